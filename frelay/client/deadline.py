"""The deadline of one joining. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Deadline", "OutOfTime"]


class OutOfTime(Exception):
    """The caller's ``wait`` has passed. Not TimeoutError: that may be the kernel's, or on_status's."""


class Deadline:
    """The one deadline over all steps."""

    def __init__(self, seconds: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = None if seconds is None else clock() + seconds

    def left(self) -> float | None:
        """Seconds left, None without a deadline; raises OutOfTime once there are none."""
        if self._at is None:
            return None
        left = self._at - self._clock()
        if left <= 0:
            raise OutOfTime
        return left

    def bound(self, limit: float) -> float:
        """``limit``, or what is left if that is less."""
        left = self.left()
        return limit if left is None else min(limit, left)

    def stage(self, seconds: float) -> Callable[[], float]:
        """What gives the seconds left for the next step of a stage that may take ``seconds`` in all, and raises then.

        One that answers a byte at a time would otherwise get the whole time again with every byte. Raises TimeoutError,
        and OutOfTime where there is no time at all.
        """
        end = self._clock() + seconds

        def left() -> float:
            left = self.bound(end - self._clock())
            if left <= 0:
                raise TimeoutError("timed out")
            return left

        return left

    def cuts(self, limit: float) -> bool:
        """Whether it comes before ``limit`` seconds from now."""
        return self._at is not None and self._at - self._clock() <= limit
