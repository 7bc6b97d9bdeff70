"""The collectives as generators: which rank sends which bytes to which rank, and in which order. Standard library only.

A generator yields a :class:`Step`, a set of messages to send and to receive that may all be under way at once. It is
resumed when all of them are done, with the buffers that were received. It knows neither wires nor time, so one test
runs all ranks in one thread.

The relay carries every byte of a group, so the sum of the bytes decides more than who sends them:

==============  =============================  =========================================
collective      small                          large
==============  =============================  =========================================
barrier         dissemination
bcast           binomial tree                  chain, in pieces of CHAIN_PIECE
reduce          binomial tree                  recursive halving, then gather
allreduce       recursive doubling             recursive halving, then recursive doubling
scan            prefix doubling
allgather       Bruck                          ring
gather          binomial tree                  each rank to the root
scatter         binomial tree                  the root to each rank
alltoall        every pair at once
==============  =============================  =========================================

For bcast, reduce and allreduce all ranks know the size, so all choose the same way. The parts of gather, scatter and
allgather may differ in size, and no rank knows those of the others. So their small way always runs, and takes along the
parts of up to SMALL_PART bytes, and of larger parts the lengths alone. The large way follows for these only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from frelay.client.group.buffers import EMPTY
from frelay.client.group.bundles import Bundle, Part, pack, unpack
from frelay.client.group.reduction import Reduction

__all__ = [
    "CHAIN_FROM",
    "CHAIN_PIECE",
    "HALVING_FROM",
    "Step",
    "Steps",
    "allgather",
    "allreduce",
    "alltoall",
    "barrier",
    "bcast",
    "gather",
    "reduce",
    "scan",
    "scatter",
]

CHAIN_FROM: Final = 1024 * 1024
"""Bytes from which bcast takes the chain."""
CHAIN_PIECE: Final = 262144
HALVING_FROM: Final = 131072
"""Bytes from which reduce and allreduce halve the buffer."""

T = TypeVar("T")
Received = memoryview | bytearray


@dataclass(frozen=True, slots=True)
class Step:
    """Messages that may all be under way at once, at most one to each rank and one from each rank."""

    sends: Sequence[tuple[int, memoryview]] = ()
    """Rank and bytes."""
    receives: Sequence[tuple[int, memoryview | None]] = ()
    """Rank and the buffer that the message must fill; None: a new buffer of its length."""


Steps = Generator[Step, Sequence[Received], T]


# --- barrier, bcast -------------------------------------------------------------------------------------------------


def barrier(rank: int, size: int) -> Steps[None]:
    """Return when every rank has called it."""
    distance = 1
    while distance < size:
        yield Step((((rank + distance) % size, EMPTY),), (((rank - distance) % size, EMPTY),))
        distance *= 2


def bcast(rank: int, size: int, buffer: memoryview, root: int) -> Steps[None]:
    """Bring the root's bytes into the buffers of all."""
    if size == 1:
        return
    if len(buffer) >= CHAIN_FROM:
        yield from _chain(rank, size, buffer, root)
    else:
        yield from _tree_bcast(rank, size, buffer, root)


def _tree_bcast(rank: int, size: int, buffer: memoryview, root: int) -> Steps[None]:
    place = (rank - root) % size
    if place:
        yield Step(receives=(((_parent(place) + root) % size, buffer),))
    for child in _children(place, size):
        yield Step(sends=(((child + root) % size, buffer),))


def _chain(rank: int, size: int, buffer: memoryview, root: int) -> Steps[None]:
    """Each rank passes a piece on while it receives the next one."""
    place = (rank - root) % size
    before, after = (rank - 1) % size, (rank + 1) % size
    pieces = [buffer[at : at + CHAIN_PIECE] for at in range(0, len(buffer), CHAIN_PIECE)]
    if place == 0:
        for piece in pieces:
            yield Step(sends=((after, piece),))
        return
    yield Step(receives=((before, pieces[0]),))
    is_last = place == size - 1
    for number, piece in enumerate(pieces):
        sends = () if is_last else ((after, piece),)
        receives = ((before, pieces[number + 1]),) if number + 1 < len(pieces) else ()
        if sends or receives:
            yield Step(sends, receives)


# A binomial tree over places 0..size-1, rooted at 0. A place and those below it are a run of places, so a subtree is a
# slice. The parent of a place lacks its lowest bit, and the largest subtree comes first.


def _parent(place: int) -> int:
    return place & (place - 1)


def _span(place: int, size: int) -> int:
    """The number of places in the subtree of ``place``, itself included."""
    return min(place & -place, size - place) if place else size


def _children(place: int, size: int) -> list[int]:
    """The children of ``place``, the largest subtree first."""
    found, distance = [], 1
    while distance < _span(place, size):
        found.append(place + distance)
        distance *= 2
    return found[::-1]


# --- reduce, allreduce, scan ----------------------------------------------------------------------------------------


def reduce(rank: int, size: int, reduction: Reduction, root: int) -> Steps[None]:
    """Bring the fold of all buffers into the root's; the others stay as they are."""
    if size == 1:
        return
    buffer = reduction.view
    total = buffer if rank == root else memoryview(bytearray(buffer))
    if len(buffer) < HALVING_FROM:
        yield from _tree_reduce(rank, size, reduction, total, root)
        return
    halving = _Halving(rank, size, reduction, total)
    yield from halving.scatter()
    mine = halving.segment
    owners = [(one, halving.segment_of(one)) for one in halving.owners]
    if rank == root:
        yield Step(receives=[(one, total[part]) for one, part in owners if one != rank and part.start < part.stop])
    elif halving.is_owner and mine.start < mine.stop:
        yield Step(sends=((root, total[mine]),))


def _tree_reduce(rank: int, size: int, reduction: Reduction, total: memoryview, root: int) -> Steps[None]:
    # The tree stands on rank 0, so each subtree is a run of ranks and is folded in rank order.
    incoming = memoryview(bytearray(len(total)))
    for child in reversed(_children(rank, size)):
        yield Step(receives=((child, incoming),))
        reduction.fold(total, incoming, total)
    if rank:
        yield Step(sends=((_parent(rank), total),))
    if root and rank == 0:
        yield Step(sends=((root, total),))
    elif root and rank == root:
        yield Step(receives=((0, total),))


def allreduce(rank: int, size: int, reduction: Reduction) -> Steps[None]:
    """Bring the fold of all buffers into all of them."""
    if size == 1:
        return
    total = reduction.view
    halving = _Halving(rank, size, reduction, total)
    if len(total) < HALVING_FROM:
        yield from halving.double()
    else:
        yield from halving.scatter()
        yield from halving.collect()
    yield from halving.tell_the_rest()


class _Halving:
    """The steps of recursive doubling and halving, over the largest power of two of ranks.

    If there are more ranks, each of the first pairs folds into its second rank, which stands for both (``place``).
    Distances are 1, 2, 4 and so on. So what a place has folded before each step is a run of ranks, its partner's is the
    run beside it, and everything is folded in rank order.
    """

    def __init__(self, rank: int, size: int, reduction: Reduction, total: memoryview) -> None:
        self._rank: Final = rank
        self._reduction: Final = reduction
        self._total: Final = total
        self._places: Final = 1 << (size.bit_length() - 1)
        self._pairs: Final = size - self._places
        self.owners: Final = [self._rank_at(place) for place in range(self._places)]
        """The ranks that stand for the places."""
        self.is_owner: Final = rank >= 2 * self._pairs or rank % 2 == 1
        self._place: Final = rank // 2 if rank < 2 * self._pairs else rank - self._pairs
        self._scratch: Final = memoryview(bytearray(len(total)))

    def _rank_at(self, place: int) -> int:
        return 2 * place + 1 if place < self._pairs else place + self._pairs

    @property
    def segment(self) -> slice:
        """The bytes of the buffer that are folded at this rank after :meth:`scatter`."""
        return self._segment_at(self._place, self._places)

    def segment_of(self, rank: int) -> slice:
        """As :attr:`segment`, of another owner."""
        return self._segment_at(self.owners.index(rank), self._places)

    def _segment_at(self, place: int, distance: int) -> slice:
        """What ``place`` works on before the step of ``distance``: one half for each lower bit of its number."""
        item = self._reduction.item_size
        start, stop = 0, len(self._total) // item
        bit = 1
        while bit < distance:
            middle = (start + stop + 1) // 2
            start, stop = (middle, stop) if place & bit else (start, middle)
            bit *= 2
        return slice(start * item, stop * item)

    def _fold(self, part: slice, partner: int) -> None:
        """Fold what came from ``partner``, a rank, into this part of the buffer."""
        mine, theirs = self._total[part], self._scratch[part]
        if partner < self._rank:
            self._reduction.fold(theirs, mine, mine)
        else:
            self._reduction.fold(mine, theirs, mine)

    def _join_pair(self) -> Steps[None]:
        """The first rank of a pair gives its buffer to the second."""
        if self._rank >= 2 * self._pairs:
            return
        if not self.is_owner:
            yield Step(sends=((self._rank + 1, self._total),))
            return
        yield Step(receives=((self._rank - 1, self._scratch),))
        self._fold(slice(0, len(self._total)), self._rank - 1)

    def double(self) -> Steps[None]:
        """Recursive doubling: at the end each place has the whole result."""
        yield from self._join_pair()
        distance = 1
        while self.is_owner and distance < self._places:
            partner = self._rank_at(self._place ^ distance)
            yield Step(((partner, self._total),), ((partner, self._scratch),))
            self._fold(slice(0, len(self._total)), partner)
            distance *= 2

    def scatter(self) -> Steps[None]:
        """Recursive halving: at the end each place has its segment of the result."""
        yield from self._join_pair()
        distance = 1
        while self.is_owner and distance < self._places:
            other = self._place ^ distance
            partner = self._rank_at(other)
            mine, theirs = self._segment_at(self._place, 2 * distance), self._segment_at(other, 2 * distance)
            yield Step(((partner, self._total[theirs]),), ((partner, self._scratch[mine]),))
            self._fold(mine, partner)
            distance *= 2

    def collect(self) -> Steps[None]:
        """After :meth:`scatter`: at the end each place has the whole result."""
        distance = self._places // 2
        while self.is_owner and distance:
            other = self._place ^ distance
            partner = self._rank_at(other)
            mine, theirs = self._segment_at(self._place, 2 * distance), self._segment_at(other, 2 * distance)
            yield Step(((partner, self._total[mine]),), ((partner, self._total[theirs]),))
            distance //= 2

    def tell_the_rest(self) -> Steps[None]:
        """The second rank of a pair gives the result to the first."""
        if self._rank < 2 * self._pairs:
            if self.is_owner:
                yield Step(sends=((self._rank - 1, self._total),))
            else:
                yield Step(receives=((self._rank + 1, self._total),))


def scan(rank: int, size: int, reduction: Reduction) -> Steps[None]:
    """Bring the fold of the buffers of ranks 0 to ``rank`` into the buffer of ``rank``."""
    total = reduction.view
    incoming = memoryview(bytearray(len(total)))
    distance = 1
    while distance < size:
        above, below = rank + distance, rank - distance
        if above < size or below >= 0:
            yield Step(
                ((above, total),) if above < size else (),
                ((below, incoming),) if below >= 0 else (),
            )
        if below >= 0:
            reduction.fold(incoming, total, total)
        distance *= 2


# --- gather, scatter, allgather, alltoall ----------------------------------------------------------------------------


def gather(rank: int, size: int, data: memoryview, root: int) -> Steps[list[bytearray] | None]:
    """The data of all ranks at the root, None at the others."""
    place = (rank - root) % size
    parts = [Part.of(data)]
    for child in reversed(_children(place, size)):
        (found,) = yield Step(receives=(((child + root) % size, None),))
        parts += unpack(found, _span(child, size))
    if place:
        yield Step(sends=(((_parent(place) + root) % size, pack(parts)),))
        if parts[0].is_large:
            yield Step(sends=((root, data),))
        return None
    bundle = Bundle(parts)
    large = [(number, bundle.make_room(number)) for number in bundle.missing if number]
    yield Step(receives=[((number + root) % size, room) for number, room in large])
    bundle.put(0, data)
    return bundle.turned(root)


def scatter(rank: int, size: int, data: Sequence[memoryview] | None, root: int) -> Steps[bytearray]:
    """The part of this rank; ``data`` has one for each rank at the root, and is None at the others."""
    place = (rank - root) % size
    if data is None:
        (found,) = yield Step(receives=(((_parent(place) + root) % size, None),))
        parts = unpack(found, _span(place, size))
    else:
        parts = [Part.of(data[(one + root) % size]) for one in range(size)]
    for child in _children(place, size):
        first = child - place
        yield Step(sends=(((child + root) % size, pack(parts[first : first + _span(child, size)])),))
    if data is not None:
        yield Step(
            sends=[((one + root) % size, data[(one + root) % size]) for one in range(1, size) if parts[one].is_large]
        )
        return bytearray(data[rank])
    mine = Bundle(parts[:1])
    if parts[0].is_large:
        yield Step(receives=((root, mine.make_room(0)),))
    return mine.buffer(0)


def allgather(rank: int, size: int, data: memoryview) -> Steps[list[bytearray]]:
    """The data of all ranks, at all of them."""
    # Bruck: after each step this rank has the parts of twice as many ranks, its own first, then those above it.
    parts = [Part.of(data)]
    distance = 1
    while distance < size:
        count = min(distance, size - distance)
        (found,) = yield Step((((rank - distance) % size, pack(parts[:count])),), (((rank + distance) % size, None),))
        parts += unpack(found, count)
        distance *= 2
    bundle = Bundle(parts)
    rooms = {number: bundle.make_room(number) for number in bundle.missing if number}
    bundle.put(0, data)
    rooms[0] = data
    # A ring: each part goes from its rank down to the one above it.
    for step in range(size - 1 if any(part.is_large for part in parts) else 0):
        passed, due = step, step + 1
        below, above = (rank - 1) % size, (rank + 1) % size
        yield Step(
            ((below, rooms[passed]),) if parts[passed].is_large else (),
            ((above, rooms[due]),) if parts[due].is_large else (),
        )
    return bundle.turned(rank)


def alltoall(rank: int, size: int, parts: Sequence[memoryview]) -> Steps[list[bytearray]]:
    """The part that each rank has for this one."""
    others = [(rank + distance) % size for distance in range(1, size)]
    found = yield Step([(one, parts[one]) for one in others], [(one, None) for one in reversed(others)])
    result = [bytearray() for _ in range(size)]
    result[rank] = bytearray(parts[rank])
    for one, buffer in zip(reversed(others), found, strict=True):
        assert isinstance(buffer, bytearray)  # noqa: S101  it was asked for
        result[one] = buffer
    return result
