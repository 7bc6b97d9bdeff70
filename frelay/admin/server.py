"""Serves an ASGI application on listening sockets, in the process of a relay that must not suffer from it.

The Unix socket of the admin API is bound here, because other users must never be able to connect to it, not even for a
moment. A caller over TCP is admitted by its certificate (:mod:`frelay.admin.mtls`). :mod:`frelay.admin.connections`
bounds the connections, and :mod:`frelay.admin.http` speaks HTTP on each.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio
from starlette.types import ASGIApp

from frelay.admin.connections import GRACE, PLAIN_GRACE, ConnectionSlot, ConnectionSlots, holder_of
from frelay.admin.http import Caller, speak_http
from frelay.net.sockets import close
from frelay.net.streams import RawStream
from frelay.tls.stream import TlsStream

__all__ = ["Admit", "Admitted", "admit_anyone", "bind_unix", "serve", "unlinked_at_end"]

_BACKLOG: Final = 256
# Seconds after an accept that failed.
_PAUSE: Final = 0.1
# Seconds, rounded up by the kernel: how long it keeps a connection that has sent no byte before we accept it.
_FIRST_BYTE_TIMEOUT: Final = 5


@dataclass(frozen=True, slots=True)
class Admitted:
    """A caller who was admitted; ``objection`` is that of :class:`~frelay.admin.http.Caller`."""

    stream: RawStream | TlsStream
    objection: Callable[[], str | None] = lambda: None


Admit = Callable[[socket.socket], Awaitable[Admitted | None]]
"""Decides about an accepted socket: None refuses it. It may raise OSError."""


async def admit_anyone(sock: socket.socket) -> Admitted:
    """Admit everyone who can reach this socket."""
    return Admitted(RawStream(sock))


# --- sockets ---------------------------------------------------------------------------------------------------


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket at ``path`` that only its owner can connect to; raises OSError.

    A socket file without a listener is replaced: a server that was killed could not remove its own.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Linux creates the file with the mode of the socket, so others cannot connect at any moment.
        os.fchmod(sock.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                raise
            path.unlink()
            sock.bind(str(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_abandoned(path: Path) -> bool:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False


@contextmanager
def unlinked_at_end(path: Path) -> Iterator[None]:
    """Remove the socket file at the end, unless another one has taken its place."""
    born = path.lstat().st_ino
    try:
        yield
    finally:
        with suppress(OSError):
            if path.lstat().st_ino == born:
                path.unlink()


# --- serving ---------------------------------------------------------------------------------------------------


async def serve(app: ASGIApp, sockets: Sequence[socket.socket], admit: Admit, *, most: int) -> None:
    """Serve ``app`` on listening ``sockets`` until cancelled; closes them at the end.

    There are at most ``most`` connections at a time.
    """
    server = _Server(app, admit, ConnectionSlots(most, grace=PLAIN_GRACE if admit is admit_anyone else GRACE))
    try:
        async with trio.open_nursery() as nursery:
            for sock in sockets:
                _wait_for_the_first_byte(sock)
                nursery.start_soon(server.accept, sock)
    finally:
        for sock in sockets:
            sock.close()


def _wait_for_the_first_byte(sock: socket.socket) -> None:
    """Have the kernel keep a connection until its first byte: in HTTP and in TLS the client sends first."""
    if sock.family != socket.AF_UNIX:
        # A sandboxed kernel may not know the option. Then silent connections take slots like all others.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _FIRST_BYTE_TIMEOUT)


class _Server:
    def __init__(self, app: ASGIApp, admit: Admit, slots: ConnectionSlots) -> None:
        self._app: Final = app
        self._admit: Final = admit
        self._slots: Final = slots
        self._log: Final[Any] = structlog.get_logger("frelay.admin")

    async def accept(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as connections:
            while True:
                sock, address = await self._next(listener)
                try:
                    slot = await self._slots.take(holder_of(address))
                except BaseException:
                    sock.close()
                    raise
                connections.start_soon(self._serve, sock, slot)

    async def _next(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                continue
            except OSError:
                # The connection died in the queue, or no descriptor is left. Try again soon in both cases.
                await trio.sleep(_PAUSE)
                continue
            sock.setblocking(False)
            return sock, address

    async def _serve(self, sock: socket.socket, slot: ConnectionSlot) -> None:
        try:
            with slot.scope:
                admitted = await self._admit(sock)
                if admitted is not None:
                    slot.clients_turn()
                    caller = Caller(slot.holder, admitted.objection)
                    await speak_http(self._app, admitted.stream, caller, slot)
        except* OSError:
            pass  # The client has disconnected: there is nobody to answer.
        except* Exception:
            # Only this connection ends: routes must not suffer from a bug here.
            self._log.exception("a bug in frelay ended this HTTP connection")
        finally:
            close(sock)
            slot.give_back()
