"""One epoll set for all paired legs: which sockets can move bytes now, asked once for all of them.

Theory of operation
===================

Trio parks a task by telling its epoll set about one descriptor, once, and switches tasks when it fires. For a relay of
small messages that is most of the work: an ``epoll_ctl`` and two task switches for every hundred bytes. So paired legs
are registered *here*, for as long as nothing but bytes comes, and every ready pump is stepped inline, as a plain
function call. A pump's own task sleeps on an event all the while and wakes only for what is not bytes: the end of its
direction, a fault, a cancellation. So structured concurrency keeps the last word (a pump exists exactly as long as its
task runs), and bytes do not pay for it.

Who sleeps on this set? If a Trio task did, each wake-up would be a turn of Trio's loop: its epoll set fires because
ours did, a task is switched to, ours is asked again. With one pairing that costs more than moving its bytes does. So it
is the other way round. Trio tells its instruments when it has nothing left to run and is about to sleep until a
deadline (``before_io_wait``). We sleep in its stead, on our set, in which Trio's own set is one more descriptor: bytes
that come for a paired leg are moved here and now, and whatever comes for anybody else is a return to Trio, which finds
it in its own set. Two things Trio could not find there by itself: a task that a step has made runnable, and a deadline
that has passed meanwhile. For those we ring a doorbell, an eventfd that a task of ours has Trio watch.

Trio has no public name for its epoll set. The kernel knows it: it is the one that watches the doorbell, which
``/proc/self/fdinfo`` shows. Where that cannot be seen, and in a Trio run that has such a set already, a task sleeps on
ours after all, which costs CPU time and nothing else.

Rules:

1. A :class:`Wire` is one leg: the pump that reads from it and the pump that writes to it. Its epoll mask follows
   from what these two want; it is changed only when that changes, which for a flowing stream is never. It is
   level-triggered, except for a pump that has read its source empty (``Want.ARRIVAL``): then the kernel need not look
   at the socket a second time only to find that. What a short read can leave behind comes as more than ``EPOLLIN``,
   and who gets more than that registers anew: then the kernel looks, and tells again what is there. That is the one
   thing to rely on; and a pump that rests does it too, for what no theory knows of.
2. A step never waits and is bounded, in bytes and in records, so one greedy pairing gets one step a round like everyone
   else. Small messages come first in it, and after each round Trio gets its turn, if there is anything in it for Trio.
3. ERR and HUP are reported by epoll whether asked for or not. If no pump wants the descriptor, an error ends the
   pairing (a raw leg's reset must not go unnoticed behind back-pressure; a tunnel's does until its pump has delivered
   what it holds, or stall_timeout). What ends nothing takes the descriptor out of the set until a pump wants it again,
   for it would spin otherwise: a mere HUP (both directions shut, input unread), and a reset by a party that had sent
   its FIN, behind bytes that are not delivered yet. That one ends what is written to it, and the reader goes on.
   Pumps of streams that have a budget are in the set for this alone: so they learn of a reset while they wait for
   their turn (:meth:`~frelay.pairing.stream_pump.StreamPump.meet_trouble`).
4. A descriptor leaves the set before it is closed. Its task sees to that in ``finally``.
5. No descriptor that Trio waits for may be read by another process as well: what has made its set ready for us must
   still be there when Trio looks, or Trio sleeps without us until its next deadline. So a listening socket belongs to
   one worker (``workers.spread``).
6. Code that wakes a task from within a step does it through :meth:`ReadinessSet.wake` or
   :meth:`ReadinessSet.cancel`, or Trio would sleep on.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import trio

from frelay.net.tcp import is_after_end, take_error
from frelay.pairing.pump import Want
from frelay.pairing.raw_pump import RawPump, carry_arrivals

if TYPE_CHECKING:
    from frelay.pairing.stream_pump import StreamPump

__all__ = ["ReadinessSet", "Wire"]

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
# Told once, when something comes; and told apart, what a short read may leave behind: a FIN, bytes after an urgent one.
_ARRIVES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
_TROUBLE: Final = select.EPOLLERR | select.EPOLLHUP
# How many descriptors one round takes at most: after a round everything else in the process gets its turn.
_ROUND: Final = 64
# And how many of these may be more than a message: up to a millisecond each.
_BULK_OF_A_ROUND: Final = 16
_FDINFO: Final = Path("/proc/self/fdinfo")

# Looked up with every event, and a member of an enumeration is not found as quickly as a name of this module.
_READABLE: Final = Want.SOURCE_READABLE
_WRITABLE: Final = Want.SINK_WRITABLE
_ARRIVAL: Final = Want.ARRIVAL


class Wire:
    """One leg's socket, as the readiness set knows it."""

    __slots__ = ("_mask", "error", "fd", "reader", "socket", "writer")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.reader: RawPump | StreamPump | None = None
        """The pump whose source this is."""
        self.writer: RawPump | StreamPump | None = None
        """The pump whose sink this is, if that is stepped when the sink has room, or has a budget."""
        self.error: OSError | None = None
        """How the connection broke, once a pump was told of it."""
        self._mask: int | None = None
        """The mask registered with epoll; None while it is not in the set."""

    def fail(self, error: Exception) -> None:
        """A step raised: a bug, and it must stay that of one pairing, for everybody's bytes depend on this loop."""
        for pump in (self.reader, self.writer):
            if pump is not None:
                pump.fail(error)


class ReadinessSet:
    """The set, and the task that stands behind it; one for a relay process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wires: dict[int, Wire] = {}
        self._chatty: dict[int, RawPump] = {}
        """Of the wires, those that are registered for an arrival, and the pump that waits for it."""
        self._turn = 0
        self._woke_a_task = False
        self.sleeps_for_trio = False
        """Whether bytes are moved without a turn of Trio's loop."""

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
        if writer is not None and writer.wants is _WRITABLE:
            mask = _OUT
        if reader is not None and reader.wants is _READABLE:
            mask |= _IN
        elif reader is not None and reader.wants is _ARRIVAL:
            mask = mask | _IN if mask else _ARRIVES
        if mask == wire._mask:
            return None
        if wire._mask is None:
            self._epoll.register(wire.fd, mask)
            self._wires[wire.fd] = wire
        else:
            # However it was registered before: this looks again, so what came before is not missed.
            self._epoll.modify(wire.fd, mask)
        wire._mask = mask
        if mask == _ARRIVES:
            assert isinstance(reader, RawPump)  # noqa: S101  for the type checker
            self._chatty[wire.fd] = reader
        else:
            self._chatty.pop(wire.fd, None)
        return None

    def wake(self, event: trio.Event) -> None:
        """Set ``event``, from within a step."""
        event.set()
        self._woke_a_task = True

    def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope``, from within a step."""
        scope.cancel(reason="the connection broke")
        self._woke_a_task = True

    def _forget(self, wire: Wire) -> None:
        if wire._mask is not None:
            wire._mask = None
            del self._wires[wire.fd]
            self._chatty.pop(wire.fd, None)
            self._epoll.unregister(wire.fd)

    # --- who sleeps on it ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Have ready pumps stepped until cancelled."""
        try:
            if not _is_taken.get(False):
                await self._sleep_for_trio()
            await self._sleep_within_trio()
        finally:
            self._epoll.close()

    async def _sleep_for_trio(self) -> None:
        """Return only if that is not possible here."""
        doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        sleeper = _Sleeper(self, doorbell)
        _is_taken.set(True)
        try:
            trio.lowlevel.add_instrument(sleeper)
            while True:
                await trio.lowlevel.wait_readable(doorbell)
                os.eventfd_read(doorbell)
                if sleeper.failure is not None:
                    raise sleeper.failure
                if sleeper.trio_epoll is None:
                    structlog.get_logger("frelay.readiness").warning(
                        "small messages cost more than they should",
                        reason="Trio's epoll set is not to be found in /proc/self/fdinfo",
                    )
                    return
        finally:
            self.sleeps_for_trio = False
            _is_taken.set(False)
            trio.lowlevel.remove_instrument(sleeper)
            trio.lowlevel.notify_closing(doorbell)
            os.close(doorbell)

    async def _sleep_within_trio(self) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self.serve(self._epoll.poll(0, _ROUND))
        finally:
            trio.lowlevel.notify_closing(self._epoll.fileno())

    def move_bytes(self, timeout: float, trio_epoll: int) -> bool:
        """Sleep for up to ``timeout`` seconds, or until Trio has something to do, and step ready pumps meanwhile.

        Whether Trio has to be told: because a task was woken here, or because the time is over.
        """
        poll, serve, now = self._epoll.poll, self.serve, time.monotonic
        ends, left = now() + timeout, timeout
        self._woke_a_task = False
        while True:
            is_for_trio = serve(poll(left, _ROUND), trio_epoll)
            if self._woke_a_task:
                return True
            if is_for_trio:
                return False
            left = ends - now()
            if left <= 0:
                # Trio had something to run anyway if it did not mean to sleep.
                return timeout > 0

    # --- one round -----------------------------------------------------------------------------------------------

    def serve(self, ready: Iterable[tuple[int, int]], trio_epoll: int = -1) -> bool:
        """Step the pumps of what epoll has found; whether ``trio_epoll`` was among it."""
        wires, chatty, is_for_trio = self._wires, self._chatty, False
        arrivals: list[RawPump] = []
        others: list[tuple[int, int]] = []
        for fd, events in ready:
            if events == _IN and fd in chatty:
                arrivals.append(chatty[fd])
            elif fd == trio_epoll:
                is_for_trio = True
            else:
                others.append((fd, events))
        # First, for they are soon done.
        carry_arrivals(arrivals)
        if len(others) > _BULK_OF_A_ROUND:
            others = self._some_of(others)
        for fd, events in others:
            # A pump stepped earlier in this round may have ended, and its task cannot have run since, so the number
            # still means the same connection; but the wire may have left the set.
            if (wire := wires.get(fd)) is not None:
                try:
                    self._serve_other(wire, events)
                except Exception as error:
                    wire.fail(error)
        return is_for_trio

    def _some_of(self, others: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What this round serves of so many: all that epoll tells once, and some, in turn, of what it tells again."""
        once = [one for one in others if one[0] in self._chatty]
        again = [one for one in others if one[0] not in self._chatty]
        first = self._turn % max(1, len(again))
        self._turn += _BULK_OF_A_ROUND
        return once + (again[first:] + again[:first])[:_BULK_OF_A_ROUND]

    def _serve_other(self, wire: Wire, events: int) -> None:
        """Whatever is not simply an arrival."""
        stepped = False
        reader, writer = wire.reader, wire.writer
        if reader is not None and reader.wants in (_READABLE, _ARRIVAL) and events & ~_OUT:
            reader.step()
            stepped = True
        if writer is not None and writer.wants is _WRITABLE and events & ~_IN:
            writer.step()
            stepped = True
        if stepped or not events & _TROUBLE:
            return
        self._meet_trouble(wire)

    def _meet_trouble(self, wire: Wire) -> None:
        """ERR or HUP on a wire that no pump wants at the moment."""
        for pump in (wire.reader, wire.writer):
            if pump is not None and not isinstance(pump, RawPump):
                pump.meet_trouble(wire)
        reader, writer = (
            pump if isinstance(pump, RawPump) and not pump.has_finished else None for pump in (wire.reader, wire.writer)
        )
        # Once nothing is written to it any more, a reset before the end of what it sends cannot be told from one after
        # it, except by reading; and to ask is to have the reader told of an end in either case.
        if writer is not None and (error := take_error(wire.socket)) is not None:
            if reader is not None and not is_after_end(error):
                return reader.break_off(wire, error)
            writer.break_off(wire, error)
        return self._forget(wire)


# --- in Trio's stead ----------------------------------------------------------------------------------------------

_is_taken: Final = trio.lowlevel.RunVar[bool]("frelay.readiness: somebody sleeps for Trio")
"""Two sets that sleep for one Trio would not hear each other's sockets."""


class _Sleeper(trio.abc.Instrument):
    """Sleeps for Trio whenever it would; see the theory of operation."""

    def __init__(self, readiness: ReadinessSet, doorbell: int) -> None:
        self._readiness = readiness
        self._doorbell = doorbell
        self._has_looked = False
        self.trio_epoll: int | None = None
        self.failure: BaseException | None = None

    def before_io_wait(self, timeout: float) -> None:
        """Trio is about to sleep, or, with a timeout of 0, to look who else has something to do."""
        try:
            if not self._has_looked:
                self._look_for_trio()
            if self.trio_epoll is None or not len(self._readiness):
                return  # Trio sleeps by itself
            if self._readiness.move_bytes(timeout, self.trio_epoll):
                os.eventfd_write(self._doorbell, 1)
        except BaseException as error:  # Trio would log it and go on without us, and so without anybody's bytes
            self.failure = error
            os.eventfd_write(self._doorbell, 1)

    def _look_for_trio(self) -> None:
        # Now, because only now the task that waits for the doorbell has told Trio so.
        self._has_looked = True
        self.trio_epoll = _epoll_that_watches(self._doorbell)
        if self.trio_epoll is None:
            os.eventfd_write(self._doorbell, 1)
            return
        self._readiness._epoll.register(self.trio_epoll, _IN)
        self._readiness.sleeps_for_trio = True


def _epoll_that_watches(descriptor: int) -> int | None:
    """The epoll set of this process that ``descriptor`` is in; None if there is none, or more than one, to be seen."""
    found: list[int] = []
    try:
        for entry in _FDINFO.iterdir():
            try:
                lines = entry.read_text().splitlines()
            except OSError:
                continue  # the descriptor with which the directory was read
            # "tfd:  7 events:  19 data: ...", one line for each descriptor in the set
            if any(line.split()[:2] == ["tfd:", str(descriptor)] for line in lines):
                found.append(int(entry.name))
    except OSError:
        return None
    return found[0] if len(found) == 1 else None
