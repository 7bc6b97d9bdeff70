"""Stop on SIGINT or SIGTERM at any moment, and leave nothing running.

The first signal becomes an exception in the main thread, so ``with`` and ``finally`` end what was started. Later
signals are ignored: the clean-up is short and must not be interrupted. An exception must not come between the start of
a process and the ``try`` that will end it; there a signal waits (:func:`deferred`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "deferred", "raise_on_signals"]

_depth = 0
_pending: int | None = None


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; ``exit_code`` is the one that a shell expects."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """From now on the first SIGINT or SIGTERM raises :class:`Interrupted`."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _pending
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _depth:
        raise Interrupted(number)
    _pending = number


@contextmanager
def deferred() -> Iterator[None]:
    """Hold :class:`Interrupted` back until the end of the block; keep the block short."""
    global _depth, _pending
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _pending is not None and not _depth:
            number, _pending = _pending, None
            raise Interrupted(number)
