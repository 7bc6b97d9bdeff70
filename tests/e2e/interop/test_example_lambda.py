"""The handler of ``examples/lambda`` answers from its environment alone, within its time, and leaves no key behind.

It runs in a process of its own, as the platform would run it: its certificates are PEM texts in variables, and its time
limit comes from the context.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import trio

from support.relay import RelayProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT

ROOT: Final = Path(__file__).parents[3]
EXAMPLE: Final = ROOT / "examples/lambda"

# The platform: it calls the handler, and here it also lists the files that the handler makes.
PLATFORM: Final = """
import json, os, stat, sys, time
import frelay, handler

real, seen = frelay.connect, []

def connect(*arguments, **options):
    for name in ("cert", "key", "ca"):
        path = options[name]
        directory = os.path.dirname(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        seen.extend((path, directory))
    return real(*arguments, **options)

class Context:
    end = time.monotonic() + float(sys.argv[1])
    def get_remaining_time_in_millis(self):
        return int((self.end - time.monotonic()) * 1000)

context = Context()
frelay.connect = connect
try:
    print(json.dumps(handler.handler({"question": 6}, context)))
finally:
    assert len(seen) == 6
    assert not any(map(os.path.exists, seen))
    assert context.get_remaining_time_in_millis() > 0, "the platform would have stopped it"
    assert "trio" not in sys.modules and "OpenSSL" not in sys.modules
"""

ANSWERER: Final = """
import json, sys, frelay
address, cert, key, ca, peer = sys.argv[1:]
with frelay.connect(address, cert=cert, key=key, ca=ca, peer=peer, wait=60, retry=True) as wire:
    event = json.load(wire.makefile("rb"))
    wire.sendall(json.dumps({"answer": event["question"] * 7}).encode())
"""


def environment(site: Site, relay: RelayProcess, *, line_end: str = "\n", **more: str) -> dict[str, str]:
    cert, key = site.paths["func1"]
    texts = {"FRELAY_CERT": cert, "FRELAY_KEY": key, "FRELAY_CA": site.ca_path}
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE}",
        "FRELAY_RELAY": f"localhost:{relay.port()}",
        "FRELAY_PEER": "dns:func2.demo",
        **{name: path.read_text().replace("\n", line_end) for name, path in texts.items()},
        **more,
    }


async def invoke(env: dict[str, str], *, seconds: float = 60) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PLATFORM, str(seconds)]
    with trio.fail_after(TIMEOUT + seconds):
        return await trio.run_process(command, env=env, capture_stdout=True, capture_stderr=True, check=False)


async def answer(site: Site, relay: RelayProcess) -> None:
    files = [str(path) for path in (*site.paths["func2"], site.ca_path)]
    command = [sys.executable, "-c", ANSWERER, f"localhost:{relay.port()}", *files, "dns:func1.demo"]
    await trio.run_process(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("line_end", ["\n", "\\n"], ids=["lines", "escaped"])
async def test_it_asks_and_returns_the_answer(site: Site, line_end: str) -> None:
    async with site.process() as relay, trio.open_nursery() as nursery:
        nursery.start_soon(answer, site, relay)
        ended = await invoke(environment(site, relay, line_end=line_end))
        assert ended.returncode == 0, ended.stderr.decode()
        assert json.loads(ended.stdout) == {"answer": 42}
        assert (await relay.log("pairing ended"))["outcome"] == "closed"


async def test_a_relay_that_waits_less_long_is_joined_again(site: Site) -> None:
    """The other function comes after the first wait-timeout; the handler still waits, or waits again."""
    async with site.process(DEMO + "wait_timeout = 0.5\n") as relay, trio.open_nursery() as nursery:

        async def come_late() -> None:
            await relay.log("refused", code="wait-timeout")
            await answer(site, relay)

        nursery.start_soon(come_late)
        ended = await invoke(environment(site, relay))
        assert ended.returncode == 0, ended.stderr.decode()
        assert json.loads(ended.stdout) == {"answer": 42}


async def test_nobody_came_is_said_before_the_time_is_up(site: Site) -> None:
    async with site.process() as relay:
        ended = await invoke(environment(site, relay), seconds=5)
        assert ended.returncode == 1
        assert b"wait-timeout" in ended.stderr
        assert b"AssertionError" not in ended.stderr


async def test_where_there_is_no_memory_file_system(site: Site, tmp_path: Path) -> None:
    """Lambda has no /dev/shm; the platform's temporary directory will do."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    async with site.process() as relay, trio.open_nursery() as nursery:
        nursery.start_soon(answer, site, relay)
        platform = PLATFORM.replace("context = Context()", "context = Context(); handler.MEMORY = '/nowhere'")
        command = [sys.executable, "-c", platform, "60"]
        ended = await trio.run_process(
            command, env=environment(site, relay, TMPDIR=str(directory)), capture_stdout=True, capture_stderr=True
        )
        assert json.loads(ended.stdout) == {"answer": 42}
    assert list(directory.iterdir()) == []
