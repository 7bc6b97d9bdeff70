"""Mutual TLS in front of the admin API, where it listens on TCP.

The same TLS as on a route, with the same certificates, CA and revocation list, which a reload replaces in the same
way: nothing here has to be rotated on its own. Who is verified and on the ``allow`` list is connected to the API's own
socket, which is a private Unix socket; anyone else gets the close, and a line in the log.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.protocol.identity import Selector, match
from frelay.sockets import TlsFault, accept, close, close_after_linger, format_address
from frelay.tls.context import OuterTls, Rejection, verified_peer
from frelay.tls.stream import TlsStream

__all__ = ["guard"]

_HANDSHAKE_TIME: Final = 10.0
_LINGER_TIME: Final = 1.0
# A person with a browser has six, a script one. Whoever wants more waits in the kernel.
_MAX_CONNECTIONS: Final = 64
_PAUSE: Final = 0.1
_CHUNK: Final = 65536


async def guard(
    sockets: Sequence[socket.socket],
    api: Path,
    *,
    trust: Callable[[], OuterTls],
    allow: Callable[[], Sequence[Selector]],
) -> None:
    """Let those who are allowed through to the Unix socket ``api``, until cancelled. Closes ``sockets`` at the end."""
    log: Any = structlog.get_logger("frelay.admin")
    places = trio.CapacityLimiter(_MAX_CONNECTIONS)
    try:
        async with trio.open_nursery() as nursery:
            for sock in sockets:
                nursery.start_soon(_accept, sock, api, places, trust, allow, log)
    finally:
        for sock in sockets:
            sock.close()


async def _accept(
    sock: socket.socket,
    api: Path,
    places: trio.CapacityLimiter,
    trust: Callable[[], OuterTls],
    allow: Callable[[], Sequence[Selector]],
    log: Any,
) -> None:
    async with trio.open_nursery() as connections:
        while True:
            token = object()
            await places.acquire_on_behalf_of(token)
            await trio.lowlevel.wait_readable(sock)
            try:
                connection, place = accept(sock)
            except OSError:
                # Somebody else's connection that died, or no descriptors left: either way, in a moment again.
                places.release_on_behalf_of(token)
                await trio.sleep(_PAUSE)
                continue
            visitor = _Visitor(connection, log.bind(address=format_address(place)))
            connections.start_soon(visitor.visit, api, trust(), allow, lambda t=token: places.release_on_behalf_of(t))


class _Visitor:
    """One connection from outside."""

    def __init__(self, sock: socket.socket, log: Any) -> None:
        self._sock: Final = sock
        self._log = log

    async def visit(
        self, api: Path, trust: OuterTls, allow: Callable[[], Sequence[Selector]], done: Callable[[], None]
    ) -> None:
        try:
            if trust.http_context is None:
                raise AssertionError("an admin API on TCP whose certificates were loaded without it")
            stream = TlsStream(self._sock, trust.http_context)
            if await self._is_welcome(stream, trust, allow()):
                await self._pass_on(stream, api)
        except (ConnectionBroken, RemoteProtocolError, OSError, trio.BrokenResourceError):
            pass  # it is gone, or we are; HTTP knows what a cut answer means
        except Exception:
            self._log.exception("a bug in frelay ended this admin connection")
        finally:
            close(self._sock)
            done()

    async def _is_welcome(self, stream: TlsStream, trust: OuterTls, allow: Sequence[Selector]) -> bool:
        try:
            with trio.move_on_after(_HANDSHAKE_TIME) as patience:
                await stream.do_handshake()
        except TlsFault as fault:
            rejection = stream.connection.get_app_data()
            if isinstance(rejection, Rejection):
                self._log.warning("admin refused", reason=rejection.reason, certificate=rejection.certificate)
            else:
                self._log.warning("admin refused", reason=f"TLS handshake: {fault}")
            await close_after_linger(self._sock, _LINGER_TIME)
            return False
        if patience.cancelled_caught:
            self._log.warning("admin refused", reason=f"no TLS handshake within {_HANDSHAKE_TIME:g} s")
            return False
        peer = verified_peer(stream.connection, trust)
        self._log = self._log.bind(certificate=peer.identity.describe())
        # The handshake asks OpenSSL about revocation; that the list itself has run out since is ours to see.
        rejection = trust.judge(peer)
        name = match(allow, peer.identity.names)
        if rejection is not None or name is None:
            reason = "not in admin.allow" if rejection is None else rejection.reason
            self._log.warning("admin refused", reason=reason)
            return False
        self._log.info("admin connected", identity=str(name))
        return True

    async def _pass_on(self, stream: TlsStream, api: Path) -> None:
        server = await trio.open_unix_socket(str(api))
        async with server, trio.open_nursery() as nursery:

            async def answers() -> None:
                while data := await server.receive_some(_CHUNK):
                    await stream.send_all(data)
                await stream.send_eof()
                nursery.cancel_scope.cancel(reason="the API has closed this connection")

            nursery.start_soon(answers)
            while data := await stream.receive_some(_CHUNK):
                await server.send_all(data)
            await server.send_eof()
