"""All ranks of a group in one thread, without wires: the generators of the collectives meet each other directly.

A message is delivered only when its receiver has reached the step that receives it, as if no wire held a single byte.
So a collective that works here needs no buffer on the way, and cannot wait in a circle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frelay.client.group.collectives import Step, Steps

__all__ = ["run_ranks"]


class _Rank:
    """One generator and the messages of its step that are not done."""

    def __init__(self, steps: Steps[Any]) -> None:
        self.steps = steps
        self.sends: dict[int, memoryview] = {}
        self.receives: dict[int, memoryview | None] = {}
        self.order: list[int] = []
        self.received: dict[int, memoryview | bytearray] = {}
        self.is_done = False
        self.result: Any = None

    def resume(self, *, first: bool = False) -> None:
        while not self.is_done and not self.sends and not self.receives:
            try:
                found = [self.received[rank] for rank in self.order]
                step: Step = next(self.steps) if first else self.steps.send(found)
            except StopIteration as stop:
                self.is_done, self.result = True, stop.value
                return
            first = False
            self.sends, self.receives = dict(step.sends), dict(step.receives)
            assert len(self.sends) == len(step.sends), "two messages to one rank in one step"
            assert len(self.receives) == len(step.receives), "two messages from one rank in one step"
            self.order, self.received = list(self.receives), {}


def run_ranks(size: int, make: Callable[[int], Steps[Any]]) -> list[Any]:
    """Run ``make(rank)`` for all ranks to their end; returns their results. Fails if they wait for each other."""
    ranks = [_Rank(make(rank)) for rank in range(size)]
    for rank in ranks:
        rank.resume(first=True)
    has_moved = True
    while has_moved:
        has_moved = False
        for number, rank in enumerate(ranks):
            for to in list(rank.sends):
                other = ranks[to]
                if number in other.receives:
                    _deliver(rank.sends.pop(to), other, number)
                    has_moved = True
                    other.resume()
            rank.resume()
    stuck = {number: (list(rank.sends), list(rank.receives)) for number, rank in enumerate(ranks) if not rank.is_done}
    assert not stuck, f"these ranks still send to and receive from: {stuck}"
    return [rank.result for rank in ranks]


def _deliver(data: memoryview, to: _Rank, source: int) -> None:
    view = to.receives.pop(source)
    if view is None:
        to.received[source] = bytearray(data)
        return
    assert len(data) == len(view)
    view[:] = data
    to.received[source] = view
