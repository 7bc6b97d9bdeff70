"""The lobby decides like a list of legs, and no decision costs more because others wait.

The reference below is the simplest form of a lobby: one list, which is searched completely for every question. A state
machine does anything in any order; after each step the two must agree, and every index of the lobby must be right.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from itertools import combinations
from typing import Any, Final, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.lobby import CASES, WORST, join_cost, main
from frelay.config.model import RouteLimits
from frelay.joining.lobby import Lobby, Matched, Unfinished, Waiter
from frelay.net.shares import Shares
from frelay.pairing.leg import Leg
from frelay.pairing.pairing import Pairing
from frelay.protocol.acceptance import Acceptance
from frelay.protocol.identity import Name, dns_name, match, parse_selector
from frelay.protocol.messages import LegParty, PartyName
from frelay.protocol.refusal import Refusal
from frelay.tls.trust import Credential

PARTIES: Final[tuple[LegParty, ...]] = ("func1", "func2", "either")
SETTLED: Final[tuple[PartyName, ...]] = ("func1", "func2")
KEYS: Final = (None, "one", "two")
NAMES: Final = ("dns:a.demo", "dns:b.demo", "dns:c.demo")
LISTS: Final = (None, ("dns:a.demo",), ("dns:b.demo", "dns:c.demo"), ("dns:*.demo",), ("dns:a.other", "dns:*.b.demo"))
MOST: Final = 4
Names = tuple[str, ...]


def limits(per_party: int, per_meet: int = 64, by_meet: int = 1024) -> RouteLimits:
    return RouteLimits(max_waiting_per_party=per_party, max_waiting_per_meet=per_meet, max_waiting_by_meet=by_meet)


class StandIn:
    """As much of a leg as a lobby asks of it. ``certificate`` is None for a leg without outer TLS."""

    def __init__(
        self,
        party: LegParty,
        identity: str,
        attempt: str | None,
        certificate: bytes | None,
        *,
        meet: str | None = None,
        partners: Names | None = None,
    ) -> None:
        self.party, self.identity, self.attempt = party, identity, attempt
        self.credential = None if certificate is None else Credential(certificate, (), 0.0)
        self.meet, self.partners = meet, partners
        names = (dns_name(identity.removeprefix("dns:")),)
        self.acceptance = None if meet is None else Acceptance(names, partners)

    holder = Leg.holder
    marks = Leg.marks
    identities = Leg.identities

    def is_retry_of(self, other: StandIn) -> bool:
        """As the protocol says (docs/protocol.md, 3): the same certificate or identity, and the same attempt."""
        if self.attempt is None or self.attempt != other.attempt:
            return False
        mine, others = self.credential, other.credential
        return self.identity == other.identity or (mine is not None and others is not None and mine.leaf == others.leaf)

    def may_meet(self, other: StandIn) -> bool:
        """As the protocol says: the same key or none, opposite parties, and each in the other's list."""
        if self.meet != other.meet or (self.party == other.party and self.party != "either"):
            return False
        return self.accepts(other) and other.accepts(self)

    def accepts(self, other: StandIn) -> bool:
        return self.partners is None or match(map(parse_selector, self.partners), [name_of(other)]) is not None


def name_of(stand_in: StandIn) -> Name:
    return dns_name(stand_in.identity.removeprefix("dns:"))


class Plain:
    """The reference: the waiting legs in the order in which they came."""

    def __init__(self) -> None:
        self.line: list[StandIn] = []
        self.closed: str | None = None
        self.limits = limits(MOST, MOST, MOST)

    def of(self, party: LegParty) -> list[StandIn]:
        return [stand_in for stand_in in self.line if stand_in.party == party]

    def stale(self, stand_in: StandIn) -> StandIn | None:
        return next((other for other in self.line if stand_in.is_retry_of(other)), None)

    def pools(self, stand_in: StandIn) -> list[tuple[list[StandIn], int]]:
        """Those that share a pool with it, and how many fit in."""
        side = [other for other in self.of(stand_in.party) if other.meet == stand_in.meet]
        if stand_in.meet is None:
            return [(side, self.limits.max_waiting_per_party)]
        keyed = [other for other in self.line if other.meet is not None]
        return [(side, self.limits.max_waiting_per_meet), (keyed, self.limits.max_waiting_by_meet)]

    def spare(self, stand_in: StandIn, stale: StandIn | None) -> list[StandIn] | None:
        """Those of which one is evicted: the latest of each holder with the most, which must be two more than his.

        Empty if there is room; None if there is none.
        """
        for pool, most in self.pools(stand_in):
            if len(pool) - (stale in pool) < most:
                continue
            counts = Counter(other.identity for other in pool)
            greatest = max(counts.values(), default=0)
            if counts[stand_in.identity] + 2 > greatest:
                return None
            # In the pool of a key it has a place in the pool of all keys, too, so one is enough.
            return [
                [other for other in pool if other.identity == holder][-1]
                for holder, count in counts.items()
                if count == greatest
            ]
        return []

    def objection(self, stand_in: StandIn) -> str | None:
        if self.closed is not None:
            return self.closed
        return "queue-full" if self.spare(stand_in, self.stale(stand_in)) is None else None


class LobbyMachine(RuleBasedStateMachine):
    """Does everything that a relay does with a lobby, and the same with the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.plain = Plain()
        self.lobby = Lobby(limits=self.plain.limits, clock=lambda: self.now)
        self.waiters: dict[StandIn, Waiter] = {}
        self.woken: list[StandIn] = []
        self.seen: dict[LegParty, float] = {}

    def gone(self, stand_in: StandIn) -> Waiter:
        self.plain.line.remove(stand_in)
        if stand_in.meet is None:
            self.seen[stand_in.party] = self.now
        return self.waiters.pop(stand_in)

    def expect_evicted(self, stand_in: StandIn, code: str) -> None:
        waiter = self.gone(stand_in)
        assert isinstance(waiter.verdict, Refusal)
        assert waiter.verdict.code == code
        assert self.woken.pop() is stand_in

    @rule(
        party=st.sampled_from(PARTIES),
        identity=st.sampled_from(NAMES),
        attempt=st.sampled_from([None, "1", "2"]),
        certificate=st.sampled_from([None, b"x", b"y"]),
        meet=st.sampled_from(KEYS),
        partners=st.sampled_from(LISTS),
    )
    def join(
        self,
        party: LegParty,
        identity: str,
        attempt: str | None,
        certificate: bytes | None,
        meet: str | None,
        partners: Names | None,
    ) -> None:
        if meet is None:
            party, partners = "func1" if party == "either" else party, None
        stand_in = StandIn(party, identity, attempt, certificate, meet=meet, partners=partners)
        leg = cast(Leg, stand_in)
        objection = self.lobby.objection(leg)
        assert (None if objection is None else objection.code) == self.plain.objection(stand_in)
        if objection is not None:
            assert meet is None or meet not in objection.reason, "another function learns no key"
            return
        stale = self.plain.stale(stand_in)
        self.lobby.replace_stale(leg)
        if stale is not None:
            self.expect_evicted(stale, "replaced")
        partner = next((other for other in self.plain.line if other.may_meet(stand_in)), None)
        found = self.lobby.search(leg)
        assert found is (None if partner is None else self.waiters[partner])
        if partner is not None and isinstance(found, Waiter):
            pairing = cast(Pairing, object())
            self.lobby.match(found, pairing)
            assert self.gone(partner).verdict == Matched(pairing)
            assert self.woken.pop() is partner
            return
        spare = self.plain.spare(stand_in, None)
        self.waiters[stand_in] = self.lobby.enter(
            leg, lambda: self.woken.append(stand_in), recompute_expiry=lambda: None
        )
        if spare:
            gave_way = next(other for other in spare if self.waiters[other].verdict is not None)
            self.expect_evicted(gave_way, "queue-full")
        self.plain.line.append(stand_in)

    @precondition(lambda self: self.plain.line)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = self.gone(data.draw(st.sampled_from(self.plain.line)))
        self.lobby.leave(waiter)
        # A task calls leave() in its last step, also if another task has decided about its leg before.
        self.lobby.leave(waiter)
        assert waiter.verdict is None

    @precondition(lambda self: self.plain.line)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        stand_in = data.draw(st.sampled_from(self.plain.line))
        self.lobby.evict(self.waiters[stand_in], Refusal("revoked", "its certificate"))
        self.expect_evicted(stand_in, "revoked")

    @rule(most=st.tuples(st.integers(1, 2 * MOST), st.integers(1, MOST), st.integers(1, MOST)))
    def reload(self, most: tuple[int, int, int]) -> None:
        self.lobby.limits = self.plain.limits = limits(*most)

    @rule(seconds=st.floats(0, 10))
    def pause(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.plain.closed is None and len(self.plain.line) > 2)
    @rule()
    def close(self) -> None:
        verdict = Refusal("draining", "the relay goes away")
        self.lobby.close(verdict)
        self.plain.closed = "draining"
        while self.plain.line:
            assert self.woken, "some must always be on their way out"
            for stand_in in self.woken.copy():
                self.woken.remove(stand_in)
                waiter = self.gone(stand_in)
                assert waiter.verdict is verdict
                self.lobby.leave(waiter)

    @invariant()
    def no_task_was_woken_without_a_verdict(self) -> None:
        assert not self.woken
        assert all(waiter.verdict is None for waiter in self.waiters.values())

    @invariant()
    def no_two_wait_that_may_meet(self) -> None:
        for one, other in combinations(self.plain.line, 2):
            assert not one.may_meet(other)

    @invariant()
    def both_see_the_same(self) -> None:
        for party in PARTIES:
            queue = self.plain.of(party)
            assert [waiter.leg for waiter in self.lobby.waiting(party)] == cast(list[Leg], queue)
            assert self.lobby.count(party) == len(queue)
            for meet in KEYS:
                asks = StandIn(party, "dns:x.demo", None, None, meet=meet)
                others = [other for other in self.plain.line if other.may_meet(asks) or asks_in_vain(asks, other)]
                seen = None if meet is not None else self.seen.get("func2" if party == "func1" else "func1")
                expected = 0.0 if others else None if seen is None else self.now - seen
                if party != "either" or meet is not None:
                    assert self.lobby.peer_seen(cast(Leg, asks)) == expected
                    assert self.lobby.candidate_count(cast(Leg, asks)) == len(others)
        assert sorted(map(id, self.lobby.everyone())) == sorted(map(id, self.waiters.values()))
        assert self.lobby.keys == len({stand_in.meet for stand_in in self.plain.line} - {None})

    @invariant()
    def the_indices_agree(self) -> None:
        lobby = cast(Any, self.lobby)
        attempts: dict[Any, list[Waiter]] = {}
        for stand_in in self.plain.line:
            for mark in cast(Leg, stand_in).marks():
                attempts.setdefault(mark, []).append(self.waiters[stand_in])
        assert {mark: list(waiters) for mark, waiters in lobby._attempts.items()} == attempts
        sides = {(meet, party): side for meet, found in lobby._meetings.items() for party, side in found.items()}
        assert sides.keys() == {(stand_in.meet, stand_in.party) for stand_in in self.plain.line}
        assert all(lobby._meetings.values()), "no key is kept without a leg"
        for (meet, party), side in sides.items():
            here = [one for one in self.plain.of(party) if one.meet == meet]
            assert list(side.queue) == [self.waiters[one] for one in here]
            agree(side.held, here)
        agree(lobby._keyed, [one for one in self.plain.line if one.meet is not None])


def asks_in_vain(asks: StandIn, other: StandIn) -> bool:
    """Whether they would meet, if there were no list."""
    return StandIn(asks.party, asks.identity, None, None, meet=asks.meet).may_meet(
        StandIn(other.party, other.identity, None, None, meet=other.meet)
    )


def agree(held: Shares[str, Waiter], line: list[StandIn]) -> None:
    counts = Counter(stand_in.identity for stand_in in line)
    assert len(held) == len(line)
    assert held.holders() == len(counts)
    assert held.most == max(counts.values(), default=0)
    assert all(held.held(identity) == count for identity, count in counts.items())


LobbyMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLobby = LobbyMachine.TestCase


def test_two_legs_are_one_attempt_by_the_name_or_by_the_certificate() -> None:
    """The marks, which the lobby looks up, give the same answer as comparing the two."""
    legs = [
        StandIn("func1", identity, attempt, certificate)
        for identity in ("dns:a.demo", "dns:b.demo")
        for attempt in (None, "1", "2")
        for certificate in (None, b"x", b"y")
    ]
    for one in legs:
        for other in legs:
            assert Leg.is_retry_of(cast(Leg, one), cast(Leg, other)) is one.is_retry_of(other)


def test_a_retry_makes_room_only_in_the_queue_that_it_leaves() -> None:
    """A retry as the other party needs a place in that queue; its old place does not help."""
    lobby = Lobby(limits=limits(1), clock=lambda: 0.0)

    def enter(stand_in: StandIn) -> None:
        lobby.enter(cast(Leg, stand_in), lambda: None, recompute_expiry=lambda: None)

    enter(StandIn("func1", "dns:a.demo", "1", None))
    enter(StandIn("func2", "dns:b.demo", "2", None))
    assert lobby.objection(cast(Leg, StandIn("func1", "dns:a.demo", "1", None))) is None
    refused = lobby.objection(cast(Leg, StandIn("func2", "dns:a.demo", "1", None)))
    assert refused is not None
    assert refused.code == "queue-full"


def test_a_closed_lobby_empties_itself_a_few_at_a_time() -> None:
    """Each leg that has left evicts another one, so that thousands are never woken at once; none is forgotten."""
    lobby = Lobby(limits=limits(1000), clock=lambda: 0.0)
    woken: list[int] = []
    waiters = [
        lobby.enter(
            cast(Leg, StandIn(SETTLED[number % 2], "dns:a.demo", str(number), None)),
            lambda number=number: woken.append(number),  # type: ignore[misc]
            recompute_expiry=lambda: None,
        )
        for number in range(1000)
    ]
    verdict = Refusal("draining", "the relay goes away")
    lobby.close(verdict)
    newcomer = cast(Leg, StandIn("func1", "dns:b.demo", None, None))
    most = gone = 0
    while gone < len(woken):
        assert lobby.objection(newcomer) is verdict
        most = max(most, len(woken) - gone)
        lobby.leave(waiters[woken[gone]])
        gone += 1
    assert sorted(woken) == list(range(1000))
    assert most <= 16
    assert all(waiter.verdict is verdict for waiter in waiters)
    assert lobby.count("func1") == lobby.count("func2") == 0


def test_a_leg_that_goes_by_itself_holds_up_nobody_in_a_closed_lobby() -> None:
    lobby = Lobby(limits=limits(1000), clock=lambda: 0.0)
    woken: list[int] = []
    waiters = [
        lobby.enter(
            cast(Leg, StandIn("func1", "dns:a.demo", str(number), None)),
            lambda number=number: woken.append(number),  # type: ignore[misc]
            recompute_expiry=lambda: None,
        )
        for number in range(200)
    ]
    lobby.close(Refusal("draining", "the relay goes away"))
    for waiter in waiters[100:]:
        lobby.leave(waiter)
    for number in list(woken):
        lobby.leave(waiters[number])
    assert set(range(100)) <= set(woken)
    assert lobby.count("func1") == 0


def test_eight_legs_of_one_group_with_four_keys_meet_as_they_should() -> None:
    """In any order of their arrival: each key joins the two that name it, and nobody waits at the end."""
    rng = random.Random(8)
    for _ in range(200):
        lobby, pairs = Lobby(limits=limits(1), clock=lambda: 0.0), set()
        legs = [StandIn("either", f"dns:rank{n}.demo", None, None, meet=f"job/{n % 4}") for n in range(8)]
        rng.shuffle(legs)
        for leg in legs:
            found = lobby.search(cast(Leg, leg))
            if isinstance(found, Waiter):
                lobby.match(found, cast(Pairing, object()))
                pairs.add(frozenset({leg.identity, found.leg.identity}))
            else:
                lobby.enter(cast(Leg, leg), lambda: None, recompute_expiry=lambda: None)
        assert pairs == {frozenset({f"dns:rank{n}.demo", f"dns:rank{n + 4}.demo"}) for n in range(4)}
        assert not lobby.everyone()
        assert lobby.keys == 0


def test_the_third_with_one_key_waits_for_a_fourth() -> None:
    lobby = Lobby(limits=limits(1), clock=lambda: 0.0)
    legs = [cast(Leg, StandIn("either", f"dns:n{number}.demo", None, None, meet="job")) for number in range(3)]
    first = lobby.enter(legs[0], lambda: None, recompute_expiry=lambda: None)
    assert lobby.search(legs[1]) is first
    lobby.match(first, cast(Pairing, object()))
    assert lobby.search(legs[2]) is None


def test_two_that_exclude_each_other_wait_until_a_third_fits_one() -> None:
    """The longest wait that is acceptable goes first; who excludes it is passed over and holds nobody up."""
    lobby = Lobby(limits=limits(1), clock=lambda: 0.0)
    squatter = cast(Leg, StandIn("func2", "dns:squatter.demo", None, None, meet="job"))
    wanted = cast(Leg, StandIn("func2", "dns:wanted.demo", None, None, meet="job", partners=("dns:n.demo",)))
    asks = cast(Leg, StandIn("func1", "dns:n.demo", None, None, meet="job", partners=("dns:wanted.demo",)))
    other = cast(Leg, StandIn("func1", "dns:other.demo", None, None, meet="job"))
    lobby.enter(squatter, lambda: None, recompute_expiry=lambda: None)
    assert lobby.search(asks) is None
    waits = lobby.enter(asks, lambda: None, recompute_expiry=lambda: None)
    assert lobby.candidate_count(wanted) == 1
    assert lobby.search(wanted) is waits
    found = lobby.search(other)
    assert isinstance(found, Waiter)
    assert found.leg is squatter


def test_floods_of_keys_leave_room_for_legs_without_one() -> None:
    """And the other way round: their pools are apart."""
    lobby = Lobby(limits=limits(2, 1, 8), clock=lambda: 0.0)
    for number in range(8):
        flood = cast(Leg, StandIn("func1", "dns:greedy.demo", None, None, meet=f"k{number}"))
        assert lobby.objection(flood) is None
        lobby.enter(flood, lambda: None, recompute_expiry=lambda: None)
    refused = lobby.objection(cast(Leg, StandIn("func1", "dns:greedy.demo", None, None, meet="k8")))
    assert refused is not None
    assert (refused.code, refused.retry_after) == ("queue-full", 5.0)
    assert lobby.objection(cast(Leg, StandIn("func1", "dns:a.demo", None, None))) is None
    # Another function gets a place of the one that has the most.
    newcomer = cast(Leg, StandIn("func1", "dns:a.demo", None, None, meet="k8"))
    assert lobby.objection(newcomer) is None
    lobby.enter(newcomer, lambda: None, recompute_expiry=lambda: None)
    assert lobby.count("func1") == 8


def test_a_search_with_long_lists_gives_way_to_other_tasks() -> None:
    """It is continued where it was, finds those that came meanwhile, and looks at nobody twice."""
    lobby = Lobby(limits=limits(1, 100, 100), clock=lambda: 0.0)
    names = tuple(dns_name(f"n{number}.many.demo") for number in range(256))
    looked_at: Counter[Acceptance] = Counter()

    class Counted(Acceptance):
        def accepts(self, other: Acceptance) -> bool:
            looked_at[other] += 1
            return super().accepts(other)

    def leg(party: PartyName, partners: Names) -> Leg:
        stand_in = StandIn(party, "dns:x.demo", None, None, meet="job")
        stand_in.acceptance = Counted(names, partners)
        return cast(Leg, stand_in)

    for _ in range(64):
        lobby.enter(leg("func2", ("dns:*.nobody.demo",)), lambda: None, recompute_expiry=lambda: None)
    asks, found, parts = leg("func1", ("dns:*.nobody.demo",)), lobby.search(leg("func1", ("dns:*.nobody.demo",))), 1
    while isinstance(found, Unfinished):
        if parts == 3:
            accepts = lobby.enter(leg("func2", ("dns:*.many.demo",)), lambda: None, recompute_expiry=lambda: None)
            asks = leg("func1", ("dns:*.many.demo",))
        found, parts = lobby.search(asks, after=found.after), parts + 1
    assert found is accepts
    assert parts > 10
    assert {looked_at[waiter.leg.acceptance] for waiter in lobby.everyone() if waiter.leg.acceptance} == {1}


@pytest.mark.load
@pytest.mark.parametrize("case", CASES)
def test_a_join_costs_the_same_however_many_wait(case: str) -> None:
    """With 10,000 waiting at most 1.5 times as with 10: medians, measured in turns, so that other load slows both."""
    short, long = CASES[case](10), CASES[case](10_000)
    few, many = [], []
    for _ in range(7):
        few.append(join_cost(short, 600))
        many.append(join_cost(long, 600))
    assert min(statistics.median(many) / statistics.median(few), min(many) / min(few)) <= 1.5, (few, many)


def test_the_figures_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--waiting", "4,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CASES) + len(WORST)
