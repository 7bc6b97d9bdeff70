"""Local addresses of ``frelay connect``: ``HOST:PORT`` or ``unix:PATH``, to listen at and to dial."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from frelay.cli.connect.local import LocalSocket
from frelay.client.options import split_address
from frelay.errors import FrelayError

__all__ = ["LocalError", "check_dial_address", "check_listen_address", "dial_local", "listening", "shown"]

_UNIX: Final = "unix:"
_MAX_UNIX_PATH: Final = 107  # sun_path of unix(7), less its NUL
# The kernel takes the lesser of this and net.core.somaxconn: callers wait there when we are slow.
_BACKLOG: Final = 4096
# A service here that does not answer by then would hold its caller, and a place, for the two minutes of a SYN.
_DIAL_TIMEOUT: Final = 10.0
_BUSY_PAUSE: Final = 0.05
_NO_SUCH_FAMILY: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class LocalError(FrelayError):
    """Nothing can listen at an address here, or no service answers there; the text names the address and the reason."""


def _unix_path(place: str) -> Path | None:
    """The path of ``unix:PATH``, or None for another kind of address; raises ValueError."""
    if not place.startswith(_UNIX):
        return None
    text = place.removeprefix(_UNIX)
    if not text or "\0" in text:
        raise ValueError(f"{place!r} is no address: write unix:PATH")
    if len(os.fsencode(text)) > _MAX_UNIX_PATH:
        raise ValueError(f"{place!r}: the path of a Unix socket has at most {_MAX_UNIX_PATH} bytes")
    return Path(text)


def check_dial_address(place: str) -> None:
    """Raise ValueError if ``place`` is no address of a service."""
    if _unix_path(place) is None:
        _or_unix(place)


def check_listen_address(place: str) -> None:
    """Raise ValueError if ``place`` is nothing to listen at; port 0 is any that is free."""
    if _unix_path(place) is None:
        _host_and_port(place)


def _or_unix(place: str) -> tuple[str, int]:
    try:
        return split_address(place)
    except ValueError as error:
        raise ValueError(f"{error}, or unix:PATH") from None


def _host_and_port(place: str) -> tuple[str, int]:
    if place.endswith(":0"):
        return _or_unix(f"{place[:-1]}1")[0], 0
    return _or_unix(place)


def shown(address: object) -> str:
    """What ``getsockname`` gave, as people write it."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{_UNIX}{os.fsdecode(address) if isinstance(address, bytes) else address}"


# --- listening --------------------------------------------------------------------------------------------------------


@contextmanager
def listening(place: str) -> Iterator[list[trio.socket.SocketType]]:
    """Sockets that listen at ``place``, all addresses of a name; closed at the end. Raises LocalError."""
    try:
        path = _unix_path(place)
        socks = _bind_tcp(*_host_and_port(place)) if path is None else [_bind_unix(path)]
    except OSError as error:
        raise LocalError(f"cannot listen on {place}: {error.strerror or error}") from error
    made = None if path is None else _file_of(path)
    try:
        yield [trio.socket.from_stdlib_socket(sock) for sock in socks]
    finally:
        for sock in socks:
            sock.close()
        # Another process may have put its own socket there meanwhile.
        if path is not None and made is not None and _file_of(path) == made:
            path.unlink(missing_ok=True)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    socks: list[socket.socket] = []
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "this is no host name") from None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            socks.append(_bind_one(family, address))
        except OSError as error:
            # localhost is ::1 as well, also where this kernel or container has no IPv6.
            if error.errno in _NO_SUCH_FAMILY:
                missing = error
                continue
            for sock in socks:
                sock.close()
            raise
    if not socks:
        raise missing or OSError(errno.EADDRNOTAVAIL, "it has no address")
    return socks


def _bind_one(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket for this user alone; what a killed process has left there is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        sock.setblocking(False)
        try:
            sock.bind(os.fspath(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            path.unlink(missing_ok=True)
            sock.bind(os.fspath(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
    return sock


def _is_left_over(path: Path) -> bool:
    """Whether ``path`` is a socket at which nobody listens any more; raises OSError for what is no socket."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "there is a file of that name already, which is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        return sock.connect_ex(os.fspath(path)) == errno.ECONNREFUSED


def _file_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


# --- dialling ---------------------------------------------------------------------------------------------------------


async def dial_local(place: str) -> LocalSocket:
    """A connection to the service at ``place``; raises LocalError."""
    try:
        with trio.fail_after(_DIAL_TIMEOUT):
            path = _unix_path(place)
            sock = await _dial_tcp(*split_address(place)) if path is None else await _dial_unix(path)
    except trio.TooSlowError:
        raise LocalError(f"no connection to the local service {place}: it does not answer") from None
    except OSError as error:
        raise LocalError(f"no connection to the local service {place}: {_reason(error)}") from error
    return LocalSocket(sock)


async def _dial_tcp(host: str, port: int) -> trio.socket.SocketType:
    sock = (await trio.open_tcp_stream(host, port)).socket
    if sock.getsockname() == sock.getpeername():
        # Nobody listens, and the kernel chose that very port for our end: TCP then connects a socket to itself.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


async def _dial_unix(path: Path) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # EAGAIN: its queue is full. Unlike TCP the kernel does not go on by itself, and tells of no change.
        while (number := sock.connect_ex(os.fspath(path))) == errno.EAGAIN:  # noqa: ASYNC110
            await trio.sleep(_BUSY_PAUSE)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    await trio.lowlevel.cancel_shielded_checkpoint()
    return trio.socket.from_stdlib_socket(sock)


def _reason(error: BaseException) -> str:
    """Why all addresses failed: trio keeps that in a group behind its own sentence."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(_reason(one) for one in cause.exceptions))
    number = getattr(error, "errno", None)
    # A positive one is the kernel's, to which trio adds the address; the resolver's have their own sentence.
    return os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)
