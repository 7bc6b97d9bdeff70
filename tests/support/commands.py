"""The ``frelay`` command as a person runs it: a process, what it says on both streams, and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

__all__ = ["FRELAY", "Said", "ask", "frelay_command", "session_processes"]

FRELAY: Final = (sys.executable, "-m", "frelay")
# A command that fails does so within a second or two; a machine may be fifty times as slow.
PATIENCE: Final = 60.0


@dataclass(frozen=True)
class Said:
    """What a command that has ended said."""

    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """The lines on stderr; a traceback among them is a failure of the test that asks."""
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.splitlines()


def frelay_command(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, patience: float = PATIENCE
) -> Said:
    """Run ``frelay ARGUMENTS`` to its end. Colours are off, as for any stream that is no terminal."""
    done = subprocess.run(
        [*FRELAY, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


async def ask(*arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Said:
    """As :func:`frelay_command`, for a test whose own parties must go on answering meanwhile."""
    return await trio.to_thread.run_sync(partial(frelay_command, *arguments, cwd=cwd, env=env))


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
