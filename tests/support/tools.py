"""Programs from outside that the tests drive: finding them, and running them.

:func:`tool` finds a program. On a developer's machine a missing one skips the test, and the reason names the package to
install. Where ``CI`` is set nothing is skipped: a promise that no test looked at may be broken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import pytest
import trio

from support.waiting import TIMEOUT

__all__ = ["library", "needs_root", "running", "skip_or_fail", "tool", "wait_listening"]

# Debian's package of a program, where its name is another.
_PACKAGES: Final = {
    "go": "golang-go",
    "gofmt": "golang-go",
    "ip": "iproute2",
    "nft": "nftables",
    "node": "nodejs",
    "nsenter": "util-linux",
    "promtool": "prometheus",
    "redis-benchmark": "redis-tools",
    "redis-cli": "redis-tools",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "stunnel": "stunnel4",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}


def tool(name: str) -> str:
    """The path of a program; without it the test is skipped, or fails where ``CI`` is set."""
    # Servers are in directories that may not be on PATH.
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        skip_or_fail(f"{name} is not installed; on Debian: apt-get install {_PACKAGES.get(name, name)}")
    return path


def library(name: str, package: str) -> str:
    """The path of a shared library that is preloaded; without it the test is skipped, or fails where ``CI`` is set."""
    path = next((str(path) for path in Path("/usr/lib").glob(f"*/**/{name}")), None)
    if path is None:
        skip_or_fail(f"{name} is not installed; on Debian: apt-get install {package}")
    return path


def needs_root(what: str) -> None:
    """Skip the test, or fail it where ``CI`` is set, unless it runs as root; ``what`` needs that."""
    if os.geteuid() != 0:
        skip_or_fail(f"{what} takes root")


def skip_or_fail(text: str) -> NoReturn:
    """Skip the test for this reason, or fail it where ``CI`` is set."""
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


@asynccontextmanager
async def running(line: list[str], *, stderr: int = subprocess.DEVNULL) -> AsyncIterator[trio.Process]:
    """A running program without input and output; ``stderr`` gets its messages. It is terminated at the end."""
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


async def wait_listening(port: int) -> None:
    """Wait until somebody listens at ``port``."""
    with trio.fail_after(TIMEOUT):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return
