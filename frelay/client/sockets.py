"""The sockets of one joining, and the look-up of names: the calls of the operating system that the shells share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Final

from frelay.client.steps import Connection, Endpoint

__all__ = ["Connections", "drop_received", "look_up", "look_up_in_thread", "numeric"]

_READ: Final = 65536
# A peer that still sends after that many reads gets the RST.
_MOST_READS: Final = 64


class Connections:
    """The open sockets of one joining, by the name of their connection. The owner calls :meth:`close_all`."""

    def __init__(self) -> None:
        self.sockets: Final[dict[Connection, socket.socket]] = {}

    def add(self, connection: Connection, endpoint: Endpoint) -> socket.socket:
        """A new socket for ``endpoint``, not connected yet, under the name ``connection``."""
        self.close(connection)
        sock = self.sockets[connection] = socket.socket(endpoint.family, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def take(self, connection: Connection) -> socket.socket:
        """The socket of ``connection``; the caller closes it from now on."""
        return self.sockets.pop(connection)

    def close(self, connection: Connection, final_bytes: bytes = b"") -> None:
        """Close ``connection`` if it is open; send ``final_bytes`` first if the kernel has room for them."""
        sock = self.sockets.pop(connection, None)
        if sock is None:
            return
        try:
            sock.setblocking(False)  # a Python socket with a timeout waits even with MSG_DONTWAIT
            if final_bytes:
                sock.send(final_bytes, socket.MSG_NOSIGNAL)
            drop_received(sock)
        except OSError:
            pass  # then the other side sees only the end, which is enough
        finally:
            sock.close()

    def close_all(self, final_bytes: Callable[[Connection], bytes]) -> None:
        """Close everything."""
        for connection in tuple(self.sockets):
            self.close(connection, final_bytes(connection))


def drop_received(sock: socket.socket) -> None:
    """Read and drop what has arrived: closing with unread bytes sends RST, which can overtake our final bytes.

    Raises OSError; BlockingIOError if nothing more is there and the other side has not ended.
    """
    for _ in range(_MOST_READS):
        if not sock.recv(_READ):
            return


def _endpoints(host: str, port: int, flags: int = 0) -> list[Endpoint]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))


def numeric(host: str, port: int) -> list[Endpoint] | None:
    """The endpoint of a ``host`` that is an IP address, or None if it is a name. Does not block."""
    try:
        return _endpoints(host, port, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None


def look_up(host: str, port: int) -> list[Endpoint]:
    """All endpoints of a name; blocks. Raises OSError."""
    try:
        return _endpoints(host, port)
    except UnicodeError:
        # The idna codec raises this for a label that is empty or too long.
        raise socket.gaierror(socket.EAI_NONAME, "this is not a host name") from None


def look_up_in_thread(host: str, port: int, done: Callable[[list[Endpoint] | OSError], None]) -> None:
    """Call ``done`` from another thread, with what :func:`look_up` returned or raised.

    The resolver's own timeouts are far longer than most callers want to wait, and cannot be interrupted. So a caller
    that gives up leaves the thread behind. It is a daemon thread, so it does not delay the end of the process.
    """

    def run() -> None:
        result: list[Endpoint] | OSError
        try:
            result = look_up(host, port)
        except OSError as error:
            result = error
        done(result)

    threading.Thread(target=run, name=f"look up {host}", daemon=True).start()
