"""The places of an HTTP server: how many connections there are at once, whose they are, and which one has to go.

A newcomer never waits for somebody who only keeps a connection open. When all places are taken, one that waits for its
client is closed: it has sent no request yet, or none since the last answer, or it does not read. It is taken from the
address that has the most connections, and there it is the one that waits longest. So a caller with many connections
closes its own, and an operator's one connection stays. A connection that the relay itself works for is never closed:
a request that is being answered, an event stream that is up to date.

Among connections of one address that rule alone would let a flood close everything before it can speak. There, and
between addresses that have equally many, a connection has a grace for each step that is up to the client: with TLS
:data:`GRACE` seconds, and :data:`PLAIN_GRACE` without, where a client sends its whole request when it connects.

Addresses are counted as :func:`holder_of` says. This module knows nothing of HTTP.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from typing import Any, Final

import structlog
import trio

__all__ = ["GRACE", "PLAIN_GRACE", "Place", "Places", "holder_of"]

GRACE: Final = 0.5
"""Seconds: a handshake and a request over half of the earth take less for each of their steps."""
PLAIN_GRACE: Final = 0.2
"""Seconds: no round trip lies between a connection and its first request, only the relay's own delays."""

# At most one line in so many seconds, however many connections were closed.
_LOG_PAUSE: Final = 10.0
_IPV6_PREFIX: Final = 64


def holder_of(address: Any) -> str:
    """Who holds a connection that comes from ``address``, as ``getpeername`` gives it.

    An IPv4 address is one holder and so is an IPv6 network of 64 bits, because one machine has all addresses of it. All
    callers of a Unix socket are one holder.
    """
    if not isinstance(address, tuple):
        return "unix"
    try:
        found = ipaddress.ip_address(str(address[0]).partition("%")[0])
    except ValueError:
        return str(address[0])
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _IPV6_PREFIX), strict=False))


class Place:
    """The place of one connection. What the connection does is done in :attr:`scope`, which ends it."""

    def __init__(self, owner: Places, holder: str) -> None:
        self.holder: Final = holder
        self.scope: Final = trio.CancelScope()
        self._owner: Final = owner
        self._since: float | None = trio.current_time()

    @property
    def waits_since(self) -> float | None:
        """Since when the connection waits for its client, on Trio's clock; None while the relay works for it."""
        return self._since

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a place, so that this one should be given up when its request is answered."""
        return self._owner.is_wanted

    def clients_turn(self) -> None:
        """From now on the client has to do something. Say so again for each step, never for a single byte."""
        self._since = trio.current_time()
        self._owner.changed()

    def our_turn(self) -> None:
        """From now on the relay has to do something."""
        self._since = None

    def give_back(self) -> None:
        """The connection is closed."""
        self._owner.give_back(self)


class Places:
    """The places of one server; there are ``most``, at least 1, and ``grace`` is in seconds."""

    def __init__(self, most: int, *, grace: float = GRACE) -> None:
        self.most: Final = max(1, most)
        self._grace: Final = grace
        self._taken: Final[set[Place]] = set()
        self._by_holder: Final[Counter[str]] = Counter()
        self._waiting = 0
        self._change = trio.Event()
        self._closed = 0
        self._logged_at = -math.inf
        self._log: Final[Any] = structlog.get_logger("frelay.admin")

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a place."""
        return self._waiting > 0

    async def take(self, holder: str) -> Place:
        """A place for a new connection of ``holder``, for which another one may have to go."""
        await trio.lowlevel.checkpoint()
        if len(self._taken) >= self.most:
            await self._make_room(holder)
        place = Place(self, holder)
        self._taken.add(place)
        self._by_holder[holder] += 1
        return place

    async def _make_room(self, holder: str) -> None:
        self._waiting += 1
        chosen: Place | None = None
        try:
            while len(self._taken) >= self.most:
                self._change = change = trio.Event() if self._change.is_set() else self._change
                wakes_at = math.inf
                if chosen not in self._taken:
                    chosen, wakes_at = self._choose(holder)
                    if chosen is not None:
                        self._note_closed(chosen)
                        chosen.scope.cancel(reason="its place was needed for another connection")
                with trio.move_on_at(wakes_at):
                    await change.wait()
        finally:
            self._waiting -= 1

    def _choose(self, holder: str) -> tuple[Place | None, float]:
        """Who has to go for a newcomer of ``holder``; or nobody, and when to look again."""
        own, now, again = self._by_holder[holder], trio.current_time(), math.inf
        best: tuple[int, float] | None = None
        chosen: Place | None = None
        for place in self._taken:
            since, count = place.waits_since, self._by_holder[place.holder]
            if since is None or place.scope.cancel_called:
                continue
            if place.holder != holder and count <= own:
                continue  # nobody who has fewer goes for somebody who has more
            if count <= own + 1 and since + self._grace > now:
                again = min(again, since + self._grace)
                continue
            rank = (-count, since)
            if best is None or rank < best:
                best, chosen = rank, place
        return chosen, again

    def changed(self) -> None:
        """Something changed that those who wait for a place have to look at."""
        if self._waiting:
            self._change.set()

    def give_back(self, place: Place) -> None:
        """``place`` is free. Idempotent."""
        if place in self._taken:
            self._taken.discard(place)
            self._by_holder[place.holder] -= 1
            if not self._by_holder[place.holder]:
                del self._by_holder[place.holder]
            self.changed()

    def _note_closed(self, place: Place) -> None:
        self._closed += 1
        if trio.current_time() >= self._logged_at + _LOG_PAUSE:
            self._log.warning(
                "HTTP connections closed to make room",
                connections=self._closed,
                address=place.holder,
                places=self.most,
            )
            self._closed, self._logged_at = 0, trio.current_time()
