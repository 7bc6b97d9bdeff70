"""The TCP connections of one joining, and looking up names: what the shells share of the operating system."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Final

from frelay.client.steps import Endpoint, Line

__all__ = ["Lines", "look_up", "look_up_in_thread", "numeric", "take_what_came"]

_READ: Final = 65536
# A peer that goes on sending gets the RST.
_MOST_READS: Final = 64


class Lines:
    """The sockets that are open, by line; whoever owns this closes them."""

    def __init__(self) -> None:
        self.sockets: Final[dict[Line, socket.socket]] = {}

    def add(self, line: Line, endpoint: Endpoint) -> socket.socket:
        """A new socket for ``endpoint``, not connected yet; it is ``line`` from here on."""
        self.hang_up(line)
        sock = self.sockets[line] = socket.socket(endpoint.family, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def take(self, line: Line) -> socket.socket:
        """The socket of ``line``, no longer ours to close."""
        return self.sockets.pop(line)

    def hang_up(self, line: Line, last_words: bytes = b"") -> None:
        """Close ``line``, if it is open; the last words are sent if the kernel has room for them."""
        sock = self.sockets.pop(line, None)
        if sock is None:
            return
        try:
            sock.setblocking(False)  # with a timeout even MSG_DONTWAIT would wait for it
            if last_words:
                sock.send(last_words, socket.MSG_NOSIGNAL)
            take_what_came(sock)
        except OSError:
            pass  # then the other side sees only the end, which says enough
        finally:
            sock.close()

    def hang_up_all(self, last_words: Callable[[Line], bytes]) -> None:
        """Close everything."""
        for line in tuple(self.sockets):
            self.hang_up(line, last_words(line))


def take_what_came(sock: socket.socket) -> None:
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
