"""The lobby of one route: the legs that wait, and the rules by which they are matched.

Plain data, no I/O and no waiting: every method is one synchronous decision, so two tasks can never disagree about a
leg. The task that matches or evicts a waiting leg writes its decision into the leg's :attr:`Waiter.verdict` (the first
one stays) and wakes the leg's own task. Only that task then acts on the leg.

Rules:

1. Only legs with the same key may be matched, and legs without a key only with each other. Of those, func1 is matched
   with func2, and a leg that may be *either* party with func1, func2 and either. The longest wait goes first, and a leg
   that a partner list excludes is passed over (:mod:`frelay.protocol.acceptance`).
2. A leg with the identity and the ``attempt`` of one that waits, whatever its party and key, replaces it: the function
   lost its connection and came back. So a function never meets itself through a retry.
3. Each pool of places has a limit; a replacement needs no room. A leg without a key has a place in the pool of its
   party (``max_waiting_per_party``). A leg with a key has one in the pool of its key and party
   (``max_waiting_per_meet``), and one in the pool of all legs with keys (``max_waiting_by_meet``). When a pool is full
   and one function has at least two more legs in it than the newcomer's function, the newest leg of the function with
   the most is evicted for the newcomer. So a function that opens connections without end evicts only its own, and a
   function that is alone may fill the pool.
4. A closed lobby takes no leg in, and says why.

An index serves each rule, so that a step of one leg costs O(1) however many others wait. Otherwise one party of a route
could hold up the event loop of the whole relay by filling a queue. Only a search among legs of one key that exclude
each other visits them one by one; ``max_waiting_per_meet`` bounds it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from frelay.config.model import RouteLimits
from frelay.net.shares import Shares
from frelay.protocol.messages import LegParty, PartyName
from frelay.protocol.refusal import Refusal

if TYPE_CHECKING:
    from frelay.pairing.leg import Leg
    from frelay.pairing.pairing import Pairing

__all__ = ["LEG_PARTIES", "Lobby", "Matched", "Unfinished", "Waiter", "opposite"]

LEG_PARTIES: Final[tuple[LegParty, ...]] = ("func1", "func2", "either")
# With which legs of its key a leg may be matched.
_PARTNERS: Final[Mapping[LegParty, tuple[LegParty, ...]]] = {
    "func1": ("func2", "either"),
    "func2": ("func1", "either"),
    "either": LEG_PARTIES,
}


def opposite(party: PartyName) -> PartyName:
    """The other party of a route."""
    return "func2" if party == "func1" else "func1"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A search has not looked at all that wait: continue it with ``after``, after a checkpoint."""

    after: int
    """The number of the last waiter that it has looked at."""


@dataclass(frozen=True, slots=True)
class Matched:
    """The leg was matched with another one."""

    pairing: Pairing


class Waiter:
    """One leg in a queue."""

    __slots__ = ("_wake", "holder", "leg", "marks", "meet", "number", "party", "recompute_expiry", "since", "verdict")

    def __init__(
        self, leg: Leg, wake: Callable[[], None], since: float, recompute_expiry: Callable[[], None], number: int
    ) -> None:
        self.leg = leg
        self.meet: Final = leg.meet
        self.party: Final = leg.party
        """As which party it waits. The leg's own changes when it is paired, if that is "either"."""
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
_number: Final = attrgetter("number")


class _Side:
    """The legs of one party at one key: longest wait first, and by the function that they belong to."""

    __slots__ = ("held", "queue")

    def __init__(self) -> None:
        self.queue: Final[_Queue] = OrderedDict()
        self.held: Final[Shares[str, Waiter]] = Shares()


_Meeting = dict[LegParty, _Side]
"""The legs of one key, by party; a party of which no leg waits is not in it."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """A limited number of places."""

    held: Shares[str, Waiter]
    size: int
    name: str
    """Whose places they are, for the function that is refused."""

    def is_full(self, without: Waiter | None) -> bool:
        """Whether all places are taken, also after ``without`` has left."""
        leaves = without is not None and self.held.holds(without.holder, without)
        return len(self.held) - leaves >= self.size

    def spare(self, holder: str) -> Waiter | None:
        """The waiter that is evicted if ``holder`` needs a place in the full pool, if there is one."""
        held = self.held
        return held.newest(held.greediest()) if held.held(holder) + 2 <= held.most else None


# How many names a search looks up in partner lists before other tasks have a turn.
_NAMES_AT_ONCE: Final = 1000
# How many legs of a closed lobby are woken at a time.
_EVICTED_AT_ONCE: Final = 16
_NOBODY: Final[Shares[str, Waiter]] = Shares()


class Lobby:
    """The legs that wait on one route."""

    def __init__(self, *, limits: RouteLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        """How many legs may wait. A reload may change it, for legs that enter from then on."""
        self._clock: Final = clock
        self._meetings: Final[OrderedDict[str | None, _Meeting]] = OrderedDict()
        """By key, None for the legs without one; removed when no leg waits there."""
        self._attempts: Final[dict[Hashable, _Queue]] = {}
        """By each of the marks that tell the attempt of a leg."""
        self._keyed: Final[Shares[str, Waiter]] = Shares()
        """The legs with keys by the function that they belong to."""
        self._counts: Final[dict[LegParty, int]] = dict.fromkeys(LEG_PARTIES, 0)
        self._last_number = 0
        self._last_seen: Final[dict[PartyName, float]] = {}
        self.closed: Refusal | None = None
        """Why it is closed; None while it is open."""

    # --- what is there -------------------------------------------------------------------------------------------

    def everyone(self) -> list[Waiter]:
        """All waiters as they are now, by key and party. O(n)."""
        return [waiter for meeting in self._meetings.values() for side in meeting.values() for waiter in side.queue]

    def waiting(self, party: LegParty) -> list[Waiter]:
        """The waiters of one party as they are now, longest wait first. O(n)."""
        queues = [meeting[party].queue for meeting in self._meetings.values() if party in meeting]
        return list(merge(*queues, key=_number))

    def count(self, party: LegParty) -> int:
        """How many legs of one party wait, with and without a key."""
        return self._counts[party]

    @property
    def keys(self) -> int:
        """How many keys have a waiting leg."""
        return len(self._meetings) - (None in self._meetings)

    def search(self, leg: Leg, *, after: int = 0) -> Waiter | Unfinished | None:
        """The waiter that ``leg`` is matched with: the longest wait of those that it may be matched with.

        None if there is none. Only waiters with a number above ``after`` count: so a search is continued.
        """
        queues = self._queues_for(leg)
        candidates: Iterator[Waiter] = iter(queues[0]) if len(queues) == 1 else merge(*queues, key=_number)
        own, work = leg.acceptance, _NAMES_AT_ONCE
        for waiter in candidates:
            if waiter.number <= after:
                continue
            other = waiter.leg.acceptance
            if own is None or other is None:
                return waiter  # without a key nobody has a list
            if work <= 0:
                return Unfinished(after)
            if own.accepts(other) and other.accepts(own):
                return waiter
            work -= own.cost(other)
            after = waiter.number
        return None

    def candidate_count(self, leg: Leg) -> int:
        """How many legs wait that ``leg``, which does not wait, may be matched with, if no list excludes it."""
        return sum(map(len, self._queues_for(leg)))

    def _queues_for(self, leg: Leg) -> list[_Queue]:
        meeting = self._meetings.get(leg.meet)
        return [] if meeting is None else [meeting[party].queue for party in _PARTNERS[leg.party] if party in meeting]

    def peer_seen(self, leg: Leg) -> float | None:
        """Seconds since the other party of ``leg`` was last here (0 while it waits), or None if it never was.

        For a key nothing is remembered: the number of keys that were ever used has no limit.
        """
        if self._queues_for(leg):
            return 0.0
        if leg.meet is not None or leg.party == "either":
            return None
        seen = self._last_seen.get(opposite(leg.party))
        return None if seen is None else max(0.0, self._clock() - seen)

    def note_seen(self, party: PartyName) -> None:
        """A leg of the party, without a key, was here just now."""
        self._last_seen[party] = self._clock()

    # --- entering ------------------------------------------------------------------------------------------------

    def objection(self, leg: Leg) -> Refusal | None:
        """Why ``leg`` cannot enter now, or None if it can."""
        return self.closed or self._make_room(leg, self._find_stale(leg))[1]

    def _make_room(self, leg: Leg, stale: Waiter | None) -> tuple[Waiter | None, Refusal | None]:
        """The waiter that must be evicted so that ``leg`` can enter, if any; or a refusal if there is no room.

        ``stale`` leaves in any case. One is enough: a waiter in the pool of a key has a place in that of all keys, too.
        """
        spare: Waiter | None = None
        for pool in self._pools(leg):
            if not pool.is_full(stale) or (spare is not None and pool.held.holds(spare.holder, spare)):
                continue
            spare = pool.spare(leg.holder)
            if spare is None:
                return None, Refusal("queue-full", f"{pool.size} {pool.name} are waiting already", retry_after=5.0)
        return spare, None

    def _pools(self, leg: Leg) -> tuple[_Pool, ...]:
        meeting = self._meetings.get(leg.meet, {})
        held = meeting[leg.party].held if leg.party in meeting else _NOBODY
        limits = self.limits
        if leg.meet is None:
            return (_Pool(held, limits.max_waiting_per_party, "legs of this party"),)
        return (
            _Pool(held, limits.max_waiting_per_meet, "legs of this party with this key"),
            _Pool(self._keyed, limits.max_waiting_by_meet, "legs with keys"),
        )

    def _find_stale(self, leg: Leg) -> Waiter | None:
        """The waiter, of any party and key, that ``leg`` is a retry of; of several, the longest wait."""
        found = [next(iter(self._attempts[mark])) for mark in leg.marks() if mark in self._attempts]
        return min(found, key=_number, default=None)

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
        spare, _ = self._make_room(leg, None)
        if spare is not None:
            text = "the queue is full, and a function with fewer places in it came"
            self.evict(spare, Refusal("queue-full", text, retry_after=5.0))
        self._last_number += 1
        waiter = Waiter(leg, wake, self._clock(), recompute_expiry, self._last_number)
        side = self._meetings.setdefault(waiter.meet, {}).setdefault(waiter.party, _Side())
        side.queue[waiter] = None
        side.held.add(waiter.holder, waiter)
        if waiter.meet is not None:
            self._keyed.add(waiter.holder, waiter)
        for mark in waiter.marks:
            self._attempts.setdefault(mark, OrderedDict())[waiter] = None
        self._counts[waiter.party] += 1
        return waiter

    # --- leaving -------------------------------------------------------------------------------------------------

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
        meet, party = waiter.meet, waiter.party
        meeting = self._meetings.get(meet, {})
        side = meeting.get(party)
        if side is None or waiter not in side.queue:
            return
        del side.queue[waiter]
        side.held.remove(waiter.holder, waiter)
        if not side.queue:
            del meeting[party]
        if not meeting:
            del self._meetings[meet]
        for mark in waiter.marks:
            equals = self._attempts[mark]
            del equals[waiter]
            if not equals:
                del self._attempts[mark]
        self._counts[party] -= 1
        if meet is not None:
            self._keyed.remove(waiter.holder, waiter)
        elif party != "either":
            self.note_seen(party)

    def close(self, refusal: Refusal) -> None:
        """Evict all legs with ``refusal``, and refuse all that come later with it.

        No leg is matched from now on. A few legs are evicted at once, and one more each time that one has left: waking
        the tasks of thousands at once would block the event loop for a second.
        """
        self.closed = refusal
        self._evict_some(_EVICTED_AT_ONCE)

    def _evict_some(self, count: int) -> None:
        for _ in range(count):
            if not self._meetings or self.closed is None:
                return
            meeting = next(iter(self._meetings.values()))
            self.evict(next(iter(next(iter(meeting.values())).queue)), self.closed)
