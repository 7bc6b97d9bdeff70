"""Containers of frelay's image, as careful users run them: a read-only root, no capability, the image's own user.

``bash .ci/image`` builds the image, and names it to the tests by FRELAY_IMAGE. :func:`image` is this name; without it a
test is skipped, so that nobody needs podman for the other tests. :class:`Containers` runs containers, which have no
network but their own loopback; the functions of a test use that of its relay.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from support.commands import Command, Said, command
from support.relay import RelayProcess
from support.site import Site
from support.tools import needs_root, tool
from support.waiting import TIMEOUT

__all__ = ["CONFIGURATION", "ROUTE", "USER", "Containers", "image", "owned"]

USER: Final = 65532
CONFIGURATION: Final = "/etc/frelay"
ROUTE: Final = """
[admin]
listen = "unix:/run/frelay/frelay.sock"

[[route]]
name = "demo"
listen = "127.0.0.1:9001"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
"""
# The last one is no protection: podman would ask systemd for a timer, and a build machine may have no systemd.
_CAREFUL: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    "--no-healthcheck",
)
# podman takes a second to start a container; a busy machine may be fifty times as slow.
_TIMEOUT: Final = 60.0


def image() -> str:
    """The name of the image under test; without it the test is skipped."""
    name = os.environ.get("FRELAY_IMAGE")
    if not name:
        pytest.skip("it tests the container image: bash .ci/image builds one and runs this test")
    tool("podman")
    needs_root("a container whose files belong to another user")
    return name


def owned(directory: Path) -> Path:
    """Give the files of a directory to root and to the group of the image's user, as Kubernetes does with fsGroup."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, 0, USER, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o750 if path.is_dir() else 0o440)
    return directory


class Containers:
    """The containers of one test; all are removed when it ends."""

    def __init__(self, image: str) -> None:
        self.image: Final = image
        self.names: Final[list[str]] = []

    async def podman(self, *arguments: str, code: int | None = 0) -> Said:
        """Run podman to its end; fails unless it exits with ``code`` (None: with any)."""
        with trio.fail_after(_TIMEOUT):
            done = await trio.run_process(
                ["podman", *arguments], stdin=b"", capture_stdout=True, capture_stderr=True, check=False
            )
        said = Said(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert code is None or said.code == code, said
        return said

    async def inspect(self, name: str) -> dict[str, Any]:
        """All that podman knows of a container, or of the image."""
        (found,) = json.loads((await self.podman("inspect", name)).stdout)
        assert isinstance(found, dict)
        return found

    def new_name(self) -> str:
        """A name for one more container."""
        self.names.append(f"frelay-test-{secrets.token_hex(4)}")
        return self.names[-1]

    def line(
        self, verb: str, name: str, *options: str, arguments: Sequence[str] = (), mount: Path | None = None
    ) -> list[str]:
        """The command line that makes a container: ``arguments`` are those of its program, ``mount`` is /etc/frelay."""
        mounts = () if mount is None else ("--volume", f"{mount}:{CONFIGURATION}:ro")
        return ["podman", verb, "--name", name, *_CAREFUL, *mounts, *options, self.image, *arguments]

    async def run(self, *arguments: str, options: Sequence[str] = (), code: int = 0) -> Said:
        """Run a container to its end."""
        line = self.line("run", self.new_name(), "--network", "none", *options, arguments=arguments)
        return await self.podman(*line[1:], code=code)

    @asynccontextmanager
    async def relay(self, directory: Path) -> AsyncIterator[tuple[str, RelayProcess]]:
        """A relay, ready, with ``directory`` as its configuration; and the name of its container.

        Its log is read from the start on, and the process ends with the exit code of the container.
        """
        name = self.new_name()
        line = self.line("run", name, "--network", "none", "--tmpfs", "/run/frelay:U", mount=directory)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(trio.run_process, line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            )
            relay = RelayProcess(process)
            nursery.start_soon(relay._read)
            try:
                await relay.log("ready", timeout=4 * TIMEOUT)
                yield name, relay
            finally:
                with trio.CancelScope(shield=True):
                    await self.remove()

    @asynccontextmanager
    async def function(self, relay: str, site: Site, me: str, other: str) -> AsyncIterator[Command]:
        """A ``frelay connect`` in a container that shares the network of the container ``relay``."""
        cert, key = site.paths[me]
        arguments = ["connect", "127.0.0.1:9001", "--server-name", "localhost", "--peer", f"dns:{other}.demo"]
        for option, path in (("--cert", cert), ("--key", key), ("--ca", site.ca_path)):
            arguments += [option, f"{CONFIGURATION}/{path.name}"]
        options = ["--interactive", "--network", f"container:{relay}"]
        async with command(
            self.line("run", self.new_name(), *options, arguments=arguments, mount=site.directory)
        ) as running:
            yield running

    async def wait_healthy(self, name: str) -> None:
        """Wait until the image's HEALTHCHECK finds a container healthy."""
        with trio.fail_after(4 * TIMEOUT):
            while True:
                if await self.is_healthy(name):
                    return
                await trio.sleep(0.1)

    async def is_healthy(self, name: str) -> bool:
        """Whether the image's HEALTHCHECK, run in this container, finds it healthy."""
        kind, *check = (await self.inspect(self.image))["Healthcheck"]["Test"]
        assert kind == "CMD"
        said = await self.podman("exec", name, *check, code=None)
        assert said.code in (0, 1), said  # others have no meaning for it
        return said.code == 0

    async def pid(self, name: str) -> int:
        """The number that the first process of a running container has outside of it."""
        return int((await self.inspect(name))["State"]["Pid"])

    async def remove(self) -> None:
        """Remove all containers of the test, running or not."""
        while self.names:
            # Newest first: a container must go before the one whose network it uses.
            await self.podman("rm", "--force", "--ignore", "--time", "0", self.names.pop())
