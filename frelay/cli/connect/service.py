"""``frelay connect --to``: each pairing dials a local service.

It is a listener (:mod:`frelay.client.trio.listening`) whose wires lead to a service. One leg always waits at the relay,
so that a caller finds it at once, and up to eight while callers queue. Waiting and paired legs together are at most
``concurrency``; more callers wait at the relay. It differs from ``frelay.client.trio.listen`` in what a failure means:

* a refusal that no pause mends ends it at once, after the pairings that run; with ``always`` nothing does;
* a certificate file that cannot be read never ends it: it was good when we started, so an operator is replacing it;
* a pairing with another ``--to`` concerns all legs: nobody calls here.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import trio

from frelay.cli.connect.address import LocalError, dial_local
from frelay.cli.connect.bridge import Broken, bridge
from frelay.cli.connect.join import Joiner, back_off, exit_code
from frelay.cli.connect.listen import raise_descriptor_limit
from frelay.cli.connect.report import Report
from frelay.cli.connect.service_mark import MetAnotherService, check_first_bytes
from frelay.client.options import JoinPlan
from frelay.client.retry import Retry
from frelay.client.standing import Leg, Rejoin, Standing, Tell
from frelay.client.trio import TrioListener, TrioWire
from frelay.client.trio.listening import OnStatus, running
from frelay.errors import CertificateError, FrelayError
from frelay.protocol.messages import Message, Waiting

__all__ = ["Service"]

MOST_WAITING: Final = 8
# An operator who corrects a fault waits to see it work. So this is shorter than the longest pause of a function.
_LONGEST_PAUSE: Final = 15.0
# A pairing that ended by a bug of ours keeps its slot this long, so that the next ones cannot keep us busy.
_PAUSE_AFTER_BUG: Final = 1.0


class _Bug(FrelayError):
    """An unexpected error in a join, which is reported already."""


class _RejoinAsService(Rejoin):
    """What ends a ``--to``: see the head of this module."""

    def __init__(self, retry: Retry | None, *, always: bool) -> None:
        super().__init__(retry or Retry(longest=_LONGEST_PAUSE))
        self._backoff: Final = Retry(longest=min(_LONGEST_PAUSE, self._retry.longest))
        self._always: Final = always
        self._services_met = 0
        """How many pairings in a row were with another ``--to``."""

    def served(self) -> None:
        """A pairing has ended as it should."""
        self._services_met = 0

    def after(self, error: FrelayError) -> float | None:
        failures = self._failures
        self._failures += 1
        if isinstance(error, MetAnotherService):
            self._services_met += 1
            return back_off(self._backoff, error, self._services_met)
        if self._always:
            return back_off(self._backoff, error, failures)
        if self._retry.tries is not None and failures >= self._retry.tries:
            return None
        if isinstance(error, CertificateError | _Bug):
            return back_off(self._backoff, error, failures)
        return self._retry.pause_after(error, 0, failures)

    def concerns_all(self, error: FrelayError) -> bool:
        return isinstance(error, MetAnotherService)


class Service:
    """Serves the callers of one local service, and keeps as many legs waiting as it expects callers."""

    def __init__(
        self, address: str, joiner: Joiner, retry: Retry | None, report: Report, *, concurrency: int, always: bool
    ) -> None:
        self._address: Final = address
        self._joiner: Final = joiner
        self._report: Final = report
        self._concurrency: Final = concurrency
        self._rejoin: Final = _RejoinAsService(retry, always=always)
        self._has_reported_waiting = False

    async def serve(self) -> int:
        """Serve until cancelled, or until a lasting failure and the end of the pairings that run then."""
        raise_descriptor_limit()
        legs = Standing(
            self._joiner.plans,
            self._rejoin,
            trio.current_time,
            lowest=1,
            highest=MOST_WAITING,
            most=self._concurrency,
        )
        listener = TrioListener(legs, self._tell, self._on_status, self._join)
        async with trio.open_nursery() as pairings, running(listener):
            try:
                while True:
                    leg, wire = await listener.accept_leg()
                    pairings.start_soon(self._serve, listener, leg, wire)
            except FrelayError as error:
                self._report.fail(error)
                code = exit_code(error)
        return code

    # --- what the listener asks and tells ------------------------------------------------------------------------

    async def _join(self, plan: JoinPlan, on_status: OnStatus) -> TrioWire:
        try:
            return await self._joiner.join_as_service(plan, on_status)
        except FrelayError:
            raise
        except Exception as error:
            # A bug of ours or of a library ends this leg, not the service with all the others.
            self._report.bug(error)
            raise _Bug(str(error)) from error

    def _on_status(self, message: Message) -> None:
        is_new = not (isinstance(message, Waiting) and self._has_reported_waiting)
        self._has_reported_waiting = self._has_reported_waiting or isinstance(message, Waiting)
        self._report.status(message, is_new=is_new)

    def _tell(self, told: Tell) -> None:
        if not isinstance(told.error, _Bug):
            self._report.fail(told.error, pause=told.pause)
        if told.pause is not None:
            self._has_reported_waiting = False

    # --- one pairing ---------------------------------------------------------------------------------------------

    async def _serve(self, listener: TrioListener, leg: Leg, wire: TrioWire) -> None:
        """Serve one caller to the end of its pairing. Raises nothing."""
        try:
            await self._bridge(listener, wire)
        except Exception as error:
            # A bug of ours or of a library ends this pairing, not the service with all the others.
            self._report.bug(error)
            await trio.sleep(_PAUSE_AFTER_BUG)
        finally:
            listener.release(leg)

    async def _bridge(self, listener: TrioListener, wire: TrioWire) -> None:
        try:
            local = await dial_local(self._address)
        except BaseException as error:
            await trio.aclose_forcefully(wire)
            if not isinstance(error, LocalError):
                raise
            self._report.fail(error)
            return
        try:
            await bridge(local, wire, self._report, partial(check_first_bytes, wire))
            await local.aclose()
            self._rejoin.served()
        except MetAnotherService as error:
            listener.stumble(error)
        except Broken as error:
            self._report.fail(error)
        finally:
            local.cut()
