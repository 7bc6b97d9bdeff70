"""Work is done once for all callers that wait for it, and dropped when all of them have gone."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from frelay.admin.sharing import Batch, Shared


class Work:
    """Takes one second, and its result is the number of the run."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0

    async def __call__(self, batch: Batch[str, int]) -> None:
        self.begun += 1
        number = self.begun
        await trio.sleep(1)
        self.ended += 1
        for kind in batch.wanted:
            batch.results[kind] = number


async def test_all_who_wait_share_the_next(autojump_clock: trio.testing.MockClock) -> None:
    """Not the running one, which began before they asked."""
    work = Work()
    shared = Shared(work)
    got: list[int] = []

    async def ask(kind: str) -> None:
        got.append(await shared.get(kind))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        async with trio.open_nursery() as askers:
            askers.start_soon(ask, "text")
            await trio.sleep(0.5)
            for kind in ("text", "text", "openmetrics", "text"):
                askers.start_soon(ask, kind)
        nursery.cancel_scope.cancel()
    assert got == [1, 2, 2, 2, 2]
    assert work.begun == 2


async def test_it_is_dropped_with_the_last_who_waits(autojump_clock: trio.testing.MockClock) -> None:
    work = Work()
    shared = Shared(work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        async with trio.open_nursery() as askers:
            for patience in (0.2, 0.4):

                async def ask(patience: float = patience) -> None:
                    with trio.move_on_after(patience):
                        await shared.get("text")

                askers.start_soon(ask)
        await trio.sleep(10)
        assert (work.begun, work.ended) == (1, 0)
        assert await shared.get("text") == 2
        nursery.cancel_scope.cancel()


async def test_who_has_gone_before_its_turn_costs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    work = Work()
    shared = Shared(work)

    async def ask(patience: float) -> None:
        with trio.move_on_after(patience):
            await shared.get("text")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        nursery.start_soon(ask, 5)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as askers:
            for _ in range(1000):
                askers.start_soon(ask, 0.1)
        await trio.sleep(10)
        assert work.begun == 1
        nursery.cancel_scope.cancel()


async def test_who_comes_after_all_have_gone_is_served(autojump_clock: trio.testing.MockClock) -> None:
    """Even if others have come and gone in the pause before."""
    work = Work()
    shared = Shared(work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        nursery.start_soon(shared.get, "text")
        await trio.sleep(0.5)
        with trio.move_on_after(0.2):
            await shared.get("text")
        assert await shared.get("text") == 2
        nursery.cancel_scope.cancel()


async def test_at_most_half_of_the_time_goes_into_it(autojump_clock: trio.testing.MockClock) -> None:
    work = Work()
    shared = Shared(work)

    async def ask_on_and_on() -> None:
        while True:
            await shared.get("text")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        for offset in range(4):
            nursery.start_soon(ask_on_and_on)
            await trio.sleep(0.1 * offset)
        await trio.sleep(20)
        assert work.begun <= 12
        nursery.cancel_scope.cancel()


async def test_a_failure_is_told_to_who_waits() -> None:
    async def fail(batch: Batch[str, int]) -> None:
        return

    shared = Shared(fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        with pytest.raises(RuntimeError, match="failed"):
            await shared.get("text")
        nursery.cancel_scope.cancel()
