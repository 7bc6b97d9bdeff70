"""Calls every method of a group, of any of the three clients, and checks the results."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable
from typing import Any, Final

import frelay

__all__ = ["Awaitable", "everything", "everything_blocking"]

MIB: Final = 1024 * 1024


def block(length: int, *seed: int) -> bytes:
    return random.Random(repr((length, seed))).randbytes(length)


def floats_of(rank: int) -> list[float]:
    """What one rank adds: positive, so that only the last bits of a sum depend on its order."""
    mixed = random.Random(rank)
    return [mixed.random() * 10.0**exponent for exponent in range(-8, 9)]


async def everything(group: Any) -> None:
    """Each method once, of a group whose methods are awaited; raises AssertionError if a result is wrong."""
    rank, size = group.rank, group.size
    await group.barrier()
    for length in (0, 5, 70_000, 2 * MIB + 1):
        buffer = bytearray(block(length)) if rank == size - 1 else bytearray(length)
        await group.bcast(buffer, root=size - 1)
        assert buffer == block(length)
    assert await group.scatter([block(100 * one) for one in range(size)] if rank == 0 else None) == block(100 * rank)
    gathered = await group.gather(block(30_000 * rank, rank), root=size // 2)
    assert gathered == ([block(30_000 * one, one) for one in range(size)] if rank == size // 2 else None)
    assert await group.allgather(block(7 + rank, rank)) == [block(7 + one, one) for one in range(size)]
    found = await group.alltoall([block(50_000 * to + rank) for to in range(size)])
    assert found == [block(50_000 * rank + one) for one in range(size)]
    for count in (0, 3, 40_001):
        given = [array("q", range(one, one + count)) for one in range(size)]
        total = array("q", (sum(column) for column in zip(*given, strict=True)))
        buf = array("q", given[rank])
        await group.allreduce(buf)
        assert buf == total
        buf = array("q", given[rank])
        await group.reduce(buf, op=max)
        assert buf == (given[-1] if rank == 0 else given[rank])
        buf = array("q", given[rank])
        await group.scan(buf, op="min")
        assert buf == given[0]
    # Sums of such numbers depend on the order, and yet all ranks get the same bits.
    columns = [floats_of(one) for one in range(size)]
    floats = array("d", columns[rank])
    await group.allreduce(floats)
    assert len(set(map(bytes, await group.allgather(floats)))) == 1
    for found_sum, column in zip(floats, zip(*columns, strict=True), strict=True):
        assert math.isclose(found_sum, math.fsum(column), rel_tol=1e-9)
    if size > 1:
        above, below = (rank + 1) % size, (rank - 1) % size
        assert bytes(await group.sendrecv(block(3 * MIB, rank), above, below)) == block(3 * MIB, below)
        # Both send first: what comes is kept meanwhile.
        await group.send(block(2 * MIB, rank), above)
        into = bytearray(4 * MIB)
        assert bytes(await group.recv(below, into)) == block(2 * MIB, below)
        assert into[: 2 * MIB] == block(2 * MIB, below)


class Awaitable:
    """A blocking group in the clothes of one whose methods are awaited."""

    def __init__(self, group: frelay.Group) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        if not callable(found):
            return found
        method: Callable[..., Any] = found

        async def call(*arguments: Any, **named: Any) -> Any:
            return method(*arguments, **named)

        return call


def everything_blocking(group: frelay.Group) -> None:
    """As :func:`everything`, of a blocking group."""
    try:
        everything(Awaitable(group)).send(None)
    except StopIteration:
        return
    raise AssertionError("a blocking group has nothing to wait for")
