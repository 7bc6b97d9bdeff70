"""What OpenSSL is set up with and asked: the relay's judgement of everyone else's certificates, as one immutable thing.

A pyOpenSSL ``Context`` is frozen once its first connection exists, and a second CRL in a live store may be ignored.
So nothing here is ever changed: an :class:`OuterTls` is made of a whole set of files (:mod:`frelay.tls.loading`), and a
reload makes a new one and swaps the reference; a connection ends with the one it began with.

Fail closed: a verdict of OpenSSL is passed on as it is, and a CRL's ``nextUpdate``, which was checked when it was
loaded, is checked again at every handshake and every pairing: once it has passed, nobody is let in.

There is one exception to "as it is". OpenSSL looks every certificate of a chain up in its issuer's list, the last one
too; and where that is an anchor by itself (:mod:`frelay.tls.anchors`) nobody has its issuer's list, nor may: an anchor
is trusted because the operator wrote it down, until the operator takes it out (RFC 5280, 6.1). So of this certificate,
and of no other, it is passed over that there is no such list.
"""

from __future__ import annotations

import base64
import errno
import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from frelay.errors import Problem
from frelay.net.streams import TlsFault
from frelay.protocol.refusal import Refusal
from frelay.tls.anchors import subject
from frelay.tls.constraints import NameLimits
from frelay.tls.identity import PeerIdentity, describe_unverified, identities, nobody

__all__ = [
    "ALPN",
    "EXPIRED",
    "NOT_TAKEN",
    "Credential",
    "FailedVerification",
    "Judgement",
    "ListDates",
    "OuterTls",
    "Trusted",
    "VerifiedPeer",
    "judgement_of",
    "openssl_version",
    "server_context",
    "verified_peer",
]

ALPN: Final = b"frelay/1"

# X509_V_ERR_* of OpenSSL's x509_vfy.h, where our protocol has a word for them.
_ERR_CERT_HAS_EXPIRED: Final = 10
_ERR_CERT_REVOKED: Final = 23
# No list, a list that does not fit, none of whose issuer is known, or one of another scope.
_NO_LIST: Final = frozenset({3, 8, 33, 44})
# No issuer was found, or one that is not trusted.
_NO_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
# X509_V_FLAG_NO_CHECK_TIME of the same file, which pyOpenSSL does not name.
_NO_CHECK_TIME: Final = 0x200000

# How much of a stranger's text one log line takes.
_SHOWN: Final = 256

NOT_TAKEN: Final = (SSL.Error, crypto.Error, TypeError, ValueError, UnsupportedAlgorithm, OSError)
"""What :func:`server_context` and :func:`judgement_of` raise for certificates, lists or a key that OpenSSL does not
take, although they could be read; OSError where the process has no descriptor left for it."""


def openssl_version() -> str:
    """The version of the OpenSSL that frelay's TLS runs on (the one bundled with ``cryptography``)."""
    return SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode("ascii", "replace")


@dataclass(frozen=True, slots=True)
class FailedVerification:
    """What a handshake found wrong with the certificate that it was shown."""

    refusal: Refusal
    """The REFUSED code, and OpenSSL's sentence."""
    certificate: str | None = None
    """What the certificate says, in one line: subject, names, issuer and serial; and that it is unverified, if so."""
    number: int = 0
    """OpenSSL's X509_V_ERR; 0 where it was not OpenSSL that refused."""
    depth: int = 0
    """Where in the chain, 0 being the party's own certificate."""
    authority: str | None = None
    """The subject of an authority of ``client_ca`` that it leads to, and that has expired."""


EXPIRED: Final = Refusal("certificate-expired", "the certificate has expired since the handshake")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Credential:
    """A party's certificate, as little of it as it takes to judge it again: kept for as long as its leg lives."""

    leaf: bytes
    """In DER: parsed, and with all that a parser keeps at hand, it is ten times that."""
    intermediates: tuple[bytes, ...]
    """In DER, and without a root: whether the anchor is still trusted is what a later judgement has to find out."""
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


@dataclass(frozen=True, slots=True)
class Trusted:
    """The authorities and lists that go into a store."""

    chained: Sequence[x509.Certificate]
    """Roots, and what leads to others of these."""
    alone: Sequence[x509.Certificate] = ()
    """Anchors by themselves: whose issuer is not here."""
    lists: Sequence[x509.CertificateRevocationList] = ()
    expired: Sequence[x509.Certificate] = ()
    """Those that are in no store, for the log to name them."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What :meth:`OuterTls.verify` goes by: stores that know no clock."""

    store: crypto.X509Store
    without_lists: crypto.X509Store
    alone: frozenset[bytes]
    """In DER, the anchors by themselves."""


@dataclass(frozen=True, slots=True)
class ListDates:
    """Until when a list is good, and until when anybody needs it: its authority's own end. Seconds since the epoch."""

    next_update: float
    needed_until: float


@dataclass(frozen=True, slots=True, eq=False)
class OuterTls:
    """A consistent set of certificate, key, CA bundle and CRLs; immutable."""

    context: SSL.Context
    not_after: float
    """When the relay's own certificate, or the last one that vouches for it, expires, in seconds since the epoch."""
    authorities_not_after: float
    """When the first of the CA certificates in use expires."""
    lists: tuple[ListDates, ...]
    """Empty without ``tls.crl``."""
    http_context: SSL.Context | None
    """The same for HTTP instead of frelay/1; None unless it was asked for."""
    server_names: frozenset[str]
    """The DNS names that the relay's own certificate shows, in lower case."""
    subject: str
    authorities: tuple[str, ...]
    """The subjects of the CA certificates that parties are verified by."""
    judgement: Judgement
    name_limits: tuple[NameLimits, ...]
    """Of each authority by which somebody can come in, what it may call them."""
    is_open: bool
    """Whether there is an authority by which somebody can come in."""
    warnings: tuple[Problem, ...]
    """What is wrong with these files, and keeps out some functions or all of them, for the operator."""

    @property
    def crl_next_update(self) -> float | None:
        """When the first of the CRLs expires, in seconds since the epoch; None without ``tls.crl``."""
        return min((one.next_update for one in self.lists), default=None)

    def judge(self, peer: VerifiedPeer, now: float | None = None) -> Refusal | None:
        """Whether ``peer``, verified some time ago, would still be let in; None means yes.

        Cheap while nothing was reloaded since its handshake: only clocks can have changed the answer.
        """
        now = time.time() if now is None else now
        if now > peer.credential.not_after:
            return EXPIRED
        if self.has_expired_list(now):
            return Refusal("not-authorised", "the relay's revocation list has expired")
        return None if peer.trust is self else self.verify(peer.credential)

    def has_expired_list(self, now: float | None = None) -> bool:
        """Whether the ``nextUpdate`` of a CRL has passed, so that nobody can be let in."""
        now = time.time() if now is None else now
        return any(one.next_update < now <= one.needed_until for one in self.lists)

    def verify(self, credential: Credential) -> Refusal | None:
        """Ask OpenSSL about a certificate that was verified by other files than these; None means it is accepted.

        It is not asked about dates, which no file can change: the end of each certificate and each list is a matter
        of its own (:attr:`Credential.not_after`, :meth:`has_expired_list`), and one that was valid at its handshake can
        only be "not yet valid" because the clock was set back. Nobody is thrown out for that.

        Costs as much as in a handshake, a fraction of a millisecond.
        """
        judgement = self.judgement
        error = _ask(judgement.store, credential)
        if error is not None and _lacks_list_of_anchor(error, judgement.alone):
            # From below OpenSSL has looked everybody else up, and stopped at the anchor; all else it has yet to judge.
            error = _ask(judgement.without_lists, credential)
        if error is None:
            return None
        return _refusal(error.errors[0] if error.errors else 0, str(error))


def _ask(store: crypto.X509Store, credential: Credential) -> crypto.X509StoreContextError | None:
    try:
        crypto.X509StoreContext(
            store,
            crypto.load_certificate(crypto.FILETYPE_ASN1, credential.leaf),
            [crypto.load_certificate(crypto.FILETYPE_ASN1, data) for data in credential.intermediates],
        ).verify_certificate()
    except crypto.X509StoreContextError as error:
        return error
    return None


def _lacks_list_of_anchor(error: crypto.X509StoreContextError, alone: frozenset[bytes]) -> bool:
    number, depth = error.errors[:2] if error.errors else (0, 0)
    return (
        number in _NO_LIST and depth > 0 and crypto.dump_certificate(crypto.FILETYPE_ASN1, error.certificate) in alone
    )


def _refusal(number: int, text: str) -> Refusal:
    codes = {_ERR_CERT_HAS_EXPIRED: "certificate-expired", _ERR_CERT_REVOKED: "revoked"}
    return Refusal(codes.get(number, "not-authorised"), text)


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
        is_root = certificates[-1].issuer == certificates[-1].subject
    except MemoryError:
        raise  # says nothing of the chain, and must not be remembered of it
    except Exception as error:
        # OpenSSL takes what ``cryptography`` cannot read, such as a version or a date that there is not. It was signed
        # by one of ours, so this is no attack and no bug; but who it is nobody can say, and nobody is let in.
        return nobody(error), Credential(b"", (), 0.0)
    return identities(certificates[0]), _credential((is_root and chain[:-1]) or chain, not_after)


def _credential(chain: tuple[bytes, ...], not_after: float) -> Credential:
    leaf, *intermediates = chain
    known = _CREDENTIALS.get((leaf, *intermediates))
    # The same certificate may come with another anchor, and so end at another time.
    if known is None or known.not_after != not_after:
        known = Credential(leaf, tuple(intermediates), not_after)
        _CREDENTIALS[leaf, *known.intermediates] = known
    return known


# --- what OpenSSL asks us during a handshake --------------------------------------------------------------------


class _VerifyCallback:
    """Keeps why verification failed, for the log, and *passes on* OpenSSL's verdict, but for the anchors by themselves.

    What it returns overrides the verdict, so it must be ``ok`` and nothing else for any other certificate. An exception
    in there refuses.
    """

    __slots__ = ("_alone", "_expired")

    def __init__(self, trusted: Trusted) -> None:
        self._alone: Final = _in_der(trusted.alone)
        self._expired: Final = {one.subject.public_bytes(): subject(one) for one in trusted.expired}

    def __call__(self, connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int) -> bool:
        if ok or (number in _NO_LIST and depth > 0 and self._is_anchor_by_itself(certificate)):
            return True
        described = describe_unverified(certificate.to_cryptography)
        text = f"{_VERIFY_ERRORS.get(number, f'X509 verification error {number}')} (at depth {depth} of the chain)"
        authority = None
        if self._expired and number in _NO_ISSUER:
            authority = _expired_issuer(certificate, self._expired)
        if authority is not None:
            text += f"; {authority} of tls.client_ca has expired"
        refusal = _refusal(number, text) if authority is None else Refusal("certificate-expired", text)
        connection.set_app_data(FailedVerification(refusal, described, number, depth, authority))
        return False

    def _is_anchor_by_itself(self, certificate: crypto.X509) -> bool:
        return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate) in self._alone


def _expired_issuer(certificate: crypto.X509, expired: Mapping[bytes, str]) -> str | None:
    try:
        return expired.get(certificate.to_cryptography().issuer.public_bytes())
    except Exception:  # a stranger's bytes
        return None


def _in_der(certificates: Sequence[x509.Certificate]) -> frozenset[bytes]:
    return frozenset(one.public_bytes(Encoding.DER) for one in certificates)


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
    trusted: Trusted,
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
    _fill(store, trusted)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _VerifyCallback(trusted))
    context.set_alpn_select_callback(_select_http if for_http else _select_protocol)
    return context


def judgement_of(trusted: Trusted) -> Judgement:
    """What :meth:`OuterTls.verify` goes by; raises one of NOT_TAKEN."""
    store = crypto.X509Store()
    _fill(store, trusted, _NO_CHECK_TIME)
    without_lists = crypto.X509Store()
    _fill(without_lists, Trusted(trusted.chained, trusted.alone), _NO_CHECK_TIME)
    return Judgement(store, without_lists, _in_der(trusted.alone))


def _fill(store: crypto.X509Store, trusted: Trusted, flags: int = 0) -> None:
    for certificate in trusted.chained:
        store.add_cert(crypto.X509.from_cryptography(certificate))
    if trusted.alone:
        _add_alone(store, trusted.alone)
    for crl in trusted.lists:
        store.add_crl(crl)
    if trusted.lists:
        # ALL: a revoked intermediate must not vouch for anyone either.
        flags |= crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL
    store.set_flags(flags)


# X509_CERT_AUX with a trust list of anyExtendedKeyUsage: what `openssl x509 -addtrust anyExtendedKeyUsage` writes.
_TRUSTED: Final = bytes.fromhex("3008 3006 0604 551d2500")


def _add_alone(store: crypto.X509Store, certificates: Sequence[x509.Certificate]) -> None:
    """Add anchors at which a chain may end although they are no roots.

    X509_V_FLAG_PARTIAL_CHAIN would make an anchor of *every* certificate in the store, so that no chain went on to a
    root that revokes or constrains what is below it. OpenSSL's trust setting is for one certificate. It is read from
    its own kind of PEM only, and pyOpenSSL reads that from a file only: here one without a name, in memory.
    """
    lines = []
    for one in certificates:
        data = base64.encodebytes(one.public_bytes(Encoding.DER) + _TRUSTED)
        lines.append(b"-----BEGIN TRUSTED CERTIFICATE-----\n" + data + b"-----END TRUSTED CERTIFICATE-----\n")
    descriptor = _nameless_file()
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(b"".join(lines))
        store.load_locations(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# linux/memfd.h. Where vm.memfd_noexec is 2 nothing else is allowed; kernels before 6.3 do not know it.
_MFD_NOEXEC_SEAL: Final = 0x8


def _nameless_file() -> int:
    try:
        return os.memfd_create("frelay-anchors", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("frelay-anchors", os.MFD_CLOEXEC)
