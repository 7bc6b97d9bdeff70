"""One epoll set for all raw legs: which sockets can move bytes now, asked once for all of them.

Theory of operation
===================

Trio parks a task by telling its epoll set about one descriptor, once, and switches tasks when it fires. For a relay of
small messages that is most of the work: an ``epoll_ctl`` and two task switches for every hundred bytes. So raw legs
are registered *here*, level-triggered and for good, and a single task sleeps (through Trio) until this whole set has
something. It then steps every ready pump inline, as plain function calls. A pump's own task sleeps on an event all the
while and wakes only for what is not bytes: the end of its direction, a fault, a cancellation. So structured
concurrency keeps the last word (a pump exists exactly as long as its task runs), and bytes do not pay for it.

Rules:

1. A :class:`Wire` is one raw leg: the pump that reads from it and the pump that writes to it. Its epoll mask follows
   from what these two want; it is changed only when that changes, which for a flowing stream is never.
2. A step never waits and is bounded, so one greedy pairing gets one step a round like everyone else.
3. ERR and HUP are reported by epoll whether asked for or not. If no pump wants the descriptor, an error ends the
   pairing (a reset must not go unnoticed behind back-pressure), and a mere HUP (both directions shut, input unread)
   takes the descriptor out of the set until a pump wants it again: level-triggered, it would spin otherwise.
4. A descriptor leaves the set before it is closed. Its task sees to that in ``finally``.
"""

from __future__ import annotations

import os
import select
import socket
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from frelay.pump import RawPump

__all__ = ["ReadinessSet", "Want", "Wire"]

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_TROUBLE: Final = select.EPOLLERR | select.EPOLLHUP
# How many descriptors one round takes at most: after a round everything else in the process gets its turn.
_ROUND: Final = 256


class Want(IntEnum):
    """What a pump needs before its next step makes sense."""

    NOTHING = 0
    SOURCE_READABLE = 1
    SINK_WRITABLE = 2


class Wire:
    """One raw leg's socket, as the readiness set knows it."""

    __slots__ = ("_mask", "error", "fd", "reader", "socket", "writer")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.reader: RawPump | None = None
        """The pump whose source this is."""
        self.writer: RawPump | None = None
        """The pump whose sink this is."""
        self.error: OSError | None = None
        """How the connection broke, once a pump was told of it."""
        self._mask: int | None = None
        """The mask registered with epoll; None while it is not in the set."""


class ReadinessSet:
    """The set, and the task that steps its pumps; one for a relay process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wires: dict[int, Wire] = {}

    def __len__(self) -> int:
        return len(self._wires)

    def refresh(self, wire: Wire) -> None:
        """Make the registration of ``wire`` follow what its pumps want now."""
        if self._epoll.closed:
            # The whole relay is cancelled, this set's task was quicker than its pumps, and they still have to go.
            return None
        reader, writer = wire.reader, wire.writer
        if reader is None and writer is None:
            return self._forget(wire)
        mask = 0
        if reader is not None and reader.wants is Want.SOURCE_READABLE:
            mask = _IN
        if writer is not None and writer.wants is Want.SINK_WRITABLE:
            mask |= _OUT
        if mask == wire._mask:
            return None
        if wire._mask is None:
            self._epoll.register(wire.fd, mask)
            self._wires[wire.fd] = wire
        else:
            self._epoll.modify(wire.fd, mask)
        wire._mask = mask
        return None

    def _forget(self, wire: Wire) -> None:
        if wire._mask is not None:
            wire._mask = None
            del self._wires[wire.fd]
            self._epoll.unregister(wire.fd)

    async def run(self) -> None:
        """Step ready pumps until cancelled."""
        poll, wires = self._epoll.poll, self._wires
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, events in poll(0, _ROUND):
                    # A pump stepped earlier in this round may have ended, and its task cannot have run since, so
                    # the number still means the same connection; but the wire may have left the set.
                    wire = wires.get(fd)
                    if wire is not None:
                        try:
                            self._serve(wire, events)
                        except Exception as error:
                            # A bug, and it must stay that of one pairing: everybody's bytes depend on this loop.
                            for pump in (wire.reader, wire.writer):
                                if pump is not None:
                                    pump.fail(error)
        finally:
            trio.lowlevel.notify_closing(self._epoll.fileno())
            self._epoll.close()

    def _serve(self, wire: Wire, events: int) -> None:
        stepped = False
        reader, writer = wire.reader, wire.writer
        if reader is not None and reader.wants is Want.SOURCE_READABLE and events & ~_OUT:
            reader.step()
            stepped = True
        if writer is not None and writer.wants is Want.SINK_WRITABLE and events & ~_IN:
            writer.step()
            stepped = True
        if not stepped and events & _TROUBLE:
            error = wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            victim = reader if reader is not None and not reader.has_finished else writer
            if error and victim is not None and not victim.has_finished:
                victim.break_off(wire, OSError(error, os.strerror(error)))
            else:
                self._forget(wire)
