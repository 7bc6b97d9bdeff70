"""A function that is killed or cancelled at any step of its joining: the other one learns it, the relay holds nothing.

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
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

import frelay
from clients import CLIENTS, Client, ask, options, run_function
from frelay.client.core import Options
from rig import PATIENCE, Site, eventually

STEPS: Final = ("waiting", "paired", "hand-off", "inner")
ROOT: Final = Path(__file__).resolve().parents[2]
# "Within a second" on a machine that does nothing else.
SOON: Final = 5.0


@asynccontextmanager
async def stopped_at(client: Client, step: str, address: str, given: Options) -> AsyncIterator[trio.Process]:
    """A function in its own process, which has come to ``step`` and stays there."""
    settings = {"client": client, "stop_at": step, "address": address, "options": given}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(ROOT / "tests" / "client_process.py"), json.dumps(settings, default=str)],
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
    with trio.fail_after(PATIENCE):
        while not said.endswith(b"\n"):
            data = await process.stdout.receive_some(100)
            assert data, f"it ended before it got there, and said {said!r}"
            said += data


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "cancelled"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_the_relay_forgets_a_waiting_function_that_goes(site: Site, client: Client, sign: signal.Signals) -> None:
    """After JOIN. Cancelled it says LEAVE, which a reset could not be mistaken for."""
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


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "cancelled"])
@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize(("client", "other"), [("blocking", "trio"), ("trio", "asyncio"), ("asyncio", "blocking")])
async def test_the_other_function_learns_it(
    site: Site, client: Client, other: Client, step: str, sign: signal.Signals
) -> None:
    """After PAIRED, in mid-hand-off, and in the inner handshake: PeerGone or HandOffFailed, and soon."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        learnt = trio.Event()

        async def partner() -> None:
            with pytest.raises((frelay.PeerGone, frelay.HandOffFailed)):
                await run_function(other, address, ask(b"x"), options(site, "func2", "func1"))
            learnt.set()

        given = options(site, "func1", "func2")
        async with trio.open_nursery() as nursery, stopped_at(client, step, address, given) as process:
            nursery.start_soon(partner)
            await has_stopped(process)
            process.send_signal(sign)
            with trio.fail_after(SOON):
                await learnt.wait()
            await eventually(lambda: relay.legs == 0, "nothing is held", SOON)
        assert len(relay.logged("pairing ended")) == 1
