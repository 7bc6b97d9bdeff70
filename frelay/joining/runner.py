"""The runner gives each pairing its task, and does the book-keeping when a pairing starts and when it has ended.

At the start it charges the descriptors of both legs to their holders and notes the start in the journal. At the end it
notes the record, takes the pairing out of its route, and releases the slots of both legs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from frelay.joining.route import LiveRoute
from frelay.joining.routes import RouteRegistry
from frelay.journal import Journal, PairingEnded, PairingStarted
from frelay.pairing.pairing import Pairing
from frelay.protocol.outcome import Outcome

__all__ = ["PairingRunner"]


class PairingRunner:
    """Runs the pairings of one relay. Open it with :meth:`open`; then :meth:`start` may be called."""

    def __init__(self, routes: RouteRegistry, journal: Journal) -> None:
        self._routes: Final = routes
        self._journal: Final = journal
        self._nursery: trio.Nursery | None = None
        self.was_cut = False
        """Whether the end of the relay has cut a pairing."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The scope in which pairings run; it ends once all of them have ended."""
        async with trio.open_nursery() as self._nursery:
            yield

    def start(self, pairing: Pairing, route: LiveRoute) -> None:
        """Give ``pairing``, which ``route`` has just matched, the task that it runs in."""
        if self._nursery is None:
            raise AssertionError("a pairing before the relay runs")
        legs = pairing.legs
        one, two = legs.values()
        one.slot.charge(route.charges.paired(one, two))
        two.slot.charge(route.charges.paired(two, one))
        self._journal.note(
            PairingStarted(
                pairing=pairing.id,
                route=route.name,
                func1=legs["func1"].identity,
                func2=legs["func2"].identity,
                waited=pairing.waited,
                meet=pairing.meet,
            )
        )
        self._nursery.start_soon(self._run, pairing, route)

    async def _run(self, pairing: Pairing, route: LiveRoute) -> None:
        try:
            await pairing.run()
        finally:
            if pairing.record is not None:
                self.was_cut |= pairing.record.outcome is Outcome.DRAINED
                self._journal.note(PairingEnded(record=pairing.record))
            self._routes.unpair(route, pairing)
            for leg in pairing.legs.values():
                leg.slot.release()
