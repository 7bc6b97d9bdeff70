"""Judges the certificates of functions: :class:`OuterTls`, an immutable result of the files of ``[tls]``.

A reload makes a new :class:`OuterTls` (:mod:`frelay.tls.loading`) and swaps the reference; a connection ends with the
one that it began with. :mod:`frelay.tls.context` sets OpenSSL up for it.

Fail closed: a verdict of OpenSSL is passed on as it is. The ``nextUpdate`` of a CRL is checked when the list is loaded,
and again at every handshake and every pairing: once it has passed, nobody is let in.

There is one exception to "as it is". OpenSSL looks up every certificate of a chain in the list of its issuer, the last
certificate too. If that is an anchor by itself (:mod:`frelay.tls.anchors`), nobody has the list of its issuer, and none
is needed: an anchor is trusted because the operator named it, until the operator removes it (RFC 5280, 6.1). So for
this certificate alone we ignore that there is no such list.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from cryptography import x509
from OpenSSL import SSL, crypto

from frelay.errors import Problem
from frelay.protocol.refusal import Refusal
from frelay.tls.constraints import NameLimits
from frelay.tls.identity import PeerIdentity, identities, nobody

__all__ = [
    "EXPIRED",
    "NO_LIST",
    "Credential",
    "FailedVerification",
    "ListDates",
    "OuterTls",
    "VerifiedPeer",
    "VerifyStores",
    "refusal_for",
    "verified_peer",
]

# X509_V_ERR_* of OpenSSL's x509_vfy.h for which our protocol has a code of its own.
_ERR_CERT_HAS_EXPIRED: Final = 10
_ERR_CERT_REVOKED: Final = 23
NO_LIST: Final = frozenset({3, 8, 33, 44})
"""X509_V_ERR_* for: no list, a list that does not fit, no list of a known issuer, a list of another scope."""


@dataclass(frozen=True, slots=True)
class FailedVerification:
    """Why the certificate of a handshake was refused."""

    refusal: Refusal
    """The REFUSED code, and the reason in OpenSSL's words."""
    certificate: str | None = None
    """The certificate in one line: subject, names, issuer and serial; and "unverified", if it is."""
    number: int = 0
    """OpenSSL's X509_V_ERR; 0 if OpenSSL did not refuse it."""
    depth: int = 0
    """The position in the chain; 0 is the party's own certificate."""
    authority: str | None = None
    """The subject of the expired authority of ``client_ca`` that issued it, if that is why."""


EXPIRED: Final = Refusal("certificate-expired", "the certificate has expired since the handshake")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Credential:
    """As much of a party's certificate as is needed to verify it again; kept as long as its leg lives."""

    leaf: bytes
    """In DER: a parsed certificate takes ten times the memory."""
    intermediates: tuple[bytes, ...]
    """In DER, without the root: a later verification has to find out whether that is still trusted."""
    not_after: float
    """When the first certificate of the chain expires, in seconds since the epoch."""


# How many parsed chains are cached; each takes some KiB. All instances of a function show the same certificate, again
# and again.
_CACHED_CHAINS: Final = 128

# Many legs show the same certificate, since a function has many instances: each certificate is stored once.
_CREDENTIALS: Final[WeakValueDictionary[tuple[bytes, ...], Credential]] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class VerifiedPeer:
    """A party's certificate as it was verified in the handshake."""

    identity: PeerIdentity
    credential: Credential
    trust: OuterTls


@dataclass(frozen=True, slots=True)
class VerifyStores:
    """The stores that :meth:`OuterTls.verify` uses; they do not check dates."""

    store: crypto.X509Store
    without_lists: crypto.X509Store
    alone: frozenset[bytes]
    """The anchors by themselves, in DER."""


@dataclass(frozen=True, slots=True)
class ListDates:
    """When a list expires, and when its authority expires: after that nobody needs it. Seconds since the epoch."""

    next_update: float
    needed_until: float


@dataclass(frozen=True, slots=True, eq=False)
class OuterTls:
    """A consistent set of certificate, key, CA bundle and CRLs; immutable."""

    context: SSL.Context
    not_after: float
    """When the relay's own certificate expires, or the last of its issuers in the file; seconds since the epoch."""
    authorities_not_after: float
    """When the first of the CA certificates in use expires."""
    lists: tuple[ListDates, ...]
    """Empty without ``tls.crl``."""
    http_context: SSL.Context | None
    """The context for HTTP instead of frelay/1; None if the relay serves no HTTP with TLS."""
    server_names: frozenset[str]
    """The DNS names in the relay's own certificate, in lower case."""
    subject: str
    authorities: tuple[str, ...]
    """The subjects of the CA certificates that parties are verified by."""
    verify_stores: VerifyStores
    name_limits: tuple[NameLimits, ...]
    """For each authority whose certificates can be admitted: the names that it may give."""
    is_open: bool
    """Whether there is an authority whose certificates can be admitted."""
    warnings: tuple[Problem, ...]
    """Problems of these files that keep out some functions or all of them, for the operator."""

    @property
    def crl_next_update(self) -> float | None:
        """When the first of the CRLs expires, in seconds since the epoch; None without ``tls.crl``."""
        return min((one.next_update for one in self.lists), default=None)

    def recheck(self, peer: VerifiedPeer, now: float | None = None) -> Refusal | None:
        """Check again whether ``peer``, which was verified at its handshake, may be admitted; None means yes.

        This is cheap if nothing was reloaded since the handshake: then only the time can have changed the answer.
        """
        now = time.time() if now is None else now
        if now > peer.credential.not_after:
            return EXPIRED
        if self.has_expired_list(now):
            return Refusal("not-authorised", "the relay's revocation list has expired")
        return None if peer.trust is self else self.verify(peer.credential)

    def has_expired_list(self, now: float | None = None) -> bool:
        """Whether the ``nextUpdate`` of a CRL has passed; then nobody is let in."""
        now = time.time() if now is None else now
        return any(one.next_update < now <= one.needed_until for one in self.lists)

    def verify(self, credential: Credential) -> Refusal | None:
        """Verify with these files a certificate that was verified with others before; None means it is accepted.

        OpenSSL does not check dates here, since no file can change them: :attr:`Credential.not_after` and
        :meth:`has_expired_list` are checked apart. And a certificate that was valid at its handshake can only be "not
        yet valid" because the clock was set back. No connection is ended for that.

        It takes as long as in a handshake, a fraction of a millisecond.
        """
        stores = self.verify_stores
        error = _ask(stores.store, credential)
        if error is not None and _lacks_list_of_anchor(error, stores.alone):
            # OpenSSL looks up a chain from the leaf, and has stopped at the anchor. It has yet to check everything
            # else.
            error = _ask(stores.without_lists, credential)
        if error is None:
            return None
        return refusal_for(error.errors[0] if error.errors else 0, str(error))


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
    return number in NO_LIST and depth > 0 and crypto.dump_certificate(crypto.FILETYPE_ASN1, error.certificate) in alone


def refusal_for(number: int, text: str) -> Refusal:
    """The refusal for a certificate that OpenSSL refuses with X509_V_ERR ``number`` and this ``text``."""
    codes = {_ERR_CERT_HAS_EXPIRED: "certificate-expired", _ERR_CERT_REVOKED: "revoked"}
    return Refusal(codes.get(number, "not-authorised"), text)


def verified_peer(connection: SSL.Connection, trust: OuterTls) -> VerifiedPeer:
    """The party's certificate that the finished handshake of ``connection`` has verified."""
    chain = connection.get_verified_chain()
    if not chain:
        # Unreachable with FAIL_IF_NO_PEER_CERT. If it is reached anyway, nobody must be let in.
        raise AssertionError("a handshake without a verified certificate chain")
    identity, credential = _read(tuple(crypto.dump_certificate(crypto.FILETYPE_ASN1, one) for one in chain))
    return VerifiedPeer(identity=identity, credential=credential, trust=trust)


@functools.lru_cache(maxsize=_CACHED_CHAINS)
def _read(chain: tuple[bytes, ...]) -> tuple[PeerIdentity, Credential]:
    """The identity and credential of a verified chain in DER, the leaf first."""
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        not_after = min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)
        is_root = certificates[-1].issuer == certificates[-1].subject
    except MemoryError:
        raise  # this is not the fault of the chain, and must not be cached
    except Exception as error:
        # OpenSSL accepts some certificates that ``cryptography`` cannot read, such as one with an impossible version or
        # date. One of our authorities signed it, so this is neither an attack nor a bug. It has no name, so nobody is
        # let in by it.
        return nobody(error), Credential(b"", (), 0.0)
    return identities(certificates[0]), _credential((is_root and chain[:-1]) or chain, not_after)


def _credential(chain: tuple[bytes, ...], not_after: float) -> Credential:
    leaf, *intermediates = chain
    known = _CREDENTIALS.get((leaf, *intermediates))
    # The same certificate may have another anchor, and so another end.
    if known is None or known.not_after != not_after:
        known = Credential(leaf, tuple(intermediates), not_after)
        _CREDENTIALS[leaf, *known.intermediates] = known
    return known
