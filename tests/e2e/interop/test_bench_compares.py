"""``bench/compare.py --quick`` runs: it measures, judges, saves, draws, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(ROOT / "bench" / "compare.py"), "--no-install", "--quick"]

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and "CI" not in os.environ, reason="the load generator must be compiled"
)


def test_a_quick_comparison_measures_and_judges(tmp_path: Path) -> None:
    saved = tmp_path / "all.json"
    command = [*COMMAND, "--cases", "plain,admission", "--subjects", "direct,frelay"]
    done = subprocess.run(
        [*command, "--json", str(saved), "--svg", str(tmp_path / "pictures")],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(saved.read_text())
    assert record["notes"] == []
    found = {(one["case"], one["subject"]) for one in record["results"] if one["rounds"] and one["rounds"][0]}
    cases = {"bulk", "ping-pong 64 B", "ping-pong 1 KiB", "mixed", "beside bulk", "admission", "first byte"}
    assert {case for case, subject in found if subject == "frelay"} == cases
    assert "The claims" in done.stdout
    assert (tmp_path / "pictures" / "bench-bulk-cpu.svg").is_file()

    again = subprocess.run([*COMMAND, "--from", str(saved)], capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
def test_a_network_of_its_own_has_the_congestion_control_asked_for(tmp_path: Path) -> None:
    """Every kernel has reno, and no machine has it as its default."""
    saved = tmp_path / "all.json"
    command = [*COMMAND, "--cases", "admission", "--subjects", "frelay", "--congestion-control", "reno"]
    done = subprocess.run([*command, "--json", str(saved)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(saved.read_text())["machine"]["congestion_control"] == "reno"
    assert "TCP sends by reno." in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
def test_a_congestion_control_that_is_not_here_is_named() -> None:
    done = subprocess.run([*COMMAND, "--congestion-control", "vegas2"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert "this kernel has no congestion control vegas2; it has " in done.stderr


def test_interrupted_it_ends_what_it_started(tmp_path: Path) -> None:
    command = [*COMMAND, "--cases", "plain", "--subjects", "frelay", "--seconds", "60"]
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        while not list(tmp_path.glob("frelay-bench-*/subject-*/relay.toml")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []
