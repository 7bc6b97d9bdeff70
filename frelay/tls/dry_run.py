"""What the relay's outer TLS makes of a certificate, found out by a real handshake without the certificate's key.

A verdict that is computed beside OpenSSL's would differ from it some day: a handshake checks the purpose, the key's
strength and the revocation lists with settings that no other function of OpenSSL has by default. So the certificate is
shown to the very context that the relay serves with, over two buffers in memory.

Nobody has the key of a certificate that they only ask about, and in TLS 1.3 a client must sign to be let in. But the
server judges the chain when it reads Certificate, which is the message before the signature; and OpenSSL takes a public
key in the place of a private one, since it compares no more than the public halves. Such a client sends its
certificate, fails to sign, and says so by an alert. At that moment the server either has refused the chain, for the
reason that a real handshake would have logged, or it holds a verified one and has been left alone.

Nothing here can let anybody in: the handshake never ends.
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
from frelay.tls.context import FailedVerification, OuterTls, VerifiedPeer, verified_peer
from frelay.tls.identity import distinguished_name

__all__ = ["Rehearsal", "rehearse"]

# As much as a record can hold, header included; more than one fits in is fetched by another turn.
_CHUNK: Final = 65536
# Two suffice. What has not ended after ten goes round in circles.
_TURNS: Final = 10

# The alerts of RFC 8446, 6.2 that OpenSSL sends for a failed verification (x509table in its ssl/statem/statem_lib.c),
# by X509_V_ERR. Whatever it does not name is certificate_unknown there, too.
_ALERTS: Final = {
    **dict.fromkeys((2, 3, 18, 19, 20, 21, 22, 25, 33, 79), "unknown_ca"),
    **dict.fromkeys((4, 5, 7, 8), "decrypt_error"),
    **dict.fromkeys((6, 9, 11, 13, 14, 15, 16, 27, 28, 66, 67, 68, 94), "bad_certificate"),
    **dict.fromkeys((10, 12), "certificate_expired"),
    23: "certificate_revoked",
    26: "unsupported_certificate",
}


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How a handshake with a certificate goes.

    Exactly one of ``peer`` and ``failure`` is set. ``alert`` is the name of the TLS alert that a refused function
    sees, as RFC 8446 writes it. ``path`` are the subjects of the chain that OpenSSL built, the certificate itself
    first; where no authority was found it ends early, and ``missing`` is the issuer of its last one. ``unshown`` says
    why no client can show the certificate at all, and is None where one can; the relay then sees a client without a
    certificate.
    """

    peer: VerifiedPeer | None
    failure: FailedVerification | None
    alert: str | None
    path: tuple[str, ...]
    unshown: str | None = None
    missing: str | None = None


def rehearse(trust: OuterTls, chain: Sequence[x509.Certificate]) -> Rehearsal:
    """Show ``chain``, the certificate itself first, to the relay's TLS, now. Never raises for what is in it."""
    server = SSL.Connection(trust.context)
    server.set_accept_state()
    try:
        client = _keyless(chain)
    except (SSL.Error, crypto.Error, UnsupportedAlgorithm, TypeError, ValueError):
        return _not_shown("OpenSSL takes no such certificate for TLS")
    fault = _shake_hands(client, server)
    failure = server.get_app_data()
    found = server.get_verified_chain(as_cryptography=True) or ()
    path = tuple(distinguished_name(partial(getattr, one, "subject")) for one in found)
    if isinstance(failure, FailedVerification):
        missing = distinguished_name(partial(getattr, found[-1], "issuer")) if found else None
        return Rehearsal(None, failure, _ALERTS.get(failure.number, "certificate_unknown"), path, missing=missing)
    if server.get_peer_certificate(as_cryptography=True) is None:
        return _not_shown("no TLS 1.3 client can sign with its key", fault)
    return Rehearsal(verified_peer(server, trust), None, None, path)


def _not_shown(why: str, fault: str = "peer did not return a certificate") -> Rehearsal:
    failure = FailedVerification(Refusal("protocol-error", f"TLS handshake: {fault}"))
    return Rehearsal(None, failure, "certificate_required", (), unshown=why)


def _keyless(chain: Sequence[x509.Certificate]) -> SSL.Connection:
    """A client that can show ``chain`` and prove nothing."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    # What is too weak is the server's to say.
    context.set_cipher_list(b"DEFAULT:@SECLEVEL=0")
    context.use_certificate(chain[0])
    for intermediate in chain[1:]:
        context.add_extra_chain_cert(intermediate)
    with warnings.catch_warnings():
        # The other way, by way of `cryptography`, loses what sets an RSASSA-PSS key apart from an RSA key.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.use_privatekey(crypto.X509.from_cryptography(chain[0]).get_pubkey())
    client = SSL.Connection(context)
    client.set_connect_state()
    return client


def _shake_hands(client: SSL.Connection, server: SSL.Connection) -> str:
    """Let both talk until the server has had enough; gives its complaint."""
    for _ in range(_TURNS):
        for side, other in ((client, server), (server, client)):
            # See TlsStream: what an earlier failure left in the thread's queue is not this one's.
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
