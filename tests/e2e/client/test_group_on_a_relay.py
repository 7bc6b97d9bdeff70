"""A blocking group on a real relay, all ranks as threads: every method, sizes of messages, and how it ends well."""

from __future__ import annotations

import random
from array import array
from functools import reduce as fold
from typing import Any

import pytest

import frelay
from support.descriptors import open_descriptors, opened_since
from support.groups import GROUP_ROUTE, in_threads
from support.site import Site
from support.waiting import eventually

MIB = 1024 * 1024


def block(length: int, *seed: int) -> bytes:
    return random.Random(repr((length, seed))).randbytes(length)


def everything(group: frelay.Group) -> None:
    """Each method once; raises AssertionError if a result is wrong."""
    rank, size = group.rank, group.size
    group.barrier()
    for length in (0, 5, 70_000, 2 * MIB + 1):
        buffer = bytearray(block(length)) if rank == size - 1 else bytearray(length)
        group.bcast(buffer, root=size - 1)
        assert buffer == block(length)
    assert group.scatter([block(100 * one) for one in range(size)] if rank == 0 else None) == block(100 * rank)
    gathered = group.gather(block(30_000 * rank, rank), root=size // 2)
    assert gathered == ([block(30_000 * one, one) for one in range(size)] if rank == size // 2 else None)
    assert group.allgather(block(7 + rank, rank)) == [block(7 + one, one) for one in range(size)]
    found = group.alltoall([block(50_000 * to + rank) for to in range(size)])
    assert found == [block(50_000 * rank + one) for one in range(size)]
    for count in (0, 3, 40_001):
        given = [array("q", range(one, one + count)) for one in range(size)]
        total = array("q", (sum(column) for column in zip(*given, strict=True)))
        buf = array("q", given[rank])
        group.allreduce(buf)
        assert buf == total
        buf = array("q", given[rank])
        group.reduce(buf, op=max)
        assert buf == (given[-1] if rank == 0 else given[rank])
        buf = array("q", given[rank])
        group.scan(buf, op="min")
        assert buf == given[0]
    if size > 1:
        above, below = (rank + 1) % size, (rank - 1) % size
        assert bytes(group.sendrecv(block(3 * MIB, rank), above, below)) == block(3 * MIB, below)
        # Both send first: what comes is kept meanwhile.
        group.send(block(2 * MIB, rank), above)
        into = bytearray(4 * MIB)
        assert bytes(group.recv(below, into)) == block(2 * MIB, below)
        assert into[: 2 * MIB] == block(2 * MIB, below)


@pytest.mark.parametrize(("size", "options"), [(1, {}), (2, {}), (3, {}), (5, {"at_once": 1}), (6, {"eager": False})])
async def test_every_method(site: Site, size: int, options: dict[str, Any]) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, size, everything, **options) == [None] * size
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        # A group that ends in good order leaves no cut behind.
        outcomes = [event["outcome"] for event in relay.logged("pairing ended")]
        assert set(outcomes) <= {"closed"}
        if options.get("eager") is None:
            assert len(outcomes) == size * (size - 1) // 2


@pytest.mark.parametrize("mode", ["ticket", "tunnel"])
async def test_other_modes(site: Site, mode: str) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 3, everything, mode=mode) == [None] * 3


async def test_an_operation_that_does_not_commute(site: Site) -> None:
    def compose(lower: int, higher: int) -> int:
        (a, b), (c, d) = divmod(lower, 256), divmod(higher, 256)
        return (a * c % 251) * 256 + (b * c + d) % 251

    def body(group: frelay.Group) -> int:
        buf = array("q", [(group.rank + 2) * 256 + group.rank])
        group.allreduce(buf, op=compose)
        return buf[0]

    async with site.relay(GROUP_ROUTE) as relay:
        expected = fold(compose, [(rank + 2) * 256 + rank for rank in range(5)])
        assert await in_threads(site, relay, 5, body) == [expected] * 5


@pytest.mark.load
async def test_no_descriptor_is_left(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        await in_threads(site, relay, 3, lambda group: group.barrier(), name="first")
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        before = open_descriptors()
        await in_threads(site, relay, 4, lambda group: group.barrier(), name="second")
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        pipes = relay.relay.parts.forwarding.pipes
        await eventually(lambda: not opened_since(before, pipes=pipes), "the end of all descriptors")
