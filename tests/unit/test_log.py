"""The log: what a line looks like, and that writing one neither waits, nor fails, nor hides what is missing."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import structlog

from frelay.relay.logging import LineWriter, LogFormat, configure

# A line end, a cursor movement, a bell, DEL, a C1 control, a bidi override, a line separator, half a surrogate pair.
HOSTILE: Final = "a\nb\r\x1b[2J\x07\x7f\x9b31m\u202egnp\u2028\ud800z"


@contextmanager
def pipe(capacity: int = 4096) -> Iterator[tuple[int, int]]:
    """A pipe with room for ``capacity`` bytes (a page is the least) as (read end, write end)."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, capacity)
    try:
        yield reading, writing
    finally:
        for descriptor in (reading, writing):
            try:
                os.close(descriptor)
            except OSError:
                pass  # the test has closed it


def missing(count: int) -> str:
    return f"({count} missing)\n"


def read_all(descriptor: int) -> list[str]:
    """The lines of a pipe to its end."""
    with os.fdopen(os.dup(descriptor)) as file:
        return file.read().splitlines()


def fill(writing: int) -> int:
    """Fill a pipe to its last byte; gives how many went in."""
    os.set_blocking(writing, False)
    size = 0
    try:
        while True:
            size += os.write(writing, b"x")
    except BlockingIOError:
        os.set_blocking(writing, True)
    return size


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_lines_are_written_in_order_and_all_of_them_by_the_end() -> None:
    with pipe(1 << 20) as (reading, writing):
        writer = LineWriter(writing, missing)
        for number in range(2000):
            writer.write(f"{number}\n")
        writer.close()
        os.close(writing)
        assert read_all(reading) == [str(number) for number in range(2000)]


@pytest.mark.load
def test_a_full_pipe_costs_no_time_and_what_is_missing_is_told_in_its_place() -> None:
    with pipe() as (reading, writing):
        stuffing = fill(writing)
        writer = LineWriter(writing, missing, longest_queue=10)
        writer.write("the one that is stuck\n")
        wait_until(lambda: not writer._queue)
        began = time.monotonic()
        for number in range(1000):
            writer.write(f"{number}\n")
        assert time.monotonic() - began < 20  # a write to the full pipe would never return
        assert os.read(reading, stuffing) == b"x" * stuffing
        wait_until(lambda: not writer._queue)
        writer.write("after\n")
        writer.close()
        os.close(writing)
        kept = [str(number) for number in range(10)]
        assert read_all(reading) == ["the one that is stuck", *kept, "(990 missing)", "after"]


def test_what_is_missing_is_told_without_waiting_for_another_line() -> None:
    with pipe() as (reading, writing):
        stuffing = fill(writing)
        writer = LineWriter(writing, missing, longest_queue=1)
        for number in range(5):
            writer.write(f"{number}\n")
        os.read(reading, stuffing)
        text = b""
        while b"missing" not in text:
            text += os.read(reading, 4096)
        writer.close()


@pytest.mark.load
def test_an_end_does_not_wait_for_a_reader_that_never_comes() -> None:
    with pipe() as (_, writing):
        fill(writing)
        writer = LineWriter(writing, missing)
        writer.write("stuck\n")
        began = time.monotonic()
        writer.close(timeout=0.1)
        assert 0.1 <= time.monotonic() - began < 20  # without the timeout it would wait for ever


@pytest.mark.load
def test_a_write_that_fails_is_counted_until_one_succeeds(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(fifo, os.O_WRONLY)
    writer = LineWriter(writing, missing)
    writer.write("heard\n")
    wait_until(lambda: not writer._queue)
    assert os.read(first, 4096) == b"heard\n"
    os.close(first)  # from here on EPIPE
    for number in range(3):
        writer.write(f"{number}\n")
    wait_until(lambda: not writer._queue)
    time.sleep(0.05)  # the last one is no longer queued, but may still be about to fail
    second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer.write("heard again\n")
    writer.close()
    os.close(writing)
    os.set_blocking(second, True)
    assert read_all(second) == ["(3 missing)", "heard again"]
    os.close(second)


@pytest.mark.load
def test_a_line_that_was_cut_short_does_not_swallow_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that becomes full in the middle of a line, and has room again later."""
    written = b""
    room = 6

    def write(descriptor: int, data: bytes) -> int:
        nonlocal written, room
        if room == 0:
            raise OSError(28, "No space left on device")
        now = bytes(data[:room])
        written, room = written + now, room - len(now)
        return len(now)

    monkeypatch.setattr(os, "write", write)
    writer = LineWriter(-1, missing)
    writer.write("one\n")
    writer.write("two\n")
    writer.write("three\n")
    wait_until(lambda: not writer._queue)
    time.sleep(0.05)
    room = 1000
    writer.write("four\n")
    writer.close()
    assert written.decode().splitlines() == ["one", "tw", "(2 missing)", "four"]


def test_a_descriptor_that_does_not_block_loses_nothing() -> None:
    """A terminal or a pipe has one such flag for all processes that share it."""
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        writer = LineWriter(writing, missing)
        lines = [f"{number:0100}" for number in range(1000)]
        for line in lines:
            writer.write(f"{line}\n")
        text = b""
        while len(text) < 101 * 1000:
            text += os.read(reading, 4096)
        writer.close()
        assert text.decode().splitlines() == lines


# --- lines ------------------------------------------------------------------------------------------------------------


def logged(tmp_path: Path, format_: LogFormat, log: Callable[[Any], None]) -> str:
    """What ``log`` writes with a logger."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    before = structlog.get_config()
    try:
        writer = configure(format_, "debug", descriptor)
        log(structlog.get_logger("test"))
        writer.close()
    finally:
        structlog.configure(**before)
        os.close(descriptor)
    return path.read_bytes().decode("utf-8")


@pytest.mark.parametrize("format_", ["console", "json"])
def test_nothing_in_a_value_can_forge_a_line_or_move_a_cursor(tmp_path: Path, format_: LogFormat) -> None:
    def log(logger: Any) -> None:
        logger.info(HOSTILE, value=HOSTILE, several=[HOSTILE], bound=(HOSTILE,), more={HOSTILE: HOSTILE})
        logger.bind(certificate=HOSTILE).warning("refused", reason=HOSTILE)

    text = logged(tmp_path, format_, log)
    assert text.count("\n") == 2
    assert all(char == "\n" or char.isprintable() for char in text)
    assert text.isascii()


def test_json_keeps_what_was_said(tmp_path: Path) -> None:
    """Escaping changes nothing: a JSON reader gets the same text."""
    text = logged(tmp_path, "json", lambda logger: logger.info("refused", reason=HOSTILE))
    assert json.loads(text)["reason"] == HOSTILE


def test_a_traceback_cannot_pass_for_another_event(tmp_path: Path) -> None:
    def log(logger: Any) -> None:
        try:
            raise ValueError(f"{HOSTILE}\n2026-11-24T20:00:00Z [info     ] forged")
        except ValueError:
            logger.exception("a bug in frelay ended this connection")

    first, *others = logged(tmp_path, "console", log).splitlines()
    assert first.rstrip().endswith("a bug in frelay ended this connection")
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") and line.isprintable() for line in others)


@pytest.mark.parametrize("format_", ["console", "json"])
def test_the_note_of_what_is_missing_is_a_line_like_any_other(tmp_path: Path, format_: LogFormat) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    before = structlog.get_config()
    writer = configure(format_, "info", descriptor)
    structlog.configure(**before)
    text = writer._note(7)
    writer.close()
    os.close(descriptor)
    if format_ == "json":
        event = json.loads(text)
        del event["timestamp"]
        assert event == {"event": "log lines dropped", "count": 7, "level": "warning"}
    else:
        assert "[warning  ] log lines dropped    count=7" in text
    assert text.endswith("\n")
