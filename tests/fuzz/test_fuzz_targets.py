"""The fuzz targets as tests: with their committed corpus, with inputs close to it, and with noise.

What coverage-guided fuzzing needs is minutes, and atheris; see ``campaign.py``. Here the same functions are called, so
that they cannot rot, and so that an input that once found a bug is looked at by every run of the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_frames
import fuzz_route_file
import fuzz_selectors
import fuzz_ticket_line
from campaign import corpus

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "frames": fuzz_frames.one_input,
    "route_file": fuzz_route_file.one_input,
    "selectors": fuzz_selectors.one_input,
    "ticket_line": fuzz_ticket_line.one_input,
}
HERE: Final = Path(__file__).parent

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def near(draw: st.DrawFn, target: str) -> bytes:
    """An input of the corpus with a few octets changed, lost, added or repeated; or two inputs joined."""
    files = st.sampled_from([path.read_bytes() for path in corpus(target)])
    data = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["flip", "drop", "insert", "repeat", "join"]))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 9))
        elif kind == "join":
            data[at:] = draw(files)
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus(target: str) -> None:
    """TESTPLAN 21, and 3, 5 and 40 for names and files."""
    files = corpus(target)
    assert files
    for path in files:
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_near_the_corpus(target: str) -> None:
    @unhurried
    @given(near(target))
    def check(data: bytes) -> None:
        TARGETS[target](data)

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_noise(target: str) -> None:
    @unhurried
    @given(st.integers(0, 255), st.binary(max_size=300))
    def check(first: int, rest: bytes) -> None:
        TARGETS[target](bytes([first]) + rest)

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_opens_with_what_it_holds(target: str) -> None:
    """All existing targets are tested here."""
    assert (HERE / f"fuzz_{target}.py").read_text(encoding="utf-8").startswith('"""Any ')
    assert {path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py")} == TARGETS.keys()


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install -e '.[fuzz]'")
def test_the_runner_runs(tmp_path: Path) -> None:
    """A campaign of no runs: it instruments, reads the corpus, and prints that it is done."""
    command = [sys.executable, str(HERE / "fuzz_ticket_line.py"), "-runs=50", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, str(HERE / "corpus" / "ticket_line")], capture_output=True, text=True, check=True)
    assert "Done 50 runs" in done.stderr
