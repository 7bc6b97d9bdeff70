"""Connections without a certificate cost no function its place, its turn or its time."""

from __future__ import annotations

import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually


@asynccontextmanager
async def silent(
    relay: RelayInProcess, count: int, source: str = "127.0.0.1"
) -> AsyncIterator[list[trio.SocketStream]]:
    """``count`` connections from ``source`` that send nothing."""
    streams = [await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address=source) for _ in range(count)]
    try:
        yield streams
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def is_closed(stream: trio.SocketStream) -> bool:
    with trio.fail_after(TIMEOUT):
        try:
            return await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True


async def test_the_silent_hold_no_turn(site: Site) -> None:
    """However few turns there are, and from any address, a function gets its turn at once."""
    limits = "[limits]\nmax_pre_auth = 1\nmax_pre_auth_per_ip = 1\nhandshake_timeout = 60\n"
    async with site.relay(sections=limits) as relay, silent(relay, 20):
        await eventually(lambda: relay.legs == 20, "twenty strangers")
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        await pair_with(site, relay, one)
        assert not relay.logged("refused")


async def test_known_functions_do_not_count(site: Site) -> None:
    """Waiting and paired legs have shown their certificates: they take no place of strangers, however many they are."""
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


@asynccontextmanager
async def halfway(site: Site, relay: RelayInProcess, count: int) -> AsyncIterator[list[Party]]:
    """``count`` connections that send a complete ClientHello and nothing more."""
    parties = []
    for _ in range(count):
        party = await site.connect(relay, "func1")
        with pytest.raises(ssl.SSLWantReadError):
            party.tls.do_handshake()
        await party.flush()
        parties.append(party)
    yield parties


@pytest.mark.parametrize("limit", ["max_pre_auth", "max_pre_auth_per_ip"])
async def test_beyond_the_limit_newcomers_are_held_back(
    site: Site, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all turns are taken, nobody is refused: the next connection waits until a turn is free."""
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    limits = f"[limits]\n{limit} = 2\nhandshake_timeout = 60\n"
    async with site.relay(sections=limits) as relay, halfway(site, relay, 2) as strangers:
        admission = relay.relay.admission
        await eventually(lambda: admission.strangers.running == 2, "all turns taken")
        party = await site.connect(relay, "func1")
        joining = trio.Event()

        async def join() -> None:
            await party.handshake()
            await party.join()
            await party.expect("WAITING")
            joining.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            await eventually(lambda: admission.strangers.held == 1, "it is held back")
            with trio.move_on_after(0.3) as pause:
                await joining.wait()
            assert pause.cancelled_caught
            strangers.pop().close()
            with trio.fail_after(TIMEOUT):
                await joining.wait()
        assert not relay.logged("refused", code="limit")


async def test_who_is_held_back_and_hangs_up_is_gone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay notices at once, however it hangs up and whatever it had sent."""
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    limits = "[limits]\nmax_pre_auth = 1\nhandshake_timeout = 60\n"
    async with site.relay(sections=limits) as relay, halfway(site, relay, 1):
        strangers = relay.relay.admission.strangers
        await eventually(lambda: strangers.running == 1, "the turn is taken")
        async with halfway(site, relay, 3) as held:
            await eventually(lambda: strangers.held == 3, "they are held back")
            await held[0].send_raw(b"more")
            held[0].close()
            held[1].reset()
            await held[2].send_eof()
            await eventually(lambda: relay.legs == 1, "all three have gone")


async def test_the_time_for_which_it_was_held_back_is_not_a_functions_own(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handshake_timeout starts then. The wait itself is bounded, or the queue would have no end."""
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    limits = "[limits]\nmax_pre_auth = 1\nhandshake_timeout = 2\n"
    async with site.relay(sections=limits) as relay, halfway(site, relay, 1), halfway(site, relay, 1) as held:
        await relay.log("refused", reason="no TLS handshake within 2 s")
        (party,) = held
        await party.handshake()
        await party.join()
        await party.expect("WAITING")


async def test_who_gets_no_turn_is_told_to_the_operator(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    monkeypatch.setattr("frelay.joining.connection._HELD_BACK", 0.1)
    limits = "[limits]\nmax_pre_auth = 1\nhandshake_timeout = 5\n"
    async with site.relay(sections=limits) as relay, halfway(site, relay, 1), halfway(site, relay, 1) as held:
        assert await is_closed(held[0].stream)
        (refused,) = relay.logged("refused", code="limit")
        assert refused["reason"] == (
            "held back for 0.5 s, because too many handshakes were running "
            "(limits.max_pre_auth, limits.max_pre_auth_per_ip)"
        )


async def test_a_handshake_that_lets_others_wait_gives_way(site: Site) -> None:
    """It could hold its turn for handshake_timeout; if another connection needs it, it has two seconds."""
    limits = "[limits]\nmax_pre_auth = 2\nmax_pre_auth_per_ip = 2\nhandshake_timeout = 600\n"
    async with site.relay(sections=limits) as relay, halfway(site, relay, 2) as strangers:
        await eventually(lambda: relay.relay.admission.strangers.running == 2, "all turns taken")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert len(relay.logged("refused", code="limit")) in (1, 2)
        await ended_by_relay(strangers[0])


async def ended_by_relay(party: Party) -> None:
    with trio.fail_after(TIMEOUT):
        try:
            while await party.pull():
                pass
        except trio.BrokenResourceError:
            pass


async def test_the_limits_hold_from_a_reload_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a limit is raised, connections that are held back are served at once; if lowered, nobody loses a turn."""
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    rest = "handshake_timeout = 60\n"
    async with site.relay(sections="[limits]\nmax_pre_auth = 1\n" + rest) as relay, halfway(site, relay, 4):
        strangers = relay.relay.admission.strangers
        for limits, running in (
            ("max_pre_auth = 3\nmax_pre_auth_per_ip = 2\n", 2),
            ("max_pre_auth = 3\n", 3),
            ("max_pre_auth_per_ip = 1\n", 3),
            ("max_pre_auth = 1\n", 3),
            ("", 4),
        ):
            await eventually(lambda: len(strangers) == 4, "all four have come")
            site.write(sections=f"[limits]\n{limits}{rest}")
            await relay.relay.reload()
            await trio.testing.wait_all_tasks_blocked()
            assert strangers.running == running


async def test_the_limits_hold_from_a_reload_on_in_workers_too(site: Site) -> None:
    """Each worker counts for itself. Before the reload the second complete ClientHello has to wait long for a turn."""
    rest = "handshake_timeout = 600\njoin_timeout = 600\n"
    async with site.process(sections=f"[limits]\nmax_pre_auth = 1\n{rest}", workers=2) as relay:
        first = await site.connect(relay, "func1")
        await first.handshake()  # and no JOIN: the one turn is taken
        site.write(sections=f"[limits]\n{rest}")
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")
        second = await site.party(relay, "func2")
        await second.join()
        await second.expect("WAITING")
        await first.join()
        await first.expect("WAITING")
        assert not relay.logged("refused")


async def test_silent_strangers_are_gone_at_the_deadline(site: Site) -> None:
    """A flood holds its places for handshake_timeout and not longer."""
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
    """Above fd_budget a function is told so; when one leg ends there is room again."""
    async with site.relay(sections="[limits]\nfd_budget = 1e-9\n") as relay:  # two legs are always allowed
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        third = await site.party(relay, "func1")
        await third.join()
        assert await third.refusal() == {
            "code": "limit",
            "reason": "this relay has no file descriptor left for one more connection (limits.fd_budget)",
            "retry_after": 10.0,
        }
        await relay.log("refused", code="limit", identity="dns:func1.demo")
        assert len(relay.relay.pairings) == 1
        one.reset()
        two.reset()
        await eventually(lambda: relay.relay.admission.admitted == 0, "both legs gone")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


async def test_a_full_pool_makes_room_for_an_address_with_fewer(site: Site) -> None:
    """The relay evicts the longest silent stranger of the address that has the most, and logs it."""
    async with site.relay(sections="[limits]\nfd_budget = 1e-9\nhandshake_timeout = 600\n") as relay:
        budget = relay.relay.admission.stranger_budget
        async with silent(relay, budget - 1, "127.0.0.2") as many, silent(relay, 1, "127.0.0.3") as few:
            await eventually(lambda: relay.legs == budget, "the pool is full")
            one = await site.party(relay, "func1")
            assert await is_closed(many[0])
            await one.join()
            await one.expect("WAITING")
            await pair_with(site, relay, one)
            assert relay.legs == budget - 1 + 2
            with trio.move_on_after(0.1) as pause:
                await few[0].receive_some(1)
            assert pause.cancelled_caught
            refused = relay.logged("refused", code="limit")
            assert {e["reason"] for e in refused} == {
                "gave its place to another connection: all places for strangers are taken"
            }


async def pair_with(site: Site, relay: RelayInProcess, one: Party) -> None:
    two = await site.party(relay, "func2")
    await two.join()
    await two.expect("WAITING")
    await one.expect("PAIRED")
    await two.expect("PAIRED")


async def test_a_flood_is_told_in_a_few_lines_and_counted_to_the_last(site: Site) -> None:
    """A stranger can neither fill the log nor push all others out of the last refusals."""
    count = 500
    async with site.relay() as relay:
        for _ in range(count):
            async with await trio.open_tcp_stream("127.0.0.1", relay.port()) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                await is_closed(stream)
        totals = relay.relay.journal.totals["demo"].refusals
        await eventually(lambda: totals["protocol-error"] == count, "all are counted")
        refused = relay.logged("refused")
        assert sum(event.get("count", 1) for event in refused) == count
        assert len(refused) < count / 2
