"""One piece of work at a time, shared by all who wait for its result and dropped when nobody does.

A scrape of a large relay takes a second of the interpreter, and anybody who reaches the port may ask for one. So all
who ask while one is made wait together for the next, and get one result. The one that is being made is not theirs: it
began before they asked, and would tell them of a moment before. After work for several there is a pause as long as the
work was, so that at most half of the time goes here.
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
    """Those who wait for one result, and what they want of it."""

    def __init__(self) -> None:
        self.results: dict[K, T] = {}
        self.done: Final = trio.Event()
        self.scope: Final = trio.CancelScope()
        self.is_shared = False
        """Whether several have waited for it."""
        self._waiting: Final[dict[K, int]] = {}

    @property
    def wanted(self) -> tuple[K, ...]:
        """What somebody waits for; empty if nobody waits. May be asked in another thread."""
        return tuple(self._waiting)

    def join(self, kind: K) -> None:
        """One more waits for ``kind``."""
        self.is_shared = bool(self._waiting)
        self._waiting[kind] = self._waiting.get(kind, 0) + 1

    def leave(self, kind: K) -> None:
        """One of them waits no more."""
        self._waiting[kind] -= 1
        if not self._waiting[kind]:
            del self._waiting[kind]


class Shared(Generic[K, T]):
    """Work that gives a result for each kind that is wanted. Give :meth:`run` a task.

    ``work`` gets the batch that it works for and fills its ``results``; it is cancelled when nobody waits any more. If
    it leaves out a kind, or raises an exception, all who wait for that get :class:`RuntimeError`.
    """

    def __init__(self, work: Callable[[Batch[K, T]], Awaitable[None]]) -> None:
        self._work: Final = work
        self._next: Batch[K, T] | None = None
        self._asked = trio.Event()

    async def get(self, kind: K) -> T:
        """A result for which the work began after this call."""
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
            self._next = None  # a caller who comes now begins another one
        else:
            batch.scope.cancel(reason="nobody waits for this any more")

    async def run(self) -> None:
        """Do the work whenever it is asked for, until cancelled. An exception of the work ends it."""
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
