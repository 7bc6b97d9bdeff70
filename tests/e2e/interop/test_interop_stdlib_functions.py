"""Two processes with the standard library's ``ssl`` alone, written from the protocol, meet through ``frelay run``.

That is the proof that the protocol can be spoken without our client: ``recv()`` until ``b""``, ``unwrap()``, and the
same TCP connection carries the functions' own mTLS (see ``parties/stdlib_function.py``).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT

FUNCTION: Final = Path(__file__).parents[2] / "support/parties" / "stdlib_function.py"
SIZE: Final = 8 * 1024 * 1024 + 3


async def run_function(site: Site, relay: RelayProcess, name: str, stories: dict[str, dict[str, Any]]) -> None:
    cert, key = site.paths[name]
    settings = {
        "host": "127.0.0.1",
        "port": relay.port(),
        "cert": str(cert),
        "key": str(key),
        "ca": str(site.ca_path),
        "size": SIZE,
        "seed": name,
    }
    # -I -S: no site-packages and no checkout on the path, so frelay cannot be imported.
    command = [sys.executable, "-I", "-S", "-X", "dev", "-W", "error", str(FUNCTION), json.dumps(settings)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    stories[name] = json.loads(done.stdout)


@pytest.mark.parametrize("first", ["func1", "func2"])
async def test_two_stdlib_functions_meet(site: Site, first: str) -> None:
    """In any order of arrival func1 is the TLS client, func2 the server."""
    second = "func2" if first == "func1" else "func1"
    stories: dict[str, dict[str, Any]] = {}
    async with site.process() as relay:
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(run_function, site, relay, first, stories))
                await relay.log("waiting", party=first)
                nursery.start_soon(partial(run_function, site, relay, second, stories))
        ended = await relay.log("pairing ended")
    one, two = stories["func1"], stories["func2"]
    assert (one["paired"]["role"], two["paired"]["role"]) == ("client", "server")
    assert (one["paired"]["peer"], two["paired"]["peer"]) == ("dns:func2.demo", "dns:func1.demo")
    assert one["paired"]["pairing"] == two["paired"]["pairing"] == ended["pairing"]
    assert (one["peer"], two["peer"]) == ([["DNS", "func2.demo"]], [["DNS", "func1.demo"]])
    assert one["received"] == two["sent"]
    assert two["received"] == one["sent"]
    assert one["sent"] != two["sent"]
    assert (ended["outcome"], ended["side"]) == ("closed", "both")
    # Inner TLS adds bytes, so the relay counted more; and both legs were raw.
    assert min(ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) > SIZE
    assert relay.logged("handed off", func1_mode="handoff", func2_mode="handoff")
    for story in stories.values():
        assert story["foreign"] == []
        assert story["site"] is False
