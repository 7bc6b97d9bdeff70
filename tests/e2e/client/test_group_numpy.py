"""NumPy arrays in a group: every element type, in place, and refused where they have no plain bytes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

import frelay
from support.groups import GROUP_ROUTE, in_threads
from support.site import Site

SIZE: Final = 3
COUNTS: Final = (0, 5, 40_000)
OPERATIONS: Final[dict[str, Any]] = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


def numbers(rank: int, count: int, dtype: str) -> Any:
    mixed = np.random.default_rng(rank * 1000 + count)
    values = mixed.integers(0, 4, count)
    return (values + 1j * values[::-1] if dtype == "c16" else values).astype(dtype)


def same(one: Any, other: Any) -> bool:
    # Not by bytes: of products of complex numbers the sign of a zero depends on the order.
    return bool(one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other))


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "i4", "i8", "u2", "c16", ">i4", ">f8", "?"])
async def test_each_reduction(site: Site, dtype: str) -> None:
    """Small whole numbers, whose sums and products are exact in any order."""
    operations = [op for op in OPERATIONS if dtype not in ("c16", "?") or op in ("sum", "prod")]

    def body(group: frelay.Group) -> None:
        for count in COUNTS:
            given = [numbers(rank, count, dtype) for rank in range(SIZE)]
            for name in operations:
                ufunc = OPERATIONS[name]
                upto = [ufunc(ufunc(given[0], given[1]), given[2]), given[0], ufunc(given[0], given[1])]
                whole = upto[0].astype(dtype)
                for op in (name, lambda a, b, ufunc=ufunc: ufunc(a, b)):
                    buf = given[group.rank].copy()
                    group.allreduce(buf, op=op)
                    assert same(buf, whole), (name, count, buf, whole)
                    buf = given[group.rank].copy()
                    group.reduce(buf, op=op, root=1)
                    assert same(buf, whole if group.rank == 1 else given[group.rank]), (name, count)
                    buf = given[group.rank].copy()
                    group.scan(buf, op=op)
                    assert same(buf, upto[(group.rank + 1) % SIZE].astype(dtype)), (name, count)

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, SIZE, body) == [None] * SIZE


async def test_arrays_of_several_dimensions_and_of_dates(site: Site) -> None:
    """They travel as their bytes, and what comes into an array keeps its shape."""

    def body(group: frelay.Group) -> None:
        matrix = np.arange(12.0).reshape(3, 4) if group.rank == 0 else np.zeros((3, 4))
        group.bcast(matrix)
        assert same(matrix, np.arange(12.0).reshape(3, 4))
        days = np.array(["2026-01-01"], "datetime64[D]") + np.timedelta64(group.rank, "D")
        found = [np.frombuffer(part, "datetime64[D]")[0] for part in group.allgather(days)]
        assert found == [np.datetime64("2026-01-01") + np.timedelta64(rank, "D") for rank in range(SIZE)]
        parts = group.alltoall([np.full((2, 2), 10 * group.rank + to, "i8") for to in range(SIZE)])
        assert [np.frombuffer(part, "i8")[3] for part in parts] == [10 * rank + group.rank for rank in range(SIZE)]
        above, below = (group.rank + 1) % SIZE, (group.rank - 1) % SIZE
        into = np.zeros(4, "f4")
        group.sendrecv(np.full(4, group.rank, "f4"), above, below, into)
        assert same(into, np.full(4, below, "f4"))

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, SIZE, body) == [None] * SIZE


async def test_what_has_no_plain_bytes_is_refused_and_breaks_nothing(site: Site) -> None:
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    cases: list[tuple[Any, type[Exception], str]] = [
        (np.zeros((4, 4))[:, 1], ValueError, r"buf: the array is not contiguous in C order; give numpy.ascontiguous"),
        (np.zeros(8)[::2], ValueError, "buf: the array is not contiguous"),
        (np.array([object()]), TypeError, "buf: an array of Python objects has no bytes to send"),
        (frozen, ValueError, "buf: the buffer is read-only"),
    ]

    def body(group: frelay.Group) -> None:
        for buf, error, text in cases:
            with pytest.raises(error, match=text):
                group.allreduce(buf)
            with pytest.raises(error, match=text):
                group.bcast(buf, root=1 - min(group.rank, 1))
        group.barrier()

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 2, body) == [None] * 2
