"""When a network drops everything, no error comes: the relay has to notice it, and end the other party's leg.

No FIN and no RST comes through a cut cable. What remains are TCP's own timers (keepalive for an idle leg,
TCP_USER_TIMEOUT for bytes in flight), the relay's stall_timeout, and the PING of a waiting leg.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from support.descriptors import open_descriptors
from support.ends import OPEN, End, Mode, block, join_ends, pause_reading
from support.netns import Network, network
from support.party import Party
from support.relay import RelayProcess
from support.site import Site
from support.through_faults import direct
from support.waiting import TIMEOUT, eventually

ROUTES = OPEN + OPEN.replace('"demo"', '"lobby"')
SHORT = """
[limits]
ping_interval = 0.5
pong_timeout = 1.5
stall_timeout = 3
[tcp]
keepalive = [1, 1, 2]
user_timeout = 3
"""
"""The defaults take minutes, longer than TIMEOUT, so a relay that ignores these values fails the test."""

CUTS = {"both ways": (True, True), "to func1 only": (True, False), "from func1 only": (False, True)}
DATA = block(1 << 18)

# These tests make their own network between the relay and the parties.
pytestmark = direct


@asynccontextmanager
async def far_relay(site: Site, sections: str) -> AsyncIterator[tuple[Network, RelayProcess]]:
    async with (
        network(site, "func1", "func2", "neighbour") as net,
        net.relay_there(ROUTES, sections=sections) as relay,
    ):
        yield net, relay


async def flood(source: End) -> None:
    try:
        while True:
            await source.send(DATA)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # it was noticed


async def drain(sink: End) -> None:
    """Read until the connection breaks; at func1, behind the cut, that is never."""
    try:
        while await sink.receive():
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def is_cut(end: End) -> None:
    assert await end.ended() in ("reset", "truncated")


async def talk(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"


async def waits(net: Network, relay: RelayProcess, name: str) -> Party:
    party = await net.party(relay, name, route="lobby")
    await party.join()
    await party.expect("WAITING")
    return party


@pytest.mark.load
@pytest.mark.parametrize("cut", CUTS)
async def test_while_idle_in_flight_and_waiting(site: Site, cut: str) -> None:
    """TESTPLAN 47: in each mode one pairing is idle, one sends to func1, and one sends from func1. One leg waits."""
    to, back = CUTS[cut]
    async with far_relay(site, SHORT) as (net, relay), trio.open_nursery() as nursery:
        bystanders = await join_ends(net, relay, names=("neighbour", "func2"))
        at_rest = len(open_descriptors(relay.process.pid))
        modes: tuple[Mode, ...] = ("raw", "tunnel")
        idle = [await join_ends(net, relay, mode, mode) for mode in modes]
        sent_to = [await join_ends(net, relay, mode, mode) for mode in modes]
        sent_from = [await join_ends(net, relay, mode, mode) for mode in modes]
        lost = await waits(net, relay, "func1")
        for ends in idle:
            await talk(*ends)
        for one, two in sent_to:
            nursery.start_soon(flood, two)
            await one.receive_exactly(len(DATA))
            nursery.start_soon(drain, one)
        for one, two in sent_from:
            nursery.start_soon(flood, one)
            await two.receive_exactly(len(DATA))
        net.cut("func1", to=to, back=back)

        pairs = [*idle, *sent_to, *sent_from]
        # All at once: a func2 that reads nothing for user_timeout is cut for that, and not for the cable.
        async with trio.open_nursery() as waiting:
            for _, two in pairs:
                waiting.start_soon(is_cut, two)
        await relay.log("pairing ended", count=len(pairs), side="func1")
        ended = relay.logged("pairing ended")
        assert {entry["outcome"] for entry in ended} <= {"reset", "stall-timeout"}
        assert len(ended) == len(pairs)
        # The place is free: a party that joins now meets one that is there.
        await relay.log("refused", party="func1", code="pong-timeout")
        newcomers = [await waits(net, relay, name) for name in ("neighbour", "func2")]
        for newcomer in newcomers:
            await newcomer.expect("PAIRED")
        await talk(*bystanders)
        for party in (*newcomers, lost):
            party.close()
        for _, end in pairs:
            end.party.close()
        # The pool keeps the pipes of the bulk transfers: two for each direction.
        await eventually(
            lambda: (
                sum(not what.startswith("pipe:") for what in open_descriptors(relay.process.pid).values()) <= at_rest
            ),
            "no descriptor is left of them",
        )
        nursery.cancel_scope.cancel()


async def test_a_cut_that_is_mended_in_time_costs_no_byte(site: Site) -> None:
    """With the default limits: TCP sends the lost segments again before any limit is over."""
    async with far_relay(site, "") as (net, relay):
        one, two = await join_ends(net, relay)
        pause_reading(two)
        waiting = await waits(net, relay, "func1")
        net.cut("func1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, DATA)
            nursery.start_soon(two.send, DATA)
            await eventually(lambda: retransmissions(one) >= 3, "func1 has tried again, three times")
            net.mend("func1")
            with trio.fail_after(TIMEOUT):
                assert await two.receive_exactly(len(DATA)) == DATA
                assert await one.receive_exactly(len(DATA)) == DATA
        other = await waits(net, relay, "func2")
        await waiting.expect("PAIRED")
        await other.expect("PAIRED")
        assert not relay.logged("pairing ended")


def retransmissions(end: End) -> int:
    """How often in a row its kernel has sent a segment again without an answer: tcpi_retransmits of linux/tcp.h."""
    return int(end.party.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2])
