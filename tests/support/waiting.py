"""How a test waits for an event, and not for time to pass; and how it copes with a machine that stalls."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import trio

__all__ = ["TIMEOUT", "before_it_expires", "despite_stalls", "eventually"]

T = TypeVar("T")

TIMEOUT: Final = 20.0
"""Seconds after which a wait for an event has failed; on an idle machine each takes milliseconds."""


async def eventually(condition: Callable[[], bool], what: str = "the condition", timeout: float = TIMEOUT) -> None:
    """Wait until ``condition`` holds; fails after ``timeout`` seconds."""
    deadline = trio.current_time() + timeout
    while not condition():
        assert trio.current_time() < deadline, f"{what} did not come true within {timeout} s"
        await trio.sleep(0.005)


async def before_it_expires(make: Callable[[float], datetime], use: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """Make something that ends soon, such as a certificate, and use it before its end. If that was slow, try again.

    ``make`` gets the life in seconds, longer each time, and returns the end. Certificates have whole seconds, so the
    end may be a second earlier. ``use`` may be called several times. Returns the result of ``use``, and the end as
    Unix time.
    """
    for seconds in (2, 4, 8, 16, 32):
        ends = make(seconds).timestamp()
        try:
            found = await use()
        except Exception:
            if time.time() < ends:
                raise
        else:
            if time.time() < ends:
                return found, ends
    raise AssertionError("half a minute is not enough to use it")


def waited_for_a_processor() -> float:
    """How long the main thread was ready to run and did not run, in seconds (proc_pid_schedstat)."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


async def despite_stalls(test: Callable[[float], Awaitable[None]], limit: float) -> None:
    """Run a test in which a time limit of ``limit`` seconds must not strike; with a longer limit if the machine stalls.

    Relay and parties share this process, so a pause of the process looks like silence. A failed test is tried again
    with four times the limit, but only if the process stood still for a third of the limit, or waited so long for a
    processor in many small pauses.
    """
    for attempt in range(3):
        longest, began = 0.0, waited_for_a_processor()

        async def watch() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await trio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await test(limit)
                nursery.cancel_scope.cancel()
        except Exception:
            starved = waited_for_a_processor() - began
            if max(longest, starved) < limit / 3 or attempt == 2:
                raise
        else:
            return
        limit *= 4
