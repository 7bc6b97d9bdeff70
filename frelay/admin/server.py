"""An ASGI application on a socket, beside a relay that must not suffer from it.

The HTTP server is anycorn's, on Trio. It is given a bound socket, since it matters how that was bound (a Unix socket
must never be open to others, not even for a moment), and since a new server can go on with it if one falls over.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anycorn
import structlog
import trio
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["bind_unix", "serve", "unlinked_at_end"]

_BACKLOG: Final = 64
_PAUSE: Final = 1.0
# One listing of a thousand routes is a second at most; who has not got it then does not take it.
_GRACE: Final = 1.0


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


async def serve(app: ASGIApp, sock: socket.socket, *, what: str) -> None:
    """Serve ``app`` on ``sock``, which is closed at the end, until cancelled. Raises nothing else."""
    log: Any = structlog.get_logger("frelay.admin").bind(server=what)
    with sock:
        while True:
            try:
                await anycorn.serve(_without_lifespan(app), _configuration(sock), mode="asgi")  # type: ignore[arg-type]
            except Exception:
                # Routes go on without it; it must not take them along.
                log.exception("a bug ended this HTTP server; starting it again")
                await trio.sleep(_PAUSE)


def _without_lifespan(app: ASGIApp) -> ASGIApp:
    """The nurseries of the relay say when things begin and end; Starlette takes a cancelled lifespan for a failure."""

    async def without(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError  # how an application says that it has none
        await app(scope, receive, send)

    return without


def _configuration(sock: socket.socket) -> anycorn.Config:
    config = anycorn.Config()
    # The server closes what it gets.
    config.bind = [f"fd://{os.dup(sock.fileno())}"]
    config.errorlog = None
    config.accesslog = None
    config.include_server_header = False
    config.graceful_timeout = _GRACE
    config.shutdown_timeout = _GRACE
    config.keep_alive_timeout = 30
    config.worker_class = "trio"
    return config
