"""``frelay connect --to``: each pairing dials a local service.

Theory of operation. A *leg* here is one task from JOIN to the end of its pairing. One leg always waits at the relay, so
that a caller finds it. Where legs are taken as soon as they wait, callers are queueing: then twice as many are kept
waiting, up to eight, and one again once nobody has come for some seconds. Waiting and paired legs together are at most
``concurrency``; what comes beyond that waits at the relay.

Surplus legs are given up newest first and by halves. The relay pairs the oldest first, so the leg that we give up is
not the one that a caller gets at that moment.

A failure before PAIRED concerns all legs alike (no relay, not let in), as does a meeting with another ``--to``: it is
said once, and no leg is started before a pause has passed. Any other failure after PAIRED is this caller's own. It
delays nobody else, but its place is held for a moment, so that a caller who fails again and again cannot keep this
process busy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from frelay.cli.connect.address import LocalError, dial_local
from frelay.cli.connect.bridge import Broken, bridge
from frelay.cli.connect.join import Joiner, back_off, exit_code, is_nobody_came
from frelay.cli.connect.listen import raise_descriptor_limit
from frelay.cli.connect.report import Report
from frelay.cli.connect.service_mark import MetAnotherService, check_first_bytes
from frelay.client.retry import Retry
from frelay.client.trio import TrioWire
from frelay.errors import CertificateError, FrelayError, Refused
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["Service"]

MOST_WAITING: Final = 8
# A leg that waited for less had its caller queueing. A join takes two or three round trips, so this is many of them.
_QUICK: Final = 1.0
# Without a caller for this long the surplus goes, half of it at a time.
_IDLE: Final = 5.0
_IDLE_STEP: Final = 2.0
_LOOK: Final = 0.5
# An operator who mends a fault watches whether it works: not the half minute of a function's own retries.
_LONGEST_PAUSE: Final = 15.0
# What a place is held for after pairings that failed one after the other.
_FIRST_PENALTY: Final = 0.1
_LONGEST_PENALTY: Final = 5.0


@dataclass(eq=False, slots=True)
class _Leg:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancelled to give the leg up; never once it is paired."""
    since: float | None = None
    """When the relay said WAITING."""
    is_paired: bool = False


class Service:
    """The way to a local service, with as many legs at the relay as there are callers to expect."""

    def __init__(
        self, place: str, joiner: Joiner, retry: Retry | None, report: Report, *, concurrency: int, always: bool
    ) -> None:
        self._place: Final = place
        self._joiner: Final = joiner
        self._retry: Final = retry or Retry(longest=_LONGEST_PAUSE)
        self._pauses: Final = Retry(longest=min(_LONGEST_PAUSE, self._retry.longest))
        self._report: Final = report
        self._concurrency: Final = concurrency
        self._always: Final = always
        self._unpaired: Final[list[_Leg]] = []
        """Oldest first."""
        self._busy = 0
        """Legs that are paired, or hold their place for a moment after a failure."""
        self._wanted = 1
        self._most = MOST_WAITING
        self._last_taken = 0.0
        self._failures = 0
        """Joins in a row that got no WAITING."""
        self._spoilt = 0
        """Pairings in a row that failed before there was a wire."""
        self._meetings = 0
        """How often we have met another ``--to`` in a row."""
        self._failure: FrelayError | None = None
        """Why a leg could not join, until it is dealt with."""
        self._said_waiting = False
        self._news = trio.Event()

    async def serve(self) -> int:
        """Serve until cancelled, or until a failure for good, and then to the end of the pairings under way."""
        raise_descriptor_limit()
        async with trio.open_nursery() as pairings:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_up_surplus)
                error = await self._keep_waiting(pairings)
                nursery.cancel_scope.cancel(reason="the relay refused for good")
            for leg in self._unpaired:
                leg.scope.cancel(reason="the relay refused for good")
        return exit_code(error)

    async def _keep_waiting(self, nursery: trio.Nursery) -> FrelayError:
        """Start legs as they are needed; returns the failure after which that cannot help."""
        while True:
            while self._failure is None and self._lacks_leg():
                leg = _Leg()
                self._unpaired.append(leg)
                nursery.start_soon(self._run, leg)
            await self._news.wait()
            error = self._failure
            if error is None:
                continue
            pause = self._pause_after(error)
            self._report.fail(error, pause=pause)
            if pause is None:
                return error
            self._failures += 1
            self._wanted = 1
            self._said_waiting = False
            await trio.sleep(pause)
            self._failure = None  # what else failed meanwhile failed by the same cause

    def _lacks_leg(self) -> bool:
        self._news = trio.Event()
        return len(self._unpaired) < min(self._wanted, self._concurrency - self._busy)

    def _pause_after(self, error: FrelayError) -> float | None:
        if isinstance(error, MetAnotherService):
            self._meetings += 1
            return back_off(self._pauses, error, self._meetings)
        if self._always:
            return back_off(self._pauses, error, self._failures)
        if self._retry.tries is not None and self._failures >= self._retry.tries:
            return None
        if isinstance(error, CertificateError):
            # They were good when we started: somebody is replacing them.
            return back_off(self._pauses, error, self._failures)
        return self._retry.pause_after(error, 0, self._failures)

    async def _give_up_surplus(self) -> None:
        while True:
            await trio.sleep(_LOOK)
            if trio.current_time() < self._last_taken + _IDLE:
                continue
            if self._wanted == 1:
                self._most = MOST_WAITING
                continue
            self._last_taken = trio.current_time() - _IDLE + _IDLE_STEP
            self._wanted //= 2
            for leg in self._unpaired[self._wanted :]:
                leg.scope.cancel(reason="no caller needs it now")

    # --- one leg -------------------------------------------------------------------------------------------------

    async def _run(self, leg: _Leg) -> None:
        """One leg from JOIN to its end. Raises nothing."""
        try:
            await self._serve_one(leg)
        except Exception as error:
            # A bug of ours, or of a library: it ends this pairing, and not the service with all others.
            self._report.bug(error)
            await self._hold_place()
        finally:
            if leg.is_paired:
                self._busy -= 1
            else:
                self._unpaired.remove(leg)
            self._news.set()

    async def _serve_one(self, leg: _Leg) -> None:
        wire: TrioWire | None = None
        failure: FrelayError | None = None
        with leg.scope:
            try:
                wire = await self._joiner.join_once(
                    self._joiner.wait, lambda message: self._on_status(leg, message), as_service=True
                )
            except FrelayError as error:
                failure = error
        if failure is not None:
            if isinstance(failure, MetAnotherService):
                self._failure = self._failure or failure
            elif leg.is_paired:
                self._report.fail(failure)
                await self._hold_place()
            else:
                self._note(leg, failure)
        if wire is None:
            return
        self._spoilt = 0
        try:
            local = await dial_local(self._place)
        except BaseException as error:
            await trio.aclose_forcefully(wire)
            if not isinstance(error, LocalError):
                raise
            self._report.fail(error)
            return
        try:
            await bridge(local, wire, self._report, partial(check_first_bytes, wire))
            await local.aclose()
            self._meetings = 0
        except MetAnotherService as error:
            self._failure = self._failure or error
        except Broken as error:
            self._report.fail(error)
        finally:
            local.cut()

    def _on_status(self, leg: _Leg, message: Message) -> None:
        if isinstance(message, Waiting):
            leg.since = trio.current_time()
            self._failures = 0
            self._report.status(message, is_news=not self._said_waiting)
            self._said_waiting = True
            return
        self._report.status(message)
        if isinstance(message, Paired) and not leg.is_paired:
            self._take(leg)

    def _take(self, leg: _Leg) -> None:
        """PAIRED: now, not after the inner handshake. A caller that is slow there must not keep the next one out."""
        now = trio.current_time()
        leg.is_paired = True
        self._unpaired.remove(leg)
        self._busy += 1
        self._failures = 0
        self._last_taken = now
        if leg.since is None or now - leg.since < _QUICK:
            self._wanted = min(self._most, self._wanted * 2)
        self._news.set()

    def _note(self, leg: _Leg, error: FrelayError) -> None:
        """A leg did not get as far as PAIRED; ``_keep_waiting`` decides what that means."""
        if is_nobody_came(error) and leg.since is not None:
            return  # which is no failure of a service
        if isinstance(error, Refused) and error.code in ("queue-full", "limit") and len(self._unpaired) > 1:
            # There is room at the relay for those that wait already, and for no more.
            self._most = self._wanted = max(1, len(self._unpaired) - 1)
            return
        if self._failure is None:
            self._failure = error

    async def _hold_place(self) -> None:
        pause = min(_LONGEST_PENALTY, _FIRST_PENALTY * 2.0 ** min(self._spoilt, 16))
        self._spoilt += 1
        await trio.sleep(random.uniform(pause / 2, pause))  # noqa: S311  not a secret
