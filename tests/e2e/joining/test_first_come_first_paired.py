"""The two queues of a route are first in, first out, and a leg that leaves changes nobody else's turn."""

from __future__ import annotations

import pytest

from support.party import Party
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually


async def queue_up(site: Site, relay: RelayInProcess, name: str, count: int) -> list[Party]:
    parties = []
    for number in range(count):
        party = await site.party(relay, name)
        await party.join()
        await party.expect("WAITING")
        await eventually(lambda number=number: sum(relay.waiting()) == number + 1, "its place")  # type: ignore[misc]
        parties.append(party)
    return parties


async def pairing_of(site: Site, relay: RelayInProcess, name: str) -> str:
    """Let one more function join; gives the pairing that it gets."""
    party = await site.party(relay, name)
    await party.join()
    await party.expect("WAITING")
    return str((await party.expect("PAIRED"))["pairing"])


@pytest.mark.parametrize(("waiting", "coming"), [("func1", "func2"), ("func2", "func1")])
async def test_the_longest_wait_is_first(site: Site, waiting: str, coming: str) -> None:
    async with site.relay() as relay:
        for_turns = await queue_up(site, relay, waiting, 4)
        for party in for_turns:
            pairing = await pairing_of(site, relay, coming)
            assert (await party.expect("PAIRED"))["pairing"] == pairing
        assert relay.waiting() == (0, 0)


async def test_gaps_in_the_queue_close(site: Site) -> None:
    async with site.relay() as relay:
        first, second, third, fourth = await queue_up(site, relay, "func1", 4)
        await first.send_frame("LEAVE")
        third.reset()
        await eventually(lambda: relay.waiting() == (2, 0), "two gone")
        for party in (second, fourth):
            pairing = await pairing_of(site, relay, "func2")
            assert (await party.expect("PAIRED"))["pairing"] == pairing


async def test_a_retry_stands_at_the_end_of_the_queue(site: Site) -> None:
    """Its old place went with its old connection; a function that reconnects often must not starve the others."""
    async with site.relay() as relay:
        first, second = await queue_up(site, relay, "func1", 2)
        retry = await site.party(relay, "func1")
        retry.attempt = first.attempt
        await retry.join()
        await retry.expect("WAITING")
        assert (await first.refusal())["code"] == "replaced"
        for party in (second, retry):
            pairing = await pairing_of(site, relay, "func2")
            assert (await party.expect("PAIRED"))["pairing"] == pairing


async def test_bare_and_framed_legs_stand_in_one_queue(site: Site) -> None:
    async with site.relay() as relay:
        bare = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (1, 0), "the bare leg's place")
        framed = await site.party(relay, "func1")
        await framed.join()
        await framed.expect("WAITING")
        await eventually(lambda: relay.waiting() == (2, 0), "the framed leg's place")
        two = await site.party(relay, "func2", alpn=())
        await two.send(b"for the first")
        assert await bare.receive_exactly(13, raw=False) == b"for the first"
        pairing = await pairing_of(site, relay, "func2")
        assert (await framed.expect("PAIRED"))["pairing"] == pairing
