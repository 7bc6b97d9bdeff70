"""Which ranks of a group get a wire between them, and in which order they join. Standard library only."""

from __future__ import annotations

from typing import Final

__all__ = ["FULL_MESH", "in_order", "linked_ranks"]

FULL_MESH: Final = 16
"""Up to this size each rank is linked with all others at once: 120 pairings, of which a relay takes 1024 by default."""


def linked_ranks(rank: int, size: int, eager: bool | None) -> frozenset[int]:
    """The ranks to which ``rank`` gets a wire while the group is set up.

    In a full mesh these are all others. Else they are the ranks at a distance of 1, 2, 4 and so on, which most
    collectives need and no other, and rank 0, which sends the roster. All ranks come to the same pairs.
    """
    if size <= FULL_MESH if eager is None else eager:
        return frozenset(range(size)) - {rank}
    if rank == 0:
        return frozenset(range(1, size))
    found, distance = {0}, 1
    while distance < size:
        found |= {(rank + distance) % size, (rank - distance) % size}
        distance *= 2
    return frozenset(found) - {rank}


def in_order(rank: int, size: int) -> list[int]:
    """All other ranks in the order in which ``rank`` joins them: a round-robin tournament.

    In each round a rank has at most one partner. All ranks take the rounds in the same order, so both ranks of the
    earliest pair that is not linked yet are on it: nobody waits in a circle, even if each joins one partner at a time.
    Ranks 0 and 1 join before all rounds, because rank 0 joins with no other rank before.
    """
    # The circle method: one seat is fixed, and the others turn by one seat a round. An odd size has an empty seat.
    seats = size + size % 2
    fixed = seats - 1
    order = []
    for turn in range(fixed):
        partner = turn if rank == fixed else (2 * turn - rank) % fixed
        if partner == rank:
            partner = fixed
        if partner < size:
            order.append(partner)
    # False sorts before True, and the order is else kept.
    return order if rank > 1 else sorted(order, key=lambda partner: partner != 1 - rank)
