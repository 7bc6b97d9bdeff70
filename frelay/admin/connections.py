"""How many connections an HTTP server may have at once, and which one is closed to make room for a new one.

A new connection never waits for one that a client only keeps open. When all slots are taken, a connection that waits
for its client is closed: its client has sent no request yet, has sent none since the last answer, or does not read. It
is the one that waits longest, among the connections of the address that has the most. So a caller with many connections
loses its own, and an operator's only connection stays. A connection for which the relay is working is never closed: a
request that is being answered, an event stream whose reader keeps up.

Among connections of one address this rule alone would let a flood close each connection before it can send anything. So
there, and between addresses with equally many connections, a client has a grace period for each of its steps:
:data:`GRACE` seconds with TLS, and :data:`PLAIN_GRACE` without, where a client sends its request when it connects.

Addresses are counted as :func:`holder_of` says. This module knows nothing of HTTP.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Final

import structlog
import trio

from frelay.net.shares import address_unit

__all__ = ["GRACE", "PLAIN_GRACE", "ConnectionSlot", "ConnectionSlots", "holder_of"]

GRACE: Final = 0.5
"""Seconds. Each step of a handshake or a request takes less, even around half of the earth."""
PLAIN_GRACE: Final = 0.2
"""Seconds. The first request needs no round trip after the connection, so only the relay's own delays count."""

# Seconds between two log lines, however many connections were closed.
_LOG_INTERVAL: Final = 10.0


def holder_of(address: Any) -> str:
    """The holder of a connection from ``address``, which is what ``getpeername`` gives.

    An IPv4 address is one holder. An IPv6 /64 network is one holder, because one machine may have all its addresses.
    All callers of a Unix socket are one holder.
    """
    if not isinstance(address, tuple):
        return "unix"
    try:
        return str(address_unit(str(address[0])))
    except ValueError:
        return str(address[0])


class ConnectionSlot:
    """The slot of one connection. The connection runs inside :attr:`scope`, which is cancelled to close it."""

    def __init__(self, owner: ConnectionSlots, holder: str) -> None:
        self.holder: Final = holder
        self.scope: Final = trio.CancelScope()
        self._owner: Final = owner
        self._since: float | None = trio.current_time()

    @property
    def waits_since(self) -> float | None:
        """When the connection began to wait for its client, on Trio's clock; None while the relay works for it."""
        return self._since

    @property
    def is_wanted(self) -> bool:
        """Whether a new connection waits for a slot, so that this one should close after its answer."""
        return self._owner.is_wanted

    def clients_turn(self) -> None:
        """The next step is the client's. Call this once for each step, never for a single byte."""
        self._since = trio.current_time()
        self._owner.wake_newcomers()

    def our_turn(self) -> None:
        """The next step is the relay's."""
        self._since = None

    def give_back(self) -> None:
        """The connection is closed."""
        self._owner.give_back(self)


class ConnectionSlots:
    """The slots of one server: ``most`` of them, at least 1. ``grace`` is in seconds."""

    def __init__(self, most: int, *, grace: float = GRACE) -> None:
        self.most: Final = max(1, most)
        self._grace: Final = grace
        self._taken: Final[set[ConnectionSlot]] = set()
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
        """Whether a new connection waits for a slot."""
        return self._waiting > 0

    async def take(self, holder: str) -> ConnectionSlot:
        """A slot for a new connection of ``holder``. Closes another connection if all slots are taken."""
        await trio.lowlevel.checkpoint()
        if len(self._taken) >= self.most:
            await self._make_room(holder)
        slot = ConnectionSlot(self, holder)
        self._taken.add(slot)
        self._by_holder[holder] += 1
        return slot

    async def _make_room(self, holder: str) -> None:
        self._waiting += 1
        chosen: ConnectionSlot | None = None
        try:
            while len(self._taken) >= self.most:
                self._change = change = trio.Event() if self._change.is_set() else self._change
                wakes_at = math.inf
                if chosen not in self._taken:
                    chosen, wakes_at = self._choose(holder)
                    if chosen is not None:
                        self._note_closed(chosen)
                        chosen.scope.cancel(reason="its slot was needed for another connection")
                with trio.move_on_at(wakes_at):
                    await change.wait()
        finally:
            self._waiting -= 1

    def _choose(self, holder: str) -> tuple[ConnectionSlot | None, float]:
        """The slot to free for a new connection of ``holder``; or None, and when to choose again."""
        own, now, again = self._by_holder[holder], trio.current_time(), math.inf
        best: tuple[int, float] | None = None
        chosen: ConnectionSlot | None = None
        for slot in self._taken:
            since, count = slot.waits_since, self._by_holder[slot.holder]
            if since is None or slot.scope.cancel_called:
                continue
            if slot.holder != holder and count <= own:
                continue  # A holder with fewer connections loses none to a holder with more.
            if count <= own + 1 and since + self._grace > now:
                again = min(again, since + self._grace)
                continue
            rank = (-count, since)
            if best is None or rank < best:
                best, chosen = rank, slot
        return chosen, again

    def wake_newcomers(self) -> None:
        """Have the connections that wait for a slot choose again: a slot is free, or another may be closed now."""
        if self._waiting:
            self._change.set()

    def give_back(self, slot: ConnectionSlot) -> None:
        """``slot`` is free. Idempotent."""
        if slot in self._taken:
            self._taken.discard(slot)
            self._by_holder[slot.holder] -= 1
            if not self._by_holder[slot.holder]:
                del self._by_holder[slot.holder]
            self.wake_newcomers()

    def _note_closed(self, slot: ConnectionSlot) -> None:
        self._closed += 1
        if trio.current_time() >= self._logged_at + _LOG_INTERVAL:
            self._log.warning(
                "HTTP connections closed to make room",
                connections=self._closed,
                address=slot.holder,
                places=self.most,
            )
            self._closed, self._logged_at = 0, trio.current_time()
