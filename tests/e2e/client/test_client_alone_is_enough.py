"""A function needs frelay alone: ``pip install --no-deps frelay``, the wheel frelay-client, or the layer for Lambda.

Each of them exchanges 8 MiB, on each Python of this machine, and loads neither Trio nor OpenSSL's bindings.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

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


WAYS: Final = ("no-deps", "client", "layer")
"""``pip install --no-deps frelay``; ``pip install frelay-client``; the layer for AWS Lambda on the path."""


def pythons() -> dict[str, Path]:
    """The versions of Python that frelay runs on, as far as this machine has them; always the one of the tests."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": Path(sys.executable)}
    for minor in (11, 12, 13):
        candidates = [Path(one) for one in (shutil.which(f"python3.{minor}"),) if one is not None]
        candidates += sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for one in candidates:
            done = subprocess.run([one, "-c", "import ssl, venv"], capture_output=True, check=False)
            if done.returncode == 0:
                found.setdefault(f"3.{minor}", one)
    return found


PYTHONS: Final = pythons()


@dataclass(frozen=True)
class Installation:
    """A Python that finds frelay and nothing else."""

    python: Path
    environment: dict[str, str]
    source: Path
    """Where it finds it."""


class Installations:
    """Makes each installation once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[tuple[str, str], Installation] = {}

    @cached_property
    def wheels(self) -> dict[str, Path]:
        """The wheels of frelay and of frelay-client, built from this checkout."""
        found = {}
        for name, source in (("no-deps", ROOT), ("client", ROOT / "deploy/client")):
            into = self._directory / name
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
            done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            (found[name],) = into.glob("*.whl")
        return found

    def get(self, way: str, version: str = f"{sys.version_info[0]}.{sys.version_info[1]}") -> Installation:
        """A fresh virtual environment of one Python with frelay, by one of the ways."""
        if (way, version) not in self._made:
            self._made[way, version] = self._make(way, version)
        return self._made[way, version]

    def _make(self, way: str, version: str) -> Installation:
        place = self._directory / f"{way}-{version}"
        subprocess.run([PYTHONS[version], "-m", "venv", "--without-pip", place], check=True)
        python = place / "bin" / "python"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if way == "layer":
            layer = self._directory / f"layer-{version}.zip"
            runpy.run_path(str(ROOT / ".ci/release.py"))["write_layer"](self.wheels["client"], layer)
            with zipfile.ZipFile(layer) as archive:
                archive.extractall(place / "opt")
            return Installation(python, environment | {"PYTHONPATH": str(place / "opt/python")}, place / "opt")
        install(python, self.wheels[way], "--no-deps" if way == "no-deps" else "--no-index")
        return Installation(python, environment, place)


def install(python: Path, wheel: Path, option: str) -> None:
    """Install a wheel, and nothing from anywhere else."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", option, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installations(tmp_path_factory: pytest.TempPathFactory) -> Installations:
    return Installations(tmp_path_factory.mktemp("alone"))


@pytest.fixture
def interpreter(installations: Installations) -> Path:
    """The Python of a fresh virtual environment with frelay, without its dependencies."""
    return installations.get("no-deps").python


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


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_an_interpreter_with_frelay_alone_exchanges_8_mib(
    site: Site, installations: Installations, kind: str, way: str, version: str
) -> None:
    installation = installations.get(way, version)
    results: list[dict[str, object]] = []

    async with site.relay() as relay:

        async def run(me: str, other: str) -> None:
            settings = json.dumps([f"127.0.0.1:{relay.port()}", options(site, me, other), kind], default=str)
            done = await trio.run_process(
                [str(installation.python), "-c", FUNCTION, settings],
                capture_stdout=True,
                env=installation.environment,
                cwd=str(site.directory),
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
        assert str(installation.source) in str(result["file"])


# --- frelay-client ----------------------------------------------------------------------------------------------------


def test_the_client_has_all_that_it_imports_and_no_more(installations: Installations) -> None:
    """Its list of files stands in deploy/client/pyproject.toml."""
    client = installations.get("client")
    code = (
        "import frelay, json, pkgutil, sys; names = sorted(name for _, name, _ in pkgutil.walk_packages("
        "frelay.__path__, 'frelay.') if not name.startswith('frelay.client.trio') and name != 'frelay.__main__'); "
        "[__import__(name) for name in names]; "
        "print(json.dumps([names, sorted(name for name in sys.modules if name.startswith('frelay.'))]))"
    )
    done = subprocess.run(
        [client.python, "-P", "-c", code], env=client.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    there, loaded = json.loads(done.stdout)
    assert set(loaded) == set(there)
    imported = set()
    for name in there:
        path = ROOT / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frelay."):
                imported.add(node.module)
    outside = {name for name in there if not name.startswith("frelay.client") and "." in name.removeprefix("frelay.")}
    assert outside <= imported, "these files are in frelay-client, and nothing in it needs them"


def test_the_client_has_no_commands_and_says_so(installations: Installations) -> None:
    client = installations.get("client")
    done = alone(client.python, str(client.python), "-m", "frelay", "run")
    assert done.returncode == 1
    assert done.stderr == (
        "frelay: frelay-client has no commands; for these, pip uninstall it and pip install frelay\n"
    )


def test_both_in_one_environment_are_told(installations: Installations, tmp_path: Path) -> None:
    """They share their files, and pip does not notice. The function hears of it, and so does the command."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "both"], check=True)
    python = tmp_path / "both/bin/python"
    install(python, installations.wheels["no-deps"], "--no-deps")
    install(python, installations.wheels["client"], "--no-index")
    for line in ([str(python), "-c", "import frelay; frelay.connect"], [str(python), "-m", "frelay", "--version"]):
        done = alone(python, *line)
        assert "frelay and frelay-client are both installed, and they share their files" in done.stderr
        assert "pip uninstall frelay frelay-client, then pip install frelay" in done.stderr
    for way in ("no-deps", "client"):
        only = installations.get(way)
        done = alone(only.python, str(only.python), "-c", "import frelay; frelay.connect")
        assert (done.returncode, done.stderr) == (0, "")
