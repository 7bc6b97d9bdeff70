"""Measures how late the event loop wakes its tasks. Functions wait that long in addition; no other figure shows it."""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

__all__ = ["LAG_MEMORY", "LoopLag"]

# Seconds. A loop that stands still for longer than this is always noticed, and four wake-ups a second cost nothing.
_PROBE_INTERVAL: Final = 0.25
LAG_MEMORY: Final = 60.0
"""Seconds: longer than the usual time between two scrapes, and the same for all scrapers."""


class LoopLag:
    """Measures the event loop that runs :meth:`watch`."""

    def __init__(self) -> None:
        self._lags: Final[deque[float]] = deque(maxlen=round(LAG_MEMORY / _PROBE_INTERVAL))

    @property
    def worst(self) -> float:
        """The longest delay within the last :data:`LAG_MEMORY`, in seconds."""
        return max(self._lags, default=0.0)

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + _PROBE_INTERVAL
            await trio.sleep_until(due)
            self._lags.append(trio.current_time() - due)
