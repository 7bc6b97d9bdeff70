"""What a pump and the readiness set know of each other: an interest in a socket, and the step that serves it.

Each pump is :class:`Steppable`: it says what it waits for (:class:`Interest`), and the readiness set calls it when that
has come. The readiness set is the pumps' :class:`Stepper`. Between them stands the :class:`PolledSocket`.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import Protocol

import trio

__all__ = ["Interest", "PolledSocket", "Steppable", "Stepper"]


class Interest(IntEnum):
    """What must happen before the next step of a pump can move anything."""

    NOTHING = 0
    """No step can: the pump has ended, or its task is at work."""
    SOURCE_READABLE = 1
    SINK_WRITABLE = 2
    ARRIVAL = 3
    """New bytes come to its source, which it has read empty. Only raw pumps have this, and only while they copy."""


class Steppable(Protocol):
    """A pump, as the readiness set sees it."""

    interest: Interest

    def step(self) -> None:
        """Move what can be moved now; never wait."""

    def fail(self, error: Exception) -> None:
        """Have the pump's task raise ``error``: a step raised it, which is a bug of ours."""

    def break_off(self, polled: PolledSocket, error: OSError) -> bool:
        """End this direction because the connection of ``polled`` broke; False if it had ended already."""

    def meet_trouble(self, polled: PolledSocket) -> None:
        """Look what is wrong: epoll reports ERR or HUP for ``polled``, and neither of its pumps waits for it now."""


class Stepper(Protocol):
    """The readiness set, as a pump sees it."""

    def refresh(self, polled: PolledSocket) -> None:
        """Make the registration of ``polled`` follow the interests of its two pumps."""

    def wake(self, event: trio.Event) -> None:
        """Set ``event``, from within a step."""

    def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope``, from within a step."""


class PolledSocket:
    """One leg's socket with the two pumps that use it, as the readiness set registers it."""

    __slots__ = ("error", "fd", "mask", "reader", "socket", "writer")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.reader: Steppable | None = None
        """The pump whose source this is."""
        self.writer: Steppable | None = None
        """The pump whose sink this is, if it is stepped when the sink has room, or has a budget."""
        self.error: OSError | None = None
        """How the connection broke, once a pump has learnt it."""
        self.mask: int | None = None
        """The mask registered with epoll; None while the socket is not in the set."""

    def fail(self, error: Exception) -> None:
        """End both pumps with ``error``, a bug. It must stay within one pairing: all pairings depend on this loop."""
        for pump in (self.reader, self.writer):
            if pump is not None:
                pump.fail(error)
