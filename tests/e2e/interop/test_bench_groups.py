"""``bench/groups.py --quick`` runs: it measures, judges, saves and draws; and it judges right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.collectives.claims import judge
from bench.collectives.record import GroupRecord, as_text
from bench.comparison.record import about_machine
from support.tools import skip_or_fail, tool

ROOT: Final = Path(__file__).resolve().parents[3]
COMMAND: Final = [sys.executable, str(ROOT / "bench" / "groups.py")]
MIB: Final = 1 << 20


def test_a_quick_run_measures_and_judges(tmp_path: Path) -> None:
    """It installs NumPy and a Redis client from PyPI into an environment of its own."""
    tool("redis-server")
    saved = tmp_path / "groups.json"
    command = [*COMMAND, "--quick", "--ranks", "2,4", "--subjects", "frelay,redis"]
    done = subprocess.run(
        [*command, "--json", str(saved), "--svg", str(tmp_path / "pictures")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "could not be installed" in done.stderr:
        skip_or_fail(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(saved.read_text())["figures"]
    assert set(found["2 ping-pong 64"]) == {"frelay", "redis", "wire"}
    for case in ("barrier 0", "bcast 8", "allreduce 65536", "alltoall 65536", "set-up 0", "cpu 0"):
        assert all(found[f"4 {case}"][subject][0] > 0 for subject in ("frelay", "redis")), case
    assert "ping-pong of 64 B: at most 1.2 x a bare wire" in done.stdout
    assert (tmp_path / "pictures" / "bench-groups.svg").is_file()

    again = subprocess.run([*COMMAND, "--from", str(saved)], capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout == done.stdout


def test_ratios_are_taken_round_by_round_and_slow_cases_are_named() -> None:
    record = GroupRecord("today", about_machine(), 3, {})
    for figure in (1.0, 3.0, 2.0):
        record.add(2, "ping-pong 64", "frelay", figure)
        record.add(2, "ping-pong 64", "wire", figure)
        record.add(2, "ping-pong 64", "redis", 2 * figure)
        record.add(4, f"bcast {8 * MIB}", "frelay", 1.1 * figure)
        record.add(4, f"bcast {8 * MIB}", "redis", figure)
        record.add(16, "set-up 0", "frelay", 1000 * figure)
    said = [line for line in judge(record) if line]
    assert said == [
        "holds   ping-pong of 64 B: at most 1.2 x a bare wire: 1.00",
        "MISSED  ping-pong of 64 B: at most 0.4 x Redis: 0.50",
        "MISSED  bcast of 8 MiB, 4 ranks: at most 0.6 x Redis: 1.10",
        "holds   set-up and first barrier of 16 ranks: at most 3 s: 2.00 s",
        "slower than Redis: bcast 8388608, 4 ranks: 1.10 x",
    ]
    assert "2.00 (1.00-3.00)" in as_text(record)
    assert GroupRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text('{"figures": 3}')
    done = subprocess.run([*COMMAND, "--from", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{path}: this is no result of bench/groups.py" in done.stderr
