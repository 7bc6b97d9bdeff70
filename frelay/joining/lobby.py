"""The lobby of one route: two FIFO queues of waiting legs, and the rules by which they are matched.

Plain data, no I/O and no waiting: every method is one synchronous decision, so two tasks can never disagree about a
leg. The task that matches or evicts a waiting leg writes its decision into the leg's :attr:`Waiter.verdict` (the first
one stays) and wakes the leg's own task. Only that task then acts on the leg.

Rules:

1. A leg is paired with the leg of the other party that has waited longest.
2. A leg with the identity and the ``attempt`` of one that waits, on either side, replaces it: the function lost its
   connection and came back. So a function never meets itself through a retry.
3. A queue holds at most ``max_waiting_per_party`` legs; a replacement needs no room. When a queue is full and one
   function has at least two more legs in it than the newcomer's function, the newest leg of the function with the most
   is evicted for the newcomer. So a function that opens connections without end evicts only its own, and a function
   that is alone may fill the queue.
4. A closed lobby takes no leg in, and says why.

An index serves each rule, so that a step of one leg costs O(1) however many others wait. Otherwise one party of a route
could hold up the event loop of the whole relay by filling a queue. Only :meth:`Lobby.waiting` visits every leg.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from frelay.net.shares import Shares
from frelay.protocol.messages import PartyName
from frelay.protocol.refusal import Refusal

if TYPE_CHECKING:
    from frelay.pairing.leg import Leg
    from frelay.pairing.pairing import Pairing

__all__ = ["Lobby", "Matched", "Waiter", "opposite"]


def opposite(party: PartyName) -> PartyName:
    """The other party of a route."""
    return "func2" if party == "func1" else "func1"


@dataclass(frozen=True, slots=True)
class Matched:
    """The leg was matched with another one."""

    pairing: Pairing


class Waiter:
    """One leg in a queue."""

    __slots__ = ("_wake", "holder", "leg", "marks", "number", "recompute_expiry", "since", "verdict")

    def __init__(
        self, leg: Leg, wake: Callable[[], None], since: float, recompute_expiry: Callable[[], None], number: int
    ) -> None:
        self.leg = leg
        self.holder: Final = leg.holder
        self.marks: Final = leg.marks()
        self.since = since
        """When the leg entered, on the lobby's clock."""
        self.number: Final = number
        """Waiters are numbered as they enter, because two may enter at the same reading of the clock."""
        self.verdict: Matched | Refusal | None = None
        """What became of the leg: matched, or evicted with a refusal for its function; None while it waits."""
        self._wake = wake
        self.recompute_expiry: Final = recompute_expiry
        """To be called when the system clock was set: computes again when the leg's certificate ends its wait."""

    def decide(self, verdict: Matched | Refusal) -> None:
        """Decide what becomes of the leg and wake its task; only the first decision counts."""
        if self.verdict is None:
            self.verdict = verdict
            self._wake()


# OrderedDict, because a plain dictionary finds its first key in O(n) after n others were taken out before it.
_Queue = OrderedDict[Waiter, None]


@dataclass(slots=True)
class _Meeting:
    """The legs that may be matched with each other, by party, longest wait first."""

    func1: _Queue = field(default_factory=OrderedDict)
    func2: _Queue = field(default_factory=OrderedDict)

    def queue(self, party: PartyName) -> _Queue:
        """The queue of one party."""
        return self.func1 if party == "func1" else self.func2


# How many legs of a closed lobby are woken at a time.
_EVICTED_AT_ONCE: Final = 16

# The key of legs that join without one; there are no others yet.
_NO_KEY: Final = None


class Lobby:
    """The legs that wait on one route."""

    def __init__(self, *, max_waiting: int, clock: Callable[[], float]) -> None:
        self.max_waiting = max_waiting
        """How many legs of each party may wait. A reload may change it, for legs that enter from then on."""
        self._clock: Final = clock
        self._meetings: Final[dict[None, _Meeting]] = {}
        """By key; removed when no leg waits there."""
        self._attempts: Final[dict[Hashable, _Queue]] = {}
        """By each of the marks that tell the attempt of a leg."""
        self._held: Final[dict[PartyName, Shares[str, Waiter]]] = {"func1": Shares(), "func2": Shares()}
        """The legs of each party by the function that they belong to."""
        self._last_number = 0
        self._last_seen: Final[dict[PartyName, float]] = {}
        self.closed: Refusal | None = None
        """Why it is closed; None while it is open."""

    def waiting(self, party: PartyName) -> Iterator[Waiter]:
        """The waiters of one party as they are now, longest wait first. O(n)."""
        return iter([waiter for meeting in self._meetings.values() for waiter in meeting.queue(party)])

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

    def objection(self, leg: Leg) -> Refusal | None:
        """Why ``leg`` cannot enter now, or None if it can."""
        if self.closed is not None:
            return self.closed
        if self._is_full(leg.party) and not self._makes_room_itself(leg) and self._find_spare(leg) is None:
            return Refusal("queue-full", f"{self.max_waiting} legs of this party are waiting already", retry_after=5.0)
        return None

    def _is_full(self, party: PartyName) -> bool:
        return self.count(party) >= self.max_waiting

    def _makes_room_itself(self, leg: Leg) -> bool:
        stale = self._find_stale(leg)
        return stale is not None and stale.leg.party == leg.party

    def _find_spare(self, leg: Leg) -> Waiter | None:
        """The waiter in a full queue that is evicted if ``leg`` enters, if there is one."""
        held = self._held[leg.party]
        return held.newest(held.greediest()) if held.held(leg.holder) + 2 <= held.most else None

    def _find_stale(self, leg: Leg) -> Waiter | None:
        """The waiter, of either party, that ``leg`` is a retry of; of several, the longest wait."""
        found = [next(iter(self._attempts[mark])) for mark in leg.marks() if mark in self._attempts]
        return min(found, key=lambda waiter: waiter.number, default=None)

    def has_stale(self, leg: Leg) -> bool:
        """Whether ``leg`` would replace one that waits."""
        return self._find_stale(leg) is not None

    def replace_stale(self, leg: Leg) -> None:
        """Evict the earlier leg of the same identity and attempt, if there is one."""
        stale = self._find_stale(leg)
        if stale is not None:
            self.evict(stale, Refusal("replaced", "the same attempt came in on a newer connection"))

    def enter(self, leg: Leg, wake: Callable[[], None], *, recompute_expiry: Callable[[], None]) -> Waiter:
        """Queue ``leg``, to which there is no objection; ``wake`` is called once, when its verdict is decided."""
        spare = self._find_spare(leg) if self._is_full(leg.party) else None
        if spare is not None:
            text = "the queue is full, and a function with fewer places in it came"
            self.evict(spare, Refusal("queue-full", text, retry_after=5.0))
        self._last_number += 1
        waiter = Waiter(leg, wake, self._clock(), recompute_expiry, self._last_number)
        self._meetings.setdefault(_NO_KEY, _Meeting()).queue(leg.party)[waiter] = None
        for mark in waiter.marks:
            self._attempts.setdefault(mark, OrderedDict())[waiter] = None
        self._held[leg.party].add(waiter.holder, waiter)
        return waiter

    def head(self, party: PartyName) -> Waiter | None:
        """The waiter of ``party`` that is matched next: the one with the longest wait."""
        meeting = self._meetings.get(_NO_KEY)
        return None if meeting is None else next(iter(meeting.queue(party)), None)

    def match(self, waiter: Waiter, pairing: Pairing) -> None:
        """``waiter`` was matched: ``pairing`` takes over its leg."""
        self._remove(waiter)
        waiter.decide(Matched(pairing))

    def evict(self, waiter: Waiter, refusal: Refusal) -> None:
        """Take ``waiter`` out of its queue; its task then tells its function ``refusal``."""
        self._remove(waiter)
        waiter.decide(refusal)

    def leave(self, waiter: Waiter) -> None:
        """The task of ``waiter`` attends its leg no longer. Each task calls this at its end, whatever the reason."""
        self._remove(waiter)
        if self.closed is not None:
            self._evict_some(1)

    def _remove(self, waiter: Waiter) -> None:
        leg = waiter.leg
        meeting = self._meetings.get(_NO_KEY)
        if meeting is None or waiter not in meeting.queue(leg.party):
            return
        del meeting.queue(leg.party)[waiter]
        if not meeting.func1 and not meeting.func2:
            del self._meetings[_NO_KEY]
        for mark in waiter.marks:
            equals = self._attempts[mark]
            del equals[waiter]
            if not equals:
                del self._attempts[mark]
        self._held[leg.party].remove(waiter.holder, waiter)
        self.note_seen(leg.party)

    def close(self, refusal: Refusal) -> None:
        """Evict all legs with ``refusal``, and refuse all that come later with it.

        No leg is matched from now on. A few legs are evicted at once, and one more each time that one has left: waking
        the tasks of thousands at once would block the event loop for a second.
        """
        self.closed = refusal
        self._evict_some(_EVICTED_AT_ONCE)

    def _evict_some(self, count: int) -> None:
        for _ in range(count):
            waiter = self.head("func1") or self.head("func2")
            if waiter is None or self.closed is None:
                return
            self.evict(waiter, self.closed)
