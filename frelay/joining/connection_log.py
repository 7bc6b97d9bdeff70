"""What the log and the journal are told of one connection.

A connection becomes known step by step: first its address, then its certificate, then the route and the party. Every
line of the log and every refusal in the journal has what is known by then.
"""

from __future__ import annotations

from typing import Any, Final

import structlog

from frelay.joining.accept_context import SharedParts
from frelay.journal import LegRefused
from frelay.pairing.leg import Leg
from frelay.protocol.refusal import Refusal

__all__ = ["ConnectionLog", "refuse"]


class ConnectionLog:
    """One connection in the log and the journal."""

    __slots__ = ("_address", "_certificate", "_leg", "_logger", "_only_route", "_route", "_shared")

    def __init__(self, address: str, only_route: str | None, shared: SharedParts) -> None:
        self._address = address
        self._only_route: Final = only_route
        """The route of the listener, if there is only one: the connection can be meant for no other."""
        self._shared: Final = shared
        self._certificate: str | None = None
        self._leg: Leg | None = None
        self._route: str | None = None
        self._logger: Any = structlog.get_logger("frelay.reception").bind(address=address)

    def note_address(self, address: str) -> None:
        """A PROXY header said that the connection comes from ``address``."""
        self._address = address
        self._logger = self._logger.bind(address=address)

    def note_certificate(self, certificate: str | None) -> None:
        """A certificate was shown; ``certificate`` describes it in one line."""
        self._certificate = certificate
        self._logger = self._logger.bind(certificate=certificate)

    def note_trace(self, traceparent: str) -> None:
        """The function said of which trace its leg is a part."""
        self._logger = self._logger.bind(traceparent=traceparent)

    def note_route(self, leg: Leg, route: str) -> None:
        """``leg`` was let in to ``route``."""
        self._leg, self._route = leg, route
        key = {} if leg.meet is None else {"meet": leg.meet}
        self._logger = self._logger.bind(route=route, party=leg.party, identity=leg.identity, **key)

    def info(self, event: str, **values: Any) -> None:
        """Write a line with what is known of the connection."""
        self._logger.info(event, **values)

    def note_refusal(self, refusal: Refusal) -> None:
        """The connection was refused."""
        leg = self._leg
        entry = LegRefused(
            code=refusal.code,
            reason=refusal.logged,
            address=self._address,
            route=self._route or self._only_route,
            party=None if leg is None else leg.party,
            identity=None if leg is None else leg.identity,
            meet=None if leg is None else leg.meet,
            certificate=self._certificate,
        )
        if self._certificate is None and self._route is None:
            self._shared.strangers_refused.note(entry)
            return
        self._logger.warning("refused", code=refusal.code, reason=refusal.logged)
        self._shared.journal.note(entry)


async def refuse(leg: Leg, refusal: Refusal, log: ConnectionLog) -> None:
    """Refuse a leg: note it, give its place among the strangers back, and tell its function."""
    log.note_refusal(refusal)
    leg.slot.note_refused()
    await leg.refuse(refusal)
