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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from frelay.protocol.messages import PartyName, Refused

if TYPE_CHECKING:
    from frelay.leg import Leg
    from frelay.pairing import Pairing

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

    __slots__ = ("_wake", "leg", "reckon_expiry", "since", "verdict")

    def __init__(self, leg: Leg, wake: Callable[[], None], since: float, reckon_expiry: Callable[[], None]) -> None:
        self.leg = leg
        self.since = since
        """When the leg entered, on the lobby's clock."""
        self.verdict: Taken | Withdrawn | None = None
        self._wake = wake
        self.reckon_expiry: Final = reckon_expiry
        """To be called when the clock was set: reckons again when the leg's certificate ends its wait."""

    def decide(self, verdict: Taken | Withdrawn) -> None:
        """Settle what becomes of the leg, once, and wake its task."""
        if self.verdict is None:
            self.verdict = verdict
            self._wake()


class Lobby:
    """The two queues of one route."""

    def __init__(self, *, max_waiting: int, clock: Callable[[], float]) -> None:
        self.max_waiting = max_waiting
        """Places a party; may be changed by a reload, and then counts for whoever comes next."""
        self._clock: Final = clock
        # Dictionaries keep their order and give a place up in O(1), wherever in the queue it stands.
        self._queues: Final[dict[PartyName, dict[Place, None]]] = {"func1": {}, "func2": {}}
        self._last_seen: Final[dict[PartyName, float]] = {}
        self._closed: Withdrawn | None = None

    def waiting(self, party: PartyName) -> Iterator[Place]:
        """The places of one party, longest wait first."""
        return iter(tuple(self._queues[party]))

    def count(self, party: PartyName) -> int:
        """How many legs of one party wait."""
        return len(self._queues[party])

    def peer_seen(self, party: PartyName) -> float | None:
        """Seconds since the other party of ``party`` was last here (0 while it waits), or None if it never was."""
        other = opposite(party)
        if self._queues[other]:
            return 0.0
        seen = self._last_seen.get(other)
        return None if seen is None else max(0.0, self._clock() - seen)

    def note_seen(self, party: PartyName) -> None:
        """The party was here just now."""
        self._last_seen[party] = self._clock()

    def objection(self, leg: Leg) -> Withdrawn | None:
        """Why ``leg`` cannot come in now, or None if it can."""
        if self._closed is not None:
            return self._closed
        if self._is_full(leg.party) and self._find_stale(leg) is None and self._find_spare(leg) is None:
            return Withdrawn(
                Refused("queue-full", f"{self.max_waiting} legs of this party are waiting already", retry_after=5.0)
            )
        return None

    def _is_full(self, party: PartyName) -> bool:
        return self.count(party) >= self.max_waiting

    def _find_spare(self, leg: Leg) -> Place | None:
        """The place in a full queue that ``leg`` has a better right to, if there is one."""
        queue = self._queues[leg.party]
        held = Counter(place.leg.identity for place in queue)
        greediest, most = max(held.items(), key=lambda item: item[1])
        if held[leg.identity] + 2 > most:
            return None
        return next(place for place in reversed(queue) if place.leg.identity == greediest)

    def _find_stale(self, leg: Leg) -> Place | None:
        if leg.attempt is None:
            return None
        return next((place for queue in self._queues.values() for place in queue if leg.is_retry_of(place.leg)), None)

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
        place = Place(leg, wake, self._clock(), reckon_expiry)
        self._queues[leg.party][place] = None
        return place

    def head(self, party: PartyName) -> Place | None:
        """The place of ``party`` that is next to be paired."""
        return next(iter(self._queues[party]), None)

    def take(self, place: Place, pairing: Pairing) -> None:
        """The leg in ``place`` is paired."""
        self._remove(place)
        place.decide(Taken(pairing))

    def withdraw(self, place: Place, verdict: Withdrawn) -> None:
        """Give ``place`` up for a reason that its leg must be told."""
        self._remove(place)
        place.decide(verdict)

    def leave(self, place: Place) -> None:
        """The leg in ``place`` went of its own accord."""
        self._remove(place)

    def _remove(self, place: Place) -> None:
        party = place.leg.party
        if place in self._queues[party]:
            del self._queues[party][place]
            self.note_seen(party)

    def close(self, verdict: Withdrawn) -> None:
        """Withdraw everybody, and whoever comes later, with the same reason."""
        self._closed = verdict
        for party in self._queues:
            for place in self.waiting(party):
                self.withdraw(place, verdict)
