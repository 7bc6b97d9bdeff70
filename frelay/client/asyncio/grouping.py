"""A group in asyncio code: :func:`group` and :class:`AsyncioGroup`. Standard library only."""

from __future__ import annotations

import asyncio
from typing import Final, Unpack

from frelay.client.group.awaited import AwaitedGroup
from frelay.client.group.mesh import Mesh
from frelay.client.group.plan import ConnectOptions, GroupPlan, Peer

__all__ = ["AsyncioGroup", "group"]

# Event loops take milliseconds as an int, so 24 days at most.
_LONGEST_WAIT: Final = 86400.0


async def group(
    address: str,
    *,
    name: str,
    rank: int,
    size: int,
    peer: Peer,
    timeout: float = 60.0,
    eager: bool | None = None,
    at_once: int = 4,
    **connect: Unpack[ConnectOptions],
) -> AsyncioGroup:
    """Join with the other functions of a job, as :func:`frelay.group` does; use it in ``async with``.

    You may cancel it at any point: nothing stays open, and the other ranks hear that this one is gone.
    """
    plan = GroupPlan.make(
        address,
        name=name,
        rank=rank,
        size=size,
        peer=peer,
        timeout=timeout,
        eager=eager,
        at_once=at_once,
        options=connect,
    )
    return await AsyncioGroup(Mesh(plan))._begin()


class AsyncioGroup(AwaitedGroup):
    """As :class:`frelay.Group`, with methods that are awaited in an asyncio task."""

    async def _wait(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        number = self._mesh.poll.fileno()
        loop.add_reader(number, wake)
        timer = loop.call_later(min(seconds, _LONGEST_WAIT), wake)
        try:
            await woken
        finally:
            timer.cancel()
            loop.remove_reader(number)

    async def _checkpoint(self) -> None:
        await asyncio.sleep(0)

    async def _leave_shielded(self) -> None:
        # A task that was cancelled may await again; only a second cancel() interrupts it.
        await self._leave()
