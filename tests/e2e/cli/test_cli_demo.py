"""``frelay demo`` shows everything in one command, and leaves nothing behind, in whatever way it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.commands import COMMAND_TIMEOUT, FRELAY, session_processes


class Demo:
    """A demo in a session of its own, with a temporary directory of its own, so that what it leaves can be found."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [*FRELAY, "demo"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(directory)},
            start_new_session=True,
        )
        self.stdout = ""

    def read_until(self, text: str) -> None:
        """Wait until the demo has printed ``text``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout += line
            if text in line:
                return
        pytest.fail(f"{text!r} was not told:\n{self.stdout}{self.finish()[1]}")

    def finish(self) -> tuple[int, str]:
        """Wait for the end; returns the exit code and stderr. Nothing may be left behind."""
        rest, stderr = self.process.communicate(timeout=COMMAND_TIMEOUT)
        self.stdout += rest
        deadline = time.monotonic() + COMMAND_TIMEOUT
        while left := session_processes(self.process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        assert list(self.directory.iterdir()) == []
        return self.process.returncode, stderr


@contextmanager
def demo(directory: Path) -> Iterator[Demo]:
    running = Demo(directory)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.communicate()


@pytest.mark.load
def test_the_whole_way_is_shown_and_nothing_is_left(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        code, stderr = running.finish()
    assert (code, stderr) == (0, "")
    told = running.stdout
    steps = [
        r"relay   listening on 127\.0\.0\.1:\d+ for dns:func1\.demo and dns:func2\.demo",
        r"func1   dials 127\.0\.0\.1:\d+, with its certificate",
        r"func1   joined as dns:func1\.demo; the other party is (not )?here",
        r"relay   dns:func[12]\.demo is verified and waits in the lobby",
        r"func1   paired with dns:func2\.demo, plays the TLS client",
        r"func2   paired with dns:func1\.demo, plays the TLS server",
        r"relay   both legs handed off",
        r"func1   end-to-end mTLS with dns:func2\.demo \(TLSv1\.3, ",
        r"func2   received: 'hello from func1'",
        r"func1   received: 'hello from func2'",
        r"func1   received 64 MiB at \d+\.\d Gbit/s of inner TLS",
        r"func2   received 64 MiB at \d+\.\d Gbit/s of inner TLS",
        r"relay   pairing ended: closed; \d+\.\d MB passed through, unreadable here",
        r"both    SHA-256 of what arrived equals what was sent, in both directions",
        r"relay   stopped",
    ]
    for step in steps:
        assert re.search(rf"^ +\d+\.\d\d s  {step}", told, re.MULTILINE), f"{step}\n{told}"
    assert told.splitlines()[-1] == "next: frelay init my-relay && frelay run -c my-relay/relay.toml"


MOMENTS = ["listening on", "dials", "end-to-end mTLS"]


@pytest.mark.load
@pytest.mark.parametrize("whom", ["all", "one"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str, whom: str) -> None:
    """A terminal sends SIGINT to the whole process group; ``kill -INT`` only to one process."""
    with demo(tmp_path) as running:
        running.read_until(moment)
        if whom == "all":
            os.killpg(running.process.pid, signal.SIGINT)
        else:
            running.process.send_signal(signal.SIGINT)
        code, stderr = running.finish()
    assert code == 130
    assert "Traceback" not in stderr


@pytest.mark.load
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with demo(tmp_path) as running:
        running.read_until(moment)
        running.process.terminate()
        code, stderr = running.finish()
    assert (code, stderr) == (1, "frelay demo: ended by SIGTERM\n")


@pytest.mark.load
def test_a_demo_whose_output_nobody_reads_leaves_nothing(tmp_path: Path) -> None:
    """``frelay demo | head -3``."""
    with demo(tmp_path) as running:
        running.read_until("listening on")
        assert running.process.stdout is not None
        running.process.stdout.close()
        assert running.process.stderr is not None
        with running.process.stderr:
            stderr = running.process.stderr.read()
        running.process.wait(COMMAND_TIMEOUT)
        deadline = time.monotonic() + COMMAND_TIMEOUT
        while session_processes(running.process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []
    assert running.process.returncode != 0
    assert "Traceback" not in stderr
