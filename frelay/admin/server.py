"""An ASGI application on listening sockets, beside a relay that must not suffer from it.

The socket of the admin API must never be open to others, not even for a moment, so it is bound here. A caller over TCP
has to be let in by a certificate first (:mod:`frelay.admin.mtls`), with the relay's own TLS. How many there are at a
time, and who has to go for a newcomer, is told in :mod:`frelay.admin.places`; how HTTP is spoken with each of them in
:mod:`frelay.admin.http`.
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

from frelay.admin.http import Caller, speak_http
from frelay.admin.places import GRACE, PLAIN_GRACE, Place, Places, holder_of
from frelay.net.sockets import close
from frelay.net.streams import RawStream
from frelay.tls.stream import TlsStream

__all__ = ["Admit", "Admitted", "bind_unix", "let_in", "serve", "unlinked_at_end"]

_BACKLOG: Final = 256
_PAUSE: Final = 0.1
# Seconds for which the kernel keeps a connection without a byte to itself, about: it rounds up.
_FIRST_BYTE_TIME: Final = 5


@dataclass(frozen=True, slots=True)
class Admitted:
    """A caller who was let in; ``objection`` is that of :class:`~frelay.admin.http.Caller`."""

    stream: RawStream | TlsStream
    objection: Callable[[], str | None] = lambda: None


Admit = Callable[[socket.socket], Awaitable[Admitted | None]]
"""Makes a caller of an accepted socket, or gives None for one that may not come in. It may raise OSError."""


async def let_in(sock: socket.socket) -> Admitted:
    """Admit everybody: whoever can reach this socket may use it."""
    return Admitted(RawStream(sock))


# --- sockets ---------------------------------------------------------------------------------------------------


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket at ``path``, for its owner alone; raises OSError.

    A socket file that nobody listens on any more is replaced: no server can remove its own when it is killed.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Linux gives the file the mode of the socket: there is no moment in which others could connect.
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
    """Remove the socket file at the end, if it is still the one that was there at the beginning."""
    born = path.lstat().st_ino
    try:
        yield
    finally:
        with suppress(OSError):
            if path.lstat().st_ino == born:
                path.unlink()


# --- serving ---------------------------------------------------------------------------------------------------


async def serve(app: ASGIApp, sockets: Sequence[socket.socket], admit: Admit, *, most: int) -> None:
    """Serve ``app`` on listening ``sockets``, which are closed at the end, until cancelled.

    There are at most ``most`` connections at a time.
    """
    server = _Server(app, admit, Places(most, grace=PLAIN_GRACE if admit is let_in else GRACE))
    try:
        async with trio.open_nursery() as nursery:
            for sock in sockets:
                _wait_for_the_first_byte(sock)
                nursery.start_soon(server.accept, sock)
    finally:
        for sock in sockets:
            sock.close()


def _wait_for_the_first_byte(sock: socket.socket) -> None:
    """Have the kernel keep connections that say nothing: in HTTP and in TLS the client speaks first."""
    if sock.family != socket.AF_UNIX:
        # A sandboxed kernel may not know it, and then such connections have places like all others.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _FIRST_BYTE_TIME)


class _Server:
    def __init__(self, app: ASGIApp, admit: Admit, places: Places) -> None:
        self._app: Final = app
        self._admit: Final = admit
        self._places: Final = places
        self._log: Final[Any] = structlog.get_logger("frelay.admin")

    async def accept(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as connections:
            while True:
                sock, address = await self._next(listener)
                try:
                    place = await self._places.take(holder_of(address))
                except BaseException:
                    sock.close()
                    raise
                connections.start_soon(self._attend, sock, place)

    async def _next(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                continue
            except OSError:
                # A connection that died in the queue, or no descriptors left: either way, in a moment again.
                await trio.sleep(_PAUSE)
                continue
            sock.setblocking(False)
            return sock, address

    async def _attend(self, sock: socket.socket, place: Place) -> None:
        try:
            with place.scope:
                admitted = await self._admit(sock)
                if admitted is not None:
                    place.clients_turn()
                    caller = Caller(place.holder, admitted.objection)
                    await speak_http(self._app, admitted.stream, caller, place)
        except* OSError:
            pass  # it is gone; there is nobody to tell
        except* Exception:
            # Routes go on without it; it must not take them along.
            self._log.exception("a bug in frelay ended this HTTP connection")
        finally:
            close(sock)
            place.give_back()
