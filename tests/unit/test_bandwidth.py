"""A route's budget is kept exactly, shared equally, and costs no memory. Only the test moves the clock."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing

from frelay.pairing.bandwidth import Bandwidth, Share
from frelay.pairing.stepping import PolledSocket
from frelay.pairing.stream_pump import Budget, StreamPump
from frelay.protocol.outcome import Side

SIDES: tuple[Side, Side] = ("func1", "func2")
SECONDS = 5.0


class NoTrouble:
    """A readiness set without events: a pump with a budget is not stepped, and uses the set only to learn of errors."""

    def refresh(self, polled: Any) -> None:
        pass


NO_TROUBLE: Any = NoTrouble()

RATES = [10_000, 1_000_000, 20_000_000]


class Whole:
    """A socket whose connection has not broken."""

    def fileno(self) -> int:
        return -1

    def getsockopt(self, *_: int) -> bytes:
        return b"\x01"  # ESTABLISHED


class End:
    """What a pump needs from either end of its direction in these tests."""

    sock: Any = Whole()

    has_met_more = False

    def receive_now(self, room: memoryview) -> int:
        raise AssertionError("with a budget it is to be asked for a portion")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise AssertionError("only a sink")

    def send_now(self, data: memoryview) -> int:
        raise AssertionError("only a source")

    async def send_rest(self, data: bytes) -> None:
        raise AssertionError("there is always room")

    async def send_eof(self) -> None:
        raise AssertionError("a spring has no end")


class Spring(End):
    """A source of endless bytes; ``most`` is how many it gives at once, like a sender of small messages."""

    def __init__(self, most: int | None = None) -> None:
        self.given = 0
        self._most = most

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        assert max_bytes is not None
        data = bytes(min(max_bytes, self._most or max_bytes))
        self.given += len(data)
        return data


class Drain(End):
    """A sink that takes everything at once and counts it."""

    def __init__(self) -> None:
        self.taken = 0

    def send_now(self, data: memoryview) -> int:
        self.taken += len(data)
        return len(data)


def pump(source: Spring, sink: Drain, share: Share) -> StreamPump:
    budget = Budget(share, PolledSocket(source.sock), PolledSocket(sink.sock))
    return StreamPump(source, sink, sides=SIDES, readiness=NO_TROUBLE, budget=budget)


def flow(nursery: trio.Nursery, share: Share, most: int | None = None) -> tuple[Spring, Drain]:
    source, sink = Spring(most), Drain()
    nursery.start_soon(pump(source, sink, share).run)
    return source, sink


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("pairings", [1, 7])
async def test_the_rate_is_kept_exactly(autojump_clock: trio.testing.MockClock, rate: int, pairings: int) -> None:
    """The promise is 10 % over 5 s, of which the first burst may be 5 %."""
    bandwidth = Bandwidth(rate)
    async with trio.open_nursery() as nursery:
        flows = [flow(nursery, Share(bandwidth)) for _ in range(pairings)]
        await trio.sleep(SECONDS)
        taken = sum(sink.taken for _, sink in flows)
        await trio.sleep(SECONDS)
        later = sum(sink.taken for _, sink in flows) - taken
        nursery.cancel_scope.cancel()
    assert rate * SECONDS <= taken <= 1.1 * rate * SECONDS
    assert later == pytest.approx(rate * SECONDS, rel=0.03)


@pytest.mark.load
async def test_late_timers_do_not_add_up(autojump_clock: trio.testing.MockClock) -> None:
    """A pairing that is late for its turn by less than a quarter of a second still has the whole rate."""
    bandwidth = Bandwidth(1_000_000)
    share = Share(bandwidth)
    spent = 0
    began = trio.current_time()
    while trio.current_time() < began + SECONDS:
        await share.spend(bandwidth.portion)
        spent += bandwidth.portion
        if spent % (10 * bandwidth.portion) == 0:
            await trio.sleep(0.2)
    assert spent == pytest.approx(1_000_000 * SECONDS, rel=0.1)


@pytest.mark.load
async def test_silence_saves_up_no_more_than_a_quarter_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    share = Share(Bandwidth(1_000_000))
    await trio.sleep(3600)
    began = trio.current_time()
    for _ in range(100):
        await share.spend(10_000)
    assert trio.current_time() - began == pytest.approx(0.74, abs=0.02)


@pytest.mark.parametrize("rate", RATES)
async def test_pairings_get_equal_parts(autojump_clock: trio.testing.MockClock, rate: int) -> None:
    """A pairing that is busy both ways counts once, and each gets as much of its share as it can use."""
    bandwidth = Bandwidth(rate)
    async with trio.open_nursery() as nursery:
        both_ways = Share(bandwidth)
        flows = {"one": flow(nursery, Share(bandwidth)), "two": flow(nursery, Share(bandwidth))}
        forth, back = flow(nursery, both_ways), flow(nursery, both_ways)
        await trio.sleep(SECONDS)
        taken = Counter({name: sink.taken for name, (_, sink) in flows.items()})
        taken["both ways"] = forth[1].taken + back[1].taken
        nursery.cancel_scope.cancel()
    for count in taken.values():
        assert count == pytest.approx(rate * SECONDS / 3, rel=0.1)
    assert forth[1].taken == pytest.approx(back[1].taken, rel=0.2)


@pytest.mark.load
async def test_a_short_message_now_and_then_does_not_wait_for_bulk(autojump_clock: trio.testing.MockClock) -> None:
    """It waits only for the current turn, however many others wait for theirs."""
    bandwidth = Bandwidth(1_000_000)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            flow(nursery, Share(bandwidth))
        await trio.sleep(1)
        share = Share(bandwidth)
        longest = 0.0
        for _ in range(20):
            began = trio.current_time()
            await share.spend(64)
            longest = max(longest, trio.current_time() - began)
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert longest <= 0.021


@pytest.mark.parametrize("rate", RATES)
async def test_nothing_is_read_ahead(autojump_clock: trio.testing.MockClock, rate: int) -> None:
    """Only one portion in each direction waits for its turn; all else waits at the sender."""
    bandwidth = Bandwidth(rate)
    async with trio.open_nursery() as nursery:
        flows = [flow(nursery, Share(bandwidth)) for _ in range(20)]
        await trio.sleep(2)
        held = [source.given - sink.taken for source, sink in flows]
        nursery.cancel_scope.cancel()
    assert max(held) <= bandwidth.portion


async def test_small_messages_pay_for_their_bytes_and_not_for_their_number(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bandwidth = Bandwidth(10_000)
    async with trio.open_nursery() as nursery:
        _, sink = flow(nursery, Share(bandwidth), most=50)
        await trio.sleep(SECONDS)
        nursery.cancel_scope.cancel()
    assert sink.taken == pytest.approx(10_000 * SECONDS, rel=0.1)


@pytest.mark.load
async def test_a_new_rate_counts_from_the_next_portion_on(autojump_clock: trio.testing.MockClock) -> None:
    bandwidth = Bandwidth(10_000)
    async with trio.open_nursery() as nursery:
        _, sink = flow(nursery, Share(bandwidth))
        await trio.sleep(SECONDS)
        before = sink.taken
        bandwidth.rate = 1_000_000
        await trio.sleep(SECONDS)
        assert sink.taken - before == pytest.approx(1_000_000 * SECONDS, rel=0.1)
        nursery.cancel_scope.cancel()
    bandwidth.rate = None
    share = Share(bandwidth)
    began = trio.current_time()
    for _ in range(10):
        await share.spend(1 << 30)
    assert trio.current_time() == began


async def test_a_pump_that_waits_for_its_turn_says_so(autojump_clock: trio.testing.MockClock) -> None:
    """So that no time limit takes it for silent, or its receiver for stalled."""
    bandwidth = Bandwidth(1)
    source, sink = Spring(), Drain()
    waiting = pump(source, sink, Share(bandwidth))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.run)
        await trio.sleep(0.9)  # the first portion went at once, and the second goes after a second
        assert waiting.is_held_back
        assert not waiting.is_blocked
        assert (waiting.moved, source.given) == (bandwidth.portion, 2 * bandwidth.portion)
        nursery.cancel_scope.cancel()


@pytest.mark.load
async def test_a_pairing_that_ends_while_it_waits_leaves_its_turn_to_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its pairing ends; the other direction and the other pairings go on."""
    bandwidth = Bandwidth(1_000_000)
    share = Share(bandwidth)
    with trio.move_on_after(1):
        await share.spend(1_000_000)
        await share.spend(1_000_000)
    with trio.move_on_after(math.inf) as scope:
        began = trio.current_time()
        await share.spend(1000)
    assert not scope.cancelled_caught
    assert trio.current_time() - began <= 1.1


@pytest.mark.load
async def test_turns_of_pairings_that_have_ended_are_given_back(autojump_clock: trio.testing.MockClock) -> None:
    """Sixty pairings request a kilobyte each and end. A pairing that comes then waits for none of these."""
    bandwidth = Bandwidth(5000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(Share(bandwidth).spend, 1024)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await Share(bandwidth).spend(10)
    assert trio.current_time() - began <= 0.21


@pytest.mark.load
async def test_when_the_next_pairing_ends_the_turn_goes_to_the_one_after_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """And that one goes in time, although it was not told to check the clock."""
    bandwidth = Bandwidth(1000)
    await Share(bandwidth).spend(200)
    gone = trio.CancelScope()
    order: list[str] = []

    async def ask(name: str, count: int, scope: trio.CancelScope) -> None:
        with scope:
            await Share(bandwidth).spend(count)
            order.append(name)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "one", 10, gone)
        nursery.start_soon(ask, "two", 20, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        gone.cancel()
    assert order == ["two"]
    assert trio.current_time() - began == pytest.approx(0.2, abs=0.01)


@pytest.mark.load
@pytest.mark.parametrize("rate", [100, 5000, 1_000_000])
async def test_a_turn_is_short_at_any_rate(autojump_clock: trio.testing.MockClock, rate: int) -> None:
    """However slow the route, ten bytes wait for one turn of another pairing, and then for their own."""
    bandwidth = Bandwidth(rate)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            flow(nursery, Share(bandwidth))
        await trio.sleep(60)
        began = trio.current_time()
        await Share(bandwidth).spend(1)
        assert trio.current_time() - began <= 0.21
        nursery.cancel_scope.cancel()


@pytest.mark.load
async def test_a_new_rate_counts_for_those_who_wait(autojump_clock: trio.testing.MockClock) -> None:
    """A higher rate, a lower one, none: no pairing waits as long as the old rate would demand."""
    bandwidth = Bandwidth(1)
    await Share(bandwidth).spend(1)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Share(bandwidth).spend, 1)
        nursery.start_soon(Share(bandwidth).spend, 1000)
        await trio.sleep(0.5)
        bandwidth.rate = 1000
    assert trio.current_time() - began == pytest.approx(1.5, abs=0.3)
    bandwidth.rate = 1
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Share(bandwidth).spend, 100_000)
        await trio.sleep(5)
        bandwidth.rate = None
    assert trio.current_time() - began == pytest.approx(5)


async def test_small_and_large_portions_have_equal_parts_too(autojump_clock: trio.testing.MockClock) -> None:
    """A pairing with small portions goes first, but gets no more bytes."""
    bandwidth = Bandwidth(1_000_000)
    async with trio.open_nursery() as nursery:
        sinks = [flow(nursery, Share(bandwidth), most)[1] for most in (50, 1000, None)]
        await trio.sleep(SECONDS)
        nursery.cancel_scope.cancel()
    for sink in sinks:
        assert sink.taken == pytest.approx(1_000_000 * SECONDS / 3, rel=0.1)
