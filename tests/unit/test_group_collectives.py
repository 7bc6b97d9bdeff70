"""Each collective against a plain reference, for all sizes of groups, without wires (support.all_ranks)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from functools import reduce as fold
from typing import Any, Final

import pytest

from frelay.client.group import collectives
from frelay.client.group.bundles import SMALL_PART
from frelay.client.group.collectives import Step
from frelay.client.group.reduction import Reduction
from support.all_ranks import run_ranks

SIZES: Final = (*range(1, 10), 16, 19)
# Elements of 8 bytes: none, one, odd numbers, and more than the large ways begin with.
COUNTS: Final = (0, 1, 3, 1001, collectives.HALVING_FROM // 8 + 7)
PART_LENGTHS: Final = (0, 1, 1000, SMALL_PART, SMALL_PART + 1, 70_001)


def numbers(rank: int, count: int) -> array[int]:
    """Whole numbers of 64 bits that differ by rank; all their sums fit."""
    mixed = random.Random(rank * 1_000_003 + count)
    return array("q", (mixed.randrange(-(10**6), 10**6) for _ in range(count)))


def part(source: int, to: int, lengths: tuple[int, ...] = PART_LENGTHS) -> bytes:
    """What one rank has for another; the lengths differ by both."""
    length = lengths[(source * 3 + to) % len(lengths)]
    return random.Random(source * 1009 + to).randbytes(length)


def roots(size: int) -> list[int]:
    return sorted({0, size // 2, size - 1})


@pytest.mark.parametrize("size", SIZES)
def test_barrier_lets_nobody_through_before_the_last_has_come(size: int) -> None:
    arrived: list[int] = []

    def rank(number: int) -> Any:
        arrived.append(number)
        yield from collectives.barrier(number, size)
        return len(arrived)

    assert run_ranks(size, rank) == [size] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0, 1, 4097, collectives.CHAIN_FROM - 1, collectives.CHAIN_FROM + 12345])
def test_bcast(size: int, length: int) -> None:
    for root in roots(size):
        sent = random.Random(length).randbytes(length)
        buffers = [bytearray(sent) if rank == root else bytearray(length) for rank in range(size)]
        run_ranks(size, lambda rank: collectives.bcast(rank, size, memoryview(buffers[rank]), root))  # noqa: B023
        assert all(buffer == sent for buffer in buffers)


OPERATIONS: Final[dict[str, Callable[[int, int], int]]] = {
    "sum": lambda a, b: a + b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_reduce_allreduce_and_scan(size: int, count: int) -> None:
    given = [numbers(rank, count) for rank in range(size)]
    for name, function in OPERATIONS.items() if count < 1000 else [("sum", OPERATIONS["sum"])]:
        expected = array("q", (fold(function, column) for column in zip(*given, strict=True)))
        for root in roots(size):
            buffers = [array("q", one) for one in given]
            run_ranks(size, lambda rank: collectives.reduce(rank, size, Reduction(buffers[rank], name), root))  # noqa: B023
            assert buffers[root] == expected, name
            assert all(buffers[rank] == given[rank] for rank in range(size) if rank != root)
        buffers = [array("q", one) for one in given]
        run_ranks(size, lambda rank: collectives.allreduce(rank, size, Reduction(buffers[rank], name)))  # noqa: B023
        assert all(buffer == expected for buffer in buffers), name
        buffers = [array("q", one) for one in given]
        run_ranks(size, lambda rank: collectives.scan(rank, size, Reduction(buffers[rank], name)))  # noqa: B023
        for rank in range(size):
            prefix = array("q", (fold(function, column) for column in zip(*given[: rank + 1], strict=True)))
            assert buffers[rank] == prefix, (name, rank)


def compose(lower: int, higher: int) -> int:
    """Two maps x -> a * x + b modulo 251, packed as a * 256 + b, one after the other: it does not commute."""
    (a, b), (c, d) = divmod(lower, 256), divmod(higher, 256)
    return (a * c % 251) * 256 + (b * c + d) % 251


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 5, collectives.HALVING_FROM // 8 + 3])
def test_an_operation_that_does_not_commute_is_folded_in_rank_order(size: int, count: int) -> None:
    if count > 5 and size > 5:
        size = min(size, 7)
    mixed = random.Random(size)
    given = [
        array("q", (mixed.randrange(1, 251) * 256 + mixed.randrange(251) for _ in range(count))) for _ in range(size)
    ]
    expected = array("q", (fold(compose, column) for column in zip(*given, strict=True)))
    buffers = [array("q", one) for one in given]
    run_ranks(size, lambda rank: collectives.allreduce(rank, size, Reduction(buffers[rank], compose)))
    assert all(buffer == expected for buffer in buffers)
    buffers = [array("q", one) for one in given]
    run_ranks(size, lambda rank: collectives.reduce(rank, size, Reduction(buffers[rank], compose), size // 2))
    assert buffers[size // 2] == expected
    buffers = [array("q", one) for one in given]
    run_ranks(size, lambda rank: collectives.scan(rank, size, Reduction(buffers[rank], compose)))
    assert buffers[-1] == expected
    assert buffers[0] == given[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [7, collectives.HALVING_FROM // 8 + 5])
def test_all_ranks_get_the_same_bits_of_floats_that_round(size: int, count: int) -> None:
    mixed = random.Random(size)
    buffers = [
        array("d", (mixed.uniform(-1, 1) * 10.0 ** mixed.randrange(-9, 9) for _ in range(count))) for _ in range(size)
    ]
    run_ranks(size, lambda rank: collectives.allreduce(rank, size, Reduction(buffers[rank], "sum")))
    assert len({buffer.tobytes() for buffer in buffers}) == 1


@pytest.mark.parametrize("size", SIZES)
def test_gather_scatter_allgather_and_alltoall_of_parts_that_differ_in_size(size: int) -> None:
    for root in roots(size):
        given = [part(rank, root) for rank in range(size)]
        found = run_ranks(size, lambda rank: collectives.gather(rank, size, memoryview(given[rank]), root))  # noqa: B023
        assert found[root] == given
        assert all(found[rank] is None for rank in range(size) if rank != root)
        views = [memoryview(one) for one in given]
        found = run_ranks(
            size,
            lambda rank: collectives.scatter(rank, size, views if rank == root else None, root),  # noqa: B023
        )
        assert found == given
    given = [part(rank, 1) for rank in range(size)]
    found = run_ranks(size, lambda rank: collectives.allgather(rank, size, memoryview(given[rank])))
    assert found == [given] * size
    found = run_ranks(
        size, lambda rank: collectives.alltoall(rank, size, [memoryview(part(rank, to)) for to in range(size)])
    )
    assert found == [[part(source, rank) for source in range(size)] for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0, SMALL_PART, 5 * SMALL_PART])
def test_parts_that_are_all_empty_small_or_large(size: int, length: int) -> None:
    given = [part(rank, 0, (length,)) for rank in range(size)]
    assert run_ranks(size, lambda rank: collectives.allgather(rank, size, memoryview(given[rank]))) == [given] * size
    assert run_ranks(size, lambda rank: collectives.gather(rank, size, memoryview(given[rank]), 0))[0] == given


def test_results_are_the_callers_own() -> None:
    """No result shares memory with an argument, or with another rank's result."""
    given = [bytearray(b"abc"), bytearray(b"de")]
    found = run_ranks(2, lambda rank: collectives.allgather(rank, 2, memoryview(given[rank])))
    found[0][0][:] = b"xyz"
    assert given[0] == b"abc"
    assert found[1] == [b"abc", b"de"]


def test_a_circle_is_noticed() -> None:
    """The test of the test."""

    def rank(number: int) -> Any:
        yield Step(receives=((1 - number, None),))

    with pytest.raises(AssertionError, match="still send to and receive from"):
        run_ranks(2, rank)
