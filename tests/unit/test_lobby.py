"""The lobby decides like a list of legs, and no decision costs more because others wait.

The reference below is the simplest form of a lobby: one list, which is searched completely for every question. A state
machine does anything in any order; after each step the two must agree, and every index of the lobby must be right.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any, Final, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.lobby import CASES, join_cost, main
from frelay.joining.lobby import Lobby, Matched, Waiter, opposite
from frelay.pairing.leg import Leg
from frelay.pairing.pairing import Pairing
from frelay.protocol.messages import PartyName
from frelay.protocol.refusal import Refusal
from frelay.tls.trust import Credential

PARTIES: Final[tuple[PartyName, ...]] = ("func1", "func2")
MOST: Final = 4


class StandIn:
    """As much of a leg as a lobby asks of it. ``certificate`` is None for a leg without outer TLS."""

    def __init__(self, party: PartyName, identity: str, attempt: str | None, certificate: bytes | None) -> None:
        self.party, self.identity, self.attempt = party, identity, attempt
        self.credential = None if certificate is None else Credential(certificate, (), 0.0)

    holder = Leg.holder
    marks = Leg.marks

    def is_retry_of(self, other: StandIn) -> bool:
        """As the protocol says (docs/protocol.md, 3): the same certificate or identity, and the same attempt."""
        if self.attempt is None or self.attempt != other.attempt:
            return False
        mine, others = self.credential, other.credential
        return self.identity == other.identity or (mine is not None and others is not None and mine.leaf == others.leaf)


class Plain:
    """The reference: the waiting legs in the order in which they came."""

    def __init__(self) -> None:
        self.line: list[StandIn] = []
        self.closed: str | None = None
        self.most = MOST

    def of(self, party: PartyName) -> list[StandIn]:
        return [stand_in for stand_in in self.line if stand_in.party == party]

    def stale(self, stand_in: StandIn) -> StandIn | None:
        return next((other for other in self.line if stand_in.is_retry_of(other)), None)

    def spare(self, stand_in: StandIn) -> list[StandIn]:
        """Those of which one is evicted: the latest of each holder with the most, which must be two more than his."""
        counts = Counter(other.identity for other in self.of(stand_in.party))
        most = max(counts.values(), default=0)
        if counts[stand_in.identity] + 2 > most:
            return []
        queue = self.of(stand_in.party)
        return [[other for other in queue if other.identity == holder][-1] for holder, n in counts.items() if n == most]

    def is_full(self, party: PartyName) -> bool:
        return len(self.of(party)) >= self.most

    def objection(self, stand_in: StandIn) -> str | None:
        if self.closed is not None:
            return self.closed
        stale = self.stale(stand_in)
        makes_room = stale is not None and stale.party == stand_in.party
        return "queue-full" if self.is_full(stand_in.party) and not makes_room and not self.spare(stand_in) else None


class LobbyMachine(RuleBasedStateMachine):
    """Does everything that a relay does with a lobby, and the same with the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lobby = Lobby(max_waiting=MOST, clock=lambda: self.now)
        self.plain = Plain()
        self.waiters: dict[StandIn, Waiter] = {}
        self.woken: list[StandIn] = []
        self.seen: dict[PartyName, float] = {}

    def gone(self, stand_in: StandIn) -> Waiter:
        self.plain.line.remove(stand_in)
        self.seen[stand_in.party] = self.now
        return self.waiters.pop(stand_in)

    def expect_evicted(self, stand_in: StandIn, code: str) -> None:
        waiter = self.gone(stand_in)
        assert isinstance(waiter.verdict, Refusal)
        assert waiter.verdict.code == code
        assert self.woken.pop() is stand_in

    @rule(
        party=st.sampled_from(PARTIES),
        identity=st.sampled_from(["dns:a.demo", "dns:b.demo", "dns:c.demo"]),
        attempt=st.sampled_from([None, "1", "2"]),
        certificate=st.sampled_from([None, b"x", b"y"]),
    )
    def join(self, party: PartyName, identity: str, attempt: str | None, certificate: bytes | None) -> None:
        stand_in = StandIn(party, identity, attempt, certificate)
        leg = cast(Leg, stand_in)
        objection = self.lobby.objection(leg)
        assert (None if objection is None else objection.code) == self.plain.objection(stand_in)
        if objection is not None:
            return
        stale = self.plain.stale(stand_in)
        self.lobby.replace_stale(leg)
        if stale is not None:
            self.expect_evicted(stale, "replaced")
        head = self.lobby.head(opposite(party))
        queue = self.plain.of(opposite(party))
        assert (None if head is None else head.leg) is (cast(Leg, queue[0]) if queue else None)
        if head is not None:
            pairing = cast(Pairing, object())
            self.lobby.match(head, pairing)
            assert self.gone(queue[0]).verdict == Matched(pairing)
            assert self.woken.pop() is queue[0]
            return
        spare = self.plain.spare(stand_in) if self.plain.is_full(party) else []
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

    @rule(most=st.integers(1, 2 * MOST))
    def reload(self, most: int) -> None:
        self.lobby.max_waiting = self.plain.most = most

    @rule(seconds=st.floats(0, 10))
    def pause(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.plain.closed is None and len(self.plain.line) > 2)
    @rule()
    def close(self) -> None:
        verdict = Refusal("draining", "the relay goes away")
        self.lobby.close(verdict)
        self.plain.closed = "draining"
        assert sorted(map(id, self.woken)) == sorted(map(id, self.plain.line))
        self.woken.clear()
        for stand_in in list(self.plain.line):
            assert self.gone(stand_in).verdict is verdict

    @invariant()
    def no_task_was_woken_without_a_verdict(self) -> None:
        assert not self.woken
        assert all(waiter.verdict is None for waiter in self.waiters.values())

    @invariant()
    def both_see_the_same(self) -> None:
        for party in PARTIES:
            queue = self.plain.of(party)
            assert [waiter.leg for waiter in self.lobby.waiting(party)] == cast(list[Leg], queue)
            assert self.lobby.count(party) == len(queue)
            other = opposite(party)
            seen = self.seen.get(other)
            expected = 0.0 if self.plain.of(other) else None if seen is None else self.now - seen
            assert self.lobby.peer_seen(party) == expected

    @invariant()
    def the_indices_agree(self) -> None:
        lobby = cast(Any, self.lobby)
        attempts: dict[Any, list[Waiter]] = {}
        for stand_in in self.plain.line:
            for mark in cast(Leg, stand_in).marks():
                attempts.setdefault(mark, []).append(self.waiters[stand_in])
        assert {mark: list(waiters) for mark, waiters in lobby._attempts.items()} == attempts
        assert bool(lobby._meetings) == bool(self.plain.line)
        for party in PARTIES:
            counts = Counter(stand_in.identity for stand_in in self.plain.of(party))
            held = lobby._held[party]
            assert held.holders() == len(counts)
            assert held.most == max(counts.values(), default=0)
            assert all(held.held(identity) == count for identity, count in counts.items())


LobbyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
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
    lobby = Lobby(max_waiting=1, clock=lambda: 0.0)

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
    lobby = Lobby(max_waiting=1000, clock=lambda: 0.0)
    woken: list[int] = []
    waiters = [
        lobby.enter(
            cast(Leg, StandIn(PARTIES[number % 2], "dns:a.demo", str(number), None)),
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
    lobby = Lobby(max_waiting=1000, clock=lambda: 0.0)
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
    assert len(lines) == 1 + len(CASES)
