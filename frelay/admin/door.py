"""The door of the admin API where it listens on TCP: mutual TLS, and a list of who may come in.

The same TLS as on a route, with the same certificates, CA and revocation list, which a reload replaces in the same
way: nothing here has to be rotated on its own. Anyone who is not verified, or not on the list, gets the close and no
byte of HTTP, and the log a line that says who it was.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import trio

from frelay.admin.server import Connection
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.protocol.identity import Selector, match
from frelay.sockets import TlsFault, close_after_linger, format_address
from frelay.tls.context import OuterTls, Rejection, verified_peer
from frelay.tls.stream import TlsStream

__all__ = ["TlsDoor"]

_HANDSHAKE_TIME: Final = 10.0
_LINGER_TIME: Final = 1.0


class _HttpStream:
    """A TLS stream with the face of a socket stream, and Trio's errors instead of ours."""

    def __init__(self, stream: TlsStream) -> None:
        self._stream: Final = stream

    @property
    def socket(self) -> socket.socket:
        return self._stream.sock

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return await self._stream.receive_some(max_bytes)
        except (ConnectionBroken, RemoteProtocolError) as error:
            # Truncation included: HTTP says itself where a message ends, and what is cut short is no request.
            raise trio.BrokenResourceError(str(error)) from error

    async def send_eof(self) -> None:
        try:
            await self._stream.send_eof()
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.aclose()


class TlsDoor:
    """Admits those who show a certificate of the list; ``trust`` and ``allow`` give what is in force."""

    def __init__(self, trust: Callable[[], OuterTls], allow: Callable[[], Sequence[Selector]]) -> None:
        self._trust: Final = trust
        self._allow: Final = allow

    async def __call__(self, sock: socket.socket) -> Connection | None:
        """The connection in ``sock`` as an HTTP stream, or None."""
        trust = self._trust()
        if trust.http_context is None:
            raise AssertionError("an admin API on TCP whose certificates were loaded without it")
        log = structlog.get_logger("frelay.admin").bind(address=format_address(sock.getpeername()[:2]))
        stream = TlsStream(sock, trust.http_context)
        try:
            with trio.move_on_after(_HANDSHAKE_TIME) as patience:
                await stream.do_handshake()
        except TlsFault as fault:
            rejection = stream.connection.get_app_data()
            if isinstance(rejection, Rejection):
                log.warning("admin refused", reason=rejection.reason, certificate=rejection.certificate)
            else:
                log.warning("admin refused", reason=f"TLS handshake: {fault}")
            # The alert is written; an RST on unread input would destroy it under way.
            await close_after_linger(sock, _LINGER_TIME)
            return None
        except (ConnectionBroken, RemoteProtocolError) as error:
            log.info("admin connection lost", reason=str(error))
            return None
        if patience.cancelled_caught:
            log.warning("admin refused", reason=f"no TLS handshake within {_HANDSHAKE_TIME:g} s")
            return None
        return _HttpStream(stream) if self._may_come_in(stream, trust, log) else None

    def _may_come_in(self, stream: TlsStream, trust: OuterTls, log: Any) -> bool:
        peer = verified_peer(stream.connection, trust)
        log = log.bind(certificate=peer.identity.describe())
        # The handshake asked OpenSSL about revocation; that the list itself has run out since is ours to see.
        rejection = trust.judge(peer)
        name = match(self._allow(), peer.identity.names)
        if rejection is not None or name is None:
            log.warning("admin refused", reason="not in admin.allow" if rejection is None else rejection.reason)
            return False
        log.info("admin connected", identity=str(name))
        return True
