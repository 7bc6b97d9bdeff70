"""When one direction has ended and the other is silent, the pairing ends at half_close_timeout and leaves nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from support.descriptors import open_descriptors, opened_since
from support.ends import OPEN, PAIRS_OF_MODES, End, join_all, join_ends
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import despite_stalls, eventually

LIMIT = 0.8
LIMITS = f"[limits]\nhalf_close_timeout = {LIMIT}\n"
CLOSE_WAIT = "08"  # include/net/tcp_states.h


def close_waits(port: int) -> list[str]:
    """The sockets on the relay's side of ``port`` that the other side has closed and the relay has not."""
    rows = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return [row for row in rows if row.split()[1].endswith(f":{port:04X}") and row.split()[3] == CLOSE_WAIT]


async def nothing_is_left(relay: RelayInProcess, descriptors: dict[int, str]) -> None:
    await eventually(lambda: not relay.relay.pairings and relay.legs == 0, "the pairings are gone")
    await eventually(lambda: not close_waits(relay.port()), "no CLOSE_WAIT")
    await eventually(lambda: not opened_since(descriptors), "the descriptors are back")


@pytest.mark.load
@pytest.mark.parametrize("first", ["func1", "func2"])
async def test_half_closed_and_silent(site: Site, first: str) -> None:
    """TESTPLAN 27: outcome half-close-timeout in every mode, both legs cut, no CLOSE_WAIT and no descriptor left."""

    async def fall_silent(ender: End, other: End) -> None:
        await ender.send(b"that is all")
        await ender.send_eof()
        assert await other.receive_to_end() == b"that is all"
        began = time.monotonic()
        assert await ender.ended() == "reset", "a cut must not look like the end of the other's data"
        assert time.monotonic() - began > LIMIT * 0.9

    async with site.relay(OPEN, sections=LIMITS) as relay:
        descriptors = open_descriptors()
        pairs = await join_all(site, relay)
        async with trio.open_nursery() as nursery:
            for one, two in pairs:
                nursery.start_soon(fall_silent, *((one, two) if first == "func1" else (two, one)))
        await eventually(lambda: len(relay.logged("pairing ended")) == len(PAIRS_OF_MODES), "all have ended")
        assert len(relay.logged("pairing ended", outcome="half-close-timeout", side="relay")) == len(PAIRS_OF_MODES)
        site.hang_up()
        await nothing_is_left(relay, descriptors)


@pytest.mark.load
async def test_the_limit_counts_from_the_last_byte(site: Site) -> None:
    """A party that still sends is not silent, however long ago the other direction ended."""

    async def speak_on(limit: float) -> None:
        async with site.relay(OPEN, sections=f"[limits]\nhalf_close_timeout = {limit}\n") as relay:
            one, two = await join_ends(site, relay)
            await one.send_eof()
            began = time.monotonic()
            while time.monotonic() - began < 2 * limit:
                await two.send(b".")
                assert await one.receive_exactly(1) == b"."
                await trio.sleep(limit / 8)
            assert not relay.logged("pairing ended")
            ended = await relay.outcome()
            assert ended["outcome"] == "half-close-timeout"
            assert ended["duration"] > 2.7 * limit

    await despite_stalls(speak_on, LIMIT)


@pytest.mark.load
async def test_a_party_that_crashes_after_the_half_close_leaves_nothing(site: Site) -> None:
    """No CLOSE_WAIT is left either when the two parties go in different ways."""
    async with site.relay(OPEN, sections=LIMITS) as relay:
        descriptors = open_descriptors()
        one, two = await join_ends(site, relay)
        await one.send_eof()
        assert await two.receive() == b""
        two.party.reset()
        assert await one.ended() == "reset"
        assert (await relay.outcome())["side"] == "func2"
        site.hang_up()
        await nothing_is_left(relay, descriptors)
