"""Two functions are paired with only Python and ``frelay`` installed, as by ``pip install --no-deps frelay``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import trio

import frelay
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT
from support.wires import options

FUNCTION: Final = Path(__file__).parents[2] / "support/parties" / "frelay_function.py"
SIZE: Final = 4 * 1024 * 1024


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package and nothing else."""
    folder = tmp_path / "only-frelay"
    shutil.copytree(Path(frelay.__file__).parent, folder / "frelay", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


async def test_two_functions_without_dependencies_meet(site: Site, package: Path) -> None:
    stories: dict[str, dict[str, Any]] = {}

    async def run(relay: RelayProcess, name: str) -> None:
        arguments = {
            key: str(value) if isinstance(value, Path) else value for key, value in options(site, name).items()
        }
        settings = {
            "package": str(package),
            "address": f"127.0.0.1:{relay.port()}",
            "size": SIZE,
            "arguments": arguments,
        }
        command = [sys.executable, "-I", "-S", "-B", "-X", "dev", "-W", "error", str(FUNCTION), json.dumps(settings)]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        stories[name] = json.loads(done.stdout)

    async with site.process() as relay:
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                for name in ("func1", "func2"):
                    nursery.start_soon(run, relay, name)
        record = await relay.log("pairing ended")
    one, two = stories["func1"], stories["func2"]
    assert (one["role"], two["role"]) == ("client", "server")
    assert one["received"] == two["sent"] != one["sent"] == two["received"]
    assert (one["missing"], two["missing"]) == (0, 0)
    assert record["outcome"] == "closed"
    for story in stories.values():
        assert story["foreign"] == []
        assert not [entry for entry in story["path"] if "site-packages" in entry], "the test shows nothing"
