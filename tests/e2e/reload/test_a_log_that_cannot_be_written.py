"""A log that cannot be written costs lines, and nothing else: pairings form, bytes flow, and the end is in order."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from support.commands import relay_logging_to
from support.party import TLS_HEADER, pair
from support.site import Site
from support.waiting import TIMEOUT

BYTES: Final = TLS_HEADER + bytes(100_000)


async def meet(site: Site, port: int) -> None:
    """Make a whole pairing with its hand-off, which gives some lines of the log."""
    one, two = await site.party(port, "func1"), await site.party(port, "func2")
    await pair(one, two)
    await one.hand_off()
    await two.hand_off()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_raw, BYTES)
        with trio.fail_after(TIMEOUT):
            assert await two.receive_exactly(len(BYTES)) == BYTES
    one.close()
    two.close()


async def check_that_it_serves_and_ends(site: Site, process: trio.Process, port: int, meetings: int = 3) -> None:
    for _ in range(meetings):
        await meet(site, port)
    process.send_signal(signal.SIGHUP)
    await meet(site, port)
    process.send_signal(signal.SIGTERM)
    with trio.fail_after(TIMEOUT):
        assert await process.wait() == 0


@pytest.mark.parametrize("format_", ["console", "json"])
async def test_on_a_full_disk(site: Site, format_: str) -> None:
    """TESTPLAN 51."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with relay_logging_to(site, full, "--log-format", format_) as (process, port):
            await check_that_it_serves_and_ends(site, process, port)
    finally:
        os.close(full)


async def test_with_a_reader_that_has_gone(site: Site) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        async with relay_logging_to(site, writing, "--log-format", "json") as (process, port):
            await check_that_it_serves_and_ends(site, process, port)
    finally:
        os.close(writing)


@pytest.mark.parametrize("shell", ["2>&-", "<&- >&- 2>&-"], ids=["stderr", "all three"])
async def test_with_the_standard_streams_closed(site: Site, shell: str) -> None:
    """TESTPLAN 51. Their numbers then go to other files; nothing may be written there as if it were a log."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        async with relay_logging_to(site, null, shell=shell) as (process, port):
            await check_that_it_serves_and_ends(site, process, port)
    finally:
        os.close(null)


@pytest.mark.load
async def test_with_a_reader_that_never_reads(site: Site) -> None:
    """The hardest case: a write to a full pipe does not fail, it waits. The relay must not wait with it."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(4096))
    try:
        async with relay_logging_to(site, writing, "--log-format", "json") as (process, port):
            began = time.monotonic()
            await check_that_it_serves_and_ends(site, process, port, meetings=10)
            assert time.monotonic() - began < TIMEOUT / 2
    finally:
        os.close(reading)
        os.close(writing)


async def test_with_a_reader_that_comes_late_no_line_is_lost(site: Site) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * 4095 + b"\n")
    try:
        async with relay_logging_to(site, writing, "--log-format", "json") as (process, port):
            for _ in range(10):
                await meet(site, port)
            process.send_signal(signal.SIGTERM)
            events = await trio.to_thread.run_sync(_read_events, reading)
            with trio.fail_after(TIMEOUT):
                assert await process.wait() == 0
        names = [event["event"] for event in events]
        assert names[0] == "listening"
        assert names.count("handed off") == names.count("pairing ended") == 10
        assert "log lines dropped" not in names
        times = [event["timestamp"] for event in events]
        assert times == sorted(times)
    finally:
        os.close(reading)
        os.close(writing)


def _read_events(descriptor: int) -> list[dict[str, Any]]:
    """The events of a log, up to the one that always comes last."""
    text = b""
    while b'"event": "stopped"' not in text or not text.endswith(b"\n"):
        text += os.read(descriptor, 65536)
    return [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]


async def test_what_was_lost_is_counted_afterwards(site: Site, tmp_path: Path) -> None:
    """A later reader of the log must not take a gap for silence."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(fifo, os.O_WRONLY)
    try:
        async with relay_logging_to(site, writing, "--log-format", "json") as (process, port):
            # The relay can be dialled before its first line is written: a thread writes it.
            with trio.fail_after(TIMEOUT):
                await trio.lowlevel.wait_readable(first)
            os.close(first)
            for _ in range(3):
                await meet(site, port)
            second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(second, True)
            process.send_signal(signal.SIGTERM)
            events = await trio.to_thread.run_sync(_read_events, second)
            os.close(second)
            with trio.fail_after(TIMEOUT):
                assert await process.wait() == 0
        names = [event["event"] for event in events]
        place = names.index("log lines dropped")
        assert "listening" in names[:place], "what was written before is still in the pipe"
        assert "stopped" in names[place:]
        assert events[place]["count"] >= 2
    finally:
        os.close(writing)
