"""The ``frelay`` command as a person runs it: a process, what it says on both streams, and its exit code.

:func:`frelay_command` and :func:`ask` run any command to its end; :func:`command` is ``frelay connect`` while it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from support.ports import reserved_port
from support.relay import FRELAY_RUN
from support.site import DEMO, Site
from support.tools import running, wait_listening
from support.waiting import TIMEOUT

__all__ = [
    "FRELAY",
    "Command",
    "Said",
    "arguments",
    "ask",
    "command",
    "frelay_command",
    "relay_logging_to",
    "session_processes",
]

FRELAY: Final = (sys.executable, "-m", "frelay")
# A command that fails takes a second or two; a busy machine may be fifty times as slow.
COMMAND_TIMEOUT: Final = 60.0


@dataclass(frozen=True)
class Said:
    """The exit code and the output of a command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """The lines on stderr; a traceback among them fails the test."""
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.splitlines()


def frelay_command(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = COMMAND_TIMEOUT,
) -> Said:
    """Run ``frelay ARGUMENTS`` to its end; without colours, since its streams are no terminal."""
    done = subprocess.run(
        [*FRELAY, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


async def ask(*arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Said:
    """As :func:`frelay_command`, in a thread: the test's own parties can answer meanwhile."""
    return await trio.to_thread.run_sync(partial(frelay_command, *arguments, cwd=cwd, env=env))


# --- frelay connect, while it runs ---------------------------------------------------------------------------------


def arguments(site: Site, address: str, me: str, other: str, *more: str) -> list[str]:
    """The command line of ``frelay connect`` for ``me``, who expects ``other``."""
    cert, key = site.paths[me]
    line = [sys.executable, "-m", "frelay", "connect", address, "--server-name", "localhost"]
    line += ["--cert", str(cert), "--key", str(key), "--ca", str(site.ca_path), "--peer", f"dns:{other}.demo"]
    return [*line, *more]


class Command:
    """A running ``frelay connect --json``; ``stdin`` and ``stdout`` are pipes."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.stdin = process.stdin
        self.stdout = process.stdout
        self.events: list[dict[str, Any]] = []
        self.stderr = ""
        self._more = trio.Event()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        rest = b""
        async for chunk in self.process.stderr:
            self.stderr += chunk.decode("utf-8", "replace")
            *lines, rest = (rest + bytes(chunk)).split(b"\n")
            self.events += [json.loads(line) for line in lines if line.startswith(b"{")]
            self._more.set()
            self._more = trio.Event()
        self._more.set()

    def said(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]

    async def say(self, event: str, count: int = 1) -> dict[str, Any]:
        """The ``count``-th status line of this name, now or to come."""
        with trio.move_on_after(TIMEOUT):
            while len(self.said(event)) < count:
                await self._more.wait()
        assert len(self.said(event)) >= count, f"no {event!r} ({count}); stderr:\n{self.stderr}"
        return self.said(event)[count - 1]

    async def output(self) -> bytes:
        """Standard output to its end."""
        with trio.fail_after(TIMEOUT):
            return b"".join([bytes(data) async for data in self.stdout])

    async def exit_code(self) -> int:
        with trio.fail_after(TIMEOUT):
            return await self.process.wait()


@asynccontextmanager
async def command(line: list[str], env: Mapping[str, str] | None = None) -> AsyncIterator[Command]:
    """Run a command line with ``--json`` added; killed at the end if it still runs."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*line, "--json"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
                env={**os.environ, **(env or {})},
            )
        )
        running = Command(process)
        nursery.start_soon(running._read)
        try:
            yield running
        finally:
            await trio.aclose_forcefully(running.stdin)
            await trio.aclose_forcefully(running.stdout)
            if process.returncode is None:
                process.kill()


# --- frelay run, whose log goes elsewhere ---------------------------------------------------------------------------


@asynccontextmanager
async def relay_logging_to(
    site: Site, stderr: int, *options: str, shell: str | None = None
) -> AsyncIterator[tuple[trio.Process, int]]:
    """A ``frelay run`` whose log goes to this descriptor, and its port.

    ``shell`` is a redirection of the shell, for what cannot be done with a descriptor.
    """
    with reserved_port() as port:
        config = site.write(DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        line = [*FRELAY_RUN, "-c", str(config), "--log-level", "debug", *options]
        if shell is not None:
            line = ["/bin/sh", "-c", f'exec "$@" {shell}', "sh", *line]
        async with running(line, stderr=stderr) as process:
            await wait_listening(port)
            yield process, port


def session_processes(session: int) -> list[str]:
    """The command lines of the processes that are left of a session, zombies aside."""
    left = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # pid (comm) state ppid pgrp session ...; comm may hold spaces and brackets.
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                left.append((folder / "cmdline").read_text().replace("\0", " ").strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just gone
    return left
