"""The plan of many joins, made anew when a file has changed. Standard library only.

To read the files and make TLS contexts of them costs as much as the rest of a join. So all joins of a listener share
one plan. But certificates are renewed on disk while it runs: before each join we look whether a file has changed.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

from frelay.client.contexts import StrPath
from frelay.client.options import JoinPlan, Options

__all__ = ["Plans"]


class Plans:
    """The plan for these arguments of ``connect``, and its files.

    With ``wait_ends_when_paired`` a caller that comes at the end of ``wait`` still has time for its handshake.
    """

    def __init__(self, address: str, options: Options, *, wait_ends_when_paired: bool = False) -> None:
        self._address: Final = address
        self._options: Final = options
        self._wait_ends_when_paired: Final = wait_ends_when_paired
        self._files: Final[tuple[StrPath | None, ...]] = (
            options.get("cert"),
            options.get("key"),
            options.get("ca"),
            options.get("inner_cert"),
            options.get("inner_key"),
            options.get("inner_ca"),
        )
        self._plan: JoinPlan | None = None
        self._seen: list[tuple[int, ...] | None] = []

    def current(self) -> JoinPlan:
        """The plan with the files as they are now; raises what :meth:`JoinPlan.make` raises."""
        # Look first, then read: a change in between is seen the next time.
        seen = [None if path is None else _state_of(path) for path in self._files]
        if self._plan is None or seen != self._seen:
            self._plan = None
            plan = JoinPlan.make(self._address, **self._options)
            self._plan = replace(plan, wait_ends_when_paired=self._wait_ends_when_paired)
            self._seen = seen
        return self._plan

    def read_again(self) -> None:
        """Read all files for the next join, also those that seem to be the same."""
        self._plan = None


def _state_of(path: StrPath) -> tuple[int, ...] | None:
    """What changes with the content of a file; None if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
