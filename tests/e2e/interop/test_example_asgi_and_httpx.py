"""The ASGI app of ``examples/asgi``, in uvicorn in a function that nobody can dial, and the httpx callers of
``examples/httpx``: real libraries on both sides, and the relay between them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio

from support.connects import port_here
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually
from support.wires import in_thread

ROOT: Final = Path(__file__).parents[3]
ASGI: Final = ROOT / "examples/asgi"
URL: Final = "http://func2.demo"


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that users copy."""
    monkeypatch.syspath_prepend(ROOT / "examples/httpx")
    import frelay_httpx  # type: ignore[import-not-found]

    return frelay_httpx


def options(site: Site) -> dict[str, Any]:
    cert, key = site.paths["func1"]
    return {"cert": cert, "key": key, "ca": site.ca_path, "server_name": "localhost"}


class App:
    """A running ``serve.py``."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.stderr = ""

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for chunk in self.process.stderr:
            self.stderr += bytes(chunk).decode()


@asynccontextmanager
async def app(site: Site, relay: RelayInProcess, name: str = "func2") -> AsyncIterator[App]:
    """The app as the function ``name``, once four legs of it wait."""
    cert, key = site.paths[name]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FRELAY_CERT": str(cert),
        "FRELAY_KEY": str(key),
        "FRELAY_CA": str(site.ca_path),
        "FRELAY_PEER": "dns:func1.demo",
    }
    command = [sys.executable, "serve.py", "app:app", f"localhost:{relay.port()}"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, command, cwd=ASGI, env=env, stderr=subprocess.PIPE, check=False)
        )
        running = App(process)
        nursery.start_soon(running.read)
        try:
            await eventually(lambda: relay.waiting() == (0, 4), "four legs stand", TIMEOUT * 2)
            yield running
            assert process.returncode is not None or not running.stderr.count("Traceback"), running.stderr
        finally:
            if process.returncode is None:
                process.kill()


async def test_a_blocking_client(site: Site, transports: Any) -> None:
    async with site.relay() as relay, app(site, relay):
        transport = transports.FrelayTransport(f"127.0.0.1:{relay.port()}", **options(site))
        body = os.urandom(1_000_000).hex()

        def calls() -> None:
            with httpx.Client(transport=transport, timeout=TIMEOUT) as client:
                assert client.get(f"{URL}/one").text == "GET /one: "
                answer = client.post(f"{URL}/two", content=body)
                assert (answer.status_code, answer.text) == (200, f"POST /two: {body}")

        await in_thread(calls)
        # Both calls went over one wire, as over one TCP connection.
        await eventually(lambda: relay.legs == 4, "the client has closed it")
        assert len(relay.logged("pairing ended")) == 1


async def test_sixty_calls_from_twelve_threads(site: Site, transports: Any) -> None:
    async with site.relay() as relay, app(site, relay):
        transport = transports.FrelayTransport(f"127.0.0.1:{relay.port()}", **options(site))

        def calls() -> set[str]:
            with httpx.Client(transport=transport, timeout=TIMEOUT * 2) as client, ThreadPoolExecutor(12) as threads:
                return set(threads.map(lambda number: client.get(f"{URL}/{number}").text, range(60)))

        assert await in_thread(calls) == {f"GET /{number}: " for number in range(60)}
        assert not relay.logged("refused")


async def test_an_asyncio_client(site: Site, transports: Any) -> None:
    async with site.relay() as relay, app(site, relay):

        async def calls() -> set[str]:
            transport = transports.AsyncFrelayTransport(f"127.0.0.1:{relay.port()}", **options(site))
            async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT * 2) as client:
                answers = await asyncio.gather(*(client.post(f"{URL}/{n}", content=b"x" * n) for n in range(60)))
                return {answer.text for answer in answers}

        heard = await in_thread(asyncio.run, calls())
        assert heard == {f"POST /{number}: {'x' * number}" for number in range(60)}
        assert not relay.logged("refused")


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_a_function_that_restarts_is_called_again(site: Site, transports: Any, kind: str) -> None:
    """The kept connection is cut: httpx notices that before it uses it again."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        ask, go_on = trio.open_memory_channel[str](0), trio.open_memory_channel[None](0)

        token = trio.lowlevel.current_trio_token()

        def restart() -> None:
            trio.from_thread.run(ask[0].send, "restart it", trio_token=token)
            trio.from_thread.run(go_on[1].receive, trio_token=token)

        def blocking() -> None:
            transport = transports.FrelayTransport(address, **options(site))
            with httpx.Client(transport=transport, timeout=TIMEOUT * 2) as client:
                assert client.get(f"{URL}/one").text == "GET /one: "
                restart()
                assert client.get(f"{URL}/two").text == "GET /two: "

        async def in_asyncio() -> None:
            transport = transports.AsyncFrelayTransport(address, **options(site))
            async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT * 2) as client:
                assert (await client.get(f"{URL}/one")).text == "GET /one: "
                await asyncio.to_thread(restart)
                assert (await client.get(f"{URL}/two")).text == "GET /two: "

        async def call_twice() -> None:
            await in_thread(blocking if kind == "blocking" else lambda: asyncio.run(in_asyncio()))

        async with trio.open_nursery() as nursery:
            async with app(site, relay) as first:
                nursery.start_soon(call_twice)
                await ask[1].receive()
                first.process.kill()
                await first.process.wait()
                await eventually(lambda: relay.waiting() == (0, 0), "the relay has noticed")
            async with app(site, relay):
                await go_on[0].send(None)
                await eventually(lambda: len(relay.logged("pairing ended")) == 2, "it was called again", TIMEOUT * 2)


async def test_errors_are_httpxs_own(site: Site, transports: Any) -> None:
    async with site.relay(DEMO) as relay:
        transport = transports.FrelayTransport(f"127.0.0.1:{relay.port()}", **options(site))

        def call(url: str, seconds: float) -> None:
            with httpx.Client(transport=transport, timeout=seconds) as client:
                client.get(url)

        with pytest.raises(httpx.ConnectTimeout, match="nobody came within"):
            await in_thread(call, URL, 0.5)
        async with app(site, relay):
            with pytest.raises(httpx.ConnectError, match=r"the peer showed dns:func2\.demo.*where dns:other\.demo"):
                await in_thread(call, "http://other.demo/", TIMEOUT)


async def test_any_http_client_through_a_local_port(site: Site) -> None:
    async with site.relay() as relay, app(site, relay), port_here(site, relay) as (_, place):
        answer = await in_thread(httpx.get, f"http://{place}/by/port", timeout=TIMEOUT, trust_env=False)
        assert answer.text == "GET /by/port: "


async def test_it_ends_in_order(site: Site) -> None:
    """SIGTERM: its legs leave, and it exits by itself."""
    async with site.relay() as relay, app(site, relay) as running:
        running.process.send_signal(signal.SIGTERM)
        with trio.fail_after(TIMEOUT):
            assert await running.process.wait() == 0, running.stderr
        await eventually(lambda: relay.legs == 0, "its legs have left")
        assert len([entry for entry in relay.events if "LEAVE" in str(entry)]) >= 4


async def test_a_refusal_ends_it_and_says_why(site: Site) -> None:
    async with site.relay() as relay, app(site, relay) as running:
        site.write(DEMO.replace("dns:func2.demo", "dns:func3.demo"))
        await relay.relay.reload()
        with trio.fail_after(TIMEOUT * 2):
            assert await running.process.wait() == 1
        await eventually(lambda: "not-authorised" in running.stderr, "it says why")
