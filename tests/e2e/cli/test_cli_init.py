"""``frelay init DIR`` writes a set that runs as it is: the relay starts, and its two functions meet."""

from __future__ import annotations

import re
import stat
import subprocess
from functools import partial
from pathlib import Path

import trio

import frelay
from support.commands import FRELAY, frelay_command
from support.relay import RelayProcess
from support.tools import tool
from support.wires import in_thread, read_to_end

FILES = {
    *("certs/ca.pem", "certs/ca.key", "certs/crl.pem", "certs/relay.pem", "certs/relay.key"),
    *("certs/func1.pem", "certs/func1.key", "certs/func2.pem", "certs/func2.key", ".gitignore", "relay.toml"),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if not path.is_dir()}


def test_what_is_written_and_said(tmp_path: Path) -> None:
    said = frelay_command("init", "my relay", cwd=tmp_path)
    assert (said.code, said.stderr) == (0, "")
    directory = tmp_path / "my relay"
    assert contents(directory).keys() == FILES
    for name in FILES:
        mode = stat.S_IMODE((directory / name).stat().st_mode)
        assert not (name.endswith(".key") and mode & 0o077), name
        assert name in said.stdout
    assert said.stdout.endswith("next: frelay run -c 'my relay/relay.toml'\n")


def test_what_is_written_is_good(tmp_path: Path) -> None:
    frelay_command("init", tmp_path / "r")
    said = frelay_command("check", "-c", tmp_path / "r" / "relay.toml")
    assert said.code == 0, said.stderr
    assert "1 route on 1 address" in said.stdout


async def test_it_runs_as_it_is_and_two_functions_meet(tmp_path: Path) -> None:
    """Only the port is changed, since 9001 may be in use."""
    directory = tmp_path / "r"
    assert (await in_thread(frelay_command, "init", directory)).code == 0
    config = directory / "relay.toml"
    text, changes = re.subn(r'listen = "127\.0\.0\.1:9001"', 'listen = "127.0.0.1:0"', config.read_text())
    assert changes == 1
    config.write_text(text)
    came: dict[str, bytes] = {}

    def function(name: str, other: str, address: str) -> None:
        certs = directory / "certs"
        with frelay.connect(
            address,
            cert=certs / f"{name}.pem",
            key=certs / f"{name}.key",
            ca=certs / "ca.pem",
            peer=f"dns:{other}.demo",
            wait=20,
        ) as wire:
            wire.settimeout(20)
            wire.sendall(f"hello from {name}".encode())
            wire.send_eof()
            came[name] = read_to_end(wire)

    command = [*FRELAY, "run", "-c", str(config), "--log-format", "json"]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stderr=subprocess.PIPE, check=False)
        )
        relay = RelayProcess(process)
        nursery.start_soon(relay._read)
        try:
            await relay.log("ready")
            address = f"127.0.0.1:{relay.port()}"
            async with trio.open_nursery() as functions:
                functions.start_soon(in_thread, function, "func1", "func2", address)
                functions.start_soon(in_thread, function, "func2", "func1", address)
            await relay.log("pairing ended", outcome="closed")
        finally:
            process.terminate()
        assert await relay.exit_code() == 0
    assert came == {"func1": b"hello from func2", "func2": b"hello from func1"}


def committed(repository: Path) -> set[str]:
    """What ``git add --all`` would commit."""
    git = [tool("git"), "-c", "safe.directory=*", "-C", str(repository)]
    subprocess.run([*git, "add", "--all"], check=True)
    done = subprocess.run([*git, "ls-files"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_in_a_clone_no_key_is_left_to_be_committed(tmp_path: Path) -> None:
    """No key of the set, of an authority or of a certificate is committed; the user may commit all other files."""
    subprocess.run([tool("git"), "init", "--quiet", tmp_path], check=True)
    frelay_command("init", tmp_path / "my-relay")
    frelay_command("ca", "init", "ca", cwd=tmp_path)
    frelay_command("ca", "party", "func1", "--ca", "ca", "--dns", "func1.acme", "--out", "of-func1", cwd=tmp_path)
    assert {path.name for path in tmp_path.rglob("*.key")} == {"ca.key", "relay.key", "func1.key", "func2.key"}
    found = committed(tmp_path)
    assert {"my-relay/relay.toml", "my-relay/certs/ca.pem", "ca/crl.pem", "of-func1/func1.pem"} <= found
    assert not [name for name in found if name.endswith(".key")]


def test_a_gitignore_that_is_there_stays_and_the_keys_are_ignored_all_the_same(tmp_path: Path) -> None:
    subprocess.run([tool("git"), "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    said = frelay_command("init", ".", cwd=tmp_path)
    assert (said.code, said.stderr) == (0, "")
    assert (tmp_path / ".gitignore").read_text() == "__pycache__/\n"
    assert "certs/.gitignore" in said.stdout
    assert not [name for name in committed(tmp_path) if name.endswith(".key")]
    # Both exist now: a second set does not change them either.
    (tmp_path / "certs/.gitignore").write_text("*\n")
    assert frelay_command("init", ".", "--force", cwd=tmp_path).code == 0
    assert (tmp_path / "certs/.gitignore").read_text() == "*\n"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """If one file exists, none of the others is written either."""
    directory = tmp_path / "r"
    frelay_command("init", directory)
    before = contents(directory)
    said = frelay_command("init", directory)
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    assert message.startswith("frelay: ")
    assert "already there, and nothing was written" in message
    assert "--force" in message
    assert contents(directory) == before
    for name in FILES - {"certs/func2.key"}:
        (directory / name).unlink()
    said = frelay_command("init", directory)
    assert said.code == 1
    assert f"{directory}/certs/func2.key: already there" in said.messages[0]
    assert contents(directory) == {"certs/func2.key": before["certs/func2.key"]}


def test_force_overwrites_all_of_it(tmp_path: Path) -> None:
    directory = tmp_path / "r"
    frelay_command("init", directory)
    before = contents(directory)
    assert frelay_command("init", "--force", directory).code == 0
    after = contents(directory)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] == after[name]} == {"relay.toml", ".gitignore"}
    assert frelay_command("check", "-c", directory / "relay.toml").code == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    said = frelay_command("init", occupied / "r")
    assert (said.code, said.stdout) == (1, "")
    assert f"frelay: {occupied}/r: cannot be made" in said.messages[0]
    assert list(tmp_path.iterdir()) == [occupied]
