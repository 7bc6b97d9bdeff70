"""Install what frelay is compared with: from Debian as root, and from PyPI into a virtual environment of its own.

Debian starts a daemon when it installs it. These daemons would take port 80, or join a public pool of relays. So during
the installation ``policy-rc.d`` forbids starts, as it always does in containers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.measuring.load import BenchError

__all__ = ["in_venv", "install"]

_POLICY: Final = Path("/usr/sbin/policy-rc.d")
# apt and pip have time limits for each connection; this one is for a mirror that sends a byte now and then.
_PATIENCE: Final = 600.0


def install(program: str, packages: Sequence[str], *, allowed: bool) -> str | None:
    """Make sure that ``program`` is installed. Returns the reason if it is not, as a clause."""
    # Debian installs daemons into directories that are not on an ordinary user's PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    if shutil.which(program):
        return None
    what = f"{program} is not installed (Debian: apt-get install {' '.join(packages)})"
    if not allowed or shutil.which("apt-get") is None:
        return what
    if os.geteuid() != 0:
        return f"{what}, and only root can install it"
    print(f"installing {' '.join(packages)}", file=sys.stderr)
    variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _nothing_started():
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        for attempt in (command, ["apt-get", "update", "-qq"], command):
            done = _run(attempt, variables)
            if attempt is command and done is None:
                break
    return None if shutil.which(program) else f"{what}: {done or 'apt-get brought no such program'}"


def _run(command: Sequence[str], variables: dict[str, str]) -> str | None:
    """Run it; returns the last line of a failure."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=_PATIENCE, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took too long"
    if done.returncode == 0:
        return None
    return next(reversed((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")


@contextmanager
def _nothing_started() -> Iterator[None]:
    if _POLICY.exists():
        yield
        return
    try:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def in_venv(*packages: str, allowed: bool) -> Path:
    """The ``bin`` of an environment with ``packages`` from PyPI, made once and kept; raises BenchError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    directory = cache / "frelay-bench" / f"{'-'.join(packages)}-{version}"
    is_whole = directory / "is-whole"
    if is_whole.exists():
        return directory / "bin"
    what = ", ".join(packages)
    if not allowed:
        raise BenchError(f"{what}: not installed in {directory}")
    print(f"installing {what} in {directory}", file=sys.stderr)
    try:
        venv.create(directory, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"no virtual environment for {what}: {error}") from None
    command = [str(directory / "bin" / "python"), "-m", "pip", "install", "-q", *packages]
    if failure := _run(command, dict(os.environ)):
        raise BenchError(f"{what} could not be installed: {failure}")
    is_whole.touch()
    return directory / "bin"
