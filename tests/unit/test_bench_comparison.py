"""bench/compare.py without its long runs: how it judges, what it shows, and what it saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from bench.compare import main
from bench.comparison import strelay
from bench.comparison.bars import write_pictures
from bench.comparison.claims import Claim, Verdict, claims, judge
from bench.comparison.pages import with_section
from bench.comparison.record import QUICK, AboutMachine, Key, Record, Sizes, Spread, read_record
from bench.comparison.tables import as_markdown, as_summary, as_text
from bench.measuring.cpu import read_cpu, read_memory
from bench.measuring.flags import output_directory, output_file
from bench.measuring.load import BenchError

ROOT = Path(__file__).parents[2]

MACHINE: AboutMachine = {
    "cpu": "a CPU",
    "cpus": 2,
    "memory_gib": 4.0,
    "kernel": "6.1",
    "python": "3.11",
    "generator_tls": "OpenSSL",
    "congestion_control": "cubic",
}


def a_record(**results: list[dict[str, float]]) -> Record:
    record = Record("2026-01-01 12:00 UTC", MACHINE.copy(), 1.0, 3, Sizes())
    record.names = {"direct": "no relay", "frelay": "frelay, handed off", "haproxy": "HAProxy"}
    record.results = {Key("bulk", 16, subject): list(rounds) for subject, rounds in results.items()}
    return record


def rounds(*values: float | None, figure: str = "cpu_ms_per_gb") -> list[dict[str, float]]:
    return [{} if value is None else {figure: value} for value in values]


def verdict_on(record: Record, goal: str) -> Verdict:
    return next(one for one in judge(record) if one.claim.goal == goal)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine became three times slower during the run; neither relay did.
    record = a_record(frelay=rounds(100, 200, 300), haproxy=rounds(400, 800, 1200))
    found = record.ratio(Key("bulk", 16, "frelay"), Key("bulk", 16, "haproxy"), "cpu_ms_per_gb")
    assert found == Spread(0.25, 0.25, 0.25, 3)


def test_a_round_that_failed_counts_for_nobody() -> None:
    record = a_record(frelay=rounds(100, None, 300), haproxy=rounds(400, 400, 400))
    found = record.ratio(Key("bulk", 16, "frelay"), Key("bulk", 16, "haproxy"), "cpu_ms_per_gb")
    assert found == Spread(0.5, 0.25, 0.75, 2)


@pytest.mark.parametrize(("ours", "is_met"), [(299, True), (300, True), (301, False)])
def test_a_claim_is_met_by_the_median(ours: float, is_met: bool) -> None:
    record = a_record(frelay=rounds(1, ours, 5000), haproxy=rounds(1000, 1000, 1000))
    assert verdict_on(record, "Bulk, 16 pairs: CPU per GB to HAProxy's").is_met is is_met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    verdict = verdict_on(a_record(frelay=rounds(1, 1, 1)), "Bulk, 16 pairs: CPU per GB to HAProxy's")
    assert verdict.found is None
    assert verdict.is_met is None


def test_at_least_is_the_other_way_round() -> None:
    claim = Claim("", "", Key("", 0, ""), None, "at least", 1.8)
    assert Verdict(claim, Spread(1.9, 1, 2, 3)).is_met is True
    assert Verdict(claim, Spread(1.7, 1, 2, 3)).is_met is False


def test_every_claim_has_a_goal_of_its_own() -> None:
    for sizes in (Sizes(), QUICK):
        goals = [claim.goal for claim in claims(sizes)]
        assert len(set(goals)) == len(goals)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = a_record(frelay=rounds(1, None, 3))
    record.missing["haproxy"] = "not there"
    (tmp_path / "all.json").write_text(json.dumps(record.as_json()))
    assert read_record(tmp_path / "all.json") == record


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{}]}', '{"results": [], "sizes": {"other": 1}}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(BenchError, match="is no record"):
        read_record(tmp_path / "all.json")


def test_the_table_tells_spread_versions_and_who_is_missing() -> None:
    record = a_record(frelay=rounds(100, 200, 300), direct=rounds(20, 20, 20, figure="gbit_per_second"))
    record.versions["frelay"] = "frelay 9"
    record.missing["haproxy"] = "haproxy is not installed"
    text = as_text(record)
    for expected in ("200 (100..300)", "frelay 9", "Missing: HAProxy: haproxy is not installed", "not measured"):
        assert expected in text


def test_the_readme_gets_its_section_and_keeps_the_rest(tmp_path: Path) -> None:
    record = a_record(frelay=rounds(100, 200, 300), haproxy=rounds(1000, 1000, 1000))
    pictures = write_pictures(record, tmp_path)
    assert [path.name for path in pictures] == ["bench-bulk-cpu.svg"]
    assert "HAProxy" in (tmp_path / "bench-bulk-cpu.svg").read_text(encoding="utf-8")
    section = as_markdown(record, {f"docs/{path.name}": shown for path, shown in pictures.items()})
    readme = "before\n<!-- compare.py: begin -->\nold\n<!-- compare.py: end -->\nafter\n"
    updated = with_section(readme, "compare.py", section)
    assert updated.startswith("before\n")
    assert updated.endswith("\nafter\n")
    assert "old" not in updated
    assert "| frelay, handed off | - | 200 |" in updated
    assert "![CPU time per GB relayed in bulk: frelay beside HAProxy](docs/bench-bulk-cpu.svg)" in updated
    assert with_section(updated, "compare.py", section) == updated


def test_the_readme_gets_one_table_of_six_lines() -> None:
    record = a_record(frelay=rounds(100, 200, 300), haproxy=rounds(1000, 1000, 1000))
    record.results[Key("admission", 1, "haproxy")] = [*rounds(5, 5, 5, figure="cpu_us_per_leg")]
    record.results[Key("admission", 1, "haproxy-mtls")] = [*rounds(7, 7, 7, figure="cpu_us_per_leg")]
    head, _, *lines = as_summary(record, "![bulk](docs/bench-bulk-cpu.svg)").splitlines()
    assert head == "|  | no relay | frelay | HAProxy | nginx stream |"
    assert sum(line.startswith("|") for line in lines) == 6
    assert "| Bulk, 16 pairs: CPU ms per GB | - | 200 | 1,000 | - |" in lines
    # Admission needs TLS, so the figure beside frelay's is that of HAProxy with mutual TLS.
    assert "| Letting one function in by mutual TLS: CPU µs | - | - | 7 | - |" in lines
    assert "![bulk](docs/bench-bulk-cpu.svg)" in lines


def test_the_pages_show_what_the_saved_run_holds(tmp_path: Path) -> None:
    """Otherwise: ``python bench/compare.py --from docs/bench.json --update-readme``."""
    docs = ROOT / "docs"
    record = read_record(docs / "bench.json")
    pictures = write_pictures(record, tmp_path)
    for picture in pictures:
        assert picture.read_text("utf-8") == (docs / picture.name).read_text("utf-8"), picture.name
    page = (docs / "benchmarks.md").read_text("utf-8")
    section = as_markdown(record, {path.name: text for path, text in pictures.items()})
    assert with_section(page, "compare.py", section) == page
    readme = (ROOT / "README.md").read_text("utf-8")
    bulk = next(text for path, text in pictures.items() if path.name == "bench-bulk-cpu.svg")
    assert with_section(readme, "compare.py", as_summary(record, f"![{bulk}](docs/bench-bulk-cpu.svg)")) == readme


@pytest.mark.parametrize(
    ("names", "compared"),
    [
        (("frelay", "frelay, tunnelled"), "frelay"),
        (("HAProxy", "nginx stream"), "HAProxy and nginx stream"),
        (("no relay", "frelay", "frelay, tunnelled", "HAProxy", "HAProxy, splice", "socat"),
         "frelay beside no relay, HAProxy and others"),
    ],
)  # fmt: skip
def test_a_picture_says_in_a_sentence_who_is_in_it(tmp_path: Path, names: tuple[str, ...], compared: str) -> None:
    record = a_record()
    record.names = {name.lower(): name for name in names}
    for key in record.names:
        record.results[Key("bulk", 1, key)] = record.results[Key("bulk", 16, key)] = [*rounds(1, 2, 3)]
    assert list(write_pictures(record, tmp_path).values()) == [f"CPU time per GB relayed in bulk: {compared}"]


@pytest.mark.parametrize(
    "text", ["", "<!-- compare.py: end --><!-- compare.py: begin -->", "<!-- compare.py: begin -->"]
)
def test_a_readme_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(BenchError):
        with_section(text, "compare.py", "section")


def test_wrong_flags_and_files_have_their_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measuring.script.raise_on_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["--cases", "nonsense"])
    assert ended.value.code == 2
    assert main(["--from", str(tmp_path / "missing.json")]) == 2


@pytest.mark.parametrize(
    ("flag", "path", "remedy"),
    [
        ("--json", "", "give a file in it"),
        ("--json", "missing/all.json", "'{}/missing' is no directory; make it first"),
        ("--json", "file/all.json", "'{}/file' is no directory; make it first"),
        ("--svg", "file", "'{}/file' is a file"),
        ("--svg", "file/pictures", "'{}/file' is a file"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, flag: str, path: str, remedy: str) -> None:  # fmt: skip
    monkeypatch.setattr("bench.compare.measure", lambda options: pytest.fail("it began to measure"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([flag, str(tmp_path / path)])
    assert ended.value.code == 2
    assert remedy.format(tmp_path) in capsys.readouterr().err


def test_what_may_not_be_written_is_said_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, and root may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for kind, path in ((output_file, "all.json"), (output_directory, "new/pictures")):
        with pytest.raises(ArgumentTypeError, match=f"'{tmp_path}' may not be written"):
            kind(str(tmp_path / path))


def test_where_something_can_be_written_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("all.json").touch()
    assert [str(output_file(text)) for text in ("all.json", "new.json", "/dev/null")] == [
        "all.json", "new.json", "/dev/null"
    ]  # fmt: skip
    assert [str(output_directory(text)) for text in (".", "new", "new/deep")] == [".", "new", "new/deep"]
    assert sorted(os.listdir()) == ["all.json"]


def test_the_kernel_is_asked_for_a_process_and_its_children() -> None:
    assert read_cpu([os.getpid()]).subject > 0
    assert read_memory(os.getpid()) > 1024 * 1024
    gone = 2**22 + 1
    assert (read_cpu([gone]).subject, read_memory(gone)) == (0, 0)


def test_a_child_that_ends_while_it_is_looked_at_fails_no_reading() -> None:
    """As of socat, with a process for each connection: in one reading of a hundred, one ended in the middle."""
    spawns = "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n os.fork() or os._exit(0)"
    with subprocess.Popen([sys.executable, "-c", spawns]) as process:
        try:
            for _ in range(400):
                read_cpu([process.pid])
        finally:
            process.kill()


# --- strelaysrv's frames ------------------------------------------------------------------------------------------


def test_a_frame_is_header_and_payload_in_xdr() -> None:
    assert strelay.frame(strelay.JOIN_SESSION, strelay.opaque(b"abcde")) == bytes.fromhex(
        "9e79bc40 00000003 0000000c 00000005 6162636465 000000"
    )


@pytest.mark.parametrize("portion", [1, 5, 1000])
def test_frames_come_out_as_they_went_in_and_nothing_behind_them_is_read(portion: int) -> None:
    stream = strelay.frame(strelay.PING) + strelay.frame(strelay.RESPONSE, b"\0\0\0\0\0\0\0\0") + b"raw bytes"
    frames = strelay.Frames()
    found: list[tuple[int, bytes]] = []
    while len(found) < 2:
        count = min(portion, frames.missing)
        if (one := frames.receive(stream[:count])) is not None:
            found.append(one)
        stream = stream[count:]
    assert found == [(strelay.PING, b""), (strelay.RESPONSE, bytes(8))]
    assert stream == b"raw bytes"


def test_response_and_invitation_are_understood() -> None:
    assert strelay.response_of(b"\0\0\0\2" + strelay.opaque(b"already connected")) == (2, "already connected")
    payload = strelay.opaque(b"i" * 32) + strelay.opaque(b"the key") + strelay.opaque(b"") + bytes(8)
    assert strelay.session_key_of(payload) == b"the key"


@pytest.mark.parametrize("data", [b"HTTP/1.1 400", bytes.fromhex("9e79bc40 00000004 00100000")])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a frame"):
        strelay.Frames().receive(data)


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\0", b"\0\0\0\0\0\0\0\x09short"])
def test_a_payload_cut_short_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"a (response|payload|field)"):
        strelay.response_of(payload)
