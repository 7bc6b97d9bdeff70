"""Whatever the network does to the segments, the functions get each other's bytes, or see that the connection broke.

Each seed is a network of its own (``tests/support/faults.py``), with a pair of modes, an order of messages, and sizes.
To run more seeds, and to run all other tests through such a network::

    FRELAY_FAULT_SEEDS=200 pytest tests/e2e/pairing/test_through_a_network_that_faults.py
    FRELAY_THROUGH_FAULTS=7 pytest tests/e2e
"""

from __future__ import annotations

import hashlib
import os
import random
import ssl
from dataclasses import dataclass, field

import pytest
import trio

from support.clients import CLIENTS, answer, ask, meet, options
from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block
from support.faults import Conditions, Fault, faulty_network
from support.party import Party
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

SEEDS = range(int(os.environ.get("FRELAY_FAULT_SEEDS", "9")))
# All limits that end a leg which the network has silenced. Where nothing is silenced, they do not matter.
SHORT = """
[limits]
handshake_timeout = 1
join_timeout = 1
handoff_timeout = 1
wait_timeout = 2
ping_interval = 0.5
pong_timeout = 0.5
half_close_timeout = 1
idle_timeout = 1
stall_timeout = 1
"""


# So that the relay soon notices a silent waiting leg.
PINGS = "[limits]\nping_interval = 0.2\npong_timeout = 60\n"


class GoneError(Exception):
    """The relay, or the network, took the leg away."""


@dataclass
class Function:
    """One party in a scenario: it sends all of ``says``, ends its direction, and receives what the other sends."""

    name: str
    mode: Mode
    says: bytes
    speaks_first: bool
    heard: bytes = b""
    heard_the_end: bool = False
    said_all: bool = False
    has_left: trio.Event = field(default_factory=trio.Event)

    async def play(self, site: Site, relay: RelayInProcess) -> None:
        try:
            party = await site.connect(relay, self.name, alpn=() if self.mode == "bare" else ("frelay/1",))
            await party.handshake()
            if self.mode != "bare":
                await self._join(party)
            await self._talk(End(party, self.mode))
        except* (GoneError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            # Linux reports a reset once. If the sending task got it, it looks like a FIN to the receiving task.
            self.heard_the_end = False
        finally:
            self.has_left.set()

    async def _join(self, party: Party) -> None:
        await party.join(modes=["handoff" if self.mode == "raw" else "tunnel"])
        while (found := await party.next_frame()) is not None:
            name, payload = found
            if name == "PING":
                await party.send_frame("PONG", payload)
            elif name == "PAIRED":
                if self.mode == "raw":
                    # Read up to the relay's close_notify, which no raw byte follows, and then send ours.
                    while await party.receive():
                        raise AssertionError("TLS data after PAIRED")
                    assert party.incoming.read() == b"", "raw bytes before our close_notify"
                    await party.stream.send_all(party.close_notify())
                return
            elif name == "REFUSED":
                raise GoneError
        raise GoneError

    async def _talk(self, end: End) -> None:
        if not self.speaks_first:
            await self._listen(end)
        async with trio.open_nursery() as nursery:
            if self.speaks_first:
                nursery.start_soon(self._listen, end)
            await end.send(self.says)
            await end.send_eof()
            self.said_all = True

    async def _listen(self, end: End) -> None:
        while data := await end.receive():
            self.heard += data
        self.heard_the_end = True


def cast(seed: int) -> tuple[Function, Function]:
    """Two functions for a seed: both send at once, or one answers only when the other has ended its direction."""
    chance = random.Random(f"cast {seed}")
    mode1, mode2 = PAIRS_OF_MODES[seed % len(PAIRS_OF_MODES)]
    who_waits = chance.choice(["nobody", "func1", "func2"])
    sizes = [chance.choice([1, 100, 20_000, 200_000]) for _ in range(2)]
    return (
        Function("func1", mode1, block(sizes[0], seed), who_waits != "func1"),
        Function("func2", mode2, block(sizes[1], seed + 1), who_waits != "func2"),
    )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def lives_on(site: Site, relay: RelayInProcess) -> None:
    """The relay has nothing left of the earlier pairings, and pairs the next two functions."""
    if relay.network is not None:
        relay.network.go_down()
    relay.network = None
    site.hang_up()
    await eventually(lambda: relay.legs == 0, "no leg is left")
    assert relay.waiting() == (0, 0)
    assert not relay.relay.pairings
    one, two = cast(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.play, site, relay)
        nursery.start_soon(two.play, site, relay)
    assert (one.heard, two.heard) == (two.says, one.says)


@pytest.mark.parametrize("seed", SEEDS)
async def test_bytes_arrive_through_any_weather(site: Site, seed: int) -> None:
    """TESTPLAN 14, 23, 25: segments are split, merged and delayed; both digests are right, and the end is clean."""
    one, two = cast(seed)
    async with faulty_network(Conditions(seed)) as network, site.relay(OPEN) as relay:
        relay.network = network
        with trio.fail_after(3 * TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.play, site, relay)
                nursery.start_soon(two.play, site, relay)
        assert (digest(one.heard), digest(two.heard)) == (digest(two.says), digest(one.says))
        assert one.said_all
        assert two.said_all
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("closed", "both")
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (len(one.says), len(two.says))
        await lives_on(site, relay)


@pytest.mark.parametrize("fault", ["cut", "reset", "silence"])
@pytest.mark.parametrize("seed", SEEDS)
async def test_what_the_network_breaks_ends_for_both(site: Site, seed: int, fault: Fault) -> None:
    """TESTPLAN 16, 48: a break at any byte of either leg. Never wrong bytes, never a hang, nothing left.

    A FIN on a raw leg is an end, even if the network made it; only the functions' own TLS can tell the difference. What
    a function received is always the first part of what the other sent.
    """
    one, two = cast(seed)
    limits = SHORT if fault == "silence" else PINGS
    async with faulty_network(Conditions(seed, fault=fault)) as network, site.relay(OPEN, sections=limits) as relay:
        relay.network = network
        with trio.fail_after(3 * TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.play, site, relay)
                nursery.start_soon(two.play, site, relay)
                while not (one.has_left.is_set() and two.has_left.is_set()):
                    await trio.sleep(0.005)
                    if (
                        fault == "silence"
                        and (one.has_left.is_set() or two.has_left.is_set())
                        and relay.legs == 0
                        and network.has_struck
                    ):
                        # The relay has given up this leg, and cannot tell its party.
                        nursery.cancel_scope.cancel()
                        break
                    if network.has_struck and relay.legs == 1 and sum(relay.waiting()) == 1:
                        # The other party never came this far. A FIN would not end every wait: after a bare leg's
                        # unread bytes it might be half of a conversation.
                        network.go_down()
        assert two.says.startswith(one.heard)
        assert one.says.startswith(two.heard)
        if not network.has_struck:
            assert (one.heard, two.heard) == (two.says, one.says)
        if fault == "reset":
            # A reset is never passed on as an end.
            assert not one.heard_the_end or one.heard == two.says
            assert not two.heard_the_end or two.heard == one.says
        await lives_on(site, relay)


@pytest.mark.parametrize("seed", SEEDS)
async def test_our_clients_meet_through_any_weather(site: Site, seed: int) -> None:
    """With their own TLS inside; the seeds take turns through all pairs of clients and modes."""
    chance = random.Random(f"clients {seed}")
    clients = (chance.choice(CLIENTS), chance.choice(CLIENTS))
    question, reply = block(chance.choice([1, 50_000]), 1), block(chance.choice([1, 50_000]), 2)
    async with faulty_network(Conditions(seed, connections=4)) as network, site.relay(OPEN) as relay:
        relay.network = network
        given = tuple(
            options(site, me, other, mode=chance.choice(["handoff", "ticket", "tunnel"]))
            for me, other in (("func1", "func2"), ("func2", "func1"))
        )
        heard = await meet(clients, f"127.0.0.1:{relay.port()}", (ask(question), answer(reply)), (given[0], given[1]))
        assert heard == (reply, question)
        assert (await relay.outcome())["outcome"] == "closed"
        await lives_on(site, relay)
