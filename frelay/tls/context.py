"""The relay's certificates and its judgement of everyone else's, loaded as one thing that is replaced as a whole.

A pyOpenSSL ``Context`` is frozen once its first connection exists, and a second CRL in a live store may be ignored.
So nothing here is ever changed: :func:`load_outer_tls` reads every file once, checks them against each other *in
memory* (a key that is swapped while the certificate is being read can therefore never be paired with it), and gives an
:class:`OuterTls`. A reload makes a new one and swaps the reference; a connection ends with the one it began with.

Fail closed: what cannot be read, has expired or does not fit is a :class:`~frelay.errors.ConfigError`, at start as at
reload. And the CRL's ``nextUpdate`` is checked again at every handshake and every pairing: once it has passed, nobody
is let in.
"""

from __future__ import annotations

import datetime
import functools
import re
import stat
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto

from frelay.config.model import TlsSection
from frelay.errors import ConfigError, Problem
from frelay.sockets import TlsFault
from frelay.tls.identity import PeerIdentity, describe_unverified, distinguished_name, identities, nobody

__all__ = [
    "ALPN",
    "EXPIRED",
    "Credential",
    "OuterTls",
    "Rejection",
    "VerifiedPeer",
    "load_outer_tls",
    "openssl_version",
    "verified_peer",
]

ALPN: Final = b"frelay/1"

# X509_V_ERR_* of OpenSSL's x509_vfy.h, where our protocol has a word for them.
_ERR_CERT_HAS_EXPIRED: Final = 10
_ERR_CERT_REVOKED: Final = 23
# X509_V_FLAG_NO_CHECK_TIME of the same file, which pyOpenSSL does not name.
_NO_CHECK_TIME: Final = 0x200000

# How much of a stranger's text one log line takes.
_SHOWN: Final = 256

# What ``cryptography`` raises for a certificate or a list that it cannot make sense of; not all of it is a ValueError.
_UNREADABLE: Final = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)

_CRL_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


def openssl_version() -> str:
    """The version of the OpenSSL that frelay's TLS runs on (the one bundled with ``cryptography``)."""
    return SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode("ascii", "replace")


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a certificate is not accepted: a REFUSED code, and OpenSSL's sentence for the log."""

    code: str
    reason: str
    certificate: str | None = None
    """What it says, in one line: subject, names, issuer and serial; and that it is unverified, if it is."""
    number: int = 0
    """OpenSSL's X509_V_ERR; 0 where it was not OpenSSL that refused."""
    depth: int = 0
    """Where in the chain, 0 being the party's own certificate."""


EXPIRED: Final = Rejection("certificate-expired", "the certificate has expired since the handshake")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Credential:
    """A party's certificate, as little of it as it takes to judge it again: kept for as long as its leg lives."""

    leaf: bytes
    """In DER: parsed, and with all that a parser keeps at hand, it is ten times that."""
    intermediates: tuple[bytes, ...]
    """In DER, and without the anchor: whether that is still trusted is what a later judgement has to find out."""
    not_after: float
    """When the first certificate of the chain expires, in seconds since the epoch."""


# Of how many chains it is remembered what they say; some KiB each. A function comes with its certificate again and
# again, and all its instances with the same.
_READ_BEFORE: Final = 128

# Many legs show the same certificate, all instances of a function as a rule: each of them is kept once.
_CREDENTIALS: Final[WeakValueDictionary[tuple[bytes, ...], Credential]] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class VerifiedPeer:
    """A party's certificate as it was verified in the handshake."""

    identity: PeerIdentity
    credential: Credential
    trust: OuterTls


@dataclass(frozen=True, slots=True, eq=False)
class OuterTls:
    """A consistent set of certificate, key, CA bundle and CRLs; immutable."""

    context: SSL.Context
    not_after: float
    """When the relay's own certificate expires, in seconds since the epoch."""
    authorities_not_after: float
    """When the first of the CA certificates expires."""
    crl_next_update: float | None
    """When the first of the CRLs expires, in seconds since the epoch; None without ``tls.crl``."""
    http_context: SSL.Context | None
    """The same for HTTP instead of frelay/1; None unless it was asked for."""
    server_names: frozenset[str]
    """The DNS names that the relay's own certificate shows, in lower case."""
    subject: str
    authorities: tuple[str, ...]
    """The subjects of the CA certificates that parties are verified by."""
    _judgement: crypto.X509Store
    """What :meth:`verify` goes by: the same anchors and lists, and no clock."""

    def judge(self, peer: VerifiedPeer, now: float | None = None) -> Rejection | None:
        """Whether ``peer``, verified some time ago, would still be let in; None means yes.

        Cheap while nothing was reloaded since its handshake: only clocks can have changed the answer.
        """
        now = time.time() if now is None else now
        if now > peer.credential.not_after:
            return EXPIRED
        if self.has_expired_list(now):
            return Rejection("not-authorised", "the relay's revocation list has expired")
        return None if peer.trust is self else self.verify(peer.credential)

    def has_expired_list(self, now: float | None = None) -> bool:
        """Whether the ``nextUpdate`` of a CRL has passed, so that nobody can be let in."""
        now = time.time() if now is None else now
        return self.crl_next_update is not None and now > self.crl_next_update

    def verify(self, credential: Credential) -> Rejection | None:
        """Ask OpenSSL about a certificate that was verified by other files than these; None means it is accepted.

        It is not asked about dates, which no file can change: the end of each certificate and each list is a matter
        of its own (:attr:`Credential.not_after`, :meth:`has_expired_list`), and one that was valid at its handshake can
        only be "not yet valid" because the clock was set back. Nobody is thrown out for that.

        Costs as much as in a handshake, a fraction of a millisecond.
        """
        try:
            crypto.X509StoreContext(
                self._judgement,
                crypto.load_certificate(crypto.FILETYPE_ASN1, credential.leaf),
                [crypto.load_certificate(crypto.FILETYPE_ASN1, data) for data in credential.intermediates],
            ).verify_certificate()
        except crypto.X509StoreContextError as error:
            number, depth = error.errors[:2] if error.errors else (0, 0)
            return _rejection(number, depth, str(error))
        return None


def _rejection(number: int, depth: int, text: str, certificate: str | None = None) -> Rejection:
    codes = {_ERR_CERT_HAS_EXPIRED: "certificate-expired", _ERR_CERT_REVOKED: "revoked"}
    return Rejection(codes.get(number, "not-authorised"), text, certificate, number, depth)


def verified_peer(connection: SSL.Connection, trust: OuterTls) -> VerifiedPeer:
    """What the finished handshake of ``connection`` verified about the party."""
    chain = connection.get_verified_chain()
    if not chain:
        # Unreachable with FAIL_IF_NO_PEER_CERT; if it ever is reached, nobody is let in on the strength of it.
        raise AssertionError("a handshake without a verified certificate chain")
    identity, credential = _read(tuple(crypto.dump_certificate(crypto.FILETYPE_ASN1, one) for one in chain))
    return VerifiedPeer(identity=identity, credential=credential, trust=trust)


@functools.lru_cache(maxsize=_READ_BEFORE)
def _read(chain: tuple[bytes, ...]) -> tuple[PeerIdentity, Credential]:
    """What a verified chain in DER, the leaf first, says of its party."""
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        not_after = min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)
    except Exception as error:
        # OpenSSL takes what ``cryptography`` cannot read, such as a version or a date that there is not. It was signed
        # by one of ours, so this is no attack and no bug; but who it is nobody can say, and nobody is let in.
        return nobody(error), Credential(b"", (), 0.0)
    return identities(certificates[0]), _credential(chain[:-1] or chain, not_after)


def _credential(chain: tuple[bytes, ...], not_after: float) -> Credential:
    leaf, *intermediates = chain
    known = _CREDENTIALS.get((leaf, *intermediates))
    # The same certificate may come with another anchor, and so end at another time.
    if known is None or known.not_after != not_after:
        known = Credential(leaf, tuple(intermediates), not_after)
        _CREDENTIALS[leaf, *known.intermediates] = known
    return known


# --- what OpenSSL asks us during a handshake --------------------------------------------------------------------


def _note_rejection(connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int) -> bool:
    """Keep why verification failed, for the log, and *pass on* OpenSSL's verdict.

    The return value overrides the verdict, so it must be ``ok`` and nothing else. An exception in here refuses.
    """
    if not ok:
        described = describe_unverified(certificate.to_cryptography)
        text = _VERIFY_ERRORS.get(number, f"X509 verification error {number}")
        connection.set_app_data(_rejection(number, depth, f"{text} (at depth {depth} of the chain)", described))
    return bool(ok)


_VERIFY_ERRORS: Final = {
    2: "unable to get issuer certificate",
    3: "unable to get certificate CRL",
    7: "certificate signature failure",
    8: "CRL signature failure",
    9: "certificate is not yet valid",
    10: "certificate has expired",
    11: "CRL is not yet valid",
    12: "CRL has expired",
    13: "format error in the certificate's notBefore",
    14: "format error in the certificate's notAfter",
    18: "self-signed certificate",
    19: "self-signed certificate in certificate chain",
    20: "unable to get local issuer certificate",
    21: "unable to verify the first certificate",
    22: "certificate chain too long",
    23: "certificate revoked",
    24: "issuer certificate has no public key",
    25: "path length constraint exceeded",
    26: "unsuitable certificate purpose",
    32: "key usage does not include certificate signing",
    33: "unable to get CRL issuer certificate",
    34: "unhandled critical extension",
    35: "key usage does not include CRL signing",
    41: "invalid or inconsistent certificate extension",
    44: "different CRL scope",
    47: "permitted subtree violation",
    48: "excluded subtree violation",
    51: "unsupported name constraint type",
    52: "unsupported or invalid name constraint syntax",
    53: "unsupported or invalid name syntax",
    66: "EE certificate key too weak",
    67: "CA certificate key too weak",
    68: "CA signature digest algorithm too weak",
    79: "invalid CA certificate",
    94: "public key with explicit curve parameters",
}


class _ForeignProtocol(TlsFault):
    """Raised inside the ALPN callback, which makes OpenSSL send a fatal no_application_protocol.

    pyOpenSSL then raises it out of ``do_handshake``, where it is one more way in which a handshake fails.
    """


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    shown = ", ".join(name.decode("ascii", "backslashreplace") for name in offered)[:_SHOWN]
    raise _ForeignProtocol(f"ALPN offers {shown} and not {ALPN.decode()}")


def _select_http(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if b"http/1.1" in offered:
        return b"http/1.1"
    raise _ForeignProtocol("ALPN offers no http/1.1")


# --- loading ------------------------------------------------------------------------------------------------------


class _Loader:
    """Collects what is wrong instead of stopping at the first thing."""

    def __init__(self, source: Path, contents: MutableMapping[Path, bytes] | None = None) -> None:
        self._source = source
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
        mode = 0 if path in self._given else stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            self.complain("private_key", f"{path} has mode {mode:04o}, others can read it; chmod 600 {path}")
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
) -> OuterTls:
    """Read and check the files of ``[tls]``; raises ConfigError with every problem, named by file and key.

    ``source`` is the route file, for the messages. With ``serves_http`` there is a second context, for the admin API.
    What is read is put into ``contents``, and what stands there already is not read: so another process, given both the
    ``contents`` and the ``now`` of this call, comes to the same result, whatever the files hold by then.
    """
    now = time.time() if now is None else now
    loader = _Loader(source, contents)
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
        context = _build(chain, private_key, authorities, lists, _select_protocol)
        http = _build(chain, private_key, authorities, lists, _select_http) if serves_http else None
        judgement = crypto.X509Store()
        _fill(judgement, authorities, lists, _NO_CHECK_TIME)
    except (SSL.Error, crypto.Error, TypeError, ValueError, UnsupportedAlgorithm) as error:
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
        _judgement=judgement,
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


def _build(
    chain: Sequence[x509.Certificate],
    private_key: PrivateKeyTypes,
    authorities: Sequence[x509.Certificate],
    lists: Sequence[x509.CertificateRevocationList],
    select_protocol: Callable[[SSL.Connection, list[bytes]], bytes],
) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    # A resumed session would skip expiry and revocation. Neither call is enough alone: without OP_NO_TICKET there
    # are stateless tickets, and with it OpenSSL sends tickets that point into its cache.
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # Waiting legs are many and silent: give their record buffers back while nothing is in them.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.use_certificate(chain[0])
    for intermediate in chain[1:]:
        context.add_extra_chain_cert(intermediate)
    context.use_privatekey(private_key)  # type: ignore[arg-type]
    context.check_privatekey()
    store = context.get_cert_store()
    if store is None:
        raise AssertionError("a new context without a certificate store")
    _fill(store, authorities, lists)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _note_rejection)
    context.set_alpn_select_callback(select_protocol)
    return context


def _fill(
    store: crypto.X509Store,
    authorities: Sequence[x509.Certificate],
    lists: Sequence[x509.CertificateRevocationList],
    flags: int = 0,
) -> None:
    for certificate in authorities:
        store.add_cert(crypto.X509.from_cryptography(certificate))
    for crl in lists:
        store.add_crl(crl)
    if lists:
        # ALL: a revoked intermediate must not vouch for anyone either.
        flags |= crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL
    store.set_flags(flags)
