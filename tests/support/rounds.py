"""When is a relay in this process at rest? With a pairing, ``wait_all_tasks_blocked`` with a cushion cannot tell.

It waits for Trio to sleep through the whole cushion, and with a pairing :class:`~frelay.pairing.readiness.ReadinessSet`
sleeps in Trio's stead and then wakes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio
import trio.testing

from frelay.pairing.readiness import ReadinessSet

__all__ = ["CountedRounds", "nothing_is_ready", "settled"]


class CountedRounds(ReadinessSet):
    """Counts the rounds in which a descriptor of its own was ready."""

    rounds = 0

    def serve(self, ready: Iterable[tuple[int, int]], trio_epoll: int = -1) -> bool:
        found = list(ready)
        self.rounds += any(fd != trio_epoll for fd, _ in found)
        return super().serve(found, trio_epoll)


async def nothing_is_ready(readiness: CountedRounds, pause: float) -> None:
    """Wait for ``pause`` seconds in which nothing is ready; with a spin there are none."""
    rounds = -1
    while rounds != readiness.rounds:
        rounds = readiness.rounds
        await settled(pause)


async def settled(pause: float) -> None:
    """Let ``pause`` seconds pass, and everybody have a turn in them."""
    await trio.sleep(pause)
    await trio.testing.wait_all_tasks_blocked()
