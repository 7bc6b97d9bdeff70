"""The placement: which worker has which listening address. Pure.

Both parties of a route must meet in one process. So all addresses of a route belong to one worker, and so do all routes
that share any of these addresses. Addresses that belong together in this way are a *cluster*, which is never split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from frelay.config.model import Config, Route
from frelay.config.plan import ListenerKey, listener_keys

__all__ = ["clusters", "share", "spread"]


def clusters(routes: Iterable[Route]) -> list[tuple[ListenerKey, ...]]:
    """The addresses of ``routes`` that belong together, in the order of the file."""
    of: dict[ListenerKey, dict[ListenerKey, None]] = {}
    for route in routes:
        keys = listener_keys(route)
        parts = {id(part): part for key in keys if (part := of.get(key)) is not None}
        # The largest part takes in the others, so that thousands that come one by one are not copied each time.
        whole = max(parts.values(), key=len, default={})
        for part in parts.values():
            if part is not whole:
                whole |= part
                of.update(dict.fromkeys(part, whole))
        for key in keys:
            whole[key] = None
            of[key] = whole
    return [tuple(part) for part in {id(part): part for part in of.values()}.values()]


def spread(
    wanted: Iterable[tuple[ListenerKey, ...]], workers: Iterable[int], before: Mapping[ListenerKey, int]
) -> dict[ListenerKey, int]:
    """The worker of each address: the one that its cluster had ``before``, else the one with the fewest addresses.

    ``wanted`` are :func:`clusters`. The same file gives the same result at each start. A reload moves no address that
    stays, with one exception: a new route may listen at addresses of two clusters, which makes them one. Then all their
    addresses go to the worker that has most of them.
    """
    placed: dict[ListenerKey, int] = {}
    loads = dict.fromkeys(workers, 0)
    rest = []
    for cluster in wanted:
        had = Counter(before[key] for key in cluster if key in before)
        if had:
            worker = min(had, key=lambda one: (-had[one], one))
            placed |= dict.fromkeys(cluster, worker)
            loads[worker] += len(cluster)
        else:
            rest.append(cluster)
    for cluster in rest:
        worker = min(loads, key=lambda one: (loads[one], one))
        placed |= dict.fromkeys(cluster, worker)
        loads[worker] += len(cluster)
    return placed


def share(config: Config, worker: int, placed: Mapping[ListenerKey, int]) -> Config:
    """The part of ``config`` for one worker: its own routes, and no HTTP servers, which the supervisor has."""
    routes = tuple(route for route in config.routes if placed[listener_keys(route)[0]] == worker)
    return config.model_copy(update={"routes": routes, "admin": None, "metrics": None})
