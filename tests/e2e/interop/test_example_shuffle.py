"""examples/shuffle as a person runs it: N processes, each with a certificate of its own, one route and one group."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from support.waiting import TIMEOUT

ROOT: Final = Path(__file__).parents[3]
START: Final = ROOT / "examples" / "shuffle" / "start.py"
TEXTS: Final = [ROOT / "README.md", ROOT / "docs" / "protocol.md"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, START, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * TIMEOUT,
        cwd=ROOT,
    )


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_words_are_counted_once(workers: int) -> None:
    words = Counter(re.findall(r"[^\W\d_]+", "\n".join(path.read_text() for path in TEXTS).lower()))
    done = run("--workers", str(workers), *TEXTS)
    assert done.returncode == 0, done.stderr
    total, *most = done.stdout.splitlines()
    assert total == f"{words.total()} words, {len(words)} different"
    assert [(line.split()[1], int(line.split()[0])) for line in most] == sorted(
        words.items(), key=lambda item: (-item[1], item[0])
    )[:10]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "0", "README.md"), "'0' is not a number of workers"),
        (("nowhere.txt",), "there is no file 'nowhere.txt'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_one_worker_that_fails_ends_the_job_for_all(tmp_path: Path) -> None:
    """Rank 1 divides by zero; both others say so."""
    text = tmp_path / "text"
    text.write_text("a b c\n")
    for name in ("start.py", "wordcount.py"):
        source = START.with_name(name).read_text()
        (tmp_path / name).write_text(
            source.replace("count_words(lines[rank::size])", "count_words(lines[: 7 // (rank - 1)])")
        )
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py", "--workers", "3", text],
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * TIMEOUT,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert done.stderr.count("GroupBroken: rank 1 has left the group: ZeroDivisionError") == 2
    assert done.stdout == ""
