"""The TLS contexts of a function, made from its certificate, key and CA files. Standard library only."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from frelay.client.wire import Wire
from frelay.errors import CertificateError
from frelay.protocol.messages import Role

__all__ = ["ALPN", "StrPath", "inner_context", "load_credentials", "outer_context"]

StrPath = str | Path

ALPN: Final = "frelay/1"


def load_credentials(context: ssl.SSLContext, cert: StrPath, key: StrPath | None, ca: StrPath) -> None:
    """Put certificate, key and CA into ``context``; raises CertificateError with the file that is wrong."""
    for what, path in (("ca", ca), ("cert", cert), ("key", key)):
        if path is not None:
            try:
                # OpenSSL's own error does not name the file, and says "system lib" when it is missing.
                Path(path).open("rb").close()
            except FileNotFoundError:
                raise CertificateError(f"{what}: there is no file {path}") from None
            except OSError as error:
                raise CertificateError(f"{what}: {path} cannot be read: {error.strerror}") from None

    def ask_passphrase() -> str:
        # Without this callback OpenSSL asks on the terminal. A program without one would hang or fail without a reason.
        raise CertificateError(f"key: {key or cert} is encrypted, and there is nobody to ask for its passphrase")

    # We trust each certificate in the ca file, also an issuing authority without its root.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise CertificateError(f"ca: {ca} holds no readable PEM certificate ({error.reason or error})") from None
    except OSError as error:
        raise CertificateError(f"ca: {ca} cannot be read: {error.strerror}") from None
    try:
        context.load_cert_chain(cert, key, ask_passphrase)
    except ssl.SSLError as error:
        if key is None:
            raise CertificateError(
                f"cert: {cert} does not hold both a PEM certificate and its key ({error.reason or error}); "
                "name the file of the key with key="
            ) from None
        raise CertificateError(
            f"cert, key: {cert} and {key} are no PEM certificate and its key ({error.reason or error})"
        ) from None
    except OSError as error:
        raise CertificateError(f"cert, key: {cert} and {key} cannot be read: {error.strerror}") from None


def outer_context(cert: StrPath, key: StrPath | None, ca: StrPath) -> ssl.SSLContext:
    """The context of the TLS to the relay; raises CertificateError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    load_credentials(context, cert, key, ca)
    return context


def inner_context(
    role: Role, cert: StrPath, key: StrPath | None, ca: StrPath, alpn: Sequence[str] | None = None
) -> ssl.SSLContext:
    """The context of the TLS to the other function, where both sides show certificates. Raises CertificateError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # check_peer compares the names with peer=, each with its type
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslsocket_class = Wire
    if role == "server":
        context.num_tickets = 0
    if alpn:
        context.set_alpn_protocols(list(alpn))
    load_credentials(context, cert, key, ca)
    return context
