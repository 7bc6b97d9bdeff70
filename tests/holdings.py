"""What a relay in the test's process holds: all that grows with its pairings, and must shrink with them.

::

    before = holdings(relay)
    ...
    await as_before(relay, before)
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from rig import RelayInProcess, eventually, open_descriptors

__all__ = ["Holdings", "as_before", "holdings"]


@dataclass(frozen=True)
class Holdings:
    """Everything of a relay that grows with its pairings, and must shrink with them."""

    descriptors: int
    tasks: int
    watched_wires: int
    pipes_in_use: int
    waiting: tuple[int, int]
    pairings: int
    retired_routes: int
    legs: int
    free_slots: int
    hosts_with_strangers: int


def holdings(relay: RelayInProcess) -> Holdings:
    inner = relay.relay
    admission, forwarding = inner._admission, inner._forwarding
    return Holdings(
        # Free pipes stay in their pool, bounded; they are not what a leak looks like.
        descriptors=len(open_descriptors()) - 2 * len(forwarding.pipes._free),
        tasks=trio.lowlevel.current_statistics().tasks_living - (relay.network.tasks() if relay.network else 0),
        watched_wires=len(forwarding.readiness),
        pipes_in_use=forwarding.pipes.in_use,
        waiting=relay.waiting(),
        pairings=len(inner.pairings),
        retired_routes=len(inner._now.retired),
        legs=admission.legs,
        free_slots=admission._free.value,
        hosts_with_strangers=len(admission._by_host),
    )


async def as_before(relay: RelayInProcess, before: Holdings) -> None:
    """Wait until the relay holds what it held; a failure shows both."""
    try:
        await eventually(lambda: holdings(relay) == before, patience=10)
    except AssertionError:
        assert holdings(relay) == before
