"""What OpenSSL is set up with and asked: the relay's judgement of everyone else's certificates, as one immutable thing.

A pyOpenSSL ``Context`` is frozen once its first connection exists, and a second CRL in a live store may be ignored.
So nothing here is ever changed: an :class:`OuterTls` is made of a whole set of files (:mod:`frelay.tls.loading`), and a
reload makes a new one and swaps the reference; a connection ends with the one it began with.

Fail closed: a verdict of OpenSSL is passed on as it is, and a CRL's ``nextUpdate``, which was checked when it was
loaded, is checked again at every handshake and every pairing: once it has passed, nobody is let in.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from OpenSSL import SSL, crypto

from frelay.sockets import TlsFault
from frelay.tls.identity import PeerIdentity, describe_unverified, identities, nobody

__all__ = [
    "ALPN",
    "EXPIRED",
    "NOT_TAKEN",
    "Credential",
    "OuterTls",
    "Rejection",
    "VerifiedPeer",
    "judgement_store",
    "openssl_version",
    "server_context",
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

NOT_TAKEN: Final = (SSL.Error, crypto.Error, TypeError, ValueError, UnsupportedAlgorithm)
"""What :func:`server_context` and :func:`judgement_store` raise for certificates, lists or a key that OpenSSL does not
take, although they could be read."""


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
    judgement: crypto.X509Store
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
                self.judgement,
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
    except MemoryError:
        raise  # says nothing of the chain, and must not be remembered of it
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


# --- what OpenSSL is set up with ----------------------------------------------------------------------------------


def server_context(
    chain: Sequence[x509.Certificate],
    private_key: PrivateKeyTypes,
    authorities: Sequence[x509.Certificate],
    lists: Sequence[x509.CertificateRevocationList],
    *,
    for_http: bool = False,
) -> SSL.Context:
    """What the relay's side of a handshake goes by, for frelay/1 or for HTTP; raises one of NOT_TAKEN."""
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
    context.set_alpn_select_callback(_select_http if for_http else _select_protocol)
    return context


def judgement_store(
    authorities: Sequence[x509.Certificate], lists: Sequence[x509.CertificateRevocationList]
) -> crypto.X509Store:
    """What :meth:`OuterTls.verify` goes by; raises one of NOT_TAKEN."""
    store = crypto.X509Store()
    _fill(store, authorities, lists, _NO_CHECK_TIME)
    return store


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
