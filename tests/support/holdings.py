"""What a relay in the test's process holds: all that grows with its pairings, and must shrink again.

::

    before = holdings(relay)
    ...
    await as_before(relay, before)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import trio

from support.descriptors import open_descriptors, opened_since
from support.relay import RelayInProcess
from support.waiting import eventually

__all__ = ["Holdings", "as_before", "holdings"]


@dataclass(frozen=True)
class Holdings:
    """Everything in a relay that grows with its pairings, and must shrink again."""

    descriptors: Mapping[int, str]
    """Those of the whole process; only those opened since belong to the relay and its parties."""
    tasks: int
    """Those of the relay, not those of the test."""
    watched_wires: int
    pipes_in_use: int
    waiting: tuple[int, int]
    pairings: int
    retired_routes: int
    legs: int
    handshakes: int
    hosts_with_strangers: int


def holdings(relay: RelayInProcess) -> Holdings:
    inner = relay.relay
    admission, forwarding = inner.parts.admission, inner.parts.forwarding
    return Holdings(
        descriptors=open_descriptors(),
        tasks=_tasks_below(relay.task),
        watched_wires=len(forwarding.readiness),
        pipes_in_use=forwarding.pipes.in_use,
        waiting=relay.waiting(),
        pairings=len(inner.pairings),
        retired_routes=len(inner.parts.registry.retired),
        legs=admission.legs,
        handshakes=admission.strangers.running,
        hosts_with_strangers=admission.strangers.holders,
    )


def _tasks_below(task: trio.lowlevel.Task | None) -> int:
    assert task is not None, "only the relay of Site.relay() is known by its task"
    return sum(1 + _tasks_below(child) for nursery in task.child_nurseries for child in nursery.child_tasks)


async def as_before(relay: RelayInProcess, before: Holdings) -> None:
    """Wait until the relay holds what it held at ``before``; a failure shows both."""
    nothing_opened = replace(before, descriptors={})

    def held() -> Holdings:
        opened = opened_since(before.descriptors, pipes=relay.relay.parts.forwarding.pipes)
        return replace(holdings(relay), descriptors=opened)

    try:
        await eventually(lambda: held() == nothing_opened)
    except AssertionError:
        assert held() == nothing_opened
