"""The groups of the Trio and the asyncio client: every method, all three clients in one group, and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import frelay
from frelay.errors import GroupBroken, LocalProtocolError
from support.descriptors import open_descriptors, opened_since
from support.group_calls import everything, everything_blocking
from support.groups import GROUP_ROUTE, arguments
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually


async def in_tasks(
    site: Site, relay: RelayInProcess, size: int, body: Callable[[frelay.client.trio.TrioGroup], Any], **more: Any
) -> list[Any]:
    """Run ``body`` at each rank of a group, in a Trio task each; returns their results or errors."""
    results: list[Any] = [None] * size

    async def run(rank: int) -> None:
        address, given = arguments(site, relay, rank, size, **more)
        try:
            async with await frelay.client.trio.group(address, **given) as group:
                results[rank] = await body(group)
        except Exception as error:
            results[rank] = error

    async with trio.open_nursery() as nursery:
        for rank in range(size):
            nursery.start_soon(run, rank)
    return results


async def test_every_method_in_trio(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_tasks(site, relay, 4, everything) == [None] * 4
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        assert {event["outcome"] for event in relay.logged("pairing ended")} == {"closed"}


async def test_all_three_clients_in_one_group(site: Site) -> None:
    done = []

    async with site.relay(GROUP_ROUTE) as relay:
        given = [arguments(site, relay, rank, 3) for rank in range(3)]

        def blocking() -> None:
            with frelay.group(given[0][0], **given[0][1]) as group:
                everything_blocking(group)
            done.append("blocking")

        async def of_asyncio() -> None:
            async with await frelay.client.asyncio.group(given[1][0], **given[1][1]) as group:
                await everything(group)
            done.append("asyncio")

        async def of_trio() -> None:
            async with await frelay.client.trio.group(given[2][0], **given[2][1]) as group:
                await everything(group)
            done.append("trio")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, blocking)
            nursery.start_soon(trio.to_thread.run_sync, lambda: asyncio.run(of_asyncio()))
            nursery.start_soon(of_trio)
    assert sorted(done) == ["asyncio", "blocking", "trio"]


@pytest.mark.load
async def test_a_cancelled_call_breaks_the_group_and_leaves_nothing(site: Site) -> None:
    async def body(group: frelay.client.trio.TrioGroup) -> None:
        await group.barrier()
        if group.rank == 1:
            with trio.move_on_after(0.05):
                await group.recv(0)
            with pytest.raises(GroupBroken, match=r"rank 1 has left the group: trio\.Cancelled"):
                await group.barrier()
            raise ValueError("over")
        await group.recv(1)

    async with site.relay(GROUP_ROUTE) as relay:
        await in_tasks(site, relay, 3, lambda group: group.barrier(), name="first")
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        before = open_descriptors()
        results = await in_tasks(site, relay, 3, body)
        assert isinstance(results[1], ValueError)
        for rank in (0, 2):
            assert isinstance(results[rank], GroupBroken), results
            assert results[rank].rank == 1
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        pipes = relay.relay.parts.forwarding.pipes
        await eventually(lambda: not opened_since(before, pipes=pipes), "the end of all descriptors")


@pytest.mark.load
async def test_a_cancelled_set_up_tells_the_relay(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        address, given = arguments(site, relay, 1, 3)
        before = open_descriptors()
        with trio.move_on_after(TIMEOUT) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(frelay.client.trio.group, address, **given))
                await eventually(lambda: relay.waiting() == (1, 1), "both joins wait")
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
        await eventually(lambda: relay.waiting() == (0, 0), "the end of both")
        await eventually(lambda: not opened_since(before), "the end of all descriptors")


async def test_one_call_at_a_time(site: Site) -> None:
    async def body(group: frelay.client.trio.TrioGroup) -> None:
        await group.barrier()
        if group.rank == 0:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group.recv, 1)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(LocalProtocolError, match="one call at a time"):
                    await group.barrier()
                is_tried.set()
        else:
            await is_tried.wait()
            await group.send(b"x", 0)

    is_tried = trio.Event()
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_tasks(site, relay, 2, body) == [None, None]


async def test_cancelled_in_asyncio(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        given = [arguments(site, relay, rank, 2) for rank in range(2)]
        errors: list[Any] = []

        async def of_asyncio() -> None:
            async with await frelay.client.asyncio.group(given[1][0], **given[1][1]) as group:
                await group.barrier()
                try:
                    async with asyncio.timeout(0.05):
                        await group.recv(0)
                except TimeoutError as error:
                    errors.append(error)

        async def of_trio() -> None:
            async with await frelay.client.trio.group(given[0][0], **given[0][1]) as group:
                await group.barrier()
                with pytest.raises(GroupBroken, match=r"rank 1 has left the group: .*Cancelled") as caught:
                    await group.recv(1)
                assert caught.value.rank == 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: asyncio.run(of_asyncio()))
            nursery.start_soon(of_trio)
        assert len(errors) == 1
