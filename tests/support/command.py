"""``frelay connect`` as a real process, with its status lines; and other people's servers as processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from rig import DEMO, FRELAY_RUN, PATIENCE, Site, reserved_port

__all__ = ["Command", "answers", "arguments", "command", "free_port", "relay_logging_to", "running"]


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
        with trio.move_on_after(PATIENCE):
            while len(self.said(event)) < count:
                await self._more.wait()
        assert len(self.said(event)) >= count, f"no {event!r} ({count}); stderr:\n{self.stderr}"
        return self.said(event)[count - 1]

    async def output(self) -> bytes:
        """Standard output to its end."""
        with trio.fail_after(PATIENCE):
            return b"".join([bytes(data) async for data in self.stdout])

    async def exit_code(self) -> int:
        with trio.fail_after(PATIENCE):
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


# --- other programs that serve -------------------------------------------------------------------------------------


@asynccontextmanager
async def running(line: list[str], *, stderr: int = subprocess.DEVNULL) -> AsyncIterator[trio.Process]:
    """A program without input and output, its messages to the descriptor ``stderr`` aside; terminated at the end."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                check=False,
            )
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()


@asynccontextmanager
async def relay_logging_to(
    site: Site, stderr: int, *options: str, shell: str | None = None
) -> AsyncIterator[tuple[trio.Process, int]]:
    """A ``frelay run`` that is known by its port only, since its log goes to this descriptor; with that port.

    ``shell`` are redirections, for what a descriptor cannot say.
    """
    with reserved_port() as port:
        config = site.write(DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        line = [*FRELAY_RUN, "-c", str(config), "--log-level", "debug", *options]
        if shell is not None:
            line = ["/bin/sh", "-c", f'exec "$@" {shell}', "sh", *line]
        async with running(line, stderr=stderr) as process:
            await answers(port)
            yield process, port


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot be asked which one they have taken."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def answers(port: int) -> None:
    """Wait until somebody listens at ``port``."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return
