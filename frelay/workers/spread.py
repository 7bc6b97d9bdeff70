"""Which worker has which listening address. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from frelay.config.model import Config
from frelay.config.plan import ListenerKey, listener_key

__all__ = ["share", "spread"]


def spread(
    wanted: Iterable[ListenerKey], workers: Iterable[int], before: Mapping[ListenerKey, int]
) -> dict[ListenerKey, int]:
    """The worker of each address that is wanted: the one it had ``before``, else the one with the fewest.

    The same file gives the same answer at each start, and a reload moves nothing that stays.
    """
    keys = list(dict.fromkeys(wanted))
    placed = {key: before[key] for key in keys if key in before}
    loads = dict.fromkeys(workers, 0) | Counter(placed.values())
    for key in keys:
        if key not in placed:
            placed[key] = worker = min(loads, key=lambda one: (loads[one], one))
            loads[worker] += 1
    return placed


def share(config: Config, worker: int, placed: Mapping[ListenerKey, int]) -> Config:
    """What a worker is to know of ``config``: its own routes, and nothing of what the supervisor serves."""
    routes = tuple(route for route in config.routes if placed[listener_key(route)] == worker)
    return config.model_copy(update={"routes": routes, "admin": None, "metrics": None})
