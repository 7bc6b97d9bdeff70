"""A thousand SIGHUPs in a second, with every pairing under load, lose no byte and cause few reloads."""

from __future__ import annotations

import hashlib
import os
import signal
import time

import pytest
import trio

from support.ends import OPEN, End, Mode, block, join_ends
from support.site import Site

STORM = 1000
PAIRS: list[tuple[Mode, Mode]] = [("raw", "raw"), ("raw", "tunnel"), ("bare", "bare")]


async def load(source: End, sink: End, over: trio.Event, seed: int) -> None:
    """Send bytes from one end to the other, as fast as they go, until ``over``; says whether all of them arrived."""
    sent, received = hashlib.sha256(), hashlib.sha256()
    piece = block(65536, seed)

    async def send() -> None:
        number = 0
        while not over.is_set():
            data = number.to_bytes(8, "big") + piece[8:]
            sent.update(data)
            await source.send(data)
            number += 1
        await source.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while data := await sink.receive():
            received.update(data)
    assert received.digest() == sent.digest()


def storm(pid: int) -> float:
    """Send the signals, evenly over a second if the machine can; gives the seconds it took."""
    began = time.monotonic()
    for number in range(STORM):
        os.kill(pid, signal.SIGHUP)
        time.sleep(max(0, began + number / STORM - time.monotonic()))
    return time.monotonic() - began


@pytest.mark.load
async def test_a_thousand_sighups_in_a_second_under_load(site: Site) -> None:
    """TESTPLAN 42: digests agree in both directions, and the reloads are counted in tens."""
    async with site.process(OPEN) as relay:
        pairs = [await join_ends(site, relay, *modes) for modes in PAIRS]
        over = trio.Event()
        async with trio.open_nursery() as nursery:
            for number, (one, two) in enumerate(pairs):
                nursery.start_soon(load, one, two, over, 2 * number)
                nursery.start_soon(load, two, one, over, 2 * number + 1)
            took = await trio.to_thread.run_sync(storm, relay.process.pid)
            await relay.log("reloaded", count=2)
            over.set()
        reloads = len(relay.logged("reloaded"))
        assert reloads <= 2 + 10 * took + 2, f"{reloads} reloads in {took:.1f} s"
        assert not relay.logged("reload refused, the old configuration stays")
        await relay.log("pairing ended", count=len(PAIRS), outcome="closed")
        # The relay still serves as before.
        one, two = await join_ends(site, relay)
        await one.send(b"after the storm")
        assert await two.receive_exactly(15) == b"after the storm"
