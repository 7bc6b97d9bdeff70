"""The refusals of strangers, for the log and the journal; those of a flood are summed up, so that they can be read.

The first few refusals of a second are written one by one, each with its address. Further refusals in the same second
are counted by kind; at the end of the second each kind gets one line, with ``count`` and the last address. So the
counts miss no refusal, and a stranger can neither fill the log nor push all others out of the last refusals that the
operator sees.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import structlog
import trio

from frelay.journal import Journal, LegRefused

__all__ = ["StrangersRefused"]

# More than a person reads, and 100 KB a minute.
_TOLD_A_SECOND: Final = 20
# Reasons come from our code or from OpenSSL, so there are few. This limits the memory if that is ever wrong.
_MOST_KINDS: Final = 64
_PAUSE: Final = 1.0


class StrangersRefused:
    """Give :meth:`run` a task."""

    def __init__(self, journal: Journal) -> None:
        self._journal: Final = journal
        self._told = 0
        """How many were written in this second."""
        self._untold: Final[dict[tuple[str, str, str | None], LegRefused]] = {}
        self._begun = trio.Event()
        self._log: Any = structlog.get_logger("frelay.reception")

    def note(self, entry: LegRefused) -> None:
        """A stranger was refused."""
        self._begun.set()
        if self._told < _TOLD_A_SECOND:
            self._told += 1
            self._tell(entry)
            return
        kind = (entry.code, entry.reason, entry.route)
        if kind not in self._untold and len(self._untold) >= _MOST_KINDS:
            entry = replace(entry, reason="several reasons", route=None)
            kind = (entry.code, entry.reason, None)
        before = self._untold.get(kind)
        self._untold[kind] = entry if before is None else replace(entry, count=before.count + entry.count)

    def _tell(self, entry: LegRefused) -> None:
        more: dict[str, Any] = {} if entry.route is None else {"route": entry.route}
        if entry.count > 1:
            more["count"] = entry.count
        self._log.warning("refused", address=entry.address, code=entry.code, reason=entry.reason, **more)
        self._journal.note(entry)

    def flush(self) -> None:
        """Write what was counted."""
        self._told = 0
        entries = list(self._untold.values())
        self._untold.clear()
        for entry in entries:
            self._tell(entry)

    async def run(self) -> None:
        """Write what was counted at the end of each second until cancelled, and then once more."""
        try:
            while True:
                await self._begun.wait()
                self._begun = trio.Event()
                await trio.sleep(_PAUSE)
                self.flush()
        finally:
            self.flush()
