"""Tickets: a raw leg for parties whose TLS library cannot give the socket back (docs/protocol.md, section 7).

The party gets 32 random bytes in PAIRED, and sends them on a second, plain TCP connection to the same address. That
connection then *is* the leg. Anyone who has the ticket can take the leg, so it is valid once, for a few seconds, at the
listeners of its route. A caller with a wrong ticket gets no answer, so it learns nothing.

Tickets are looked up by their SHA-256, so that the time of a look-up does not help to guess a ticket. The last
comparison takes constant time as well.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import socket
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import trio

from frelay.net.slots import Slot
from frelay.net.sockets import close_with_reset

__all__ = ["TICKET_LINE_LENGTH", "PendingTicket", "TicketIssuer", "TicketRegistry", "parse_ticket_line"]

_LINE: Final = re.compile(rb"FRELAY/1 ([0-9a-f]{64})\n\Z")
TICKET_LINE_LENGTH: Final = len("FRELAY/1 ") + 64 + 1
"""A ticket line has exactly this many bytes, so it can be read without touching a byte of what follows it."""


def parse_ticket_line(line: bytes) -> str | None:
    """The ticket in a whole line, or None if it is no ticket line."""
    found = _LINE.match(line)
    return found[1].decode("ascii") if found else None


class PendingTicket:
    """One ticket that was issued and not used yet. The connection that brings it becomes the leg's."""

    __slots__ = ("_brought", "_listeners", "arrived", "ticket")

    def __init__(self, listeners: frozenset[Hashable]) -> None:
        self.ticket: Final = secrets.token_hex(32)
        self.arrived: Final = trio.Event()
        self._brought: tuple[socket.socket, Slot] | None = None
        self._listeners: Final = listeners

    def fits(self, ticket: str, listener: Hashable) -> bool:
        """Whether ``ticket``, shown at ``listener``, is this one."""
        return hmac.compare_digest(self.ticket, ticket) and listener in self._listeners

    def bring(self, sock: socket.socket, slot: Slot) -> None:
        """The connection ``sock`` brought the ticket."""
        self._brought = (sock, slot)
        self.arrived.set()

    def take(self) -> tuple[socket.socket, Slot]:
        """The connection that brought the ticket; from now on the caller closes it."""
        if self._brought is None:
            raise AssertionError("nobody has brought this ticket")
        brought, self._brought = self._brought, None
        return brought

    def drop(self) -> None:
        """Close a connection that brought the ticket and was not taken, because the leg ended at the same moment."""
        if self._brought is not None:
            sock, slot = self.take()
            close_with_reset(sock)
            slot.release()


class TicketRegistry:
    """All tickets of this relay that are issued and not used yet."""

    def __init__(self) -> None:
        self._pending: Final[dict[bytes, PendingTicket]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    @contextmanager
    def issue(self, listeners: frozenset[Hashable]) -> Iterator[PendingTicket]:
        """A new ticket for one leg; it becomes invalid when the context is left."""
        pending = PendingTicket(listeners)
        key = _key(pending.ticket)
        self._pending[key] = pending
        try:
            yield pending
        finally:
            self._pending.pop(key, None)
            pending.drop()

    def redeem(self, ticket: str, listener: Hashable, sock: socket.socket, slot: Slot) -> bool:
        """Give ``sock`` to the leg that waits for ``ticket``; False if there is none, and then nothing has changed."""
        pending = self._pending.get(_key(ticket))
        if pending is None or not pending.fits(ticket, listener):
            return False
        del self._pending[_key(ticket)]
        pending.bring(sock, slot)
        return True


class TicketIssuer:
    """Issues the tickets for the legs of one route. They are valid at any of its listeners."""

    __slots__ = ("_listeners", "_registry", "timeout")

    def __init__(self, registry: TicketRegistry, listeners: Iterable[Hashable], timeout: float) -> None:
        self._registry: Final = registry
        self._listeners: Final = frozenset(listeners)
        self.timeout: Final = timeout
        """How long a ticket is valid, in seconds."""

    def issue(self) -> AbstractContextManager[PendingTicket]:
        """A new ticket; it becomes invalid when the context is left."""
        return self._registry.issue(self._listeners)


def _key(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode("ascii")).digest()
