"""One epoll set for all paired legs: which sockets can move bytes now, asked once for all of them.

Theory of operation
===================

When a Trio task waits for a socket, Trio registers it with epoll for one event, and switches tasks when the event
comes. For a relay of small messages that is most of the work: an ``epoll_ctl`` and two task switches for every hundred
bytes. So the sockets of paired legs are registered *here*, and stay registered for as long as only bytes come. This set
steps every ready pump inline, as a plain function call. The pump's own task sleeps on an event all the while. It wakes
only for what is not bytes: the end of its direction, a fault, a cancellation. So structured concurrency still holds (a
pump exists exactly as long as its task runs), and bytes do not pay for it.

Who waits for this set's epoll? If a Trio task did, each wake-up would be a turn of Trio's loop: Trio's epoll fires
because ours did, Trio switches to the task, the task asks our epoll again. With one pairing that costs more than moving
its bytes. So it is the other way round. Trio tells its instruments when it has nothing left to run and is about to
sleep until a deadline (``before_io_wait``). There we sleep in Trio's place, on our epoll set, in which Trio's own epoll
set is one more descriptor. Bytes for a paired leg are moved at once. When anything comes for another task, we return to
Trio, which finds it in its own set. Two things Trio could not find there by itself: a task that a step has made
runnable, and a deadline that has passed meanwhile. For those we ring a doorbell: an eventfd for which a task of ours
waits in Trio.

Trio has no public name for its epoll set. But it is the only one that watches the doorbell, and the kernel shows that
in ``/proc/self/fdinfo``. Where this cannot be read, and in a Trio run that already has such a readiness set, a Trio
task waits for our epoll after all. That costs CPU time and nothing else.

Rules:

1. A :class:`~frelay.pairing.stepping.PolledSocket` is one leg: the pump that reads from it and the pump that writes to
   it. The interests of these two give its epoll mask. The mask is changed only when they change, which for a flowing
   stream is never. It is level-triggered, except for a pump that has read its source empty (``Interest.ARRIVAL``): edge
   triggering saves the kernel a second look at the socket that would find nothing. If a short read can have left
   something, epoll reports more than ``EPOLLIN``, and the pump then registers its socket again: the kernel checks the
   socket anew and reports what is there. This renewed check is the one thing that we rely on. A pump also does it when
   it falls idle, for arrivals that we do not know of.
2. A step never waits, and it is bounded in bytes and in records: a greedy pairing gets one step a round like all
   others. Small messages come first in a round. After each round Trio gets its turn if there is anything for it.
3. epoll reports ERR and HUP even if no interest is set. If no pump waits for the socket then, an error ends the
   pairing: the reset of a raw leg must not go unnoticed behind back-pressure. (The reset of a tunnel can go unnoticed,
   until its pump has delivered what it holds, or stall_timeout ends the pairing.) Two cases do not end the pairing, and
   epoll would report them again and again: a HUP alone (both directions are shut, and input is unread), and the reset
   of a party that had sent its FIN, behind bytes that are not delivered yet. They take the socket out of the set until
   a pump waits for it again. Such a reset also ends
   the direction to that party, while the reader goes on. Stream pumps with a budget are in the set for ERR and HUP
   alone: so they learn of a reset while they wait for their turn.
4. A descriptor leaves the set before it is closed. The pump's task does that in ``finally``.
5. No other process may read from a descriptor that Trio waits for. What made Trio's epoll ready for us must still be
   there when Trio looks, or Trio sleeps without us until its next deadline. So a listening socket belongs to one worker
   process.
6. A step wakes a task only through :meth:`ReadinessSet.wake` or :meth:`ReadinessSet.cancel`, or Trio would sleep on.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog
import trio

from frelay.pairing.raw_pump import RawPump, carry_arrivals
from frelay.pairing.stepping import Interest, PolledSocket

__all__ = ["ReadinessSet"]

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
# Reported once, when something comes. RDHUP and PRI tell what a short read may have left: a FIN, or bytes after an
# urgent one.
_ARRIVES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
_TROUBLE: Final = select.EPOLLERR | select.EPOLLHUP
# How many descriptors one round serves at most. After a round everything else in the process gets its turn.
_ROUND: Final = 64
# How many of these may be more than a small message: such a step takes up to a millisecond.
_BULK_OF_A_ROUND: Final = 16
_FDINFO: Final = Path("/proc/self/fdinfo")

# Used for every event: a name of this module is found faster than a member of an enumeration.
_READABLE: Final = Interest.SOURCE_READABLE
_WRITABLE: Final = Interest.SINK_WRITABLE
_ARRIVAL: Final = Interest.ARRIVAL


class ReadinessSet:
    """The epoll set of all paired legs, and the task that has its pumps stepped. A relay process has one."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sockets: dict[int, PolledSocket] = {}
        self._expecting: dict[int, RawPump] = {}
        """The pumps that wait for an arrival, by the descriptor of their source."""
        self._turn = 0
        self._woke_a_task = False
        self.sleeps_for_trio = False
        """Whether this set sleeps in Trio's place, so that bytes cost no turn of Trio's loop."""

    def __len__(self) -> int:
        return len(self._sockets)

    def refresh(self, polled: PolledSocket) -> None:
        """Make the registration of ``polled`` follow the interests of its two pumps."""
        if self._epoll.closed:
            # The whole relay is cancelled, and this set's task ended before the tasks of its pumps did.
            return None
        reader, writer = polled.reader, polled.writer
        if reader is None and writer is None:
            return self._forget(polled)
        mask = 0
        if writer is not None and writer.interest is _WRITABLE:
            mask = _OUT
        if reader is not None and reader.interest is _READABLE:
            mask |= _IN
        elif reader is not None and reader.interest is _ARRIVAL:
            mask = mask | _IN if mask else _ARRIVES
        if mask == polled.mask:
            return None
        if polled.mask is None:
            self._epoll.register(polled.fd, mask)
            self._sockets[polled.fd] = polled
        else:
            # The kernel checks the socket anew, so what came before is reported whatever the mask was.
            self._epoll.modify(polled.fd, mask)
        polled.mask = mask
        if mask == _ARRIVES:
            assert isinstance(reader, RawPump)  # noqa: S101  for the type checker
            self._expecting[polled.fd] = reader
        else:
            self._expecting.pop(polled.fd, None)
        return None

    def wake(self, event: trio.Event) -> None:
        """Set ``event``, from within a step."""
        event.set()
        self._woke_a_task = True

    def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope``, from within a step."""
        scope.cancel(reason="the connection broke")
        self._woke_a_task = True

    def _forget(self, polled: PolledSocket) -> None:
        if polled.mask is not None:
            polled.mask = None
            del self._sockets[polled.fd]
            self._expecting.pop(polled.fd, None)
            self._epoll.unregister(polled.fd)

    # --- waiting -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Have ready pumps stepped until cancelled."""
        try:
            if not _is_taken.get(False):
                await self._sleep_for_trio()
            await self._sleep_within_trio()
        finally:
            self._epoll.close()

    async def _sleep_for_trio(self) -> None:
        """Sleep in Trio's place; return only if that is not possible here."""
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

        True if Trio must be woken: because a step woke a task, or because the time is over.
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
                # With a timeout of 0 Trio did not mean to sleep: it has something to run anyway.
                return timeout > 0

    # --- one round -----------------------------------------------------------------------------------------------

    def serve(self, ready: Iterable[tuple[int, int]], trio_epoll: int = -1) -> bool:
        """Step the pumps of the descriptors that epoll found ready; True if ``trio_epoll`` was one of them."""
        sockets, expecting, is_for_trio = self._sockets, self._expecting, False
        arrivals: list[RawPump] = []
        others: list[tuple[int, int]] = []
        for fd, events in ready:
            if events == _IN and fd in expecting:
                arrivals.append(expecting[fd])
            elif fd == trio_epoll:
                is_for_trio = True
            else:
                others.append((fd, events))
        # Small messages first, because they are soon done.
        carry_arrivals(arrivals)
        if len(others) > _BULK_OF_A_ROUND:
            others = self._some_of(others)
        for fd, events in others:
            # An earlier step of this round may have ended the pump, or taken the socket out of the set. The descriptor
            # still means the same connection: it is closed by a task, and no task has run since.
            if (polled := sockets.get(fd)) is not None:
                try:
                    self._serve_other(polled, events)
                except Exception as error:
                    polled.fail(error)
        return is_for_trio

    def _some_of(self, others: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What this round serves: all that epoll reports only once, and in turn a few that it reports again."""
        once = [one for one in others if one[0] in self._expecting]
        again = [one for one in others if one[0] not in self._expecting]
        first = self._turn % max(1, len(again))
        self._turn += _BULK_OF_A_ROUND
        return once + (again[first:] + again[:first])[:_BULK_OF_A_ROUND]

    def _serve_other(self, polled: PolledSocket, events: int) -> None:
        """Serve a socket that is ready for something else than an arrival alone."""
        stepped = False
        reader, writer = polled.reader, polled.writer
        if reader is not None and reader.interest in (_READABLE, _ARRIVAL) and events & ~_OUT:
            reader.step()
            stepped = True
        if writer is not None and writer.interest is _WRITABLE and events & ~_IN:
            writer.step()
            stepped = True
        if stepped or not events & _TROUBLE:
            return
        self._meet_trouble(polled)

    def _meet_trouble(self, polled: PolledSocket) -> None:
        """epoll reports ERR or HUP for a socket that no pump waits for now: tell the pumps, and stop polling it."""
        for pump in (polled.reader, polled.writer):
            if pump is not None:
                pump.meet_trouble(polled)
        self._forget(polled)


# --- sleeping in Trio's place -------------------------------------------------------------------------------------

_is_taken: Final = trio.lowlevel.RunVar[bool]("frelay.readiness: a set sleeps for this Trio run")
"""Whether a set sleeps in the place of this Trio run. While one of two sets slept, the other's sockets would wait."""


class _Sleeper(trio.abc.Instrument):
    """Sleeps in Trio's place whenever Trio would sleep; see the theory of operation."""

    def __init__(self, readiness: ReadinessSet, doorbell: int) -> None:
        self._readiness = readiness
        self._doorbell = doorbell
        self._has_searched = False
        self.trio_epoll: int | None = None
        self.failure: BaseException | None = None

    def before_io_wait(self, timeout: float) -> None:
        """Trio is about to sleep or, with a timeout of 0, to check its sockets before it runs the next tasks."""
        try:
            if not self._has_searched:
                self._find_trio_epoll()
            if self.trio_epoll is None or not len(self._readiness):
                return  # Trio sleeps by itself
            if self._readiness.move_bytes(timeout, self.trio_epoll):
                os.eventfd_write(self._doorbell, 1)
        except BaseException as error:  # Trio would log it and remove this instrument, and no byte would move
            self.failure = error
            os.eventfd_write(self._doorbell, 1)

    def _find_trio_epoll(self) -> None:
        # Not earlier: only now does Trio's epoll set watch the doorbell.
        self._has_searched = True
        self.trio_epoll = _epoll_that_watches(self._doorbell)
        if self.trio_epoll is None:
            os.eventfd_write(self._doorbell, 1)
            return
        self._readiness._epoll.register(self.trio_epoll, _IN)
        self._readiness.sleeps_for_trio = True


def _epoll_that_watches(descriptor: int) -> int | None:
    """The descriptor of the one epoll set that watches ``descriptor``; None if /proc shows none, or more than one."""
    found: list[int] = []
    try:
        for entry in _FDINFO.iterdir():
            try:
                lines = entry.read_text().splitlines()
            except OSError:
                continue  # the descriptor that read the directory, which is closed by now
            # "tfd:  7 events:  19 data: ...", one line for each descriptor in the set
            if any(line.split()[:2] == ["tfd:", str(descriptor)] for line in lines):
                found.append(int(entry.name))
    except OSError:
        return None
    return found[0] if len(found) == 1 else None
