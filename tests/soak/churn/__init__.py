"""The traffic of a soak, all at once: good functions of every kind, hostile strangers, and a restless operator.

Each :class:`Actor` repeats one scene: open, do, close. A good scene must succeed each time, with every byte compared.
A hostile one must be refused as the protocol says. Anything else is a :class:`Trouble`. The scenes choose by a seeded
generator, so a run can be repeated, except for its timing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from soak.churn.functions import Functions
from soak.churn.ground import CONSTANT, TIMEOUT, Ground, Trouble, ask
from soak.churn.operator import Operator
from soak.churn.strangers import Strangers

__all__ = ["CONSTANT", "Actor", "Ground", "Trouble", "actors", "ask"]


@dataclass
class Actor:
    """One scene, and how often it was played."""

    name: str
    play: Callable[[], Awaitable[None]]
    pause: float = 0.0
    """Between two plays, in seconds."""
    times: int = 0

    async def run(self, over: trio.Event, troubles: Counter[str]) -> None:
        """Play until ``over``. A scene is always played to its end: one cut short would leave connections open."""
        while not over.is_set():
            try:
                with trio.fail_after(TIMEOUT):
                    await self.play()
            except Exception as error:
                troubles[f"{self.name}: {_told(error)}"] += 1
            self.times += 1
            with trio.move_on_after(self.pause):
                await over.wait()


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def actors(ground: Ground, seed: int) -> list[Actor]:
    """All actors."""
    random_ = random.Random(seed)
    good, bad, operator = Functions(ground, random_), Strangers(ground, random_), Operator(ground, random_)
    found = []
    for number in range(CONSTANT):
        found += [
            Actor("bulk both ways", lambda n=number: good.bulk(f"bulk-{n}")),  # type: ignore[misc]
            Actor("ping-pong", lambda n=number: good.talk(f"talk-{n}")),  # type: ignore[misc]
            Actor("half-close", lambda n=number: good.half(f"half-{n}")),  # type: ignore[misc]
        ]
    return [
        *found,
        Actor("bare tunnels", good.bare, 0.05),
        Actor("plain legs", good.plain, 0.05),
        Actor("dialled service", good.service, 0.05),
        Actor("slow reader", good.slow),
        Actor("reset in mid-stream", good.reset, 0.05),
        Actor("cut in mid-hand-off", bad.cut, 0.05),
        Actor("ticket used twice", bad.ticket, 0.1),
        Actor("waits and goes", bad.lonely, 0.1),
        Actor("refused certificate", bad.refused, 0.1),
        Actor("garbage", bad.garbage, 0.1),
        Actor("garbage in frames", bad.frames, 0.1),
        Actor("silence", bad.silence),
        Actor("drip of a handshake", bad.drip),
        Actor("operator", operator.act, 0.3),
    ]
