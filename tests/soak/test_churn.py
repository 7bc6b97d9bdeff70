"""A relay process that has served any number of pairings is as small as one that has served a few.

By default this is quick. By hand, for the figure::

    FRELAY_CHURN=10000 pytest tests/soak/test_churn.py -s
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import trio

from support.descriptors import open_descriptors
from support.ends import OPEN, churn
from support.relay import RelayProcess
from support.site import Site

COUNT = int(os.environ.get("FRELAY_CHURN", "300"))
WARM_UP = 99
STEP = 100
# By how much the memory of a process without leaks may grow, in KiB: Python and malloc refill their arenas with other
# objects. A leaked pairing is 10 KiB or more, so 300 of them are found.
SLACK = 2048


def rss(relay: RelayProcess) -> int:
    """The resident memory of the relay, in KiB."""
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def settled(relay: RelayProcess, descriptors: int) -> list[str]:
    """The descriptors of the relay, as soon as there are as many as before, or after 5 s."""
    found = open_descriptors(relay.process.pid)
    with trio.move_on_after(5):
        while len(found) != descriptors:
            await trio.sleep(0.02)
            found = open_descriptors(relay.process.pid)
    return sorted(found.values())


@pytest.mark.load
@pytest.mark.timeout(60 + COUNT // 4)
async def test_descriptors_and_memory_are_back_where_they_were(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """TESTPLAN 39: pairings of all modes, a third ended in order, a third by reset, a third in mid-hand-off."""
    async with site.process(OPEN, options=["--no-watch"]) as relay:
        descriptors_at_start = len(open_descriptors(relay.process.pid))
        await churn(site, relay, WARM_UP, seed=0)
        descriptors = open_descriptors(relay.process.pid)
        # Only pooled pipes may be new; a bulk transfer has two.
        assert len(descriptors) <= descriptors_at_start + 2 * 2 + 2
        before, began = rss(relay), time.monotonic()
        for done in range(0, COUNT, STEP):
            await churn(site, relay, min(STEP, COUNT - done), seed=done)
            # To search a log of a million lines would take longer than the pairings.
            relay.events[:] = relay.logged("listening")
            relay.stderr = ""
        took = time.monotonic() - began
        after = await settled(relay, len(descriptors))
        grown = rss(relay) - before
        with capsys.disabled():
            if COUNT > 300:
                print(
                    f"\n{COUNT} pairings in {took:.0f} s: RSS {before} -> {before + grown} KiB, "
                    f"descriptors {len(descriptors)} -> {len(after)}"
                )
        assert len(after) == len(descriptors), after
        assert grown < SLACK, f"RSS grew by {grown} KiB in {COUNT} pairings"
