"""After any number of pairings, however they ended, the relay holds what it held before the first."""

from __future__ import annotations

import gc

import pytest
import trio
import trio.testing

from frelay.pairing.leg import Leg
from frelay.pairing.pairing import Pairing
from frelay.pairing.raw_pump import RawPump
from frelay.pairing.stream_pump import StreamPump
from support.ends import OPEN, PAIRS_OF_MODES, churn, end_by_reset, end_in_order, join_ends
from support.holdings import as_before, holdings
from support.site import Site
from support.waiting import eventually

CHURN = 300


@pytest.mark.load
async def test_300_churned_pairings(site: Site) -> None:
    """TESTPLAN 39: a third ends in order, a third by reset, a third in the hand-off; then all counts are as before."""
    async with site.relay(OPEN) as relay:
        # A few pairings first: what is made once and kept (a thread, a cache) is not a leak.
        await churn(site, relay, 9, seed=1)
        await eventually(lambda: holdings(relay).legs == 0, "a relay with nobody in it")
        before = holdings(relay)
        await churn(site, relay, CHURN, seed=2)
        await as_before(relay, before)
        ended = relay.logged("pairing ended")
        assert len(ended) == CHURN + 9
        assert {entry["outcome"] for entry in ended} == {"closed", "reset", "handoff-aborted"}


@pytest.mark.load
async def test_legs_that_never_pair_leave_nothing(site: Site) -> None:
    """Strangers, legs that leave and legs that are refused give back their slots too."""
    limits = "[limits]\nhandshake_timeout = 0.5\njoin_timeout = 0.5\nping_interval = 0.3\n"
    async with site.relay(OPEN, sections=limits) as relay:
        await trio.testing.wait_all_tasks_blocked()
        before = holdings(relay)
        for number in range(12):
            silent = await site.connect(relay, "func1")
            if number % 3 == 0:
                silent.reset()
            no_join = await site.party(relay, "func1")
            if number % 3 == 1:
                no_join.reset()
            waiter = await site.party(relay, "func1")
            await waiter.join(wait=0.5)
            await waiter.expect("WAITING")
            if number % 3 == 2:
                await waiter.send_frame("LEAVE")
            bare = await site.party(relay, "func1", alpn=())
            if number % 2 == 0:
                await bare.send(b"early")
            bare.reset()
        await eventually(lambda: relay.legs == 0, "everybody has gone")
        site.hang_up()
        await as_before(relay, before)


@pytest.mark.load
async def test_no_pairing_stays_in_memory(site: Site) -> None:
    """When a pairing has ended, no reference keeps it, its legs or its pumps alive."""

    def in_memory() -> list[object]:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, Pairing | Leg | RawPump | StreamPump)]

    async with site.relay(OPEN) as relay:
        # Keep the objects of earlier tests until this test ends, so that no new object gets the id of an old one.
        before = in_memory()
        known = {id(thing) for thing in before}
        for mode1, mode2 in PAIRS_OF_MODES:
            await end_in_order(*await join_ends(site, relay, mode1, mode2))
            await end_by_reset(*await join_ends(site, relay, mode1, mode2))
        site.hang_up()
        await eventually(lambda: relay.legs == 0, "everybody has gone")
        await trio.testing.wait_all_tasks_blocked()
        assert not [thing for thing in in_memory() if id(thing) not in known]
