"""Ctrl-C ends ``frelay run`` as SIGTERM does: in order, with exit code 0, and without a traceback."""

from __future__ import annotations

import signal

from support.party import pair
from support.site import Site


async def test_an_idle_relay_ends_at_once(site: Site) -> None:
    async with site.process() as relay:
        relay.signal(signal.SIGINT)
        assert await relay.exit_code() == 0
        assert relay.logged("draining", reason="SIGINT")
        assert relay.logged("stopped", clean=True)
        assert "Traceback" not in relay.stderr


async def test_a_pairing_may_end_first(site: Site) -> None:
    """TESTPLAN 45, by SIGINT."""
    async with site.process() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two, modes=["tunnel"])
        await relay.log("handed off")
        relay.signal(signal.SIGINT)
        await relay.log("draining", reason="SIGINT")
        await one.send(b"the last words")
        assert await two.receive_exactly(14, raw=False) == b"the last words"
        for party in (one, two):
            await party.stream.send_all(party.close_notify())
        assert await relay.exit_code() == 0
        assert relay.logged("pairing ended", outcome="closed")
        assert "Traceback" not in relay.stderr


async def test_a_second_one_ends_it_now(site: Site) -> None:
    """TESTPLAN 46, by SIGINT: a second Ctrl-C stops the relay now."""
    async with site.process() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two, modes=["tunnel"])
        await relay.log("handed off")
        relay.signal(signal.SIGINT)
        await relay.log("draining", reason="SIGINT")
        relay.signal(signal.SIGINT)
        assert await relay.exit_code() == 1
        assert relay.logged("pairing ended", outcome="drained")
        assert relay.logged("stopped", clean=False)
        assert "Traceback" not in relay.stderr
