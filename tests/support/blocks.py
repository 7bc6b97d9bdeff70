"""The code blocks of the documentation, and a machine of their own to run them on.

::

    block = find("README.md", "frelay init")                 # the one block that has this text
    with machine(tmp_path) as here:                           # needs root and util-linux: a network of its own
        assert here.run(block.commands[0].text).stdout == block.commands[0].output
        with here.start("frelay run -c relay.toml") as relay:
            relay.says("ready")
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from support.commands import COMMAND_TIMEOUT, Said
from support.tools import needs_root, tool

__all__ = ["PAGES", "Block", "Command", "Machine", "Running", "blocks", "find", "machine"]

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("README.md", "docs/functions.md", "docs/operating.md")
_FENCED: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a block ``console``, and what the page says that it prints."""

    text: str
    output: str


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it stands on, its language ("" for none), and what is in it."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[Command]:
        """The commands of a block ``console``, each behind a ``$``, without the comments behind them."""
        found = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            first, _, output = part.partition("\n")
            found.append(Command(re.sub(r"\s+# .*", "", first), output))
        return found


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text()
    return tuple(Block(page, language, content) for language, content in _FENCED.findall(text))


def find(page: str, having: str) -> Block:
    """The only block of the page with this text."""
    (found,) = (block for block in blocks(page) if having in block.text)
    return found


class Running:
    """A command that runs; its output is read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = ""
        """Both streams."""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.output += line
                self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def says(self, text: str, *, count: int = 1) -> str:
        """Wait until ``text`` was printed so many times; gives the line that had it last."""
        with self._more:
            come = self._more.wait_for(
                lambda: self.output.count(text) >= count or not self._reader.is_alive(), COMMAND_TIMEOUT
            )
        assert come, f"{text!r} was not said:\n{self.output}"
        assert self.output.count(text) >= count, f"it ended without {text!r}:\n{self.output}"
        return next(line for line in reversed(self.output.splitlines()) if text in line)

    def write(self, text: str, *, is_last: bool = False) -> None:
        """Send it ``text``; close its input too if this is the last of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()
        if is_last:
            self.process.stdin.close()

    def end(self) -> int:
        """Close its input, and wait for its end; gives the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(COMMAND_TIMEOUT)
        self._reader.join(COMMAND_TIMEOUT)
        return code

    def stop(self) -> None:
        """End it and all that it started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(COMMAND_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(COMMAND_TIMEOUT)
        self._reader.join(COMMAND_TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Machine:
    """A machine with a network and host names of its own; ``directory`` is where its commands run."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory
        self._enter = [tool("nsenter"), "--net", "--mount", f"--target={pid}", f"--wd={directory}"]
        programs = Path(sys.executable).parent
        # Two functions print to one pipe: unbuffered, the pieces of their lines would mix.
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("FRELAY_", "PYTHONUNBUFFERED"))
        }
        self.environment = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NO_COLOR": "1",
        }
        # As in a clone in which README's first command has run.
        (directory / ".venv").symlink_to(programs.parent)

    def run(self, script: str, *, stdin: str = "", env: Mapping[str, str] | None = None) -> Said:
        """Run a shell script to its end."""
        done = subprocess.run(
            [*self._enter, "bash", "-euo", "pipefail", "-c", script],
            env={**self.environment, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def start(self, script: str, *, env: Mapping[str, str] | None = None) -> Iterator[Running]:
        """Run a shell script in the background; it is stopped at the end."""
        process = subprocess.Popen(
            [*self._enter, "bash", "-c", script],
            env={**self.environment, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            running.stop()


@contextmanager
def machine(directory: Path, *names: str) -> Iterator[Machine]:
    """A machine whose loopback has these host names, so the names and ports of the pages lead there and are free."""
    needs_root("a network of its own")
    hosts = directory / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n::1 localhost\n")
    made = f'mount --bind "{hosts}" /etc/hosts && {tool("ip")} link set lo up && echo made && exec cat'
    # It ends when its input ends, so also when the tests are killed.
    holder = subprocess.Popen(
        [tool("unshare"), "--net", "--mount", "sh", "-c", made],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "made\n"
        yield Machine(directory, holder.pid)
    finally:
        holder.stdin.close()
        holder.wait(COMMAND_TIMEOUT)
        holder.stdout.close()
