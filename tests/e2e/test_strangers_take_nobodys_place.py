"""Connections that nobody has vouched for are few at a time, few from one address, and cost no function its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from rig import PATIENCE, Party, RelayInProcess, Site, eventually, pair


@asynccontextmanager
async def silent(
    relay: RelayInProcess, count: int, source: str = "127.0.0.1"
) -> AsyncIterator[list[trio.SocketStream]]:
    """``count`` connections from ``source`` that say nothing."""
    streams = [await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address=source) for _ in range(count)]
    try:
        yield streams
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def is_closed(stream: trio.SocketStream) -> bool:
    with trio.fail_after(PATIENCE):
        try:
            return await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True


async def test_one_address_may_only_have_so_many(site: Site) -> None:
    """The fourth of three is closed at once; the first three are left in peace, and other addresses too."""
    limits = "[limits]\nmax_pre_auth_per_ip = 3\nhandshake_timeout = 60\n"
    async with site.relay(sections=limits) as relay, silent(relay, 3) as first:
        await eventually(lambda: relay.legs == 3, "three strangers")
        async with silent(relay, 2) as more:
            for stream in more:
                assert await is_closed(stream)
        refused = relay.logged("refused", code="limit")
        assert [event["reason"] for event in refused] == [
            "3 connections from this address are unauthenticated already"
        ] * 2
        async with silent(relay, 3, source="127.0.0.2"):
            await eventually(lambda: relay.legs == 6, "three strangers from elsewhere")
        await eventually(lambda: relay.legs == 3, "those gone")
        # A place that was given back can be had again.
        await trio.aclose_forcefully(first.pop())
        await eventually(lambda: relay.legs == 2, "one less")
        party = await site.party(relay, "func1")
        await party.join()
        await party.expect("WAITING")


async def test_known_functions_do_not_count(site: Site) -> None:
    """Who waits and who is paired has shown who it is: any number of them leaves all places to strangers."""
    limits = "[limits]\nmax_pre_auth = 2\nmax_pre_auth_per_ip = 2\n"
    async with site.relay(sections=limits) as relay:
        for count in range(1, 6):
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await pair(one, two)
            assert len(relay.relay.pairings) == count
        for _ in range(5):
            waiter = await site.party(relay, "func1")
            await waiter.join()
            await waiter.expect("WAITING")
        assert relay.legs == 15
        assert not relay.logged("refused", code="limit")


async def test_beyond_the_limit_newcomers_wait_in_the_kernel(site: Site) -> None:
    """With all places taken nobody is refused: the next connection is accepted once a place is free."""
    limits = "[limits]\nmax_pre_auth = 2\nmax_pre_auth_per_ip = 32\nhandshake_timeout = 60\n"
    async with site.relay(sections=limits) as relay, silent(relay, 2) as strangers:
        await eventually(lambda: relay.legs == 2, "all places taken")
        party = await site.connect(relay, "func1")  # the kernel has it
        joining = trio.Event()

        async def join() -> None:
            await party.handshake()
            await party.join()
            await party.expect("WAITING")
            joining.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            with trio.move_on_after(0.3) as pause:
                await joining.wait()
            assert pause.cancelled_caught
            assert relay.legs == 2
            await trio.aclose_forcefully(strangers.pop())
            with trio.fail_after(PATIENCE):
                await joining.wait()
        assert not relay.logged("refused", code="limit")


async def test_silent_strangers_are_gone_at_the_deadline(site: Site) -> None:
    """So that a flood holds its places for handshake_timeout and not longer."""
    limits = "[limits]\nmax_pre_auth = 4\nmax_pre_auth_per_ip = 4\nhandshake_timeout = 0.5\n"
    async with site.relay(sections=limits) as relay, silent(relay, 4) as strangers:
        await eventually(lambda: relay.legs == 4, "all places taken")
        one = await site.party(relay, "func1")
        two = await site.party(relay, "func2")
        await pair(one, two)
        for stream in strangers:
            assert await is_closed(stream)


async def test_who_handshakes_and_then_says_nothing_holds_its_place_for_join_timeout(site: Site) -> None:
    limits = "[limits]\nmax_pre_auth = 2\nmax_pre_auth_per_ip = 2\njoin_timeout = 0.5\n"
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    async with site.relay(sections=limits) as relay:
        silent_ones: list[Party] = [await site.party(relay, "stranger") for _ in range(2)]
        await eventually(lambda: relay.legs == 2, "all places taken")
        for party in silent_ones:
            assert (await party.refusal())["reason"] == "no JOIN within 0.5 s"
            party.close()
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)


async def test_bare_legs_are_strangers_until_their_certificate_is_known(site: Site) -> None:
    limits = "[limits]\nmax_pre_auth = 1\nmax_pre_auth_per_ip = 1\n"
    async with site.relay(sections=limits) as relay:
        for count in range(1, 6):
            await site.party(relay, "func1", alpn=())
            await eventually(lambda count=count: relay.waiting() == (count, 0), "a bare leg's place")  # type: ignore[misc]


async def test_the_share_of_descriptors_has_an_end(site: Site) -> None:
    """Beyond fd_budget a connection is closed at once, known or not; with one gone there is room again."""
    async with site.relay(sections="[limits]\nfd_budget = 1e-9\n") as relay:  # two legs are always allowed
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        async with silent(relay, 1) as turned_away:
            assert await is_closed(turned_away[0])
        refused = await relay.log("refused", code="limit")
        assert "limits.fd_budget" in refused["reason"]
        assert len(relay.relay.pairings) == 1
        one.reset()
        two.reset()
        await eventually(lambda: relay.legs == 0, "both legs gone")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
