"""A thousand connections reset at once, in mid-stream, leave a thousand records and nothing else."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, PLAIN, End, block, join_ends
from support.holdings import as_before, holdings
from support.relay import RelayInProcess, address_seen
from support.site import Site
from support.waiting import eventually

RESETS = 1000
LIMITS = f"[limits]\nmax_pre_auth_per_ip = {3 * RESETS}\nmax_pairings = {2 * RESETS}\n"
ROUTES = OPEN + PLAIN.replace('"demo"', '"plain"')
# More than a pump copies at once, and small enough to fit into each buffer on the way.
DATA = block(20_000)


async def crowd(site: Site, relay: RelayInProcess, count: int) -> list[tuple[End, End]]:
    """Pairings of a plain route, which need no handshake, as (func1, func2)."""
    arrived: list[End] = []
    for _ in range(2 * count):
        end = End(await site.connect(relay, None, route="plain"), "plain")
        arrived.append(end)
    await eventually(lambda: len(relay.logged("handed off", route="plain")) == count, "all are paired")
    ends = {address_seen(relay, end.party): end for end in arrived}
    pairings = [pairing for pairing in relay.relay.pairings if pairing.route == "plain"]
    return [(ends[one.legs["func1"].address], ends[one.legs["func2"].address]) for one in pairings]


@pytest.mark.load
async def test_a_thousand_at_once(site: Site) -> None:
    """TESTPLAN 48: from either side, in all modes, with bytes on their way both ways; another pairing goes on."""
    random_ = random.Random(48)
    async with site.relay(ROUTES, sections=LIMITS) as relay:
        bystanders = await join_ends(site, relay)
        await talk(*bystanders)
        before = holdings(relay)
        pairs = [await join_ends(site, relay, mode1, mode2) for mode1, mode2 in PAIRS_OF_MODES * 3]
        pairs += await crowd(site, relay, RESETS - len(pairs))
        for ends in pairs:
            for end in ends:
                await end.send(DATA)
        sides = [random_.choice((0, 1)) for _ in pairs]
        victims = [ends[side] for ends, side in zip(pairs, sides, strict=True)]
        others = [ends[1 - side] for ends, side in zip(pairs, sides, strict=True)]
        for victim in victims:
            victim.party.reset()
        async with trio.open_nursery() as nursery:
            for other in others:
                nursery.start_soon(is_cut, other)
        await eventually(lambda: len(relay.logged("pairing ended")) == RESETS, "all are recorded")
        records = Counter((entry["outcome"], entry["side"]) for entry in relay.logged("pairing ended"))
        assert records == {("reset", "func1"): sides.count(0), ("reset", "func2"): sides.count(1)}
        await talk(*bystanders)
        for other in others:
            other.party.close()
        await as_before(relay, before)


async def is_cut(end: End) -> None:
    assert await end.ended() == "reset"


async def talk(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"
