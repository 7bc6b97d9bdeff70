"""Each time limit of a pairing ends what it is meant for, never early, and never a party that is only slow.

Each test tries all combinations of modes at once, on one relay.
"""

from __future__ import annotations

import time
from datetime import datetime

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, End, block, join_all, join_ends, pause_reading
from support.party import TLS_HEADER, pair
from support.relay import RelayInProcess
from support.site import Site
from support.through_faults import direct
from support.waiting import before_it_expires, despite_stalls, eventually

ALL = len(PAIRS_OF_MODES)


async def all_ended(relay: RelayInProcess, outcome: str, side: str, *, after: float) -> None:
    """All pairings end, each with one record and for this reason, and none early."""
    await eventually(lambda: len(relay.logged("pairing ended")) >= ALL, "all pairings have ended")
    assert len(relay.logged("pairing ended", outcome=outcome, side=side)) == ALL
    assert len(relay.logged("pairing ended")) == ALL
    assert all(record["duration"] >= after for record in relay.logged("pairing ended"))


async def all_cut(pairs: list[tuple[End, End]]) -> None:
    for one, two in pairs:
        assert await one.ended() == "reset"
        assert await two.ended() == "reset"


# --- idle_timeout ---------------------------------------------------------------------------------------------


async def test_an_idle_pairing_ends_at_idle_timeout(site: Site) -> None:
    limit = 0.6
    async with site.relay(OPEN, sections=f"[limits]\nidle_timeout = {limit}\n") as relay:
        pairs = await join_all(site, relay)
        await all_cut(pairs)
        await all_ended(relay, "idle-timeout", "relay", after=limit)


@pytest.mark.load
async def test_a_byte_now_and_then_keeps_it(site: Site) -> None:
    """TESTPLAN 33: one direction is enough."""

    async def say_a_byte(limit: float) -> None:
        async with site.relay(OPEN, sections=f"[limits]\nidle_timeout = {limit}\n") as relay:
            pairs = await join_all(site, relay)
            began = time.monotonic()
            while time.monotonic() - began < 2 * limit:
                for one, two in pairs:
                    await two.send(b".")
                    assert await one.receive_exactly(1) == b"."
                await trio.sleep(limit / 6)
            assert not relay.logged("pairing ended")
            await all_cut(pairs)
            await all_ended(relay, "idle-timeout", "relay", after=2.7 * limit)

    await despite_stalls(say_a_byte, 0.8)


# --- stall_timeout --------------------------------------------------------------------------------------------


async def flood(end: End, seconds: float) -> None:
    """Send as fast as the connection takes it."""
    data = block(1 << 18)
    with trio.move_on_after(seconds):
        try:
            while True:
                await end.send(data)
        except trio.BrokenResourceError:
            pass


async def test_a_reader_that_takes_nothing_ends_at_stall_timeout(site: Site) -> None:
    limit = 0.8
    async with site.relay(OPEN, sections=f"[limits]\nstall_timeout = {limit}\n") as relay:
        pairs = await join_all(site, relay)
        async with trio.open_nursery() as nursery:
            for one, two in pairs:
                pause_reading(two)
                nursery.start_soon(flood, one, 20)
            await all_ended(relay, "stall-timeout", "func2", after=limit)
        for _, two in pairs:
            assert await two.ended() == "reset"


@pytest.mark.load
@direct  # the relay would see the network's pace, not the reader's
async def test_a_reader_that_is_slow_but_alive_survives(site: Site) -> None:
    """TESTPLAN 33: the reader must take some bytes in time; the kernel's buffer need not have room again.

    Linux reports a socket as writable only when a third of its send buffer is free. At this reader's pace that takes
    many times the limit.
    """

    async def survive(limit: float) -> None:
        received: list[int] = []

        async def read_slowly(end: End) -> None:
            count, began = 0, time.monotonic()
            while time.monotonic() - began < 3 * limit:
                count += len(await end.receive(8192))
                await trio.sleep(0.05)
            received.append(count)

        async with site.relay(OPEN, sections=f"[limits]\nstall_timeout = {limit}\n") as relay:
            pairs = await join_all(site, relay)
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for one, two in pairs:
                        pause_reading(two, 16384)
                        nursery.start_soon(flood, one, 2.5 * limit)
                        nursery.start_soon(read_slowly, two)
            assert not relay.logged("pairing ended"), "a live reader was cut"
            assert len(received) == ALL

    await despite_stalls(survive, 1.0)


@pytest.mark.load
async def test_a_pause_shorter_than_stall_timeout_is_forgiven_again_and_again(site: Site) -> None:
    """Each byte that is taken starts the limit again; three pauses do not add up."""
    data = block(16 << 20)

    async def pause(limit: float) -> None:
        async with site.relay(OPEN, sections=f"[limits]\nstall_timeout = {limit}\n") as relay:
            one, two = await join_ends(site, relay)
            pause_reading(two)
            received = 0

            async def write() -> None:
                await one.send(data)
                await one.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                for _ in range(3):
                    await trio.sleep(limit / 2)
                    received += len(await two.receive_exactly(1 << 20))
                received += len(await two.receive_to_end())
            assert received == len(data)
            await two.send_eof()
            assert (await relay.outcome())["outcome"] == "closed"

    await despite_stalls(pause, 1.2)


# --- the ends of a life -----------------------------------------------------------------------------------------


async def test_max_lifetime_ends_even_a_busy_pairing(site: Site) -> None:
    limit = 2.0

    async def chatter(one: End, two: End) -> None:
        try:
            while True:
                await one.send(b"x" * 1000)
                await two.receive_exactly(1000)
        except trio.BrokenResourceError:
            pass

    async with site.relay(OPEN, sections=f"[limits]\nmax_lifetime = {limit}\n") as relay:
        async with trio.open_nursery() as nursery:
            for mode1, mode2 in PAIRS_OF_MODES:
                nursery.start_soon(chatter, *await join_ends(site, relay, mode1, mode2))
        # The lifetime begins when the two are matched; the record counts from the start of its task, a little later.
        await all_ended(relay, "max-lifetime", "relay", after=0.9 * limit)
        assert all(record["bytes_func1_to_func2"] >= 1000 for record in relay.logged("pairing ended"))


@pytest.mark.load
@pytest.mark.parametrize("which", ["func1", "func2"])
async def test_a_certificate_that_expires_in_mid_pairing(site: Site, which: str) -> None:
    """TESTPLAN 13: the pairing ends when the certificate of either party expires."""

    def ending(seconds: float) -> datetime:
        credential = site.add(which, site.ca.ending(seconds, dns=[f"{which}.demo"]))
        return credential.certificate.not_valid_after_utc

    async def talk() -> list[tuple[End, End]]:
        site.hang_up()
        await eventually(lambda: not relay.relay.pairings, "none of an earlier attempt")
        relay.events.clear()
        pairs = await join_all(site, relay)
        for one, two in pairs:
            await one.send(b"still valid")
            assert await two.receive_exactly(11) == b"still valid"
        return pairs

    async with site.relay(OPEN) as relay:
        pairs, ends = await before_it_expires(ending, talk)
        await all_cut(pairs)
        assert time.time() >= ends
        await all_ended(relay, "certificate-expired", "relay", after=0)
        assert all(which in record["detail"] for record in relay.logged("pairing ended"))


async def test_the_functions_are_told_their_limits(site: Site) -> None:
    """PAIRED carries the limits of this pairing, with those that its route sets."""
    limits = "[limits]\nidle_timeout = 77\nhalf_close_timeout = 66\nmax_lifetime = 99\n"
    async with site.relay(OPEN + "idle_timeout = 55\n", sections=limits) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        for paired in await pair(one, two):
            assert paired["limits"] == {
                "half_close_timeout": 66,
                "idle_timeout": 55,
                "stall_timeout": 120,
                "max_lifetime": 99,
            }


async def test_a_leg_that_never_hands_off_ends_at_handoff_timeout(site: Site) -> None:
    """The other leg waits for it no longer than that, and what the other leg has sent is not delivered."""
    limit = 0.6
    async with site.relay(OPEN, sections=f"[limits]\nhandoff_timeout = {limit}\n") as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        await one.hand_off(TLS_HEADER)
        await two.read_to_close_notify()
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-timeout", "func2")
        assert ended["duration"] >= limit
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)
        await eventually(lambda: relay.legs == 0, "both legs are gone")
        assert await one.ended() == "reset"
        assert two.leftover == b""
