"""Spliced bytes are neither lost nor doubled, whatever the sockets and pipes do, and waiting costs no CPU."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from support.ends import OPEN, End, Mode, block, join_ends, pause_reading
from support.kernel import fill, has_arrived, rests
from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.waiting import eventually

MIB = 1024 * 1024
IDLE_SHARE = 0.05
"""TESTPLAN 28: the share of one core that a relay with nothing to do may use."""


async def feed(end: End, data: bytes) -> None:
    await end.send(data)
    await end.send_eof()


async def spliced(relay: RelayInProcess) -> None:
    await eventually(lambda: relay.relay.parts.forwarding.pipes.in_use > 0, "the pump has turned to splice")


# --- no loss --------------------------------------------------------------------------------------------------


async def test_partial_writes_to_a_reader_with_a_small_window(site: Site) -> None:
    """TESTPLAN 28: a sink that takes a few pages at a time gets every byte, and no byte twice."""
    data = block(6 * MIB + 13)
    random_ = random.Random(5)
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        pause_reading(two, 32768)
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, one, data)
            await spliced(relay)
            while piece := await two.receive(random_.choice([1, 997, 4096, 65536])):
                received += piece
        assert bytes(received) == data
        await two.send_eof()
        assert (await relay.outcome())["bytes_func1_to_func2"] == len(data)


async def test_tiny_segments_behind_a_bulk_with_a_paused_reader(site: Site) -> None:
    """TESTPLAN 28: a pipe fills by slots; thousands of 1-byte segments do not block it while it is in use."""
    bulk = block(8 * MIB)
    tiny = block(20_000, 1)
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        pause_reading(two)
        sock = one.party.socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def write() -> None:
            await one.send(bulk)
            for position in range(len(tiny)):
                await one.send(tiny[position : position + 1])
            await one.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await spliced(relay)
            (pairing,) = relay.relay.pairings
            await eventually(lambda: pairing._pumps["func1"].is_blocked, "the sink is full")
            assert await two.receive_exactly(len(bulk)) == bulk
            assert await two.receive_to_end() == tiny


async def test_both_directions_spliced_at_once(site: Site) -> None:
    """Two pumps share two sockets, and never a pipe."""
    forth, back = block(5 * MIB, 1), block(5 * MIB, 2)
    found: dict[str, bytes] = {}
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)

        async def receive(name: str, end: End) -> None:
            found[name] = await end.receive_to_end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, one, forth)
            nursery.start_soon(feed, two, back)
            await eventually(lambda: relay.relay.parts.forwarding.pipes.in_use == 2, "one pipe a direction")
            nursery.start_soon(receive, "forth", two)
            nursery.start_soon(receive, "back", one)
        assert found == {"forth": forth, "back": back}
        assert (await relay.outcome())["outcome"] == "closed"


@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_reset_in_the_middle_of_a_splice(site: Site, who: str) -> None:
    """TESTPLAN 28, 48: when either party resets, the other is cut, the record names the side, and the pipe is gone."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        pause_reading(two)

        async def flood() -> None:
            try:
                while True:
                    await one.send(block(MIB))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await spliced(relay)
            received = await two.receive_exactly(100_000)
            (one if who == "func1" else two).party.reset()
            ended = await relay.outcome()
        assert received == block(MIB)[:100_000]
        assert (ended["outcome"], ended["side"]) == ("reset", who)
        if who == "func1":
            assert await two.ended() == "reset"
        pipes = relay.relay.parts.forwarding.pipes
        await eventually(lambda: pipes.in_use == 0, "no pipe is in use")


async def test_a_reset_beside_a_splice(site: Site) -> None:
    """A reset ends its own pairing, and another pairing loses no byte."""
    data = block(4 * MIB)
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        three, four = await join_ends(site, relay)
        pause_reading(four)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, one, data)
            nursery.start_soon(three.send, block(16384))
            await spliced(relay)
            four.party.reset()
            assert await two.receive_to_end() == data
        await two.send_eof()
        await relay.log("pairing ended", outcome="reset", side="func2")
        await relay.log("pairing ended", outcome="closed")


# --- no spin --------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def idle(relay: RelayProcess, one: End, two: End) -> None:
    """Nothing to do at all."""


async def chatted(relay: RelayProcess, one: End, two: End) -> None:
    """Messages were exchanged, and no more come."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send, block(MIB))
        await two.receive_exactly(MIB)


async def half_closed(relay: RelayProcess, one: End, two: End) -> None:
    """One direction has ended, so its socket stays readable."""
    await one.send_eof()
    assert await two.receive() == b""


async def blocked(relay: RelayProcess, one: End, two: End) -> None:
    """The sink is full, and the source is readable all the time."""
    await fill(relay, one, two)


async def blocked_both_ways(relay: RelayProcess, one: End, two: End) -> None:
    """Both sinks are full, and both sources are readable."""
    await fill(relay, one, two)
    await fill(relay, two, one)


async def blocked_and_ended(relay: RelayProcess, one: End, two: End) -> None:
    """The source has sent FIN behind what the sink does not take."""
    await fill(relay, one, two)
    await one.send_eof()
    await has_arrived(one)


async def shut_both_ways(relay: RelayProcess, one: End, two: End) -> None:
    """epoll reports HUP for the source again and again, without being asked, and no step can clear it."""
    await blocked_and_ended(relay, one, two)
    await two.send_eof()
    assert await one.receive() == b""


async def closed(relay: RelayProcess, one: End, two: End) -> None:
    """The source's party has closed its socket, after bytes that the sink does not take."""
    await blocked_and_ended(relay, one, two)
    one.party.close()


Situation = Callable[[RelayProcess, End, End], Awaitable[None]]
ANY_MODE: list[Situation] = [idle, chatted, half_closed, blocked]
RAW_SOURCE: list[Situation] = [*ANY_MODE, blocked_both_ways, blocked_and_ended]
RAW: list[Situation] = [*RAW_SOURCE, shut_both_ways, closed]


async def share_of_a_core(relay: RelayProcess, seconds: float = 1.0) -> float:
    pid = relay.process.pid
    before, began = cpu_seconds(pid), time.monotonic()
    await trio.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began)


@pytest.mark.load
@pytest.mark.parametrize(
    ("mode1", "mode2", "situations"),
    [
        ("raw", "raw", RAW),
        ("raw", "tunnel", RAW_SOURCE),
        ("tunnel", "raw", ANY_MODE),
        ("bare", "bare", ANY_MODE),
    ],
    ids=["raw to raw", "raw to tunnel", "tunnel to raw", "bare to bare"],
)
async def test_a_relay_that_can_move_nothing_uses_no_cpu(
    site: Site, mode1: Mode, mode2: Mode, situations: list[Situation]
) -> None:
    """TESTPLAN 28: less than 5 % of a core, with a pairing in each state in which a pump can only wait."""
    async with site.process(OPEN) as relay:
        pairs = [await join_ends(site, relay, mode1, mode2) for _ in situations]
        # One after the other: while another pairing keeps the relay busy, the test cannot tell whether it rests.
        for (one, two), situation in zip(pairs, situations, strict=True):
            pause_reading(two, 32768)
            await situation(relay, one, two)
        await rests(relay)
        share = await share_of_a_core(relay)
        assert not relay.logged("pairing ended")
    assert share < IDLE_SHARE
