"""Reads and checks the files of ``[tls]``: certificate, key, CA bundle and CRLs become one :class:`OuterTls`.

:func:`load_outer_tls` reads every file once and checks them against each other *in memory*. So if the certificate and
its key are replaced during the read, an old and a new file are never used together. Fail closed: a file that cannot be
read, has expired or does not fit is a :class:`~frelay.errors.ConfigError`, at start and at reload. The error names the
problems of all files, not only the first. Good files go to :mod:`frelay.tls.context`, which sets OpenSSL up with them.
"""

from __future__ import annotations

import datetime
import re
import time
import warnings
from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.config.model import TlsSection
from frelay.errors import ConfigError, Problem
from frelay.pki.key_mode import objection_to_mode
from frelay.tls.anchors import (
    UNREADABLE,
    Anchors,
    RevocationList,
    find_anchors,
    has_issued,
    objection_to_list,
    scope_of,
    signers,
    subject,
)
from frelay.tls.constraints import name_limits
from frelay.tls.context import NOT_TAKEN, Trusted, server_context, stores_for_verify
from frelay.tls.identity import distinguished_name
from frelay.tls.trust import ListDates, OuterTls

__all__ = ["load_outer_tls"]

_CRL_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_SHOWN: Final = 8


class _Loader:
    """Reads files, and collects all problems instead of stopping at the first."""

    def __init__(
        self, source: Path, contents: MutableMapping[Path, bytes] | None, key_readers: frozenset[int] | None
    ) -> None:
        self._source = source
        self._key_readers = key_readers
        self._contents = {} if contents is None else contents
        self._given = frozenset(self._contents)
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def complain(self, key: str, message: str) -> None:
        self.problems.append(Problem(self._source, message, key=f"tls.{key}"))

    def warn(self, key: str, message: str) -> None:
        self.warnings.append(Problem(self._source, message, key=f"tls.{key}"))

    def warn_of_many(self, found: Sequence[tuple[str, str]]) -> None:
        """Warn of some of ``found`` and count the rest: in a bundle of a hundred authorities, fifty may lack a list."""
        for key, message in found[:_SHOWN]:
            self.warn(key, message)
        if len(found) > _SHOWN:
            self.warn("client_ca", f"and {len(found) - _SHOWN} more like these")

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
                one.not_valid_before_utc, one.not_valid_after_utc  # noqa: B018  parsed only now, and may raise
            return found
        except UNREADABLE as error:
            self.complain(key, f"{path} holds no readable PEM certificate ({error})")
            return []

    def private_key(self, path: Path) -> PrivateKeyTypes | None:
        data = self.read("private_key", path)
        if data is None:
            return None
        # The process that read the given contents has checked the mode of the file.
        objection = None if path in self._given else objection_to_mode(path.stat(), path, self._key_readers)
        if objection is not None:
            self.complain("private_key", f"{path} {objection}")
        try:
            return load_pem_private_key(data, password=None)
        except TypeError:
            self.complain(
                "private_key",
                f"{path} is encrypted, but frelay cannot ask for a passphrase; decrypt it with `openssl pkey`",
            )
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
            except UNREADABLE as error:
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
    The content of each file is put into ``contents``, and a file that is there already is not read. So another process
    that gets the ``contents`` and the ``now`` of this call has the same result, even if the files have changed since.
    ``key_readers`` are the ids of the groups of the relay when it serves; by default those of this process.
    """
    now = time.time() if now is None else now
    loader = _Loader(source, contents, key_readers)
    with warnings.catch_warnings():
        # Old roots have serial numbers and other values that RFC 5280 forbids, and `cryptography` warns of them.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return _load(loader, section, source, now, serves_http=serves_http)


def _load(loader: _Loader, section: TlsSection, source: Path, now: float, *, serves_http: bool) -> OuterTls:
    chain = loader.certificates("certificate", section.certificate)
    private_key = loader.private_key(section.private_key)
    authorities = loader.certificates("client_ca", section.client_ca)
    lists = loader.revocation_lists(section.crl) if section.crl else []
    if chain:
        _check_own(loader, section, chain, private_key, now)
    in_force = _check_lists(loader, section, lists, authorities, now)
    anchors = _check_authorities(loader, section, authorities, in_force, now)
    if loader.problems:
        raise ConfigError(loader.problems)
    assert private_key is not None  # noqa: S101  for the type checker: its absence is a problem above
    trusted = Trusted(anchors.chained, anchors.alone, tuple(one.crl for one in in_force), anchors.expired)
    try:
        context = server_context(chain, private_key, trusted)
        http = server_context(chain, private_key, trusted, for_http=True) if serves_http else None
        verify_stores = stores_for_verify(trusted)
    except NOT_TAKEN as error:
        raise ConfigError([Problem(source, f"OpenSSL does not accept these files: {error}", key="tls")]) from error
    used = (*anchors.chained, *anchors.alone)
    return OuterTls(
        context=context,
        not_after=_end_of_own(chain),
        authorities_not_after=min(one.not_valid_after_utc.timestamp() for one in used),
        lists=tuple(ListDates(_next_update(one.crl), _last_end(one.signers)) for one in in_force),
        http_context=http,
        server_names=_server_names(chain[0]),
        subject=distinguished_name(lambda: chain[0].subject),
        authorities=tuple(map(subject, used)),
        verify_stores=verify_stores,
        name_limits=tuple(map(name_limits, anchors.open)),
        is_open=bool(anchors.open),
        warnings=tuple(loader.warnings),
    )


def _last_end(certificates: Sequence[x509.Certificate]) -> float:
    return max(one.not_valid_after_utc.timestamp() for one in certificates)


def _end_of_own(chain: Sequence[x509.Certificate]) -> float:
    """When the relay's certificate is no longer trusted: when it expires itself, or the last of its issuers here.

    The other certificates of the file lead to roots that a function may not need.
    """
    leaf, *others = chain
    issuers = [one for one in others if has_issued(one, leaf)]
    ends = [leaf.not_valid_after_utc.timestamp()]
    return min(*ends, _last_end(issuers)) if issuers else ends[0]


def _server_names(leaf: x509.Certificate) -> frozenset[str]:
    try:
        alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return frozenset()
    return frozenset(name.lower() for name in alternatives.get_values_for_type(x509.DNSName))


def _date(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _check_own(
    loader: _Loader,
    section: TlsSection,
    chain: Sequence[x509.Certificate],
    private_key: PrivateKeyTypes | None,
    now: float,
) -> None:
    leaf, *others = chain
    path = section.certificate
    for one in others:
        if now > one.not_valid_after_utc.timestamp():
            loader.warn(
                "certificate",
                f"{path}: {subject(one)}, which follows the relay's own, expired on {_date(one.not_valid_after_utc)}; "
                "renew it, or remove it if functions do not need it",
            )
    if now > leaf.not_valid_after_utc.timestamp():
        loader.complain("certificate", f"{path} expired on {_date(leaf.not_valid_after_utc)}; issue a new one")
    if now < leaf.not_valid_before_utc.timestamp():
        loader.complain("certificate", f"{path} is not valid before {_date(leaf.not_valid_before_utc)}")
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    except UNREADABLE as error:
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
    loader: _Loader,
    section: TlsSection,
    authorities: Sequence[x509.Certificate],
    lists: Sequence[RevocationList],
    now: float,
) -> Anchors:
    path = section.client_ca
    for certificate in authorities:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            is_authority = constraints.ca
        except (x509.ExtensionNotFound, *UNREADABLE):
            is_authority = False
        if not is_authority:
            loader.complain("client_ca", f"{path}: {subject(certificate)} is not a CA certificate")
    # If a list cannot be read or has expired, that is reported alone, and not also for each authority.
    reads_lists = section.crl is not None and not any(one.key == "tls.crl" for one in loader.problems)
    anchors = find_anchors(authorities, [one for one in lists if one.counts] if reads_lists else None, now)
    if any(one.key == "tls.client_ca" for one in loader.problems):
        return anchors  # the file is refused in any case
    found = [
        (
            "client_ca",
            f"{path}: {subject(one)} expired on {_date(one.not_valid_after_utc)}, so it admits nobody; remove it",
        )
        for one in anchors.expired
    ]
    for one in anchors.blocked:
        if one.key == "crl":
            text = f"{section.crl}: {subject(one.certificate)}, which is in {path}, {one.why}"
            remedy = "add that list (`frelay ca revoke` writes one), or remove the authority"
        else:
            text = f"{path}: {subject(one.certificate)} {one.why}"
            remedy = "remove it, or replace it by another"
        found.append((one.key, f"{text}, so it admits nobody; {remedy}"))
    if not (anchors.chained or anchors.alone):
        for key, text in found[:_SHOWN]:
            loader.complain(key, text)
        loader.complain("client_ca", f"{path} holds no authority that has not expired; add one")
    elif not anchors.open:
        loader.warn("client_ca", f"{path} holds no authority that admits anybody: nobody is let in")
    loader.warn_of_many(found)
    return anchors


def _next_update(crl: x509.CertificateRevocationList) -> float:
    # Without nextUpdate a list would never expire, and an attacker could present it for ever. So it counts as expired.
    return crl.next_update_utc.timestamp() if crl.next_update_utc else 0.0


def _check_lists(
    loader: _Loader,
    section: TlsSection,
    lists: Sequence[x509.CertificateRevocationList],
    authorities: Sequence[x509.Certificate],
    now: float,
) -> list[RevocationList]:
    """The lists to use. Reports those that are not signed by an authority, cannot be used, or are out of date."""
    path = section.crl
    kept: dict[tuple[bytes, bytes, bytes], RevocationList] = {}
    lapsed: list[tuple[RevocationList, str]] = []
    for crl in lists:
        issuer = distinguished_name(partial(getattr, crl, "issuer"))
        found = signers(crl, authorities)
        if authorities and not found:
            loader.complain("crl", f"{path}: the list of {issuer} was not signed by any CA of {section.client_ca}")
            continue
        if authorities and now > _last_end(found):
            continue  # its authority has expired, so nobody needs the list
        try:
            objection, scope = objection_to_list(crl), scope_of(crl)
        except UNREADABLE as error:
            objection, scope = f"has extensions that cannot be read ({error})", b""
        if objection is not None:
            loader.warn("crl", f"{path}: the list of {issuer} {objection}")
        if now < crl.last_update_utc.timestamp():
            loader.complain("crl", f"{path}: the list of {issuer} is not valid before {_date(crl.last_update_utc)}")
        one = RevocationList(crl, tuple(found), counts=objection is None)
        if now > _next_update(crl):
            when = _date(crl.next_update_utc) if crl.next_update_utc else "(it has no nextUpdate)"
            lapsed.append((one, f"{path}: the list of {issuer} expired on {when}"))
        # The newest list of an authority counts, as for OpenSSL.
        key = (crl.issuer.public_bytes(), _key_of(found), scope)
        if key not in kept or crl.last_update_utc > kept[key].crl.last_update_utc:
            kept[key] = one
    for one, text in lapsed:
        if one in kept.values():
            loader.complain("crl", f"{text}; publish a newer one")
        else:
            loader.warn("crl", f"{text}, and the file has a newer one; remove it")
    return list(kept.values())


def _key_of(found: Sequence[x509.Certificate]) -> bytes:
    return found[0].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) if found else b""
