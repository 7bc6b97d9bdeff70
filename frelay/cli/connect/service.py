"""``frelay connect --to``: each pairing dials a local service.

Theory of operation. A leg is a connection of ours to the relay; a task of its own serves it, from JOIN to the end of
its pairing. One leg always waits at the relay, so that a caller finds it at once. If the relay pairs a leg soon after
it began to wait, callers are queueing. Then we keep twice as many legs waiting, up to eight; when no caller has come
for some seconds, we go back to one. Waiting and paired legs together are at most ``concurrency``; more callers wait at
the relay.

We give up surplus legs from the newest on, half of them at a time. The relay pairs the oldest leg first, so a leg that
we give up is not the one that a caller gets at that moment.

A failure before PAIRED (no relay, not admitted) concerns all legs, and so does a pairing with another ``--to``. We
report it once, and start no leg before a pause is over. Any other failure after PAIRED concerns one caller only. It
delays no other caller, but the leg keeps its slot for a moment, so that a caller that fails again and again cannot keep
this process busy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from frelay.cli.connect.address import LocalError, dial_local
from frelay.cli.connect.bridge import Broken, bridge
from frelay.cli.connect.join import Joiner, back_off, exit_code, is_wait_timeout
from frelay.cli.connect.listen import raise_descriptor_limit
from frelay.cli.connect.report import Report
from frelay.cli.connect.service_mark import MetAnotherService, check_first_bytes
from frelay.client.retry import Retry
from frelay.client.trio import TrioWire
from frelay.errors import CertificateError, FrelayError, Refused
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["Service"]

MOST_WAITING: Final = 8
# If a leg waited for less than this, its caller was queueing. A join takes two or three round trips; this is many.
_PAIRED_QUICKLY: Final = 1.0
# When no caller has come for _IDLE seconds we give up half of the surplus, and then half of the rest every _IDLE_STEP.
_IDLE: Final = 5.0
_IDLE_STEP: Final = 2.0
_CHECK_INTERVAL: Final = 0.5
# An operator who corrects a fault waits to see it work. So this is shorter than the longest pause of a function.
_LONGEST_PAUSE: Final = 15.0
# How long a leg keeps its slot after its pairing failed; twice as long after each further failure in a row.
_FIRST_PENALTY: Final = 0.1
_LONGEST_PENALTY: Final = 5.0


@dataclass(eq=False, slots=True)
class _Leg:
    """One connection to the relay, from JOIN to the end of its pairing."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancel it to give the leg up; never after it is paired."""
    since: float | None = None
    """When the relay sent WAITING."""
    is_paired: bool = False


class Service:
    """Serves the callers of one local service, and keeps as many legs waiting as it expects callers."""

    def __init__(
        self, address: str, joiner: Joiner, retry: Retry | None, report: Report, *, concurrency: int, always: bool
    ) -> None:
        self._address: Final = address
        self._joiner: Final = joiner
        self._retry: Final = retry or Retry(longest=_LONGEST_PAUSE)
        self._backoff: Final = Retry(longest=min(_LONGEST_PAUSE, self._retry.longest))
        self._report: Final = report
        self._concurrency: Final = concurrency
        self._always: Final = always
        self._unpaired: Final[list[_Leg]] = []
        """Oldest first."""
        self._taken = 0
        """How many legs are paired, or keep their slot for a moment after a failure."""
        self._target = 1
        """How many legs should wait at the relay."""
        self._most_waiting = MOST_WAITING
        self._keep_surplus_until = 0.0
        self._failures = 0
        """How many joins in a row got no WAITING."""
        self._failed_pairings = 0
        """How many pairings in a row failed before there was a wire."""
        self._services_met = 0
        """How many pairings in a row were with another ``--to``."""
        self._failure: FrelayError | None = None
        """Why a leg could not join, until ``_keep_legs_waiting`` has handled it."""
        self._has_reported_waiting = False
        self._changed = trio.Event()
        """Set when a leg was paired or has ended."""

    async def serve(self) -> int:
        """Serve until cancelled, or until a lasting failure and the end of the pairings that run then."""
        raise_descriptor_limit()
        async with trio.open_nursery() as pairings:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_up_surplus)
                error = await self._keep_legs_waiting(pairings)
                nursery.cancel_scope.cancel(reason="the relay refused for good")
            for leg in self._unpaired:
                leg.scope.cancel(reason="the relay refused for good")
        return exit_code(error)

    async def _keep_legs_waiting(self, nursery: trio.Nursery) -> FrelayError:
        """Start legs when they are needed; returns the failure after which another join cannot help."""
        while True:
            self._changed = trio.Event()
            while self._failure is None and self._needs_leg():
                leg = _Leg()
                self._unpaired.append(leg)
                nursery.start_soon(self._run, leg)
            await self._changed.wait()
            error = self._failure
            if error is None:
                continue
            pause = self._pause_after(error)
            self._report.fail(error, pause=pause)
            if pause is None:
                return error
            self._failures += 1
            self._target = 1
            self._has_reported_waiting = False
            await trio.sleep(pause)
            self._failure = None  # other legs that failed meanwhile had the same cause

    def _needs_leg(self) -> bool:
        return len(self._unpaired) < min(self._target, self._concurrency - self._taken)

    def _pause_after(self, error: FrelayError) -> float | None:
        if isinstance(error, MetAnotherService):
            self._services_met += 1
            return back_off(self._backoff, error, self._services_met)
        if self._always:
            return back_off(self._backoff, error, self._failures)
        if self._retry.tries is not None and self._failures >= self._retry.tries:
            return None
        if isinstance(error, CertificateError):
            # The files were good when we started, so an operator is replacing them now.
            return back_off(self._backoff, error, self._failures)
        return self._retry.pause_after(error, 0, self._failures)

    async def _give_up_surplus(self) -> None:
        while True:
            await trio.sleep(_CHECK_INTERVAL)
            if trio.current_time() < self._keep_surplus_until:
                continue
            if self._target == 1:
                self._most_waiting = MOST_WAITING
                continue
            self._keep_surplus_until = trio.current_time() + _IDLE_STEP
            self._target //= 2
            for leg in self._unpaired[self._target :]:
                leg.scope.cancel(reason="no caller needs it now")

    # --- one leg -------------------------------------------------------------------------------------------------

    async def _run(self, leg: _Leg) -> None:
        """Serve one leg from JOIN to its end. Raises nothing."""
        try:
            await self._serve_one(leg)
        except Exception as error:
            # A bug of ours or of a library ends this pairing, not the service with all the others.
            self._report.bug(error)
            await self._hold_slot()
        finally:
            if leg.is_paired:
                self._taken -= 1
            else:
                self._unpaired.remove(leg)
            self._changed.set()

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
                await self._hold_slot()
            else:
                self._on_join_failed(leg, failure)
        if wire is None:
            return
        self._failed_pairings = 0
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
            self._services_met = 0
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
            self._report.status(message, is_new=not self._has_reported_waiting)
            self._has_reported_waiting = True
            return
        self._report.status(message)
        if isinstance(message, Paired) and not leg.is_paired:
            self._on_paired(leg)

    def _on_paired(self, leg: _Leg) -> None:
        """Count the leg as paired at once: a caller with a slow inner handshake must not delay the next one."""
        now = trio.current_time()
        leg.is_paired = True
        self._unpaired.remove(leg)
        self._taken += 1
        self._failures = 0
        self._keep_surplus_until = now + _IDLE
        if leg.since is None or now - leg.since < _PAIRED_QUICKLY:
            self._target = min(self._most_waiting, self._target * 2)
        self._changed.set()

    def _on_join_failed(self, leg: _Leg, error: FrelayError) -> None:
        """Note why a leg did not reach PAIRED; ``_keep_legs_waiting`` decides what to do."""
        if is_wait_timeout(error) and leg.since is not None:
            return  # no caller came, which is no failure of a service
        if isinstance(error, Refused) and error.code in ("queue-full", "limit") and len(self._unpaired) > 1:
            # The relay has room for the legs that wait already, and for no more.
            self._most_waiting = self._target = max(1, len(self._unpaired) - 1)
            return
        if self._failure is None:
            self._failure = error

    async def _hold_slot(self) -> None:
        """Keep the slot of a failed pairing for a moment."""
        pause = min(_LONGEST_PENALTY, _FIRST_PENALTY * 2.0 ** min(self._failed_pairings, 16))
        self._failed_pairings += 1
        await trio.sleep(random.uniform(pause / 2, pause))  # noqa: S311  not a secret
