"""``pip install --no-deps frelay`` is enough for a function: 8 MiB to and fro, and neither Trio nor OpenSSL loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from support.clients import options
from support.site import Site

ROOT = Path(__file__).resolve().parents[3]

FUNCTION = """
import asyncio, hashlib, json, sys
import frelay
address, given, kind = json.loads(sys.argv[1])
SIZE = 8 * 1024 * 1024
block = bytes(range(256)) * (SIZE // 256)

def blocking():
    with frelay.connect(address, **given) as wire:
        asks = given["peer"] == "dns:func2.demo"
        if asks:
            wire.sendall(block)
            wire.send_eof()
        got = b""
        while data := wire.recv(65536):
            got += data
        if not asks:
            wire.sendall(got)
            wire.send_eof()
        return got

async def asynchronous():
    import frelay.client.asyncio
    reader, writer = await frelay.client.asyncio.connect(address, **given)
    asks = given["peer"] == "dns:func2.demo"
    if asks:
        writer.write(block)
        await writer.drain()
        writer.write_eof()
    got = await reader.read()
    if not asks:
        writer.write(got)
        writer.write_eof()
    writer.close()
    await writer.wait_closed()
    return got

got = blocking() if kind == "blocking" else asyncio.run(asynchronous())
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"whole": got == block, "loaded": loaded, "file": frelay.__file__}))
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh virtual environment with frelay and nothing else."""
    directory = tmp_path_factory.mktemp("alone")
    # A copy, because building leaves files beside the source.
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "frelay", source / "frelay", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    python = directory / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", str(source)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        text = f"pip could not build frelay here: {done.stderr[-500:]}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return python


def alone(interpreter: Path, *line: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Not in this directory, from which frelay would be imported.
    return subprocess.run(line, check=False, capture_output=True, text=True, env=env, cwd=interpreter.parent)


@pytest.mark.parametrize("way", ["frelay", "python -m frelay", "frelay run -c relay.toml", "frelay --version"])
def test_the_command_says_in_a_line_what_is_missing(interpreter: Path, way: str) -> None:
    """The command needs libraries that a function does not; a traceback would look as if frelay were broken."""
    program, *arguments = way.split()
    done = alone(interpreter, str(interpreter.with_name(program)), *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"frelay: the library \w+ is not installed, .*without --no-deps\n", done.stderr), done.stderr


def test_the_trio_client_says_what_it_needs(interpreter: Path) -> None:
    done = alone(interpreter, str(interpreter), "-c", "import frelay; frelay.client.asyncio; frelay.client.trio")
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: frelay.client.trio needs the library trio, which is not installed: pip install trio"
    )


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_an_interpreter_with_frelay_alone_exchanges_8_mib(site: Site, interpreter: Path, kind: str) -> None:
    results: list[dict[str, object]] = []
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    async with site.relay() as relay:

        async def run(me: str, other: str) -> None:
            settings = json.dumps([f"127.0.0.1:{relay.port()}", options(site, me, other), kind], default=str)
            done = await trio.run_process(
                [str(interpreter), "-c", FUNCTION, settings], capture_stdout=True, env=env, cwd=str(site.directory)
            )
            results.append(json.loads(done.stdout))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "func1", "func2")
                nursery.start_soon(run, "func2", "func1")
    for result in results:
        assert result["whole"] is True
        loaded = result["loaded"]
        assert isinstance(loaded, list)
        assert not {"trio", "OpenSSL", "cryptography", "typer", "pydantic", "structlog"} & set(loaded)
        assert str(interpreter.parents[1]) in str(result["file"])
