"""One rank of a group in its own process, so that a test can kill, stop or end it.

``python -m support.group_rank SETTINGS`` with SETTINGS as JSON: client, address, options of ``group``, what to do:

* ``do``: the call that the rank repeats until the group is broken: bcast, allreduce, alltoall, ring, recv, barrier; or
  ``close``, called once; or ``everything``, each method once with its result checked, and then ``close``; or
  ``nothing``, which sleeps outside of any call;
* ``role``: ``victim`` ends the rank by its own fault: see ``_fault``;
* ``hold_after``: the rank says how many wires it has, stops in the set-up when it has so many, and sleeps.

It prints one JSON object a line: ``{"at": "ready"}`` after the first barrier, ``{"at": "wires", "count": ...}`` and
``{"at": "held"}`` in the set-up, and at the end
``{"at": "broken", "rank": ..., "text": ..., "clock": ...}``, ``{"at": "closed"}`` or ``{"at": "error", "text": ...}``.
``clock`` is the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
import time
from array import array
from collections.abc import Awaitable as AwaitableOf
from collections.abc import Callable
from typing import Any

from frelay.client.group import work
from frelay.client.group.mesh import Mesh
from frelay.errors import FrelayError, GroupBroken
from support.group_calls import Awaitable, everything

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])


def say(at: str, **more: Any) -> None:
    print(
        json.dumps({"at": at, "clock": time.monotonic(), "left": len(os.listdir("/proc/self/fd")), **more}), flush=True
    )


class WatchedSetUp(work.SetUp):
    """A set-up that tells how many wires the rank has, and may stop at one of the numbers."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._watched = mesh
        self._told = 0

    def advance(self) -> bool:
        done = super().advance()
        up = [rank for rank in range(self._watched.size) if rank != self._watched.rank and self._watched.is_up(rank)]
        while len(up) > self._told:
            self._told += 1
            say("wires", count=self._told)
        if len(up) >= SETTINGS["hold_after"]:
            say("held")
            time.sleep(3600)
        return done


async def _maybe(result: Any) -> Any:
    """The result of a method of any of the three groups."""
    return await result if inspect.isawaitable(result) else result


async def _once(group: Any, do: str) -> None:
    rank, size = group.rank, group.size
    if do == "bcast":
        await _maybe(group.bcast(bytearray(3 * 1024 * 1024), root=1))
    elif do == "allreduce":
        await _maybe(group.allreduce(array("d", bytes(65536))))
    elif do == "large allreduce":
        # Few elements for its length: without NumPy a rank folds in Python, and hears nothing meanwhile.
        await _maybe(group.allreduce(array("d", bytes(1024 * 1024))))
    elif do == "alltoall":
        await _maybe(group.alltoall([bytes(100_000)] * size))
    elif do == "ring":
        await _maybe(group.sendrecv(bytes(1000), (rank + 1) % size, (rank - 1) % size))
    elif do == "recv":
        await _maybe(group.recv((rank + 1) % size))
    elif do == "barrier":
        await _maybe(group.barrier())
    elif do == "everything":
        await everything(group if inspect.iscoroutinefunction(group.barrier) else Awaitable(group))
    elif do == "nothing":
        time.sleep(3600)  # noqa: ASYNC251  outside of any call, whatever the client


async def _fault(group: Any, role: str) -> None:
    """What a victim does wrong, after the first barrier."""
    if role == "exit":
        os._exit(0)
    if role == "exit in order":
        sys.exit(0)  # through the ``with`` of the group, by an exception
    if role == "raise":
        raise KeyError("a bug of rank " + str(group.rank))
    if role == "abort":
        await _maybe(group.abort("I give up"))
    if role == "out of step":
        await _maybe(group.allgather(b"what the others do not call"))
    if role == "other root":
        await _maybe(group.bcast(bytearray(3 * 1024 * 1024), root=0))
    if role == "other size":
        await _maybe(group.bcast(bytearray(3 * 1024 * 1024 + 1), root=1))


async def play(group: Any) -> None:
    await _maybe(group.barrier())
    say("ready")
    role, do = SETTINGS.get("role"), SETTINGS["do"]
    if role is not None:
        await _fault(group, role)
    if do == "everything":
        await _once(group, do)
    elif do != "close":
        while True:
            await _once(group, do)


def run(make: Callable[[], Any]) -> None:
    """The blocking group, whose methods need no event loop: nothing is ever awaited in vain."""

    async def body() -> None:
        with make() as group:
            await play(group)

    with contextlib.suppress(StopIteration):
        body().send(None)


def run_async(runner: Callable[..., Any], make: Callable[[], AwaitableOf[Any]]) -> None:
    async def body() -> None:
        async with await make() as group:
            await play(group)

    runner(body) if SETTINGS["client"] == "trio" else runner(body())


def main() -> None:
    client = SETTINGS["client"]
    module = importlib.import_module(
        "frelay.client.group.blocking" if client == "blocking" else f"frelay.client.{client}.grouping"
    )
    if "hold_after" in SETTINGS:
        shell = importlib.import_module("frelay.client.group." + ("blocking" if client == "blocking" else "awaited"))
        shell.SetUp = WatchedSetUp  # type: ignore[attr-defined]

    def make() -> Any:
        return module.group(SETTINGS["address"], **SETTINGS["options"])

    before = len(os.listdir("/proc/self/fd"))
    try:
        if client == "blocking":
            run(make)
        else:
            run_async(importlib.import_module(client).run, make)
    except GroupBroken as error:
        say("broken", rank=error.rank, text=str(error), before=before)
    except FrelayError as error:
        say("error", text=f"{type(error).__name__}: {error}", before=before)
    else:
        say("closed", before=before)


if __name__ == "__main__":
    main()
