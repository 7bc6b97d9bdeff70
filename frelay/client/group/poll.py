"""One edge-triggered epoll set for all sockets of a group. Standard library only.

Theory of operation. The group never blocks: it reads and writes until the kernel says that nothing more goes, and
remembers of each socket what it may try next. The kernel reports each change once, so no socket is registered a second
time, and a message costs no system call beside its own. A shell waits until :meth:`Poll.fileno` is readable, or until
:meth:`Poll.wait` returns. That is all that the three shells do differently.
"""

from __future__ import annotations

import select
import socket
from typing import Final, Protocol

__all__ = ["HUNG_UP", "READABLE", "WRITABLE", "Owner", "Poll"]

READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
HUNG_UP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
"""The other side has sent its FIN, or the connection is dead. Bytes may still be there to read."""

_ALL: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Owner(Protocol):
    """What has a socket in the set."""

    def ready(self, events: int) -> None:
        """Take note that the socket has changed."""


class Poll:
    """The set; ``close`` closes its own descriptor, and no socket."""

    def __init__(self) -> None:
        self._epoll: Final = select.epoll()
        self._owners: Final[dict[int, Owner]] = {}

    def fileno(self) -> int:
        """The descriptor, which is readable when a socket has changed."""
        return self._epoll.fileno()

    def add(self, sock: socket.socket | int, owner: Owner) -> None:
        """Report the changes of ``sock`` to ``owner`` from now on, beginning with what it is ready for now."""
        number = sock if isinstance(sock, int) else sock.fileno()
        if number in self._owners:
            self._epoll.modify(number, _ALL)
        else:
            self._epoll.register(number, _ALL)
        self._owners[number] = owner

    def remove(self, sock: socket.socket) -> None:
        """Forget ``sock``, before it is closed."""
        if self._owners.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def wait(self, seconds: float) -> None:
        """Wait at most so long for a change, and report all that there are."""
        for number, events in self._epoll.poll(seconds):
            owner = self._owners.get(number)
            if owner is not None:
                owner.ready(events)

    def close(self) -> None:
        """Close the set."""
        self._owners.clear()
        self._epoll.close()
