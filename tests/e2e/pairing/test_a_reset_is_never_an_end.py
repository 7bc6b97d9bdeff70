"""When one party is cut off in mid-stream, the other one sees a cut: a reset is never passed on as an end.

Linux reports a reset only once, to the first of the relay's two pumps that uses the socket. To the other pump it looks
as if FIN had come.
"""

from __future__ import annotations

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block, join_ends
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

DATA = block(1 << 18)
ROUNDS = 5


async def flood(end: End) -> None:
    try:
        while True:
            await end.send(DATA)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def reset_in_mid_stream(relay: RelayInProcess, victim: End, other: End, *, both_ways: bool) -> None:
    """``victim`` resets while bytes flow to it, or both ways; ``other`` must see a break, not an end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, other)
        if both_ways:
            nursery.start_soon(flood, victim)
        await victim.receive_exactly(len(DATA))
        victim.party.reset()
        assert await other.ended() == "reset"
        nursery.cancel_scope.cancel()
    await eventually(lambda: not relay.relay.pairings, "the pairing has ended")


@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("who", ["func1", "func2"])
@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_a_reset_in_mid_stream(site: Site, mode1: Mode, mode2: Mode, who: str, both_ways: bool) -> None:
    """TESTPLAN 48: RST in mid-stream, 180 times, from each side, in every combination of modes."""
    async with site.relay(OPEN) as relay:
        for _ in range(ROUNDS):
            one, two = await join_ends(site, relay, mode1, mode2)
            victim, other = (one, two) if who == "func1" else (two, one)
            await reset_in_mid_stream(relay, victim, other, both_ways=both_ways)
            site.hang_up()
        records = relay.logged("pairing ended")
        assert [(record["outcome"], record["side"]) for record in records] == [("reset", who)] * ROUNDS
