"""A handed-off, idle pairing costs the relay a few KiB, so that a small machine can hold thousands of them.

To measure with more of them::

    FRELAY_IDLE=500 pytest tests/e2e/pairing/test_idle_pairing_is_small.py -s
"""

from __future__ import annotations

import os

import pytest
import trio

from support.ends import OPEN, churn, join_ends
from support.kernel import resident
from support.site import Site

COUNT = int(os.environ.get("FRELAY_IDLE", "200"))
# KiB. The goal is 16, which FRELAY_IDLE=500 measures. In a usual run fewer pairings share the fixed costs.
BOUND = 18
ROUTES = OPEN + "max_waiting_per_party = 5000\nmax_pairings = 5000\n"


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    if "FRELAY_IDLE" in os.environ:
        with capsys.disabled():
            print(f"\n{text}")


@pytest.mark.load
@pytest.mark.timeout(60 + COUNT // 2)
async def test_an_idle_pairing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """What it keeps: the tasks, the pumps, and some facts of two certificates; no TLS state and no pipe."""
    async with site.process(ROUTES, options=["--no-watch"]) as relay:
        await churn(site, relay, 30, seed=1)
        before = resident(relay)
        for _ in range(COUNT):
            await join_ends(site, relay)
            relay.events[:] = relay.logged("listening")
        await trio.sleep(0.5)
        each = (resident(relay) - before) / COUNT
    say(capsys, f"{COUNT} idle handed-off pairings: {each:.1f} KiB each")
    assert each <= BOUND
