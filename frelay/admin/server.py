"""An ASGI application on listening sockets, beside a relay that must not suffer from it.

HTTP itself is hypercorn's, on Trio, a connection at a time; accepting is ours, for three reasons. The socket of the
admin API must never be open to others, not even for a moment, so we bind it. Whoever comes in over TCP has to be let in
by a certificate first (:mod:`frelay.admin.door`), with the relay's own TLS. And hypercorn shields what it sends from
cancellation: a reader that does not read would keep the relay from ending, so the connection is closed under it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from starlette.types import ASGIApp

from frelay.sockets import close

__all__ = ["Admit", "Connection", "bind_unix", "let_in", "serve", "unlinked_at_end"]

_BACKLOG: Final = 64
# A person with a browser has six, a script one. Whoever wants more waits in the kernel.
_MAX_CONNECTIONS: Final = 64
_PAUSE: Final = 0.1
_KEEP_ALIVE: Final = 30.0


class Connection(Protocol):
    """What hypercorn needs of a stream; it looks for ``socket`` to know who is there."""

    @property
    def socket(self) -> Any:
        """The socket under it."""

    async def send_all(self, data: bytes) -> None:
        """As in Trio."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As in Trio."""

    async def send_eof(self) -> None:
        """As in Trio."""

    async def aclose(self) -> None:
        """As in Trio."""


Admit = Callable[[socket.socket], Awaitable[Connection | None]]
"""Makes a connection of an accepted socket, or gives None for one that may not come in. It may raise OSError."""


async def let_in(sock: socket.socket) -> Connection:
    """Admit everybody: whoever can reach this socket may use it."""
    return cast("Connection", trio.SocketStream(trio.socket.from_stdlib_socket(sock)))


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


async def serve(app: ASGIApp, sockets: Sequence[socket.socket], admit: Admit, *, read_timeout: int | None) -> None:
    """Serve ``app`` on listening ``sockets``, which are closed at the end, until cancelled.

    ``read_timeout`` seconds without a byte from a client end its connection; None is for those who may be trusted with
    an open one, and follow a stream of events on it.
    """
    server = _Server(app, admit, read_timeout)
    try:
        async with trio.open_nursery() as nursery:
            for sock in sockets:
                nursery.start_soon(server.accept, sock)
    finally:
        for sock in sockets:
            sock.close()


class _Server:
    def __init__(self, app: ASGIApp, admit: Admit, read_timeout: int | None) -> None:
        self._app: Final = ASGIWrapper(cast("ASGIFramework", app))
        self._admit: Final = admit
        self._context: Final = WorkerContext(None)
        self._places: Final = trio.Semaphore(_MAX_CONNECTIONS)
        self._log: Final[Any] = structlog.get_logger("frelay.admin")
        config = self._config = Config()
        config.accesslog = None
        config.errorlog = _complaints()
        config.include_server_header = False
        config.keep_alive_timeout = _KEEP_ALIVE
        config.read_timeout = read_timeout

    async def accept(self, sock: socket.socket) -> None:
        async with trio.open_nursery() as connections:
            while True:
                await self._places.acquire()
                try:
                    connection = await self._next(sock)
                except BaseException:
                    self._places.release()
                    raise
                connections.start_soon(self._attend, connection)

    async def _next(self, sock: socket.socket) -> socket.socket:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                continue
            except OSError:
                # A connection that died in the queue, or no descriptors left: either way, in a moment again.
                await trio.sleep(_PAUSE)
                continue
            connection.setblocking(False)
            return connection

    async def _attend(self, sock: socket.socket) -> None:
        try:
            stream = await self._admit(sock)
            if stream is not None:
                await self._speak(stream)
        except* OSError:
            pass  # it is gone; there is nobody to tell
        except* Exception:
            # Routes go on without it; it must not take them along.
            self._log.exception("a bug in frelay ended this HTTP connection")
        finally:
            close(sock)
            self._places.release()

    async def _speak(self, stream: Connection) -> None:
        async with trio.open_nursery() as nursery:

            async def close_when_cancelled() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    with suppress(trio.ClosedResourceError):
                        close(stream.socket)

            nursery.start_soon(close_when_cancelled)
            # Typed for the two streams that hypercorn opens itself; it looks for attributes.
            await TCPServer(self._app, self._config, self._context, ConnectionState({}), stream).run()  # type: ignore[arg-type]
            nursery.cancel_scope.cancel(reason="this HTTP connection has ended")


class _Complaints(logging.Handler):
    """What hypercorn has to say of an application that failed, as a line of our log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            structlog.get_logger("frelay.admin").error("a bug in frelay ended this request", exc_info=record.exc_info)


def _complaints() -> logging.Logger:
    logger = logging.getLogger("frelay.admin.http")
    logger.propagate = False
    logger.handlers = [_Complaints(logging.ERROR)]
    return logger
