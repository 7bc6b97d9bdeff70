"""The lobby of one route: two FIFO queues of legs, and who meets whom.

Plain data, no I/O and no waiting: every method is one synchronous decision, so two tasks can never disagree about a
place. Whoever takes a place or withdraws it says so in the place (:attr:`Place.verdict`, the first one stays) and wakes
the task that waits in it; that task, and only that task, then acts on its own leg.

Rules:

1. A leg is paired with the leg of the other party that has waited longest.
2. A leg with the identity and the ``attempt`` of one that waits, on either side, replaces it: the function lost its
   connection and came back. So a function never meets itself through a retry.
3. A queue holds at most ``max_waiting_per_party`` legs; a replacement needs no room. A full one is shared: a function
   comes in all the same if another holds two places more than it does, and that one gives up its latest. So whoever
   opens connections without end takes places from itself, and one function alone may have them all.
4. A closed lobby takes nobody in, and says why.

Every rule is kept by an index, so that no step of one leg costs more because others wait: a member of a route could
otherwise hold up the loop of the whole relay by filling a queue. A step costs O(1); :meth:`Lobby.waiting` alone goes
over everybody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from frelay.net.shares import Shares
from frelay.protocol.messages import PartyName, Refused

if TYPE_CHECKING:
    from frelay.pairing.leg import Leg
    from frelay.pairing.pairing import Pairing

__all__ = ["Lobby", "Place", "Taken", "Withdrawn", "opposite"]


def opposite(party: PartyName) -> PartyName:
    """The other party of a route."""
    return "func2" if party == "func1" else "func1"


@dataclass(frozen=True, slots=True)
class Taken:
    """The leg in this place was paired."""

    pairing: Pairing


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The place was given up from outside; the leg is to be told ``refusal``, after DRAINING if the relay ends."""

    refusal: Refused
    reconnect_in: float | None = None


class Place:
    """One leg's place in a queue."""

    __slots__ = ("_wake", "holder", "leg", "marks", "number", "reckon_expiry", "since", "verdict")

    def __init__(
        self, leg: Leg, wake: Callable[[], None], since: float, reckon_expiry: Callable[[], None], number: int
    ) -> None:
        self.leg = leg
        self.holder: Final = leg.holder
        self.marks: Final = leg.marks()
        self.since = since
        """When the leg entered, on the lobby's clock."""
        self.number: Final = number
        """Places are numbered as they are taken, since two may be taken in one moment of the clock."""
        self.verdict: Taken | Withdrawn | None = None
        self._wake = wake
        self.reckon_expiry: Final = reckon_expiry
        """To be called when the clock was set: reckons again when the leg's certificate ends its wait."""

    def decide(self, verdict: Taken | Withdrawn) -> None:
        """Settle what becomes of the leg, once, and wake its task."""
        if self.verdict is None:
            self.verdict = verdict
            self._wake()


# OrderedDict, because a plain dictionary finds its first key in O(n) after n others were taken out before it.
_Queue = OrderedDict[Place, None]


@dataclass(slots=True)
class _Meeting:
    """Those who may meet each other, by party, longest wait first."""

    func1: _Queue = field(default_factory=OrderedDict)
    func2: _Queue = field(default_factory=OrderedDict)

    def queue(self, party: PartyName) -> _Queue:
        """The queue of one party."""
        return self.func1 if party == "func1" else self.func2


# How many of a closed lobby are on their way out at a time.
_SENT_AWAY_AT_ONCE: Final = 16

# The key of those who join without one; there are no others yet.
_NO_KEY: Final = None


class Lobby:
    """Who waits on one route."""

    def __init__(self, *, max_waiting: int, clock: Callable[[], float]) -> None:
        self.max_waiting = max_waiting
        """Places a party; may be changed by a reload, and then counts for whoever comes next."""
        self._clock: Final = clock
        self._meetings: Final[dict[None, _Meeting]] = {}
        """By key; gone when nobody waits there."""
        self._attempts: Final[dict[Hashable, _Queue]] = {}
        """By each of the marks of a leg that tell its attempt."""
        self._held: Final[dict[PartyName, Shares[str, Place]]] = {"func1": Shares(), "func2": Shares()}
        """The places of each party by the function that has them."""
        self._last_number = 0
        self._last_seen: Final[dict[PartyName, float]] = {}
        self.closed: Withdrawn | None = None
        """Why it is closed; None while it is open."""

    def waiting(self, party: PartyName) -> Iterator[Place]:
        """The places of one party as they are now, longest wait first. O(n)."""
        return iter([place for meeting in self._meetings.values() for place in meeting.queue(party)])

    def count(self, party: PartyName) -> int:
        """How many legs of one party wait."""
        return len(self._held[party])

    def peer_seen(self, party: PartyName) -> float | None:
        """Seconds since the other party of ``party`` was last here (0 while it waits), or None if it never was."""
        other = opposite(party)
        if self.count(other):
            return 0.0
        seen = self._last_seen.get(other)
        return None if seen is None else max(0.0, self._clock() - seen)

    def note_seen(self, party: PartyName) -> None:
        """The party was here just now."""
        self._last_seen[party] = self._clock()

    def objection(self, leg: Leg) -> Withdrawn | None:
        """Why ``leg`` cannot come in now, or None if it can."""
        if self.closed is not None:
            return self.closed
        if self._is_full(leg.party) and not self._makes_room_itself(leg) and self._find_spare(leg) is None:
            return Withdrawn(
                Refused("queue-full", f"{self.max_waiting} legs of this party are waiting already", retry_after=5.0)
            )
        return None

    def _is_full(self, party: PartyName) -> bool:
        return self.count(party) >= self.max_waiting

    def _makes_room_itself(self, leg: Leg) -> bool:
        stale = self._find_stale(leg)
        return stale is not None and stale.leg.party == leg.party

    def _find_spare(self, leg: Leg) -> Place | None:
        """The place in a full queue that ``leg`` has a better right to, if there is one."""
        held = self._held[leg.party]
        return held.newest(held.greediest()) if held.held(leg.holder) + 2 <= held.most else None

    def _find_stale(self, leg: Leg) -> Place | None:
        """The place, on either side, of a leg that ``leg`` is a retry of; of several, the longest wait."""
        found = [next(iter(self._attempts[mark])) for mark in leg.marks() if mark in self._attempts]
        return min(found, key=lambda place: place.number, default=None)

    def has_stale(self, leg: Leg) -> bool:
        """Whether ``leg`` would replace one that waits."""
        return self._find_stale(leg) is not None

    def replace_stale(self, leg: Leg) -> None:
        """Withdraw the place of an earlier leg of the same identity and attempt, if there is one."""
        stale = self._find_stale(leg)
        if stale is not None:
            self.withdraw(stale, Withdrawn(Refused("replaced", "the same attempt came in on a newer connection")))

    def enter(self, leg: Leg, wake: Callable[[], None], *, reckon_expiry: Callable[[], None]) -> Place:
        """Queue ``leg``, which has met no objection; ``wake`` is called, once, when a verdict about it falls."""
        spare = self._find_spare(leg) if self._is_full(leg.party) else None
        if spare is not None:
            text = "the queue is full, and a function with fewer places in it came"
            self.withdraw(spare, Withdrawn(Refused("queue-full", text, retry_after=5.0)))
        self._last_number += 1
        place = Place(leg, wake, self._clock(), reckon_expiry, self._last_number)
        self._meetings.setdefault(_NO_KEY, _Meeting()).queue(leg.party)[place] = None
        for mark in place.marks:
            self._attempts.setdefault(mark, OrderedDict())[place] = None
        self._held[leg.party].add(place.holder, place)
        return place

    def head(self, party: PartyName) -> Place | None:
        """The place of ``party`` that is next to be paired."""
        meeting = self._meetings.get(_NO_KEY)
        return None if meeting is None else next(iter(meeting.queue(party)), None)

    def take(self, place: Place, pairing: Pairing) -> None:
        """The leg in ``place`` is paired."""
        self._remove(place)
        place.decide(Taken(pairing))

    def withdraw(self, place: Place, verdict: Withdrawn) -> None:
        """Give ``place`` up for a reason that its leg must be told."""
        self._remove(place)
        place.decide(verdict)

    def leave(self, place: Place) -> None:
        """The task of the leg in ``place`` attends it no more. Each leg says so once, whatever the reason was."""
        self._remove(place)
        if self.closed is not None:
            self._send_away(1)

    def _remove(self, place: Place) -> None:
        leg = place.leg
        meeting = self._meetings.get(_NO_KEY)
        if meeting is None or place not in meeting.queue(leg.party):
            return
        del meeting.queue(leg.party)[place]
        if not meeting.func1 and not meeting.func2:
            del self._meetings[_NO_KEY]
        for mark in place.marks:
            equals = self._attempts[mark]
            del equals[place]
            if not equals:
                del self._attempts[mark]
        self._held[leg.party].remove(place.holder, place)
        self.note_seen(leg.party)

    def close(self, verdict: Withdrawn) -> None:
        """Withdraw all who wait, and all who come later, with the same reason.

        Nobody is paired from now on. Those who wait go a few at a time, each as one before it has gone: the tasks of
        thousands, woken at once, would keep everybody else waiting for a second.
        """
        self.closed = verdict
        self._send_away(_SENT_AWAY_AT_ONCE)

    def _send_away(self, count: int) -> None:
        for _ in range(count):
            place = self.head("func1") or self.head("func2")
            if place is None or self.closed is None:
                return
            self.withdraw(place, self.closed)
