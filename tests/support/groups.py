"""Groups on a relay: the route and certificates that they need, and all ranks of one as threads of this process.

::

    async with site.relay(GROUP_ROUTE) as relay:
        results = await in_threads(site, relay, 8, lambda group: group.allgather(b"abc"))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import trio

import frelay
from frelay.client.group.plan import ConnectOptions
from support.relay import RelayInProcess, RelayProcess
from support.site import Site

__all__ = ["GROUP_ROUTE", "PEER", "add_ranks", "arguments", "connect_options", "in_threads"]

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
