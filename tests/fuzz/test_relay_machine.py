"""Whoever joins, leaves, talks, ends, resets, and whatever is reloaded meanwhile: a route is two queues, a pairing two.

The relay is whole and real, and so are the sockets. The model of a route is the order of those who wait on either side,
and of a pairing the bytes under way in either direction. Promised at every moment: those wait whom the model lets wait,
the first of each side are paired and nobody else, what comes out of a pairing is what went in, its end comes after all
of it, and no pairing ends but for a reason that the model knows, which is the one in the log.

The machine's rules run in a thread, and what they drive in the Trio of the test: a relay wants the main thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ends import OPEN, End, Mode, block
from rig import PATIENCE, Party, RelayInProcess, Site, eventually

Side = Literal["func1", "func2"]
SIDES: Final[tuple[Side, Side]] = ("func1", "func2")
CONTENT: Final = block(1 << 20, 9)
MOST_UNDER_WAY: Final = 60_000
"""Bytes that the kernels take in any case, so that nobody has to wait."""

sides = st.sampled_from(SIDES)
whoever = st.integers(0, 1000)


@cache
def site() -> Site:
    return Site(Path(tempfile.mkdtemp(prefix="frelay-machine-")))


@dataclass
class Waiter:
    """Somebody who waits."""

    party: Party
    mode: Mode


@dataclass
class Queue:
    """One direction of a pairing."""

    start: int
    sent: int = 0
    received: int = 0
    is_ended: bool = False
    end_was_seen: bool = False

    def next(self, count: int) -> bytes:
        return CONTENT[self.start + self.sent :][:count]

    def take(self, data: bytes) -> None:
        assert data == CONTENT[self.start + self.received :][: len(data)], "other bytes than were sent"
        self.received += len(data)
        assert self.received <= self.sent, "more bytes than were sent"


@dataclass
class Couple:
    """A pairing; ``queues`` go by who sends."""

    ends: dict[Side, End]
    queues: dict[Side, Queue] = field(default_factory=dict)


def other(side: Side) -> Side:
    return "func2" if side == "func1" else "func1"


class Relaying(RuleBasedStateMachine):
    """See the module."""

    nursery: trio.Nursery
    """Where the relays run."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[Side, list[Waiter]] = {"func1": [], "func2": []}
        self.couples: list[Couple] = []
        self.met = 0
        self.ended: list[tuple[str, str]] = []
        """Outcome and side of every pairing that has ended, in any order."""
        self.reloads = 0
        self.is_at_ease = True
        """Whether nothing has failed yet; what fails after that says nothing."""
        self.relay: RelayInProcess | None = None

    @initialize()
    def start(self) -> None:
        self.over, self.stopped = trio.Event(), trio.Event()
        self.relay = trio.from_thread.run(self.nursery.start, self._serve)

    async def _serve(self, *, task_status: trio.TaskStatus[RelayInProcess]) -> None:
        async with site().relay(OPEN) as relay:
            task_status.started(relay)
            await self.over.wait()
        self.stopped.set()

    def do(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        async def call() -> None:
            with trio.fail_after(PATIENCE):
                await function(*args)

        self.is_at_ease = False
        trio.from_thread.run(call)
        self.is_at_ease = True

    @property
    def places(self) -> dict[Side, int]:
        """How many wait on either side."""
        assert self.relay is not None
        return dict(zip(SIDES, self.relay.waiting(), strict=True))

    def logged(self, event: str) -> list[MutableMapping[str, Any]]:
        assert self.relay is not None
        return self.relay.logged(event)

    # --- waiting -------------------------------------------------------------------------------------------------

    @precondition(lambda self: sum(map(len, self.waiting.values())) < 8)
    @rule(side=sides, mode=st.sampled_from(["raw", "raw", "tunnel", "bare"]))
    def join(self, side: Side, mode: Mode) -> None:
        self.do(self._join, side, mode)

    async def _join(self, side: Side, mode: Mode) -> None:
        assert self.relay is not None
        party = await site().party(self.relay, side, alpn=() if mode == "bare" else ("frelay/1",))
        if mode != "bare":
            await party.join(modes=["handoff" if mode == "raw" else "tunnel"])
            assert (await party.expect("WAITING"))["party"] == side
        self.waiting[side].append(Waiter(party, mode))
        if self.waiting[other(side)]:
            await self._meet()
        else:
            # A bare leg is told nothing, so its place in the queue is only known from the relay.
            await eventually(lambda: self.places[side] == len(self.waiting[side]), "it is admitted")

    async def _meet(self) -> None:
        """The first of both sides are told of each other, and hand off."""
        pair = {side: self.waiting[side].pop(0) for side in SIDES}
        told = {}
        for side, waiter in pair.items():
            if waiter.mode != "bare":
                told[side] = await waiter.party.expect("PAIRED")
            if waiter.mode == "raw":
                await waiter.party.hand_off()
        assert len({paired["pairing"] for paired in told.values()}) <= 1, "paired, but not with each other"
        self.met += 1
        await eventually(lambda: len(self.logged("handed off")) == self.met, "both are handed off")
        ends = {side: End(waiter.party, waiter.mode) for side, waiter in pair.items()}
        starts = {"func1": 997 * self.met, "func2": 500_000 + 1009 * self.met}
        self.couples.append(Couple(ends, {side: Queue(starts[side]) for side in SIDES}))

    @precondition(lambda self: any(self.waiting.values()))
    @rule(index=whoever, way=st.sampled_from(["LEAVE", "close_notify", "close", "reset"]))
    def leave(self, index: int, way: str) -> None:
        side = next(side for side in SIDES if self.waiting[side])
        waiter = self.waiting[side].pop(index % len(self.waiting[side]))
        self.do(self._leave, waiter, way)

    async def _leave(self, waiter: Waiter, way: str) -> None:
        party = waiter.party
        if way == "LEAVE" and waiter.mode != "bare":
            await party.send_frame("LEAVE")
        elif way == "close_notify" and waiter.mode != "bare":
            await party.send_raw(party.close_notify())
        elif way == "reset":
            party.reset()
        else:
            party.close()

    # --- talking -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.couples)
    @rule(index=whoever, side=sides, count=st.sampled_from([1, 7, 4096, 16384, 16385, 50_000]))
    def send(self, index: int, side: Side, count: int) -> None:
        couple = self.couples[index % len(self.couples)]
        queue = couple.queues[side]
        if not queue.is_ended and queue.sent - queue.received + count <= MOST_UNDER_WAY:
            self.do(couple.ends[side].send, queue.next(count))
            queue.sent += count

    @precondition(lambda self: self.couples)
    @rule(index=whoever, side=sides, count=st.sampled_from([1, 1000, 100_000]))
    def receive(self, index: int, side: Side, count: int) -> None:
        couple = self.couples[index % len(self.couples)]
        if couple.queues[other(side)].received < couple.queues[other(side)].sent:
            self.do(self._receive, couple, side, count)

    async def _receive(self, couple: Couple, side: Side, count: int) -> None:
        data = await couple.ends[side].receive(count)
        assert data, "an end before all bytes"
        couple.queues[other(side)].take(data)

    @precondition(lambda self: self.couples)
    @rule(index=whoever, side=sides)
    def half_close(self, index: int, side: Side) -> None:
        couple = self.couples[index % len(self.couples)]
        if not couple.queues[side].is_ended:
            self.do(self._half_close, couple, side)

    async def _half_close(self, couple: Couple, side: Side) -> None:
        """The other one gets what is still under way, and then the end."""
        queue = couple.queues[side]
        await couple.ends[side].send_eof()
        queue.is_ended = True
        while data := await couple.ends[other(side)].receive():
            queue.take(data)
        assert queue.received == queue.sent, "an end before all bytes"
        queue.end_was_seen = True
        if all(queue.is_ended for queue in couple.queues.values()):
            self.couples.remove(couple)
            self.ended.append(("closed", "both"))
            for end in couple.ends.values():
                end.party.close()

    # --- what else happens -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.couples)
    @rule(index=whoever, side=sides)
    def reset(self, index: int, side: Side) -> None:
        couple = self.couples[index % len(self.couples)]
        # Who has had its say and goes has hung up; that is another story.
        if not couple.queues[side].is_ended:
            self.couples.remove(couple)
            self.ended.append(("reset", side))
            self.do(self._reset, couple, side)

    async def _reset(self, couple: Couple, side: Side) -> None:
        couple.ends[side].party.reset()
        await self._all_records()
        await self._is_cut_off(couple, other(side))

    async def _all_records(self) -> None:
        await eventually(lambda: len(self.logged("pairing ended")) == len(self.ended), "the record")

    async def _is_cut_off(self, couple: Couple, side: Side) -> None:
        how = await couple.ends[side].ended()
        # Where one direction is at its end already, a party cannot always tell what comes after that.
        assert how == "reset" or any(queue.is_ended for queue in couple.queues.values()), how
        couple.ends[side].party.close()

    @precondition(lambda self: self.couples or any(self.waiting.values()))
    @rule()
    def reload(self) -> None:
        """Other limits, for those who come: nobody who is there feels it."""
        self.reloads += 1
        self.do(self._reload, OPEN + f"idle_timeout = {1000 + self.reloads}\n")

    async def _reload(self, routes: str, sections: str = "") -> None:
        assert self.relay is not None
        site().write(routes, sections=sections)
        await self.relay.relay.reload()

    @precondition(lambda self: self.couples or any(self.waiting.values()))
    @rule()
    def remove_and_add(self) -> None:
        """The route goes, and with it who waits and, after drain_timeout, who is paired; then there is a new one."""
        self.do(self._remove_and_add)

    async def _remove_and_add(self) -> None:
        await self._reload(OPEN.replace('"demo"', '"another"'), "[relay]\ndrain_timeout = 0.01\n")
        for waiter in (*self.waiting["func1"], *self.waiting["func2"]):
            if waiter.mode == "bare":
                assert await waiter.party.receive() == b""
            else:
                assert (await waiter.party.refusal())["code"] == "route-removed"
            waiter.party.close()
        self.waiting = {"func1": [], "func2": []}
        self.ended += [("route-removed", "relay")] * len(self.couples)
        await self._all_records()
        for couple in self.couples:
            for side in SIDES:
                await self._is_cut_off(couple, side)
        self.couples.clear()
        await self._reload(OPEN)

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def all_is_as_in_the_model(self) -> None:
        if self.relay is not None:
            self.do(self._compare, self.relay)

    async def _compare(self, relay: RelayInProcess) -> None:
        waiting = (len(self.waiting["func1"]), len(self.waiting["func2"]))
        await eventually(lambda: relay.waiting() == waiting, f"{waiting} wait")
        await eventually(lambda: len(relay.relay.pairings) == len(self.couples), "as many pairings")
        found = sorted((record["outcome"], record["side"]) for record in self.logged("pairing ended"))
        assert found == sorted(self.ended)

    def teardown(self) -> None:
        if self.relay is None:
            return
        try:
            if self.is_at_ease:
                for couple in list(self.couples):
                    for side in SIDES:
                        if not couple.queues[side].is_ended:
                            self.do(self._half_close, couple, side)
                self.do(self._compare, self.relay)
        finally:
            self.do(self._stop)

    async def _stop(self) -> None:
        site().hang_up()
        self.over.set()
        await self.stopped.wait()  # two at once would mix their logs


async def test_a_route_is_two_queues_and_a_pairing_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """TESTPLAN 22: join, pair, send, half-close, reset, reload, cancel, in any order."""
    few = settings(
        deadline=None,
        max_examples=20,
        stateful_step_count=25,
        # No shrinking: what fails by waiting in vain takes long each time.
        phases=[Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(Relaying, "nursery", nursery, raising=False)
        await trio.to_thread.run_sync(partial(run_state_machine_as_test, Relaying, settings=few))
