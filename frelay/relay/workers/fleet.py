"""The fleet: the slots of all workers, what each of them serves, and how all of them are asked at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Final

import trio

from frelay.admin.control import Counts
from frelay.config.model import Route
from frelay.config.plan import ListenerKey, listener_keys
from frelay.errors import ConfigError
from frelay.relay.workers.process import WorkerLost, WorkerProcess

__all__ = ["Fleet", "WorkerSlot", "for_each"]

# A person or a scraper waits for the answer. A worker that hangs makes them wait for so long and no longer, in seconds.
_POLL_TIMEOUT: Final = 5.0


class WorkerSlot:
    """The slot of one worker: one process after another fills it."""

    def __init__(self, number: int) -> None:
        self.number: Final = number
        self.restarts = 0
        self.process: WorkerProcess | None = None
        """The process that serves; None while there is none, or it is still starting."""
        self._last_counts: Counts | None = None

    @property
    def counts(self) -> Counts | None:
        """The last counts that a worker of this slot has sent. After its end the gauges are 0, and the totals stay."""
        if self.process is not None and self.process.counts is not None:
            return self.process.counts
        return self._last_counts

    def vacate(self, process: WorkerProcess) -> None:
        """``process`` has ended, or never served. Set its waiting legs and its pairings to 0, and keep its totals."""
        counts = process.counts
        if counts is not None:
            nobody, nothing = dict.fromkeys(counts.waiting, 0), dict.fromkeys(counts.pairings, 0)
            keys = dict.fromkeys(counts.keys, 0)
            self._last_counts = replace(counts, waiting=nobody, keys=keys, pairings=nothing, tasks=0, loop_lag=0.0)
        self.process = None


class Fleet:
    """The slots of ``count`` workers."""

    def __init__(self, count: int) -> None:
        self.slots: Final = tuple(WorkerSlot(number) for number in range(1, count + 1))
        self.placed: dict[ListenerKey, int] = {}
        """The number of the worker that has each address in force."""

    def slot_of(self, route: Route) -> WorkerSlot:
        """The slot of the worker that serves ``route``, which must be in force."""
        return self.slots[self.placed[listener_keys(route)[0]] - 1]

    @property
    def serving(self) -> list[tuple[WorkerSlot, WorkerProcess]]:
        """The workers that serve now."""
        return [(slot, slot.process) for slot in self.slots if slot.process is not None]

    @property
    def pairing_count(self) -> int:
        """How many pairings run in all workers, by their last counts."""
        return sum(sum(slot.counts.pairings.values()) for slot in self.slots if slot.counts is not None)

    async def poll(self, view: str, slot: WorkerSlot | None = None) -> dict[int, Any]:
        """Ask all workers for a view, or the one in ``slot``; gives the answers of those that answer, by number."""
        answers: dict[int, Any] = {}

        async def ask(slot: WorkerSlot, worker: WorkerProcess) -> None:
            try:
                answers[slot.number] = await worker.ask("poll", timeout=_POLL_TIMEOUT, view=view)
            except (WorkerLost, ConfigError):
                pass  # it is down, or has logged why; its answer is missing, and the caller copes with that

        await for_each([(one, worker) for one, worker in self.serving if slot is None or one is slot], ask)
        return answers


async def for_each(
    workers: Iterable[tuple[WorkerSlot, WorkerProcess]], do: Callable[[WorkerSlot, WorkerProcess], Awaitable[None]]
) -> None:
    """Do it for all of ``workers`` at a time; returns when it is done for all of them."""
    async with trio.open_nursery() as nursery:
        for slot, worker in workers:
            nursery.start_soon(do, slot, worker)
