"""Local addresses of ``frelay connect``, ``HOST:PORT`` or ``unix:PATH``: how to listen there and how to dial them."""

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

__all__ = ["LocalError", "address_text", "check_dial_address", "check_listen_address", "dial_local", "listening"]

_UNIX: Final = "unix:"
_MAX_UNIX_PATH: Final = 107  # sun_path of unix(7), less its NUL
# How many callers may wait in the kernel when we are slow. The kernel uses net.core.somaxconn if that is smaller.
_BACKLOG: Final = 4096
# Without it a service that does not answer would hold its caller and a pairing for two minutes, until the SYN fails.
_DIAL_TIMEOUT: Final = 10.0
_BUSY_PAUSE: Final = 0.05
_NO_SUCH_FAMILY: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class LocalError(FrelayError):
    """We cannot listen at a local address, or no service answers there; the text names the address and the reason."""


def _unix_path(address: str) -> Path | None:
    """The path of ``unix:PATH``, or None for another kind of address; raises ValueError."""
    if not address.startswith(_UNIX):
        return None
    text = address.removeprefix(_UNIX)
    if not text or "\0" in text:
        raise ValueError(f"{address!r} is no address: write unix:PATH")
    if len(os.fsencode(text)) > _MAX_UNIX_PATH:
        raise ValueError(f"{address!r}: the path of a Unix socket has at most {_MAX_UNIX_PATH} bytes")
    return Path(text)


def check_dial_address(address: str) -> None:
    """Raise ValueError if ``address`` cannot be dialled."""
    if _unix_path(address) is None:
        _split_host_and_port(address)


def check_listen_address(address: str) -> None:
    """Raise ValueError if we cannot listen at ``address``. Port 0 means any free port."""
    if _unix_path(address) is None:
        _split_listen_address(address)


def _split_host_and_port(address: str) -> tuple[str, int]:
    try:
        return split_address(address)
    except ValueError as error:
        raise ValueError(f"{error}, or unix:PATH") from None


def _split_listen_address(address: str) -> tuple[str, int]:
    if address.endswith(":0"):
        return _split_host_and_port(f"{address[:-1]}1")[0], 0
    return _split_host_and_port(address)


def address_text(address: object) -> str:
    """The result of ``getsockname`` as people write it."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{_UNIX}{os.fsdecode(address) if isinstance(address, bytes) else address}"


# --- listening --------------------------------------------------------------------------------------------------------


@contextmanager
def listening(address: str) -> Iterator[list[trio.socket.SocketType]]:
    """Sockets that listen at ``address``, one for each IP address of a name; closed at the end. Raises LocalError."""
    try:
        path = _unix_path(address)
        socks = _bind_tcp(*_split_listen_address(address)) if path is None else [_bind_unix(path)]
    except OSError as error:
        raise LocalError(f"cannot listen on {address}: {error.strerror or error}") from error
    made = None if path is None else _file_of(path)
    try:
        yield [trio.socket.from_stdlib_socket(sock) for sock in socks]
    finally:
        for sock in socks:
            sock.close()
        # Remove only our own file: another process may have put its socket there meanwhile.
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
            # localhost also resolves to ::1 on a kernel or container without IPv6.
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
    """A listening Unix socket that only this user may use. It replaces the file that a killed process left."""
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
    """Whether ``path`` is a socket where no process listens any more; raises OSError if it is no socket."""
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


async def dial_local(address: str) -> LocalSocket:
    """A connection to the service at ``address``; raises LocalError."""
    try:
        with trio.fail_after(_DIAL_TIMEOUT):
            path = _unix_path(address)
            sock = await _dial_tcp(*split_address(address)) if path is None else await _dial_unix(path)
    except trio.TooSlowError:
        raise LocalError(f"no connection to the local service {address}: it does not answer") from None
    except OSError as error:
        raise LocalError(f"no connection to the local service {address}: {_reason(error)}") from error
    return LocalSocket(sock)


async def _dial_tcp(host: str, port: int) -> trio.socket.SocketType:
    sock = (await trio.open_tcp_stream(host, port)).socket
    if sock.getsockname() == sock.getpeername():
        # No process listens there, and the kernel chose that same port for our end: TCP connected the socket to itself.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


async def _dial_unix(path: Path) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # EAGAIN: the service's queue is full. Unlike for TCP, the kernel does not retry, and reports no change.
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
    """Why all addresses failed: trio has the reasons in a group behind its own error."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(_reason(one) for one in cause.exceptions))
    number = getattr(error, "errno", None)
    # A positive errno is the kernel's, and trio adds the address to its text. The resolver's errors have a text.
    return os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)
