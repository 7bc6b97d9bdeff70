"""Two existing "hello" clients in Go meet 100 times out of 100, in any order of arrival.

The relay that they were written for echoed their line twice, and the second echo met the inner handshake: "first record
does not look like a TLS handshake". And crypto/tls reads ahead: what came in one segment with the echo would be lost.
Their source is ``parties/hello.go``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from support.relay import RelayProcess
from support.site import Site
from support.tools import tool
from support.waiting import TIMEOUT

# The first build may have to compile Go's standard library.
pytestmark = pytest.mark.timeout(300)

SOURCE: Final = Path(__file__).parents[2] / "support/parties/hello.go"
ROUTES: Final = 10
# How many seconds after the relay has the first client's line the second one comes. Each gap in both orders, on each
# route: 100 pairings.
GAPS: Final = (0, 0, 0, 0.1, 2)

Ended = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="session")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, compiled."""
    directory = tmp_path_factory.mktemp("hello")
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    if "HOME" not in environment:
        environment["GOCACHE"] = str(directory / "cache")
    binary = directory / "hello"
    subprocess.run([tool("go"), "build", "-o", str(binary), str(SOURCE)], cwd=directory, env=environment, check=True)
    return binary


def routes(count: int, settings: str = "") -> str:
    return "".join(
        f"""
[[route]]
name = "hello{number}"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
handoff = "hello"
{settings}
"""
        for number in range(count)
    )


async def meet(
    site: Site, hello: Path, relay: RelayProcess, route: str, order: Sequence[str], gap: float | None
) -> dict[str, Ended]:
    """Start both, the second ``gap`` seconds after the first one waits; None: both at once."""
    ended: dict[str, Ended] = {}

    async def run(name: str) -> None:
        role = "client" if name == "func1" else "server"
        files = [str(path) for path in (*site.paths[name], site.ca_path)]
        command = [str(hello), f"127.0.0.1:{relay.port(route)}", *files, role]
        ended[name] = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)

    first, second = order
    with trio.fail_after(TIMEOUT + (gap or 0)):
        async with trio.open_nursery() as nursery:
            waiting = len(relay.logged("waiting", route=route, party=first))
            nursery.start_soon(run, first)
            if gap is not None:
                await relay.log("waiting", route=route, party=first, count=waiting + 1)
                await trio.sleep(gap)
            nursery.start_soon(run, second)
    return ended


def failures(ended: dict[str, Ended]) -> list[str]:
    wanted = {"func1": b"all came back\n", "func2": b"echoed 262144\n"}
    return [
        f"{name}: exit code {one.returncode}, {(one.stdout + one.stderr).decode()!r}"
        for name, one in ended.items()
        if (one.returncode, one.stdout) != (0, wanted[name])
    ]


async def test_100_of_100_in_both_orders(site: Site, hello: Path) -> None:
    found: list[str] = []
    met = 0

    async def all_of(relay: RelayProcess, route: str) -> None:
        nonlocal met
        for gap in GAPS:
            for order in (("func1", "func2"), ("func2", "func1")):
                ended = await meet(site, hello, relay, route, order, gap)
                found.extend(f"{route}, {order[0]} first, gap {gap} s: {text}" for text in failures(ended))
                met += 1

    async with site.process(routes(ROUTES)) as relay:
        async with trio.open_nursery() as nursery:
            for number in range(ROUTES):
                nursery.start_soon(all_of, relay, f"hello{number}")
        assert found == []
        assert met == 100
        await relay.log("pairing ended", count=100)
        handed_off = relay.logged("handed off", func1_mode="handoff", func2_mode="handoff")
        assert len(handed_off) == 100


async def test_both_at_once(site: Site, hello: Path) -> None:
    """Both at once: the lines and the pairing cross in every way."""
    found: list[str] = []

    async def some_of(relay: RelayProcess, route: str) -> None:
        for order in (("func1", "func2"), ("func2", "func1")):
            found.extend(failures(await meet(site, hello, relay, route, order, None)))

    async with site.process(routes(ROUTES)) as relay:
        async with trio.open_nursery() as nursery:
            for number in range(ROUTES):
                nursery.start_soon(some_of, relay, f"hello{number}")
        assert found == []


async def test_one_that_gives_up_leaves_its_place(site: Site, hello: Path) -> None:
    """One is killed while it waits for the echo: the next one of its kind is paired, not the dead one."""
    async with site.process(routes(1)) as relay:
        files = [str(path) for path in (*site.paths["func1"], site.ca_path)]
        command = [str(hello), f"127.0.0.1:{relay.port('hello0')}", *files, "client"]
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                start = partial(trio.run_process, command, check=False)
                process: trio.Process = await nursery.start(start)
                await relay.log("waiting", route="hello0", party="func1")
                process.kill()
        ended = await meet(site, hello, relay, "hello0", ("func1", "func2"), 0)
        assert failures(ended) == []
