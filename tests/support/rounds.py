"""Tells when a relay in this process is idle. With a pairing, ``wait_all_tasks_blocked`` with a cushion cannot tell it.

It waits until Trio sleeps through the whole cushion, but with a pairing the
:class:`~frelay.pairing.readiness.ReadinessSet` sleeps in Trio's place and then wakes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio
import trio.testing

from frelay.pairing.readiness import ReadinessSet

__all__ = ["CountedRounds", "nothing_is_ready", "settled"]


class CountedRounds(ReadinessSet):
    """A readiness set that counts the rounds in which one of its own descriptors was ready."""

    rounds = 0

    def serve(self, ready: Iterable[tuple[int, int]], trio_epoll: int = -1) -> bool:
        found = list(ready)
        self.rounds += any(fd != trio_epoll for fd, _ in found)
        return super().serve(found, trio_epoll)


async def nothing_is_ready(readiness: CountedRounds, pause: float) -> None:
    """Wait for ``pause`` seconds in which nothing is ready; while a pump spins, they do not come."""
    rounds = -1
    while rounds != readiness.rounds:
        rounds = readiness.rounds
        await settled(pause)


async def settled(pause: float) -> None:
    """Let ``pause`` seconds pass, and let every task run in them."""
    await trio.sleep(pause)
    await trio.testing.wait_all_tasks_blocked()
