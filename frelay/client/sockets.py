"""The TCP connections of one joining, and looking up names: what the shells share of the operating system."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Final

from frelay.client.steps import Connection, Endpoint

__all__ = ["Connections", "drop_received", "look_up", "look_up_in_thread", "numeric"]

_READ: Final = 65536
# A peer that goes on sending gets the RST.
_MOST_READS: Final = 64


class Connections:
    """The open sockets of one joining, by the name of their connection. The owner calls :meth:`close_all`."""

    def __init__(self) -> None:
        self.sockets: Final[dict[Connection, socket.socket]] = {}

    def add(self, connection: Connection, endpoint: Endpoint) -> socket.socket:
        """A new socket for ``endpoint``, not connected yet; it is ``connection`` from here on."""
        self.close(connection)
        sock = self.sockets[connection] = socket.socket(endpoint.family, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def take(self, connection: Connection) -> socket.socket:
        """The socket of ``connection``, no longer ours to close."""
        return self.sockets.pop(connection)

    def close(self, connection: Connection, final_bytes: bytes = b"") -> None:
        """Close ``connection``, if it is open; the last words are sent if the kernel has room for them."""
        sock = self.sockets.pop(connection, None)
        if sock is None:
            return
        try:
            sock.setblocking(False)  # with a timeout even MSG_DONTWAIT would wait for it
            if final_bytes:
                sock.send(final_bytes, socket.MSG_NOSIGNAL)
            drop_received(sock)
        except OSError:
            pass  # then the other side sees only the end, which says enough
        finally:
            sock.close()

    def close_all(self, final_bytes: Callable[[Connection], bytes]) -> None:
        """Close everything."""
        for connection in tuple(self.sockets):
            self.close(connection, final_bytes(connection))


def drop_received(sock: socket.socket) -> None:
    """Read and drop what has arrived: closing with bytes unread sends RST, which overtakes our last words.

    Raises OSError, BlockingIOError where that is all of it.
    """
    for _ in range(_MOST_READS):
        if not sock.recv(_READ):
            return


def _endpoints(host: str, port: int, flags: int = 0) -> list[Endpoint]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))


def numeric(host: str, port: int) -> list[Endpoint] | None:
    """The endpoint that ``host`` is already, or None if it is a name. Does not block."""
    try:
        return _endpoints(host, port, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None


def look_up(host: str, port: int) -> list[Endpoint]:
    """The endpoints of a name, as many as it has; blocks. Raises OSError."""
    try:
        return _endpoints(host, port)
    except UnicodeError:
        # The idna codec's way to say that a label is empty or too long.
        raise socket.gaierror(socket.EAI_NONAME, "this is not a host name") from None


def look_up_in_thread(host: str, port: int, done: Callable[[list[Endpoint] | OSError], None]) -> None:
    """Call ``done`` with what :func:`look_up` gave or raised, from another thread.

    The resolver's own time-outs are far longer than most callers' patience and cannot be cut short, so the thread is
    left behind when they go; a daemon, so that it does not hold up the end of the process either.
    """

    def run() -> None:
        result: list[Endpoint] | OSError
        try:
            result = look_up(host, port)
        except OSError as error:
            result = error
        done(result)

    threading.Thread(target=run, name=f"look up {host}", daemon=True).start()
