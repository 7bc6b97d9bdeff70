"""How a test waits: for an event, never for time to pass; and what it does on a machine that stalls."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, TypeVar

import trio

__all__ = ["TIMEOUT", "at_any_pace", "eventually", "while_it_lasts"]

T = TypeVar("T")

TIMEOUT: Final = 20.0
"""Seconds after which a wait for an event is a failure; on an idle machine all of them take milliseconds."""


async def eventually(condition: Callable[[], bool], what: str = "the condition", timeout: float = TIMEOUT) -> None:
    """Wait until ``condition`` holds, looking often; a failure after ``timeout`` seconds."""
    deadline = trio.current_time() + timeout
    while not condition():
        assert trio.current_time() < deadline, f"{what} did not come true within {timeout} s"
        await trio.sleep(0.005)


async def while_it_lasts(make: Callable[[float], datetime], use: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """Use what soon ends, a certificate say, and have done before it does; on a slow machine one that lasts longer.

    ``make`` is given its life in seconds, and gives the end of it, as certificates write it: in whole seconds, so up to
    one earlier. ``use`` may be called several times. Gives what that gave, and the end as a Unix time.
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


async def at_any_pace(test: Callable[[float], Awaitable[None]], limit: float) -> None:
    """Run a test of what a time limit of ``limit`` seconds must not end; with a longer one where this machine stalls.

    Relay and parties share this process, so a pause of it looks like silence to a limit. What failed is tried again,
    with four times the limit, if and only if the process was seen to stand still for a third of the limit.
    """
    for attempt in range(3):
        longest = 0.0

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
            if longest < limit / 3 or attempt == 2:
                raise
        else:
            return
        limit *= 4
