"""A reader that never reads stops its writer, and costs the relay at most twice as much as an idle pairing.

To measure the number of the plan::

    FRELAY_STALLED=500 pytest tests/e2e/pairing/test_readers_that_never_read_cost_little.py -s
"""

from __future__ import annotations

import os
import socket

import pytest
import trio

from support.ends import OPEN, End, block, churn, join_all, join_ends, pause_reading
from support.kernel import resident
from support.site import Site

COUNT = int(os.environ.get("FRELAY_STALLED", "60"))
IDLE = 16
"""KiB that an idle handed-off pairing costs; see test_idle_pairing_is_small.py."""
ROUTES = OPEN + "max_waiting_per_party = 5000\nmax_pairings = 5000\nstall_timeout = 3600\n"
DATA = block(1 << 16)
WIDE = "[tcp]\nuser_timeout = 3600\n"


async def stalled(end: End) -> int:
    """Write to ``end`` until it takes nothing for half a second; returns how many bytes it took."""
    sent = 0

    async def write() -> None:
        nonlocal sent
        while True:
            await end.send(DATA)
            sent += len(DATA)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        before = -1
        while sent != before:
            # If the machine pauses for longer, this finds less than there is, but never more.
            before = sent
            await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    return sent


@pytest.mark.load
@pytest.mark.timeout(120 + COUNT)
async def test_readers_that_never_read(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """TESTPLAN 38: the bytes are in the kernel, whose buffers have limits; the process holds one buffer more."""
    async with site.process(ROUTES, sections=WIDE, options=["--no-watch"]) as relay:
        await churn(site, relay, 30, seed=1)
        before = resident(relay)
        writers = []
        for _ in range(COUNT):
            writer, reader = await join_ends(site, relay)
            pause_reading(reader)
            writers.append(writer)
            relay.events[:] = relay.logged("listening")
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(stalled, writer)
        each = (resident(relay) - before) / COUNT
        assert relay.process.returncode is None
        assert not relay.logged("pairing ended")
    if "FRELAY_STALLED" in os.environ:
        with capsys.disabled():
            print(f"\n{COUNT} pairings whose readers never read: {each:.1f} KiB each")
    assert each <= 2 * IDLE


async def test_a_writer_stops_within_16_mebibytes(site: Site) -> None:
    """TESTPLAN 38: what the relay and its kernel hold of one direction, in every combination of modes."""
    async with site.relay(ROUTES, sections=WIDE) as relay:
        pairs = await join_all(site, relay)
        sent: dict[int, int] = {}

        async def measure(number: int) -> None:
            writer, reader = pairs[number]
            pause_reading(reader)
            writer.party.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            sent[number] = await stalled(writer)

        async with trio.open_nursery() as nursery:
            for number in range(len(pairs)):
                nursery.start_soon(measure, number)
        assert all(0 < count <= 16 << 20 for count in sent.values()), sent
        for _, reader in pairs:
            assert await reader.receive_exactly(1000) == DATA[:1000]
