"""gRPC between two functions by ``frelay connect``, as ``examples/grpc`` says: real gRPC, over two Unix sockets."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from support.connects import offering, port_here
from support.site import Site
from support.waiting import TIMEOUT, eventually

EXAMPLE: Final = Path(__file__).parents[3] / "examples/grpc"
ANSWERS: Final = "HELLO\n0 1 2 3 4\none two\n"


@asynccontextmanager
async def server(place: Path) -> AsyncIterator[trio.Process]:
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, [sys.executable, str(EXAMPLE / "server.py"), str(place)], check=False)
        )
        try:
            await eventually(place.exists, "it listens", TIMEOUT * 2)
            yield process
        finally:
            process.kill()


async def calls(target: str) -> str:
    with trio.fail_after(TIMEOUT * 4):
        done = await trio.run_process(
            [sys.executable, str(EXAMPLE / "client.py"), target], capture_stdout=True, capture_stderr=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("at", ["unix", "port"])
async def test_all_kinds_of_calls(site: Site, at: str) -> None:
    place = site.directory / "words.sock"
    local = f"unix:{site.directory}/here.sock" if at == "unix" else "127.0.0.1:0"
    async with (
        server(place),
        site.relay() as relay,
        offering(site, relay, f"unix:{place}"),
        port_here(site, relay, at=local) as (_, address),
    ):
        assert await calls(address) == ANSWERS
        # Two clients at once, each with a channel of its own.
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(calls, address)
        await eventually(lambda: len(relay.logged("pairing ended")) == 3, "each channel was one pairing")


async def test_a_server_that_restarts(site: Site) -> None:
    """gRPC's own reconnect is all that it takes: a call with wait_for_ready waits for the server."""
    place = site.directory / "words.sock"
    async with (
        site.relay() as relay,
        offering(site, relay, f"unix:{place}") as there,
        port_here(site, relay) as (_, address),
        trio.open_nursery() as nursery,
    ):
        heard: list[str] = []

        async def call() -> None:
            heard.append(await calls(address))

        nursery.start_soon(call)
        await there.say("failed")  # there is no server yet
        async with server(place):
            await eventually(lambda: heard == [ANSWERS], "the waiting call is answered", TIMEOUT * 4)
