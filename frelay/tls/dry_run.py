"""Tries whether the relay's outer TLS accepts a certificate: a real handshake, without the certificate's key.

If we computed the verdict ourselves, it would some day differ from OpenSSL's: a handshake checks the purpose, the
strength of the key and the revocation lists with settings that no other function of OpenSSL has by default. So a client
shows the certificate to the same context that the relay serves with, over two buffers in memory.

The operator who asks has only the certificate and not its key, and in TLS 1.3 a client must sign to be let in. But the
server verifies the chain when it reads the message Certificate, and the signature comes after that. And OpenSSL accepts
a public key in place of the private one, since it only compares the public halves. Such a client sends its certificate,
then fails to sign and sends an alert. By then the server has either refused the chain, for the reason that a real
handshake would log, or it has verified it.

Nobody can be let in here: the handshake is never completed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from OpenSSL import SSL, crypto
from OpenSSL._util import lib as _openssl

from frelay.protocol.refusal import Refusal
from frelay.tls.identity import distinguished_name
from frelay.tls.trust import FailedVerification, OuterTls, VerifiedPeer, verified_peer

__all__ = ["HandshakeResult", "simulate_handshake"]

# More than a record with its header; what does not fit is read in the next round.
_CHUNK: Final = 65536
# Two are enough. After ten rounds without an end something is wrong.
_ROUNDS: Final = 10

# The alerts of RFC 8446, 6.2 that OpenSSL sends for a failed verification (x509table in its ssl/statem/statem_lib.c),
# by X509_V_ERR. For all others it sends certificate_unknown.
_ALERTS: Final = {
    **dict.fromkeys((2, 3, 18, 19, 20, 21, 22, 25, 33, 79), "unknown_ca"),
    **dict.fromkeys((4, 5, 7, 8), "decrypt_error"),
    **dict.fromkeys((6, 9, 11, 13, 14, 15, 16, 27, 28, 66, 67, 68, 94), "bad_certificate"),
    **dict.fromkeys((10, 12), "certificate_expired"),
    23: "certificate_revoked",
    26: "unsupported_certificate",
}


@dataclass(frozen=True, slots=True)
class HandshakeResult:
    """The result of a handshake with a certificate.

    Exactly one of ``peer`` and ``failure`` is set. ``alert`` is the name of the TLS alert that a refused function
    receives, as RFC 8446 writes it. ``path`` are the subjects of the chain that OpenSSL built, from the certificate
    itself upwards; if an authority was not found, the chain ends there, and ``missing`` is the issuer of its last
    certificate. ``unshown`` says why no client can show the certificate at all, or is None; then the relay sees a
    client without a certificate.
    """

    peer: VerifiedPeer | None
    failure: FailedVerification | None
    alert: str | None
    path: tuple[str, ...]
    unshown: str | None = None
    missing: str | None = None


def simulate_handshake(trust: OuterTls, chain: Sequence[x509.Certificate]) -> HandshakeResult:
    """Show ``chain``, the certificate itself first, to the relay's TLS. No content of a certificate makes it raise."""
    server = SSL.Connection(trust.context)
    server.set_accept_state()
    try:
        client = _keyless(chain)
    except (SSL.Error, crypto.Error, UnsupportedAlgorithm, TypeError, ValueError):
        return _not_shown("OpenSSL does not accept such a certificate for TLS")
    fault = _shake_hands(client, server)
    failure = server.get_app_data()
    found = server.get_verified_chain(as_cryptography=True) or ()
    path = tuple(distinguished_name(partial(getattr, one, "subject")) for one in found)
    if isinstance(failure, FailedVerification):
        missing = distinguished_name(partial(getattr, found[-1], "issuer")) if found else None
        return HandshakeResult(None, failure, _ALERTS.get(failure.number, "certificate_unknown"), path, missing=missing)
    if server.get_peer_certificate(as_cryptography=True) is None:
        return _not_shown("no TLS 1.3 client can sign with its key", fault)
    return HandshakeResult(verified_peer(server, trust), None, None, path)


def _not_shown(why: str, fault: str = "peer did not return a certificate") -> HandshakeResult:
    failure = FailedVerification(Refusal("protocol-error", f"TLS handshake: {fault}"))
    return HandshakeResult(None, failure, "certificate_required", (), unshown=why)


def _keyless(chain: Sequence[x509.Certificate]) -> SSL.Connection:
    """A client that can show ``chain``, but has no key to sign with."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    # The client accepts weak certificates, so that the server decides.
    context.set_cipher_list(b"DEFAULT:@SECLEVEL=0")
    context.use_certificate(chain[0])
    for intermediate in chain[1:]:
        context.add_extra_chain_cert(intermediate)
    with warnings.catch_warnings():
        # Through `cryptography`, an RSASSA-PSS key would become an ordinary RSA key.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.use_privatekey(crypto.X509.from_cryptography(chain[0]).get_pubkey())
    client = SSL.Connection(context)
    client.set_connect_state()
    return client


def _shake_hands(client: SSL.Connection, server: SSL.Connection) -> str:
    """Pass messages between the two until the server fails; returns its error."""
    for _ in range(_ROUNDS):
        for side, other in ((client, server), (server, client)):
            # As in TlsStream: remove what an earlier failure left in the error queue of this thread.
            _openssl.ERR_clear_error()
            try:
                side.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                if side is server:
                    return ", ".join(str(parts[-1]) for parts in error.args[0]) or "no reason given"
            _carry(side, other)
    raise AssertionError("a handshake without a key neither failed nor ended")


def _carry(side: SSL.Connection, other: SSL.Connection) -> None:
    try:
        while data := side.bio_read(_CHUNK):
            other.bio_write(data)
    except SSL.WantReadError:
        pass  # that was all
