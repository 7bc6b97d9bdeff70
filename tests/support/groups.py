"""Groups on a relay: the route and certificates that they need, and all ranks of one as threads of this process.

::

    async with site.relay(GROUP_ROUTE) as relay:
        results = await in_threads(site, relay, 8, lambda group: group.allgather(b"abc"))
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

import frelay
from frelay.client.group.plan import ConnectOptions
from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

__all__ = [
    "GROUP_ROUTE",
    "PEER",
    "RankProcess",
    "add_ranks",
    "arguments",
    "connect_options",
    "in_threads",
    "rank_processes",
    "start_rank",
]

T = TypeVar("T")

PEER: Final = "dns:rank{rank}.job"
GROUP_ROUTE: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = "dns:*.job"
func2 = "dns:*.job"
"""


def add_ranks(site: Site, size: int) -> None:
    """A certificate for each rank that has none yet."""
    for rank in range(size):
        if f"rank{rank}" not in site.paths:
            site.add(f"rank{rank}", site.ca.party(dns=[f"rank{rank}.job"]))


def connect_options(site: Site, rank: int) -> ConnectOptions:
    """The files of one rank."""
    cert, key = site.paths[f"rank{rank}"]
    return {"cert": cert, "key": key, "ca": site.ca_path, "server_name": "localhost"}


def arguments(
    site: Site, relay: RelayInProcess | RelayProcess, rank: int, size: int, **more: Any
) -> tuple[str, dict[str, Any]]:
    """The arguments of ``group`` for one rank."""
    add_ranks(site, size)
    given = {"name": "run", "rank": rank, "size": size, "peer": PEER, **connect_options(site, rank), **more}
    return f"127.0.0.1:{relay.port()}", given


async def in_threads(
    site: Site,
    relay: RelayInProcess | RelayProcess,
    size: int,
    body: Callable[[frelay.Group], T],
    *,
    only: Callable[[int], bool] = lambda rank: True,
    **more: Any,
) -> list[T | BaseException]:
    """Run ``body`` at each rank of a group, in a thread each, inside ``with``; returns their results or errors."""
    add_ranks(site, size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        address, given = arguments(site, relay, rank, size, **more)
        try:
            with frelay.group(address, **given) as group:
                results[rank] = body(group)
        except Exception as error:
            results[rank] = error

    limiter = trio.CapacityLimiter(size)
    async with trio.open_nursery() as nursery:
        for rank in filter(only, range(size)):
            nursery.start_soon(partial(trio.to_thread.run_sync, run, rank, limiter=limiter))
    return results


class RankProcess:
    """A process of support/group_rank.py, and what it has said."""

    def __init__(self, rank: int, process: trio.Process) -> None:
        self.rank = rank
        self.process = process
        self.said: list[dict[str, Any]] = []
        self.stderr = ""
        self._has_said_all = False

    async def _read(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        async for chunk in self.process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            self.said += [json.loads(line) for line in lines]
        self._has_said_all = True

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for chunk in self.process.stderr:
            self.stderr += chunk.decode()

    async def say(self, *at: str, **fields: Any) -> dict[str, Any]:
        """What the rank says when it is there, with these fields, now or soon."""
        found: list[dict[str, Any]] = []

        def has_said() -> bool:
            found.extend(one for one in self.said if one["at"] in at and fields.items() <= one.items())
            assert found or not self._has_said_all, f"rank {self.rank} said only {self.said}; stderr: {self.stderr}"
            return bool(found)

        await eventually(has_said, f"rank {self.rank} at {at} {fields}", timeout=4 * TIMEOUT)
        return found[0]


@asynccontextmanager
async def rank_processes(
    site: Site,
    relay: RelayProcess | RelayInProcess,
    size: int,
    do: str,
    *,
    client: str = "blocking",
    victim: int | None = None,
    of_victim: dict[str, Any] | None = None,
    hold: int | None = None,
    **more: Any,
) -> AsyncIterator[list[RankProcess]]:
    """A process for each rank; those that still run at the end are killed.

    ``hold`` is the number of wires at which the set-up stops; with ``size`` it never does, and only tells the numbers.
    """
    ranks: list[RankProcess] = []
    async with trio.open_nursery() as nursery:
        for rank in range(size):
            settings = {} if hold is None else {"hold_after": hold}
            settings |= (of_victim or {}) if rank == victim else {}
            ranks.append(await start_rank(nursery, site, relay, rank, size, do, client, more, settings))
        try:
            yield ranks
        finally:
            for one in ranks:
                if one.process.returncode is None:
                    one.process.kill()


async def start_rank(
    nursery: trio.Nursery,
    site: Site,
    relay: RelayProcess | RelayInProcess,
    rank: int,
    size: int,
    do: str,
    client: str,
    more: dict[str, Any],
    more_settings: dict[str, Any],
) -> RankProcess:
    """One process of support/group_rank.py in ``nursery``."""
    address, given = arguments(site, relay, rank, size, **more)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    settings = {"client": client, "address": address, "options": options, "do": do, **more_settings}
    process: trio.Process = await nursery.start(
        partial(
            trio.run_process,
            [sys.executable, "-m", "support.group_rank", json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
    )
    found = RankProcess(rank, process)
    nursery.start_soon(found._read)
    nursery.start_soon(found._read_errors)
    return found
