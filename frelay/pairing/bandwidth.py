"""How fast a route may go: one budget of bytes a second, shared by its pairings.

Every byte that the relay carries costs it one in and one out, whichever way it goes. So the budget is the route's as a
whole: all its pairings, both directions together.

It is a token bucket, kept as the one number that such a bucket needs: the moment from which on the next bytes may go.
A turn is paid for when it is taken, and not when it is asked for. So a pairing that ends while it waits leaves nothing
behind that others would have to wait for.

Who takes the next turn is decided by fair queueing. A turn that is asked for gets a number: the bytes that its pairing
has sent, itself included, counted from where the turns stand when it asks. The lowest number goes first. So those who
have much to send take turns, and ten bytes go before the next kilobyte of anybody.

A pump asks for a small portion at a time, and does not read on before that is delivered; so the sender's kernel holds
the rest back. And a pairing asks for one portion at a time (:class:`Share`), so one that is busy both ways gets no more
than one that is busy one way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Final

import trio

__all__ = ["Bandwidth", "Share"]

# A turn is this long, in seconds, where the portion's bounds allow it: short enough that many who take turns all seem
# to flow, long enough that fifty wake-ups a second do for a route.
_TURN: Final = 0.02
# Less than this is not worth a wake-up and, in a tunnel, a TLS record; more than this no pump reads at once.
_LEAST_PORTION: Final = 1024
_LARGEST_PORTION: Final = 64 * 1024
# But no turn is longer than this, in seconds, however low the rate: somebody else's few bytes may be next.
_LONGEST_TURN: Final = 0.2
# How much unspent time may be made up for, in seconds. Timers are late, and what is lost each time would add up; and
# what comes of it is a burst after silence, which over 5 s is still within 5 % of the rate.
_SAVED: Final = 0.25


class _Turn:
    """A portion that a pairing waits for."""

    __slots__ = ("is_over", "number", "order", "woken")

    def __init__(self, number: int, order: int) -> None:
        self.number: Final = number
        self.order: Final = order
        self.woken = trio.Event()
        self.is_over = False
        """Whether it was taken, or its pump has gone."""

    def __lt__(self, other: _Turn) -> bool:
        return (self.number, self.order) < (other.number, other.order)


class Bandwidth:
    """The budget of one route, in bytes a second."""

    def __init__(self, rate: int) -> None:
        self._rate: int | None = rate
        self._next_at = 0.0
        """The moment from which on the next portion may go (Trio's clock)."""
        self._stands_at = 0
        """Where the turn began that was taken last: its number less its own bytes. It never falls."""
        self._waiting: Final[list[_Turn]] = []
        """A heap; it also holds turns that are over, until they come to its top."""
        self._orders: Final[Iterator[int]] = itertools.count()

    @property
    def rate(self) -> int | None:
        """Bytes a second; None for no bound. May be changed at any time, and counts at once."""
        return self._rate

    @rate.setter
    def rate(self, rate: int | None) -> None:
        if rate is None or self._rate is None:
            self._next_at = 0.0
        else:
            # The bytes that went last are paid for at the new price.
            left = max(0.0, self._next_at - trio.current_time())
            self._next_at += left * (self._rate / rate - 1)
        self._rate = rate
        self._wake_next()

    @property
    def portion(self) -> int:
        """How many bytes a pump should ask for at most."""
        rate = self._rate
        if rate is None:
            return _LARGEST_PORTION
        portion = max(_LEAST_PORTION, min(_LARGEST_PORTION, int(rate * _TURN)))
        return max(1, min(portion, int(rate * _LONGEST_TURN)))

    async def take(self, after: int, count: int) -> int:
        """Wait until ``count`` more bytes may go, for a pairing whose last turn had the number ``after``.

        Gives the number of this turn. A caller that is cancelled has taken none.
        """
        if self.rate is None:
            return after
        turn = _Turn(max(self._stands_at, after) + count, next(self._orders))
        first = self._next()
        heappush(self._waiting, turn)
        if first is not None and turn < first:
            first.woken.set()  # it is not the next any more
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
        """Have the next one look at the clock again."""
        if (turn := self._next()) is not None:
            turn.woken.set()


class Share:
    """One pairing's part of a route's budget, whatever that comes to; both of its pumps draw on it."""

    __slots__ = ("_bandwidth", "_last", "_one_at_a_time")

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth: Final = bandwidth
        self._one_at_a_time: Final = trio.Lock()
        self._last = 0

    @property
    def portion(self) -> int:
        """How many bytes to ask for at most."""
        return self._bandwidth.portion

    async def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may go, behind those that the other direction has asked for."""
        async with self._one_at_a_time:
            while count > 0:
                # They may have been read when the rate, and with it the portion, was a higher one.
                portion = min(count, self.portion)
                self._last = await self._bandwidth.take(self._last, portion)
                count -= portion
