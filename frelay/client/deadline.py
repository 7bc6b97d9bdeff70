"""The deadline over all steps of one joining. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Deadline", "OutOfTime"]


class OutOfTime(Exception):
    """A signal inside the client, never an error for its caller: the caller's ``wait`` has passed.

    TimeoutError would be ambiguous: the kernel and the caller's ``on_status`` may raise it too.
    """


class Deadline:
    """The end of the caller's ``wait``, if it set one."""

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
        """``limit``, or the seconds left if they are fewer; raises OutOfTime."""
        left = self.left()
        return limit if left is None else min(limit, left)

    def stage(self, seconds: float) -> Callable[[], float]:
        """A function that returns the seconds left of a stage: ``seconds`` from now, or the deadline if it is earlier.

        Without it a peer that sends one byte at a time would get the whole timeout again with each byte. The function
        raises TimeoutError when the stage is over, and OutOfTime when the deadline has passed.
        """
        end = self._clock() + seconds

        def left() -> float:
            left = self.bound(end - self._clock())
            if left <= 0:
                raise TimeoutError("timed out")
            return left

        return left

    def is_within(self, limit: float) -> bool:
        """Whether the deadline is at most ``limit`` seconds away."""
        return self._at is not None and self._at - self._clock() <= limit
