"""How fast a route may go: one budget of bytes a second, shared by its pairings.

Every byte that the relay carries costs it one in and one out, whichever way it goes. So the budget is the route's as a
whole: all its pairings, both directions together.

It is a token bucket, kept as the one number that such a bucket needs: the moment up to which the budget is spent
already. Whoever has bytes to deliver adds their price to it, and waits for the moment that stood there before. So the
order of asking is the order of going, nobody has to be woken to fill the bucket, and it costs nothing while no bytes
flow.

Two rules make it fair. A pump asks for a small portion at a time, and does not read on before that is delivered; so
those who have much to send take turns, and the sender's kernel holds the rest back. And a pairing asks for one portion
at a time (:class:`Share`), so one that is busy both ways gets no more than one that is busy one way.
"""

from __future__ import annotations

from typing import Final

import trio

__all__ = ["Bandwidth", "Share"]

# A turn is this long, in seconds, where the portion's bounds allow it: short enough that many who take turns all seem
# to flow, long enough that fifty wake-ups a second do for a route.
_TURN: Final = 0.02
# Less than this is not worth a wake-up and, in a tunnel, a TLS record; more than this no pump reads at once.
_LEAST_PORTION: Final = 1024
_LARGEST_PORTION: Final = 64 * 1024
# How much unspent time may be made up for, in seconds. Timers are late, and what is lost each time would add up; and
# what comes of it is a burst after silence, which over 5 s is still within 5 % of the rate.
_SAVED: Final = 0.25


class Bandwidth:
    """The budget of one route."""

    __slots__ = ("_spent_until", "rate")

    def __init__(self, rate: int) -> None:
        self.rate: int | None = rate
        """Bytes a second; None for no bound. May be changed at any time, and counts from the next portion on."""
        self._spent_until = 0.0

    @property
    def portion(self) -> int:
        """How many bytes a pump should ask for at most."""
        if self.rate is None:
            return _LARGEST_PORTION
        return max(_LEAST_PORTION, min(_LARGEST_PORTION, int(self.rate * _TURN)))

    async def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may go."""
        if self.rate is None:
            return
        turn = max(self._spent_until, trio.current_time() - _SAVED)
        self._spent_until = turn + count / self.rate
        await trio.sleep_until(turn)


class Share:
    """One pairing's part of a route's budget, whatever that comes to; both of its pumps draw on it."""

    __slots__ = ("_bandwidth", "_turn")

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth: Final = bandwidth
        self._turn: Final = trio.Lock()

    @property
    def portion(self) -> int:
        """How many bytes to ask for at most."""
        return self._bandwidth.portion

    async def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may go, behind those that the other direction has asked for."""
        async with self._turn:
            await self._bandwidth.spend(count)
