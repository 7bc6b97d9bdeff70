"""When the relay is killed, its functions join again by themselves, and are paired again within seconds."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Final

import pytest
import trio

import frelay.client.trio
from frelay.client.options import Options
from frelay.client.retry import Retry
from frelay.errors import FrelayError
from support.clients import options
from support.ports import reserved_port
from support.relay import RelayProcess
from support.site import DEMO, Site

PAIRS: Final = int(os.environ.get("FRELAY_KILLED_PAIRS", "100"))
PROMISED: Final = 10.0
"""Seconds until all must be paired again, including the start of the new relay, on a machine without other work."""
TRIES: Final = 3
"""How many tries there are: during one of them this machine may be busy with something else."""


class Crowd:
    """Functions that join again and again; each is paired, or about to be."""

    def __init__(self) -> None:
        self._met: Final[dict[str, int]] = {}
        """How many of them are in each pairing now, by the id of the pairing."""
        self._news = trio.Event()

    async def live(self, address: str, given: Options) -> None:
        """Run one function: join, stay until the connection breaks, and repeat."""
        while True:
            try:
                wire = await frelay.client.trio.connect(address, **given)
            except FrelayError:
                continue  # the other one was gone before its TLS was up; ``retry`` has paused already
            pairing = wire.paired.pairing
            try:
                self._note(pairing, +1)
                await wire.receive_some(1)
            except trio.BrokenResourceError:
                pass  # the relay was killed, as intended
            finally:
                self._note(pairing, -1)
                await trio.aclose_forcefully(wire)

    def _note(self, pairing: str, change: int) -> None:
        self._met[pairing] = self._met.get(pairing, 0) + change
        self._news.set()
        self._news = trio.Event()

    @property
    def functions(self) -> int:
        """How many are in a pairing whose other function is there too."""
        return 2 * sum(count == 2 for count in self._met.values())

    async def wait(self, functions: int) -> None:
        while self.functions != functions:
            await self._news.wait()


def kept_waiting(pid: int | str = "self") -> float:
    """Seconds for which a process was ready to run while the processors were busy with others."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


async def kill(relay: RelayProcess, crowd: Crowd) -> None:
    """kill -9, and wait until every function has noticed it."""
    relay.process.kill()
    await relay.process.wait()
    await crowd.wait(0)


@pytest.mark.load
@pytest.mark.timeout(300)
async def test_all_are_paired_again_within_ten_seconds(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """TESTPLAN 49: kill -9, restart at once at the same address, and 200 of 200 functions are paired again."""
    crowd = Crowd()
    took, delay, began, waited = math.inf, 0.0, 0.0, 0.0
    with reserved_port() as port:
        routes = DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}")
        async with trio.open_nursery() as nursery:
            for me, other in (("func1", "func2"), ("func2", "func1")):
                given = options(site, me, other, wait=None, retry=Retry(longest=2.0))
                for _ in range(PAIRS):
                    nursery.start_soon(crowd.live, f"127.0.0.1:{port}", given)
            for kills in range(TRIES + 1):
                async with site.process(routes, options=["--no-watch"]) as relay:
                    assert relay.own_port() == port
                    with trio.fail_after(60):
                        await crowd.wait(2 * PAIRS)
                    if kills:
                        # Other programs may run here too, which slows down the relay and this test.
                        delay = max(kept_waiting() - waited, kept_waiting(relay.process.pid))
                        took = time.monotonic() - began - delay
                    if took <= PROMISED:
                        break
                    began, waited = time.monotonic(), kept_waiting()
                    await kill(relay, crowd)
            nursery.cancel_scope.cancel()
    with capsys.disabled():
        if PAIRS != 100:
            print(f"\n{2 * PAIRS} functions paired again after {took:.1f} s; the machine was others' for {delay:.1f} s")
    assert took <= PROMISED, f"{took:.1f} s"
