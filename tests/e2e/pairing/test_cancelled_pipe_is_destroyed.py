"""A pipe with bytes in it is never used again: bytes of one pairing can never reach another."""

from __future__ import annotations

import array
import fcntl
import termios

import pytest
import structlog
import trio

from frelay.config.load import load
from frelay.pairing.pipes import PipePool
from frelay.pairing.raw_pump import RawPump
from frelay.protocol.outcome import Outcome
from frelay.relay.run import make_relay
from support.descriptors import open_descriptors, opened_since
from support.ends import OPEN, End, block, join_ends, pause_reading
from support.relay import RelayInProcess
from support.rounds import settled
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

MIB = 1024 * 1024


def bytes_in(descriptor: int) -> int:
    """How many bytes wait in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def check_pool(pipes: PipePool) -> None:
    assert pipes.in_use == 0
    assert [bytes_in(pipe.read_end) for pipe in pipes._free] == [0] * len(pipes._free)


async def clog(relay: RelayInProcess, one: End, two: End) -> None:
    """Send until the pump of func1 holds bytes in its pipe."""
    pause_reading(two, 32768)
    (pairing,) = relay.relay.pairings
    pump = pairing._pumps["func1"]
    assert isinstance(pump, RawPump)

    async def flood() -> None:
        while True:
            await one.send(b"SECRET--" * 8192)

    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await settled(0.01)
            while pump._pipe is None or not pump._in_pipe or not pump.is_blocked:
                # Nothing moves, and the pump holds a few bytes that it happened to copy. Behind
                # them there is more by now, for which it takes a pipe.
                await two.receive()
                await settled(0.01)
            # The pump and the kernel agree on how many bytes are in the pipe.
            assert bytes_in(pump._pipe.read_end) == pump._in_pipe
            nursery.cancel_scope.cancel()


async def bulk_is_clean(site: Site, relay: RelayInProcess) -> None:
    """The next users of the pool's pipes get their own bytes and no others."""
    data = block(4 * MIB, 9)
    for _ in range(3):
        one, two = await join_ends(site, relay)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, data)
            assert await two.receive_exactly(len(data)) == data
        one.party.close()
        two.party.close()


@pytest.mark.load
async def test_a_pairing_cancelled_with_bytes_in_its_pipe(site: Site) -> None:
    """TESTPLAN 29: the pipe is destroyed, and the pool holds no pipe that is not empty."""
    async with site.relay(OPEN) as relay:
        before = open_descriptors()
        one, two = await join_ends(site, relay)
        await clog(relay, one, two)
        (pairing,) = relay.relay.pairings
        pairing.expire_at(trio.current_time(), Outcome.MAX_LIFETIME, "cut by the test")
        assert await two.ended() == "reset"
        assert (await relay.outcome())["outcome"] == "max-lifetime"
        pipes = relay.relay.parts.forwarding.pipes
        check_pool(pipes)
        site.hang_up()
        await eventually(lambda: not opened_since(before, pipes=pipes), "the descriptors are back")
        await bulk_is_clean(site, relay)
        await eventually(lambda: not relay.relay.pairings, "all pairings are gone")
        check_pool(pipes)


async def test_a_party_that_resets_with_bytes_for_it_in_the_pipe(site: Site) -> None:
    """TESTPLAN 29: the same when a pump fails instead of being cancelled."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        await clog(relay, one, two)
        two.party.reset()
        assert (await relay.outcome())["outcome"] == "reset"
        check_pool(relay.relay.parts.forwarding.pipes)
        await bulk_is_clean(site, relay)


async def test_a_route_removed_with_bytes_in_a_pipe(site: Site) -> None:
    """TESTPLAN 29: the same when a reload ends the pairing."""
    other = DEMO.replace('"demo"', '"other"')
    async with site.relay(OPEN + other, sections="[relay]\ndrain_timeout = 0.2\n") as relay:
        one, two = await join_ends(site, relay)
        await clog(relay, one, two)
        site.write(other, sections="[relay]\ndrain_timeout = 0.2\n")
        await relay.relay.reload()
        assert (await relay.outcome())["outcome"] == "route-removed"
        check_pool(relay.relay.parts.forwarding.pipes)


@pytest.mark.load
async def test_the_whole_relay_cancelled_with_bytes_in_pipes(site: Site) -> None:
    """TESTPLAN 29: cancelling the relay's own task cuts every pairing, and leaves no descriptor and no complaint."""
    before = open_descriptors()
    inner = make_relay(load(site.write(OPEN)), watch_files=False)
    with structlog.testing.capture_logs() as events:
        async with trio.open_nursery() as nursery:
            await nursery.start(inner.run)
            relay = RelayInProcess(inner, events)
            one, two = await join_ends(site, relay)
            await clog(relay, one, two)
            three, four = await join_ends(site, relay, "tunnel", "raw")
            nursery.cancel_scope.cancel()
    assert not relay.logged("a bug in frelay ended this pairing")
    assert [record["outcome"] for record in relay.logged("pairing ended")] == ["drained"] * 2
    for end in (two, three, four):
        assert await end.ended() == "reset"
    check_pool(inner.parts.forwarding.pipes)
    site.hang_up()
    assert not opened_since(before)
