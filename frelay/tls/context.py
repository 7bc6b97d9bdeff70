"""Sets OpenSSL up: the contexts of the relay's side of a handshake, the stores behind them, and their callbacks.

A pyOpenSSL ``Context`` is frozen once its first connection exists, and a second CRL in a live store may be ignored. So
a context is never changed: a reload makes a new one of the whole set of files (:mod:`frelay.tls.loading`). What follows
from the verdict of a handshake is in :mod:`frelay.tls.trust`.
"""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from frelay.net.streams import TlsFault
from frelay.protocol.refusal import Refusal
from frelay.tls.anchors import subject
from frelay.tls.identity import describe_unverified
from frelay.tls.trust import NO_LIST, FailedVerification, VerifyStores, refusal_for

__all__ = ["ALPN", "NOT_TAKEN", "Trusted", "openssl_version", "server_context", "stores_for_verify"]

ALPN: Final = b"frelay/1"

# X509_V_ERR_* of OpenSSL's x509_vfy.h: no issuer was found, or one that is not trusted.
_NO_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
# X509_V_FLAG_NO_CHECK_TIME of the same file, which pyOpenSSL does not name.
_NO_CHECK_TIME: Final = 0x200000

# The most characters of a stranger's text in one log line.
_SHOWN: Final = 256

NOT_TAKEN: Final = (SSL.Error, crypto.Error, TypeError, ValueError, UnsupportedAlgorithm, OSError)
"""The errors of :func:`server_context` and :func:`stores_for_verify` if OpenSSL refuses certificates, lists or a key,
although they could be read; OSError if the process has no descriptor left for them."""


def openssl_version() -> str:
    """The version of the OpenSSL that frelay uses (the one inside ``cryptography``)."""
    return SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode("ascii", "replace")


@dataclass(frozen=True, slots=True)
class Trusted:
    """The authorities and lists of a store."""

    chained: Sequence[x509.Certificate]
    """Roots, and authorities whose issuer is among these."""
    alone: Sequence[x509.Certificate] = ()
    """Anchors by themselves: their issuer is not among these."""
    lists: Sequence[x509.CertificateRevocationList] = ()
    expired: Sequence[x509.Certificate] = ()
    """Authorities that are in no store; the log names them."""


# --- callbacks of a handshake -----------------------------------------------------------------------------------


class _VerifyCallback:
    """Records for the log why verification failed, and *passes on* OpenSSL's verdict, except for anchors by themselves.

    What it returns overrides the verdict, so for every other certificate it must return ``ok``. An exception inside
    refuses the certificate.
    """

    __slots__ = ("_alone", "_expired")

    def __init__(self, trusted: Trusted) -> None:
        self._alone: Final = _in_der(trusted.alone)
        self._expired: Final = {one.subject.public_bytes(): subject(one) for one in trusted.expired}

    def __call__(self, connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int) -> bool:
        if ok or (number in NO_LIST and depth > 0 and self._is_anchor_by_itself(certificate)):
            return True
        described = describe_unverified(certificate.to_cryptography)
        text = f"{_VERIFY_ERRORS.get(number, f'X509 verification error {number}')} (at depth {depth} of the chain)"
        authority = None
        if self._expired and number in _NO_ISSUER:
            authority = _expired_issuer(certificate, self._expired)
        if authority is not None:
            text += f"; {authority} of tls.client_ca has expired"
        refusal = refusal_for(number, text) if authority is None else Refusal("certificate-expired", text)
        connection.set_app_data(FailedVerification(refusal, described, number, depth, authority))
        return False

    def _is_anchor_by_itself(self, certificate: crypto.X509) -> bool:
        return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate) in self._alone


def _expired_issuer(certificate: crypto.X509, expired: Mapping[bytes, str]) -> str | None:
    try:
        return expired.get(certificate.to_cryptography().issuer.public_bytes())
    except Exception:  # a stranger made the certificate, and parsing may fail in any way
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
    """Raised inside the ALPN callback. It makes OpenSSL send the fatal alert no_application_protocol.

    pyOpenSSL then raises it from ``do_handshake``, as one of the errors of a failed handshake.
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


# --- contexts and stores ------------------------------------------------------------------------------------------


def server_context(
    chain: Sequence[x509.Certificate],
    private_key: PrivateKeyTypes,
    trusted: Trusted,
    *,
    for_http: bool = False,
) -> SSL.Context:
    """The context of the relay's side of a handshake, for frelay/1 or for HTTP; raises one of NOT_TAKEN."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    # A resumed session would skip the checks of expiry and revocation. Both calls are needed: without OP_NO_TICKET
    # there are stateless tickets, and with it alone OpenSSL sends tickets that point into its cache.
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # There are many waiting legs, and they are silent: free their record buffers while those are empty.
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


def stores_for_verify(trusted: Trusted) -> VerifyStores:
    """The stores for :meth:`~frelay.tls.trust.OuterTls.verify`; raises one of NOT_TAKEN."""
    store = crypto.X509Store()
    _fill(store, trusted, _NO_CHECK_TIME)
    without_lists = crypto.X509Store()
    _fill(without_lists, Trusted(trusted.chained, trusted.alone), _NO_CHECK_TIME)
    return VerifyStores(store, without_lists, _in_der(trusted.alone))


def _fill(store: crypto.X509Store, trusted: Trusted, flags: int = 0) -> None:
    for certificate in trusted.chained:
        store.add_cert(crypto.X509.from_cryptography(certificate))
    if trusted.alone:
        _add_alone(store, trusted.alone)
    for crl in trusted.lists:
        store.add_crl(crl)
    if trusted.lists:
        # ALL: the certificates below a revoked intermediate must be refused, too.
        flags |= crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL
    store.set_flags(flags)


# X509_CERT_AUX with a trust list of anyExtendedKeyUsage: what `openssl x509 -addtrust anyExtendedKeyUsage` writes.
_TRUSTED: Final = bytes.fromhex("3008 3006 0604 551d2500")


def _add_alone(store: crypto.X509Store, certificates: Sequence[x509.Certificate]) -> None:
    """Add anchors at which a chain may end although they are no roots.

    X509_V_FLAG_PARTIAL_CHAIN would make *every* certificate in the store an anchor. Then no chain would go on to a root
    that revokes or constrains what is below it. OpenSSL also has a trust setting for a single certificate. It is stored
    in a special PEM block, which pyOpenSSL can only read from a file: here from a file in memory, without a name.
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


# linux/memfd.h. If vm.memfd_noexec is 2, this flag is required; kernels before 6.3 do not know it.
_MFD_NOEXEC_SEAL: Final = 0x8


def _nameless_file() -> int:
    try:
        return os.memfd_create("frelay-anchors", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("frelay-anchors", os.MFD_CLOEXEC)
