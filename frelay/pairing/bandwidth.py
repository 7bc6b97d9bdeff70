"""The bandwidth of a route: one budget of bytes a second, which its pairings share.

The relay receives and sends each byte once, in either direction. So there is one budget for the whole route: for all
its pairings, and for both directions together.

It is a token bucket, kept as the one number that such a bucket needs: the time from which the next bytes may go. A turn
is paid for when it is taken, not when it is requested. So when a pairing ends while it waits, no other has to wait for
the bytes that it did not send.

Fair queueing decides whose turn is next. Each requested turn gets a number: the bytes that its pairing has sent,
including this turn, counted from the number that the queue has reached when it asks. The lowest number goes first. So
pairings with much to send take turns, and ten bytes go before the next kilobyte of any other pairing.

A pump requests a small portion at a time, and reads nothing more until that is delivered, so the rest stays in the
sender's kernel. A pairing requests one portion at a time (:class:`Share`), so a pairing that is busy both ways gets no
more than one that is busy one way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Final

import trio

__all__ = ["Bandwidth", "Share"]

# How long a turn is, in seconds, if the limits of a portion permit: short enough that all pairings that take turns seem
# to flow, and long enough that fifty wake-ups a second are enough for a route.
_TURN: Final = 0.02
# Fewer bytes are not worth a wake-up and, in a tunnel, a TLS record. No pump reads more at once.
_LEAST_PORTION: Final = 1024
_LARGEST_PORTION: Final = 64 * 1024
# No turn is longer than this, in seconds, however low the rate: a few bytes of another pairing may be next.
_LONGEST_TURN: Final = 0.2
# How much unspent time counts for later bytes, in seconds. Timers are late, and without this lost time would add up. It
# also permits a burst after silence, which over 5 s is within 5 % of the rate.
_SAVED: Final = 0.25


class _Turn:
    """A portion of bytes that a pairing waits to send."""

    __slots__ = ("is_over", "number", "order", "woken")

    def __init__(self, number: int, order: int) -> None:
        self.number: Final = number
        self.order: Final = order
        self.woken = trio.Event()
        self.is_over = False
        """Whether the turn was taken, or its pump was cancelled."""

    def __lt__(self, other: _Turn) -> bool:
        return (self.number, self.order) < (other.number, other.order)


class Bandwidth:
    """The budget of one route, in bytes a second."""

    def __init__(self, rate: int) -> None:
        self._rate: int | None = rate
        self._next_at = 0.0
        """The time from which the next portion may go (Trio's clock)."""
        self._stands_at = 0
        """How far the queue has come: the number of the last turn taken, less the bytes of that turn. It only grows."""
        self._waiting: Final[list[_Turn]] = []
        """A heap. A turn that is over stays in it until it comes to the top."""
        self._orders: Final[Iterator[int]] = itertools.count()

    @property
    def rate(self) -> int | None:
        """Bytes a second; None if there is no limit. It may change at any time, with effect at once."""
        return self._rate

    @rate.setter
    def rate(self, rate: int | None) -> None:
        if rate is None or self._rate is None:
            self._next_at = 0.0
        else:
            # What is still to wait for the last bytes is scaled to the new rate.
            left = max(0.0, self._next_at - trio.current_time())
            self._next_at += left * (self._rate / rate - 1)
        self._rate = rate
        self._wake_next()

    @property
    def portion(self) -> int:
        """How many bytes a pump should request at most."""
        rate = self._rate
        if rate is None:
            return _LARGEST_PORTION
        portion = max(_LEAST_PORTION, min(_LARGEST_PORTION, int(rate * _TURN)))
        return max(1, min(portion, int(rate * _LONGEST_TURN)))

    async def take(self, after: int, count: int) -> int:
        """Wait until ``count`` more bytes may go, for a pairing whose last turn had the number ``after``.

        Returns the number of this turn. A caller that is cancelled has taken no turn.
        """
        if self.rate is None:
            return after
        turn = _Turn(max(self._stands_at, after) + count, next(self._orders))
        first = self._next()
        heappush(self._waiting, turn)
        if first is not None and turn < first:
            first.woken.set()  # it was next, and is not any more
        try:
            while not self._may_go(turn):
                turn.woken = trio.Event()
                with trio.move_on_at(self._next_at if self._next() is turn else math.inf):
                    await turn.woken.wait()
            rate = self.rate
            if rate is not None:
                self._next_at = max(self._next_at, trio.current_time() - _SAVED) + count / rate
                self._stands_at = max(self._stands_at, turn.number - count)
        finally:
            turn.is_over = True
            self._wake_next()
        return turn.number

    def _may_go(self, turn: _Turn) -> bool:
        return self._rate is None or (self._next() is turn and trio.current_time() >= self._next_at)

    def _next(self) -> _Turn | None:
        waiting = self._waiting
        while waiting and waiting[0].is_over:
            heappop(waiting)
        return waiting[0] if waiting else None

    def _wake_next(self) -> None:
        """Have the next turn check the clock again."""
        if (turn := self._next()) is not None:
            turn.woken.set()


class Share:
    """One pairing's share of its route's budget, which both of its pumps spend."""

    __slots__ = ("_bandwidth", "_last", "_one_at_a_time")

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth: Final = bandwidth
        self._one_at_a_time: Final = trio.Lock()
        self._last = 0

    @property
    def portion(self) -> int:
        """How many bytes to request at most."""
        return self._bandwidth.portion

    async def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may go, after those that the other direction has requested."""
        async with self._one_at_a_time:
            while count > 0:
                # The rate, and with it the portion, may have fallen since these bytes were read.
                portion = min(count, self.portion)
                self._last = await self._bandwidth.take(self._last, portion)
                count -= portion
