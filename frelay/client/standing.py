"""What a listener decides, without I/O: how many legs wait, when to join again, and what ends it.

Standard library only. Theory of operation: a leg is one connection of ours to the relay, from JOIN until its wire is
released. A listener keeps some legs waiting at all times, so that a caller finds one at once. The four listeners
(blocking, Trio, asyncio, and ``frelay connect --to``) must decide the same, so it is decided once, in
:class:`Standing`. A shell has one loop, which does what :meth:`Standing.next` says, and each leg reports what happens
to it:

    next() ─► Start(leg) ─► status(WAITING) ─► status(PAIRED) ─► joined ─► accepted ─► released
                               └─► failed          └─► failed

* A leg counts as waiting until PAIRED. Then the next one starts at once: a caller with a slow handshake delays nobody.
* A failure before PAIRED (no relay, not admitted) concerns all legs. It is told once, and no leg starts before a pause
  is over; other legs that fail meanwhile had the same cause. :class:`Rejoin` decides how long the pause is, and which
  error ends the listener. All files are read again before the next join.
* A ``wait-timeout`` is no failure: nobody came, and the leg is replaced. The same holds for a relay that has room for
  fewer legs than we want: we keep those that fit, and ask again later.
* A failure after PAIRED concerns one caller. It is told, and ends nothing. The leg keeps its slot for a moment, so that
  a caller that fails again and again cannot keep this process busy.
* If the program accepts no wire, no further legs start, and callers wait at the relay, where another listener may take
  them.
* With ``highest`` above ``lowest``: if the relay pairs a leg soon after it began to wait, callers are queueing. Then we
  keep twice as many legs waiting, up to ``highest``. When no caller has come for some seconds, we give up half of the
  surplus, from the newest on: the relay pairs the oldest leg first, so that a leg that we give up is not the one that a
  caller gets at that moment.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from frelay.client.options import JoinPlan, Options
from frelay.client.plans import Plans
from frelay.client.retry import Retry, random_pause, read_retry
from frelay.errors import FrelayError, Refused
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["Action", "End", "GiveUp", "Leg", "Rejoin", "Standing", "Start", "Tell", "Wait", "is_wait_timeout"]

# If a leg waited for less than this, its caller was queueing. A join takes two or three round trips; this is many.
_PAIRED_QUICKLY: Final = 1.0
# When no caller has come for _IDLE seconds we give up half of the surplus, and then half of the rest every _IDLE_STEP.
_IDLE: Final = 5.0
_IDLE_STEP: Final = 2.0
# How long we keep to the room that the relay had, at least; its own retry_after is 5 s.
_ROOM_KNOWN: Final = 5.0
# How long a leg keeps its slot after its pairing failed; twice as long after each further failure in a row.
_FIRST_PENALTY: Final = 0.1
_LONGEST_PENALTY: Final = 5.0
# A certificate and its key are two files, and during a renewal only one of them may be new. So a failure that no pause
# mends ends a listener only when it has come once more after each of so many pauses, with all files read again.
_TRIES_WITH_FILES_READ_AGAIN: Final = 3
# Paired legs whose handshake is not done. Callers that stop in the middle of it hold their slots for 30 s.
_MOST_IN_HANDSHAKES: Final = 64


class _State(Enum):
    UNPAIRED = auto()
    GIVEN_UP = auto()
    PAIRED = auto()
    READY = auto()
    ACCEPTED = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Leg:
    """One connection to the relay, from JOIN until its wire is released."""

    plan: JoinPlan
    state: _State = _State.UNPAIRED
    since: float | None = None
    """When the relay sent WAITING."""

    @property
    def is_paired(self) -> bool:
        """Whether PAIRED has come; then it must not be given up any more."""
        return self.state in (_State.PAIRED, _State.READY, _State.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Start:
    """Join with this leg."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Cancel this leg."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the user of this error, which ends nothing. With ``pause`` no leg joins for that many seconds."""

    error: FrelayError
    pause: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until a leg has reported something; at most ``seconds``, if that is not None."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class End:
    """Give up all legs that are not paired: another join cannot help."""

    error: FrelayError


Action = Start | GiveUp | Tell | Wait | End


class Rejoin:
    """How long a listener pauses after a failure that concerns all legs, and which failure ends it."""

    def __init__(self, retry: Retry | None = None) -> None:
        self._retry: Final = retry or Retry()
        self._failures = 0
        """How many joins in a row got no WAITING."""
        self._lasting = 0
        """How many of them failed for a reason that no pause mends."""

    def accepted(self) -> None:
        """The relay has accepted a leg."""
        self._failures = self._lasting = 0

    def after(self, error: FrelayError) -> float | None:
        """Seconds to pause after ``error``; None if it ends the listener."""
        failures = self._failures
        self._failures += 1
        if self._retry.tries is not None and failures >= self._retry.tries:
            return None
        pause = self._retry.pause_after(error, 0, failures)
        if pause is not None:
            return pause
        self._lasting += 1
        if self._lasting > _TRIES_WITH_FILES_READ_AGAIN:
            return None
        return random_pause(self._retry, self._lasting - 1)

    def concerns_all(self, error: FrelayError) -> bool:
        """Whether an error after PAIRED concerns all legs, and not this caller alone."""
        return False


class Standing:
    """The legs of one listener. Not safe for two threads at once."""

    def __init__(
        self, plans: Plans, rejoin: Rejoin, clock: Callable[[], float], *, lowest: int, highest: int, most: int
    ) -> None:
        self._plans: Final = plans
        self._rejoin: Final = rejoin
        self._clock: Final = clock
        self._lowest: Final = lowest
        """How many legs wait if no callers queue."""
        self._highest: Final = highest
        """How many legs wait if callers queue."""
        self._most: Final = most
        """How many legs there are at most, from JOIN until they are released."""
        self._unpaired: Final[list[Leg]] = []
        """Oldest first."""
        self._surplus: Final[deque[Leg]] = deque()
        """Legs to give up."""
        self._held: Final[list[float]] = []
        """A heap: when the slots of failed pairings become free."""
        self._told: Final[deque[Tell]] = deque()
        self._taken = 0
        """How many legs are paired, or keep their slot after a failure."""
        self._in_handshake = self._ready = 0
        self._target = lowest
        """How many legs should wait at the relay."""
        self._room: int | None = None
        """How many legs the relay has room for, as far as we know."""
        self._room_known_until = self._surplus_until = self._not_before = clock()
        self._failed_pairings = 0
        """How many pairings in a row failed before there was a wire."""
        self._failure: FrelayError | None = None
        """Why a leg could not join, until :meth:`next` has handled it."""
        self._end: End | None = None

    @classmethod
    def make(cls, address: str, standing: int, clock: Callable[[], float], options: Options) -> Standing:
        """For ``listen`` with these arguments; raises what :meth:`JoinPlan.make` raises."""
        if standing < 1:
            raise ValueError(f"standing={standing!r}: at least one leg must wait")
        retry = read_retry(options.get("retry"))
        options = options.copy()
        options["retry"] = None  # a leg tries once, and the listener decides what follows
        plans = Plans(address, options, wait_ends_when_paired=True)
        plans.current()  # a wrong argument or file is an error of this call, and not of the first caller
        return cls(plans, Rejoin(retry), clock, lowest=standing, highest=standing, most=standing + _MOST_IN_HANDSHAKES)

    @property
    def unpaired(self) -> tuple[Leg, ...]:
        """The legs that wait or join, oldest first."""
        return tuple(self._unpaired)

    @property
    def in_handshake(self) -> int:
        """How many legs are paired and have no wire yet. Their wires come also after the end of the listener."""
        return self._in_handshake

    # --- what the shell does next --------------------------------------------------------------------------------

    def next(self) -> Action:
        """What to do now. Call it again after each action, and after each report of a leg; End is the last one."""
        now = self._clock()
        if self._told:
            return self._told.popleft()
        if self._end is not None:
            return self._end
        if self._failure is not None:
            return self._pause_or_end(now)
        self._free_slots(now)
        self._lower_target(now)
        while self._surplus:
            leg = self._surplus.popleft()
            if leg.state is _State.GIVEN_UP:  # and not paired or over meanwhile
                return GiveUp(leg)
        if self._needs_leg():
            if now < self._not_before:
                return Wait(self._not_before - now)
            try:
                leg = Leg(self._plans.current())
            except FrelayError as error:
                self._failure = error
                return self._pause_or_end(now)
            self._unpaired.append(leg)
            return Start(leg)
        return Wait(self._time_to_next_change(now))

    def _pause_or_end(self, now: float) -> Action:
        error, self._failure = self._failure, None
        if error is None:
            raise AssertionError("there is no failure")
        pause = self._rejoin.after(error)
        if pause is None:
            self._end = End(error)
            return self._end
        self._plans.read_again()
        self._not_before = now + pause
        self._target = self._lowest
        return Tell(error, pause)

    def _needs_leg(self) -> bool:
        places = min(self._target, self._most - self._taken)
        if self._room is not None:
            places = min(places, self._room)
        return len(self._unpaired) < places and self._ready < self._target

    def _free_slots(self, now: float) -> None:
        while self._held and self._held[0] <= now:
            heapq.heappop(self._held)
            self._taken -= 1
        if now >= self._room_known_until:
            self._room = None

    def _lower_target(self, now: float) -> None:
        if now < self._surplus_until or not self._has_surplus:
            return
        self._surplus_until = now + _IDLE_STEP
        self._target = max(self._lowest, self._target // 2)
        while len(self._unpaired) > self._target:
            leg = self._unpaired.pop()
            leg.state = _State.GIVEN_UP
            self._surplus.append(leg)

    @property
    def _has_surplus(self) -> bool:
        # A failure lowers the target at once. The legs above it go when no caller has come for a moment.
        return max(self._target, len(self._unpaired)) > self._lowest

    def _time_to_next_change(self, now: float) -> float | None:
        times = self._held[:1]
        if self._room is not None:
            times.append(self._room_known_until)
        if self._has_surplus:
            times.append(self._surplus_until)
        return max(min(times) - now, 0.0) if times else None

    # --- what happens to a leg -------------------------------------------------------------------------------------

    def status(self, leg: Leg, message: Message) -> None:
        """The relay has sent a message to ``leg``."""
        if isinstance(message, Waiting):
            leg.since = self._clock()
            self._rejoin.accepted()
        elif isinstance(message, Paired) and leg.state in (_State.UNPAIRED, _State.GIVEN_UP):
            self._on_paired(leg)

    def _on_paired(self, leg: Leg) -> None:
        now = self._clock()
        if leg.state is _State.UNPAIRED:
            self._unpaired.remove(leg)
        leg.state = _State.PAIRED
        self._taken += 1
        self._in_handshake += 1
        self._rejoin.accepted()
        self._surplus_until = now + _IDLE
        if leg.since is None or now - leg.since < _PAIRED_QUICKLY:
            highest = self._highest if self._room is None else min(self._highest, self._room)
            self._target = max(self._lowest, min(highest, self._target * 2))

    def joined(self, leg: Leg) -> None:
        """The wire of ``leg`` is ready: its peer is checked."""
        self._in_handshake -= 1
        self._ready += 1
        self._failed_pairings = 0
        leg.state = _State.READY

    def accepted(self, leg: Leg) -> None:
        """The program has the wire of ``leg``."""
        self._ready -= 1
        leg.state = _State.ACCEPTED

    def released(self, leg: Leg) -> None:
        """The wire of ``leg``, which was accepted, does not count any more."""
        self._taken -= 1
        leg.state = _State.OVER

    def failed(self, leg: Leg, error: FrelayError) -> None:
        """The join of ``leg`` has failed."""
        was_paired, was_waiting = leg.is_paired, leg.since is not None
        others = len(self._unpaired) - (leg.state is _State.UNPAIRED)
        self.gone(leg)
        if was_paired and not self._rejoin.concerns_all(error):
            self._told.append(Tell(error))
            self._hold_slot()
        elif is_wait_timeout(error) and was_waiting:
            pass  # no caller came
        elif isinstance(error, Refused) and error.code in ("queue-full", "limit") and others:
            self._room = others
            self._room_known_until = self._clock() + max(_ROOM_KNOWN, error.retry_after or 0.0)
            self._target = max(self._lowest, min(self._target, others))
        else:
            self.stumbled(error)

    def stumbled(self, error: FrelayError) -> None:
        """Something has happened that concerns all legs."""
        if self._failure is None and self._clock() >= self._not_before:
            self._failure = error

    def gone(self, leg: Leg) -> None:
        """``leg`` has ended before it was accepted; nobody needs to know."""
        if leg.state is _State.UNPAIRED:
            self._unpaired.remove(leg)
        elif leg.state is _State.PAIRED:
            self._in_handshake -= 1
            self._taken -= 1
        leg.state = _State.OVER

    def _hold_slot(self) -> None:
        """Keep the slot of a failed pairing for a moment."""
        pause = min(_LONGEST_PENALTY, _FIRST_PENALTY * 2.0 ** min(self._failed_pairings, 16))
        self._failed_pairings += 1
        self._taken += 1
        heapq.heappush(self._held, self._clock() + random.uniform(pause / 2, pause))  # noqa: S311  not a secret


def is_wait_timeout(error: FrelayError) -> bool:
    """Whether nobody came in time, which is no fault."""
    return isinstance(error, Refused) and error.code == "wait-timeout"
