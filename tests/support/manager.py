"""What a service sees of systemd: a notify socket, and sockets that are bound before it starts.

:class:`Manager` is the notify socket. :func:`activated` is a command line that starts a program with passed sockets, as
``systemd-socket-activate`` does: the descriptors become 3 and up, and LISTEN_PID is the process of the program itself.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from support.waiting import TIMEOUT

__all__ = ["Manager", "activated", "listening"]

_SHIM: Final = """
import fcntl, os, sys
descriptors, names, program = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
# First to high numbers: one of them may have the number that another needs.
high = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 100) for one in descriptors]
for one in descriptors:
    os.close(int(one))
for place, one in enumerate(high):
    os.dup2(one, 3 + place, inheritable=True)
    os.close(one)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=names)
os.execv(program[0], program)
"""


class Manager:
    """A notify socket; ``address`` is what NOTIFY_SOCKET says, ``@`` for an abstract one."""

    def __init__(self, address: str) -> None:
        self.address: Final = address
        self.socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def heard(self) -> list[str]:
        """The messages that are there now, without those of the watchdog."""
        return [word for word in self.everything() if word != "WATCHDOG=1"]

    def everything(self) -> list[str]:
        """The messages that are there now."""
        words = []
        try:
            while True:
                words.append(self.socket.recv(65536).decode("ascii"))
        except BlockingIOError:
            return words

    def fill_up(self) -> None:
        """Fill its buffer, as if it had not read for long: nobody can send until it is read."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.connect(self.socket.getsockname())
            try:
                while True:
                    other.send(b"STATUS=somebody else")
            except BlockingIOError:
                pass  # full, as wanted

    async def hear(self, *, watchdog: bool = False) -> str:
        """The next message; messages of the watchdog are skipped unless the test waits for them."""
        with trio.fail_after(TIMEOUT):
            while True:
                await trio.lowlevel.wait_readable(self.socket)
                word = self.socket.recv(65536).decode("ascii")
                if watchdog or word != "WATCHDOG=1":
                    return word


def activated(sockets: Sequence[tuple[str, socket.socket]]) -> tuple[list[str], list[int]]:
    """How to start a program with these named sockets: what to put before its command line, and ``pass_fds``."""
    descriptors = [sock.fileno() for _, sock in sockets]
    names = ":".join(name for name, _ in sockets)
    return [sys.executable, "-c", _SHIM, ",".join(map(str, descriptors)), names], descriptors


@contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """A socket as systemd would pass it; for IPv6 alone if ``host`` is an IPv6 address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen()
        yield sock
