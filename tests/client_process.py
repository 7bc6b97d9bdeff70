"""A function as a process of its own that stops at one step of its joining, to be killed or interrupted there.

``python client_process.py SETTINGS`` with SETTINGS as JSON: client, address, stop_at, and the arguments of ``connect``.
It prints one line when it has got there, and sleeps. The steps:

* ``waiting``: the relay has said WAITING;
* ``paired``: PAIRED is read, and nothing more;
* ``hand-off``: the relay's close_notify is read, ours is not sent;
* ``inner``: the line is raw, and the inner handshake has not got beyond its first flight.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import trio

import frelay.client.asyncio
import frelay.client.blocking
import frelay.client.trio
from frelay.client.core import Joined, Joining
from frelay.client.steps import Meet, Pause, Receive, Send, Status, Step, Steps
from frelay.protocol.messages import Paired, Waiting

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])


class Stopping(Joining):
    """A joining that pauses for an hour at the step asked for."""

    sends_after_pairing = 0
    is_paired = False

    def is_there(self, step: Step) -> bool:
        if isinstance(step, Status):
            self.is_paired = self.is_paired or isinstance(step.message, Paired)
            wanted = {"waiting": Waiting, "paired": Paired}.get(SETTINGS["stop_at"])
            return wanted is not None and isinstance(step.message, wanted)
        if not self.is_paired:
            return False
        if isinstance(step, Send):
            self.sends_after_pairing += 1
            return SETTINGS["stop_at"] == "hand-off" and self.sends_after_pairing == 1
        return SETTINGS["stop_at"] == "inner" and self.sends_after_pairing > 0 and isinstance(step, Meet | Receive)

    def steps(self) -> Steps[Joined]:
        steps, reply, has_stopped = super().steps(), None, False
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                joined: Joined = done.value
                return joined
            if not has_stopped and self.is_there(step):
                has_stopped = True
                print("stopped", flush=True)
                yield Pause(3600)
            reply = yield step


async def _asyncio(address: str, given: dict[str, Any]) -> None:
    await frelay.client.asyncio.connect(address, **given)


async def _trio(address: str, given: dict[str, Any]) -> None:
    await frelay.client.trio.connect(address, **given)


def main() -> None:
    address, given = SETTINGS["address"], SETTINGS["options"]
    for module in (frelay.client.asyncio, frelay.client.blocking, frelay.client.trio):
        module.Joining = Stopping  # type: ignore[attr-defined]
    if SETTINGS["client"] == "blocking":
        frelay.client.blocking.connect(address, **given)
    elif SETTINGS["client"] == "trio":
        trio.run(_trio, address, given)
    else:
        asyncio.run(_asyncio(address, given))


if __name__ == "__main__":
    main()
