"""Does one piece of work for all callers that wait for its result, and cancels it when no caller waits any more.

A scrape of a large relay takes a second of processor time, and everyone who can reach the port may ask for one. So all
callers that arrive during a scrape wait for the next one and share its result. They do not get the result of the
running one, because it began before they asked and may be out of date. After work for several callers there is a pause
as long as the work took, so that it takes at most half of the time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import trio

__all__ = ["Batch", "Shared"]

K = TypeVar("K")
T = TypeVar("T")

_LONGEST_PAUSE: Final = 1.0


class Batch(Generic[K, T]):
    """The callers that wait for the same piece of work, and the kinds of results that they want."""

    def __init__(self) -> None:
        self.results: dict[K, T] = {}
        self.done: Final = trio.Event()
        self.scope: Final = trio.CancelScope()
        self.is_shared = False
        """Whether several callers have waited for it."""
        self._waiting: Final[dict[K, int]] = {}

    @property
    def wanted(self) -> tuple[K, ...]:
        """The kinds that callers wait for; empty if no caller waits. Another thread may read it."""
        return tuple(self._waiting)

    def join(self, kind: K) -> None:
        """One more caller waits for ``kind``."""
        self.is_shared = bool(self._waiting)
        self._waiting[kind] = self._waiting.get(kind, 0) + 1

    def leave(self, kind: K) -> None:
        """One caller of ``kind`` waits no more."""
        self._waiting[kind] -= 1
        if not self._waiting[kind]:
            del self._waiting[kind]


class Shared(Generic[K, T]):
    """Work that makes a result for each wanted kind. Run :meth:`run` in a task.

    ``work`` gets a batch and fills its ``results``. It is cancelled when no caller waits any more. If it leaves out a
    kind or raises an exception, all callers that wait for it get :class:`RuntimeError`.
    """

    def __init__(self, work: Callable[[Batch[K, T]], Awaitable[None]]) -> None:
        self._work: Final = work
        self._next: Batch[K, T] | None = None
        self._asked = trio.Event()

    async def get(self, kind: K) -> T:
        """The result of work that begins after this call."""
        batch = self._next
        if batch is None:
            batch = self._next = Batch()
        batch.join(kind)
        self._asked.set()
        try:
            await batch.done.wait()
        finally:
            batch.leave(kind)
            if not batch.wanted:
                self._drop(batch)
        if kind not in batch.results:
            raise RuntimeError("the work that this waited for has failed")
        return batch.results[kind]

    def _drop(self, batch: Batch[K, T]) -> None:
        if batch is self._next:
            self._next = None  # The next caller begins a new batch.
        else:
            batch.scope.cancel(reason="nobody waits for this any more")

    async def run(self) -> None:
        """Work whenever a caller asks, until cancelled. An exception of ``work`` ends this method."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            batch, self._next = self._next, None
            if batch is None or not batch.wanted:
                continue
            began = trio.current_time()
            try:
                with batch.scope:
                    await self._work(batch)
            finally:
                batch.done.set()
            if batch.is_shared or self._asked.is_set():
                await trio.sleep(min(trio.current_time() - began, _LONGEST_PAUSE))
