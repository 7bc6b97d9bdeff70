"""A function is killed or cancelled at any step of its joining: the other one learns it, and the relay keeps nothing.

Killed means SIGKILL. Cancelled means SIGINT, which is KeyboardInterrupt in blocking code and a cancellation of the
task in Trio and asyncio.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

import frelay
from frelay.client.options import Options
from support.clients import CLIENTS, PAIRS_OF_CLIENTS, Client, ask, options, run_function
from support.site import DEMO, Site
from support.waiting import TIMEOUT, despite_stalls, eventually

STEPS: Final = ("waiting", "paired", "hand-off", "inner")
ROOT: Final = Path(__file__).resolve().parents[3]
# "Within a second" is meant for a machine that does nothing else.
SOON: Final = 5.0


@asynccontextmanager
async def stopped_at(client: Client, step: str, address: str, given: Options) -> AsyncIterator[trio.Process]:
    """A function in its own process, which has reached ``step`` and stays there."""
    settings = {"client": client, "stop_at": step, "address": address, "options": given}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(ROOT / "tests/support/client_process.py"), json.dumps(settings, default=str)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
                env=env,
            )
        )
        assert process.stdout is not None
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()


async def has_stopped(process: trio.Process) -> None:
    assert process.stdout is not None
    said = b""
    with trio.fail_after(TIMEOUT):
        while not said.endswith(b"\n"):
            data = await process.stdout.receive_some(100)
            assert data, f"it ended before it got there, and said {said!r}"
            said += data


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "cancelled"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_the_relay_forgets_a_waiting_function_that_goes(site: Site, client: Client, sign: signal.Signals) -> None:
    """After JOIN. A cancelled function sends LEAVE, which cannot be confused with a reset."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with stopped_at(client, "waiting", address, options(site, "func1", "func2")) as process:
            await has_stopped(process)
            assert relay.waiting() == (1, 0)
            process.send_signal(sign)
            await eventually(lambda: relay.waiting() == (0, 0), "the place is free", SOON)
            await eventually(lambda: relay.legs == 0, "nothing is held", SOON)
            if sign is signal.SIGINT:
                assert any("LEAVE" in str(entry) for entry in relay.events), relay.events


@pytest.mark.load
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "cancelled"])
@pytest.mark.parametrize("step", STEPS[1:])
async def test_the_other_function_learns_it(site: Site, step: str, sign: signal.Signals) -> None:
    """After PAIRED, in mid-hand-off, and in the inner handshake: PeerGone or HandOffFailed, within a second.

    In all nine combinations of clients: each has its own route. All reach the step together, and are ended one by one.
    """
    routes = "".join(DEMO.replace('"demo"', f'"{client}-{other}"') for client, other in PAIRS_OF_CLIENTS)

    async def go_one_by_one(soon: float) -> None:
        async with site.relay(routes) as relay, trio.open_nursery() as nursery, AsyncExitStack() as stack:
            learnt = {pair: trio.Event() for pair in PAIRS_OF_CLIENTS}

            async def partner(pair: tuple[Client, Client]) -> None:
                address = f"127.0.0.1:{relay.port('-'.join(pair))}"
                with pytest.raises((frelay.PeerGone, frelay.HandOffFailed)):
                    await run_function(pair[1], address, ask(b"x"), options(site, "func2", "func1"))
                learnt[pair].set()

            processes = {}
            for pair in PAIRS_OF_CLIENTS:
                address = f"127.0.0.1:{relay.port('-'.join(pair))}"
                given = options(site, "func1", "func2")
                processes[pair] = await stack.enter_async_context(stopped_at(pair[0], step, address, given))
                nursery.start_soon(partner, pair)
            for process in processes.values():
                await has_stopped(process)
            assert not any(event.is_set() for event in learnt.values())
            for count, (pair, process) in enumerate(processes.items(), start=1):
                process.send_signal(sign)
                with trio.move_on_after(soon):
                    await learnt[pair].wait()
                assert learnt[pair].is_set(), f"{pair} did not learn it within {soon} s"
                await eventually(
                    lambda count=count: len(relay.logged("pairing ended")) == count,  # type: ignore[misc]
                    "nothing is held",
                    soon,
                )
            assert len(relay.logged("pairing ended")) == len(PAIRS_OF_CLIENTS)
            assert relay.legs == 0

    await despite_stalls(go_one_by_one, 1.0)
