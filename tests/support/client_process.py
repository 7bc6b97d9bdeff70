"""A function in its own process that stops at one step of its joining, so that a test can kill or interrupt it there.

``python client_process.py SETTINGS`` with SETTINGS as JSON: client, address, stop_at, and the arguments of ``connect``.
It prints one line when it has reached the step, and sleeps. The steps:

* ``waiting``: the relay has sent WAITING;
* ``paired``: PAIRED is read, and nothing more;
* ``hand-off``: the relay's close_notify is read, ours is not sent;
* ``inner``: the connection is raw, and the inner handshake has sent at most its first flight.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from frelay.client.joining import Joined, Joining
from frelay.client.steps import InnerHandshake, Pause, Receive, Send, Status, Step, Steps
from frelay.protocol.messages import Paired, Waiting

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])


class Stopping(Joining):
    """A joining that pauses for an hour at the step of the settings."""

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
        return (
            SETTINGS["stop_at"] == "inner"
            and self.sends_after_pairing > 0
            and isinstance(step, InnerHandshake | Receive)
        )

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


def main() -> None:
    address, given, client = SETTINGS["address"], SETTINGS["options"], SETTINGS["client"]
    # Import only this client: many of these processes start at once, and to import Trio takes longest.
    module = importlib.import_module(f"frelay.client.{client}")
    connecting = module if client == "blocking" else importlib.import_module(f"{module.__name__}.connecting")
    connecting.Joining = Stopping  # type: ignore[attr-defined]

    async def connect() -> None:
        await module.connect(address, **given)

    if client == "blocking":
        module.connect(address, **given)
    else:
        importlib.import_module(client).run(*([connect] if client == "trio" else [connect()]))


if __name__ == "__main__":
    main()
