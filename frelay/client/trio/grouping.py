"""A group in Trio code: :func:`group` and :class:`TrioGroup`."""

from __future__ import annotations

from typing import Unpack

import trio

from frelay.client.group.awaited import AwaitedGroup
from frelay.client.group.mesh import Mesh
from frelay.client.group.plan import ConnectOptions, GroupPlan, Peer

__all__ = ["TrioGroup", "group"]


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
) -> TrioGroup:
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
    return await TrioGroup(Mesh(plan))._begin()


class TrioGroup(AwaitedGroup):
    """As :class:`frelay.Group`, with methods that are awaited in a Trio task."""

    async def _wait(self, seconds: float) -> None:
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self._mesh.poll.fileno())

    async def _checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _leave_shielded(self) -> None:
        with trio.CancelScope(shield=True):
            await self._leave()
