"""bench/model.py: from known costs, what a machine carries and which resource runs out first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.comparison.record import AboutMachine, Key, Record, Sizes
from bench.measuring.load import BenchError
from bench.model import Costs, Machine, Work, carried, costs_of, main, needed, predict

COSTS = Costs(
    join_us=2000, message_us=10, gigabyte_ms=250, rest_us=1, pairing_kib=12, waiting_kib=60, relay_mib=64
)  # fmt: skip


def a_record() -> Record:
    machine: AboutMachine = {
        "cpu": "a CPU",
        "cpus": 2,
        "memory_gib": 4.0,
        "kernel": "6.1",
        "python": "3.11",
        "generator_tls": "",
        "congestion_control": "cubic",
    }
    record = Record("2026-01-01 12:00 UTC", machine, 1.0, 1, Sizes())
    for case, amount, figures in (
        ("admission", 1, {"cpu_us_per_leg": 1000.0}),
        ("ping-pong 64 B", 256, {"cpu_us_per_message": 10.0}),
        ("bulk", 128, {"cpu_ms_per_gb": 250.0}),
        ("at rest", 0, {"subject_cores": 0.01, "mib": 64.0}),
        ("at rest", 5000, {"subject_cores": 0.015, "mib": 128.0}),
        ("memory, paired", 1000, {"kib_each": 12.0}),
        ("memory, waiting", 1000, {"kib_each": 60.0}),
    ):
        record.results[Key(case, amount, "frelay")] = [figures]
    return record


def test_the_costs_are_those_of_the_record() -> None:
    costs = costs_of(a_record())
    assert costs.rest_us == pytest.approx(1.0)
    assert costs == Costs(2000, 10, 250, costs.rest_us, 12, 60, 64)


def test_a_record_without_one_of_them_is_refused() -> None:
    record = a_record()
    del record.results[Key("bulk", 128, "frelay")]
    with pytest.raises(BenchError, match="cpu_ms_per_gb"):
        costs_of(record)


def test_what_is_needed_is_a_sum() -> None:
    found = needed(COSTS, Work(pairings=1000, joins=100, messages=10_000, gbit=8, waiting=10))
    assert found["cores"] == pytest.approx(0.001 + 0.2 + 0.1 + 0.25)
    assert found["memory"] == pytest.approx((1000 * 20 + 10 * 64) / 2**20)
    assert found["descriptors"] == 4000 + 20


@pytest.mark.parametrize(
    ("machine", "work", "first"),
    [
        (Machine(2, 64), Work(0, 1, 0, 0), "cores"),
        (Machine(64, 16), Work(1, 0, 0, 0), "memory"),
        (Machine(2, 64, descriptors=1024), Work(1, 0, 0, 0), "descriptors"),
    ],
)
def test_each_limit_can_be_the_first(machine: Machine, work: Work, first: str) -> None:
    times, what = carried(COSTS, machine, work)
    assert what == first
    assert times > 0


def test_joins_of_one_core_at_seven_tenths() -> None:
    assert carried(COSTS, Machine(1, 64), Work(0, 1, 0, 0))[0] == pytest.approx(350)


def test_the_generator_takes_its_share_of_the_cores() -> None:
    # First the relay's core is full; with a second worker, the machine is.
    assert predict(2, 1, 10e-6, 5e-6) == pytest.approx(100_000)
    assert predict(2, 2, 10e-6, 5e-6) == pytest.approx(2 / 15e-6)


def test_the_page_is_computed_from_a_saved_record(tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("bench.measuring.script.raise_on_signals", lambda: None)
    saved = tmp_path / "all.json"
    saved.write_text(json.dumps(a_record().as_json()))
    assert main([str(saved), "--cores", "8", "--memory", "16"]) == 0
    shown = capsys.readouterr().out
    assert "**8 cores, 16 GiB**" in shown
    assert "| joins a second (pairings set up) | 2,800 | cores |" in shown


@pytest.mark.parametrize("flags", [[], ["--check"]], ids=["", "before it measures anything"])
@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "does not exist"),
        (b"\xff", "is no record of a comparison: Invalid JSON"),
        (b'{"date": "2026-', "is no record of a comparison: Invalid JSON"),
        (b"[]", "is no record of a comparison: Input should be an object"),
        (json.dumps({**a_record().as_json(), "machine": {"cpus": 2}}).encode(), "it lacks 'machine.cpu'"),
        (json.dumps({**a_record().as_json(), "results": []}).encode(), "the record has no subject_cores of frelay"),
    ],
    ids=["no file", "no text", "cut short", "other JSON", "no machine", "no figures"],
)
def test_a_file_that_is_no_good_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, flags: list[str], content: bytes | None, wrong: str) -> None:  # fmt: skip
    monkeypatch.setattr("bench.measuring.script.raise_on_signals", lambda: None)
    given = tmp_path / "all.json"
    if content is not None:
        given.write_bytes(content)
    assert main([str(given), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"model.py: {given}")
    assert wrong in shown.err
    assert "run bench/compare.py --json FILE" in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_check_needs_figures_of_the_generator_and_says_so_first(tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("bench.measuring.script.raise_on_signals", lambda: None)
    monkeypatch.setattr("bench.model.CompiledGenerator", lambda directory: pytest.fail("it began to measure"))
    saved = tmp_path / "all.json"
    saved.write_text(json.dumps(a_record().as_json()))
    assert main([str(saved), "--check"]) == 2
    assert f"{saved}: the record has no round_trips_per_second of frelay" in capsys.readouterr().err
