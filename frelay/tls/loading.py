"""The files of ``[tls]``, read and checked: certificate, key, CA bundle and CRLs become one :class:`OuterTls`, or none.

:func:`load_outer_tls` reads every file once and checks them against each other *in memory*: a key that is swapped while
the certificate is being read can therefore never be paired with it. Fail closed: what cannot be read, has expired or
does not fit is a :class:`~frelay.errors.ConfigError`, at start as at reload, and it tells of all files what is wrong,
not the first thing only. What OpenSSL is told of files that are good is the business of :mod:`frelay.tls.context`.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.config.model import TlsSection
from frelay.errors import ConfigError, Problem
from frelay.key_mode import objection_to_mode
from frelay.tls.context import NOT_TAKEN, OuterTls, judgement_store, server_context
from frelay.tls.identity import distinguished_name

__all__ = ["load_outer_tls"]

# What ``cryptography`` raises for a certificate or a list that it cannot make sense of; not all of it is a ValueError.
_UNREADABLE: Final = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)

_CRL_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


class _Loader:
    """Collects what is wrong instead of stopping at the first thing."""

    def __init__(
        self, source: Path, contents: MutableMapping[Path, bytes] | None, key_readers: frozenset[int] | None
    ) -> None:
        self._source = source
        self._key_readers = key_readers
        self._contents = {} if contents is None else contents
        self._given = frozenset(self._contents)
        self.problems: list[Problem] = []

    def complain(self, key: str, message: str) -> None:
        self.problems.append(Problem(self._source, message, key=f"tls.{key}"))

    def read(self, key: str, path: Path) -> bytes | None:
        known = self._contents.get(path)
        if known is not None:
            return known
        try:
            self._contents[path] = data = path.read_bytes()
            return data
        except FileNotFoundError:
            self.complain(key, f"{path} does not exist; `frelay init DIR` writes a complete set")
        except OSError as error:
            self.complain(key, f"{path} cannot be read: {error.strerror}")
        return None

    def certificates(self, key: str, path: Path) -> list[x509.Certificate]:
        data = self.read(key, path)
        if data is None:
            return []
        try:
            found = x509.load_pem_x509_certificates(data)
            for one in found:
                one.not_valid_before_utc, one.not_valid_after_utc  # noqa: B018  read only when asked for, and maybe not then
            return found
        except _UNREADABLE as error:
            self.complain(key, f"{path} holds no readable PEM certificate ({error})")
            return []

    def private_key(self, path: Path) -> PrivateKeyTypes | None:
        data = self.read("private_key", path)
        if data is None:
            return None
        # What was given was read by somebody who has looked at the file.
        objection = None if path in self._given else objection_to_mode(path.stat(), path, self._key_readers)
        if objection is not None:
            self.complain("private_key", f"{path} {objection}")
        try:
            return load_pem_private_key(data, password=None)
        except TypeError:
            self.complain("private_key", f"{path} is encrypted; frelay has nobody to ask for its passphrase")
        except (ValueError, UnsupportedAlgorithm) as error:
            self.complain("private_key", f"{path} holds no readable PEM private key ({error})")
        return None

    def revocation_lists(self, path: Path) -> list[x509.CertificateRevocationList]:
        data = self.read("crl", path)
        if data is None:
            return []
        blocks = _CRL_BLOCK.findall(data)
        if not blocks:
            self.complain("crl", f"{path} holds no PEM certificate revocation list")
        lists = []
        for block in blocks:
            try:
                crl = x509.load_pem_x509_crl(block)
                crl.issuer, crl.last_update_utc, crl.next_update_utc  # noqa: B018  see above
                lists.append(crl)
            except _UNREADABLE as error:
                self.complain("crl", f"{path} holds a revocation list that cannot be read ({error})")
        return lists


def load_outer_tls(
    section: TlsSection,
    *,
    source: Path,
    now: float | None = None,
    serves_http: bool = False,
    contents: MutableMapping[Path, bytes] | None = None,
    key_readers: frozenset[int] | None = None,
) -> OuterTls:
    """Read and check the files of ``[tls]``; raises ConfigError with every problem, named by file and key.

    ``source`` is the route file, for the messages. With ``serves_http`` there is a second context, for the admin API.
    What is read is put into ``contents``, and what stands there already is not read: so another process, given both the
    ``contents`` and the ``now`` of this call, comes to the same result, whatever the files hold by then.
    ``key_readers`` are the ids of the groups that the relay is in when it serves; by default those of this process.
    """
    now = time.time() if now is None else now
    loader = _Loader(source, contents, key_readers)
    chain = loader.certificates("certificate", section.certificate)
    private_key = loader.private_key(section.private_key)
    authorities = loader.certificates("client_ca", section.client_ca)
    lists = loader.revocation_lists(section.crl) if section.crl else []
    if chain:
        _check_own(loader, section, chain[0], private_key, now)
    _check_authorities(loader, section, authorities, now)
    _check_lists(loader, section, lists, authorities, now)
    if loader.problems:
        raise ConfigError(loader.problems)
    assert private_key is not None  # noqa: S101  for the type checker: its absence is a problem above
    try:
        context = server_context(chain, private_key, authorities, lists)
        http = server_context(chain, private_key, authorities, lists, for_http=True) if serves_http else None
        judgement = judgement_store(authorities, lists)
    except NOT_TAKEN as error:
        raise ConfigError([Problem(source, f"OpenSSL does not take these files: {error}", key="tls")]) from error
    return OuterTls(
        context=context,
        not_after=min(certificate.not_valid_after_utc.timestamp() for certificate in chain),
        authorities_not_after=min(one.not_valid_after_utc.timestamp() for one in authorities),
        crl_next_update=min((_next_update(item) for item in lists), default=None),
        http_context=http,
        server_names=_server_names(chain[0]),
        subject=distinguished_name(lambda: chain[0].subject),
        authorities=tuple(distinguished_name(partial(getattr, one, "subject")) for one in authorities),
        judgement=judgement,
    )


def _server_names(leaf: x509.Certificate) -> frozenset[str]:
    try:
        alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, *_UNREADABLE):
        return frozenset()
    return frozenset(name.lower() for name in alternatives.get_values_for_type(x509.DNSName))


def _date(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _check_own(
    loader: _Loader, section: TlsSection, leaf: x509.Certificate, private_key: PrivateKeyTypes | None, now: float
) -> None:
    path = section.certificate
    if now > leaf.not_valid_after_utc.timestamp():
        loader.complain("certificate", f"{path} expired on {_date(leaf.not_valid_after_utc)}; issue a new one")
    if now < leaf.not_valid_before_utc.timestamp():
        loader.complain("certificate", f"{path} is not valid before {_date(leaf.not_valid_before_utc)}")
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    except _UNREADABLE as error:
        loader.complain("certificate", f"{path} has extensions that cannot be read ({error})")
        usage = None
    if usage is not None and not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(
        usage
    ):
        loader.complain("certificate", f"{path} is not for servers (its extended key usage lacks serverAuth)")
    if private_key is not None:
        try:
            own, other = (
                key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                for key in (leaf.public_key(), private_key.public_key())
            )
        except (ValueError, UnsupportedAlgorithm) as error:
            loader.complain("certificate", f"{path} has a key that cannot be used ({error})")
            return
        if own != other:
            loader.complain("private_key", f"{section.private_key} is not the key of {path}; one of them is stale")


def _check_authorities(
    loader: _Loader, section: TlsSection, authorities: Sequence[x509.Certificate], now: float
) -> None:
    path = section.client_ca
    for certificate in authorities:
        subject = distinguished_name(partial(getattr, certificate, "subject"))
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            is_authority = constraints.ca
        except (x509.ExtensionNotFound, *_UNREADABLE):
            is_authority = False
        if not is_authority:
            loader.complain("client_ca", f"{path}: {subject} is not a CA certificate")
        if now > certificate.not_valid_after_utc.timestamp():
            loader.complain(
                "client_ca", f"{path}: {subject} expired on {_date(certificate.not_valid_after_utc)}; remove it"
            )


def _next_update(crl: x509.CertificateRevocationList) -> float:
    # Without nextUpdate a list would never run out, and an attacker could serve it for ever: it counts as expired.
    return crl.next_update_utc.timestamp() if crl.next_update_utc else 0.0


def _check_lists(
    loader: _Loader,
    section: TlsSection,
    lists: Sequence[x509.CertificateRevocationList],
    authorities: Sequence[x509.Certificate],
    now: float,
) -> None:
    path = section.crl
    for crl in lists:
        issuer = distinguished_name(partial(getattr, crl, "issuer"))
        if now > _next_update(crl):
            when = _date(crl.next_update_utc) if crl.next_update_utc else "(it has no nextUpdate)"
            loader.complain("crl", f"{path}: the list of {issuer} expired on {when}; publish a newer one")
        if now < crl.last_update_utc.timestamp():
            loader.complain("crl", f"{path}: the list of {issuer} is not valid before {_date(crl.last_update_utc)}")
        if authorities and not any(_is_signed_by(crl, certificate) for certificate in authorities):
            loader.complain("crl", f"{path}: the list of {issuer} was not signed by any CA of {section.client_ca}")


def _is_signed_by(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        if crl.issuer != authority.subject:
            return False
        return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except (TypeError, InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
