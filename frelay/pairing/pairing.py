"""A pairing: two legs from the moment they are matched until both are closed, and the record of how it ended.

The pairing's task owns both legs. It brings each leg through its hand-off, and opens one child nursery with the two
pumps and nothing else. Then it watches them (:mod:`frelay.pairing.watch`): all timers of a pairing are in this task. A
pump reports its end by returning, or by raising :class:`~frelay.pairing.pump.Cut`. The first reason to end stays
(:class:`~frelay.protocol.outcome.Ending`) and says how the legs are closed: in order after a clean end, and by RST
after any other end, so that no function can take a cut for the end of its peer's data.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import structlog
import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.pairing.bandwidth import Share
from frelay.pairing.forwarding import Forwarding
from frelay.pairing.leg import Leg
from frelay.pairing.pump import Cut, Pump, TlsProbe
from frelay.pairing.terms import PairingLimits, PairingTerms
from frelay.pairing.watch import Sample, Watch
from frelay.protocol.messages import Paired, PartyName
from frelay.protocol.outcome import Ending, Outcome, Record

__all__ = ["Pairing", "log_record", "new_pairing_id"]


def new_pairing_id() -> str:
    """A random id, which no other pairing has."""
    return secrets.token_hex(8)


def _logger(route: str, pairing: str) -> Any:
    return structlog.get_logger("frelay.pairing").bind(route=route, pairing=pairing)


def log_record(record: Record, log: Any = None) -> None:
    """Log that a pairing has ended, or could not begin; ``log`` is the logger of the pairing, if it has one."""
    detail: dict[str, Any] = {} if record.detail is None else {"detail": record.detail}
    (log or _logger(record.route, record.pairing)).info(
        "pairing ended",
        outcome=record.outcome.value,
        side=record.side,
        bytes_func1_to_func2=record.bytes_func1_to_func2,
        bytes_func2_to_func1=record.bytes_func2_to_func1,
        duration=round(record.duration, 3),
        func1=record.func1,
        func2=record.func2,
        **detail,
    )


class _Expiry(NamedTuple):
    """When a pairing has to end, on Trio's clock, and the outcome and detail of its record then."""

    when: float
    outcome: Outcome
    detail: str


class Pairing:
    """Two legs joined. The route makes it when it matches the legs; :meth:`run` carries it on until both are closed."""

    __slots__ = (
        "_certificates_end",
        "_ending",
        "_expiry_scope",
        "_fixed_end",
        "_forwarding",
        "_hang_up",
        "_pumps",
        "_pumps_done",
        "_released",
        "_share",
        "_wake_watch",
        "id",
        "legs",
        "record",
        "since",
        "terms",
        "waited",
    )

    def __init__(
        self, legs: Mapping[PartyName, Leg], terms: PairingTerms, forwarding: Forwarding, *, waited: float = 0.0
    ) -> None:
        self.id: Final = new_pairing_id()
        self.legs: Final[dict[PartyName, Leg]] = {"func1": legs["func1"], "func2": legs["func2"]}
        self.terms: Final = terms
        self.since: Final = time.time()
        self.waited: Final = waited
        """How long the first of the two had waited for the second, in seconds."""
        self.record: Record | None = None
        """How it ended: set before :meth:`run` returns or raises, whatever the reason."""
        self._released: trio.Event | None = trio.Event()
        """Set once the task that attended the waiting leg no longer uses it; None after that."""
        self._forwarding: Final = forwarding
        self._share: Final = None if terms.bandwidth is None else Share(terms.bandwidth)
        self._ending: Final = Ending()
        self._wake_watch = trio.Event()
        """Set when the watch must check at once: a pump has ended, or the expiry has changed."""
        self._pumps: dict[PartyName, Pump] = {}
        """By the party whose bytes they carry."""
        self._pumps_done: frozenset[PartyName] = frozenset()
        self._hang_up: str | None = None
        """Why a party takes nothing more, while what it sent before is still being delivered."""
        lifetime = terms.limits.max_lifetime
        self._fixed_end = _Expiry(
            trio.current_time() + lifetime, Outcome.MAX_LIFETIME, f"max_lifetime of {lifetime:g} s reached"
        )
        self._certificates_end: _Expiry | None = None
        """Kept apart from the other, because it is a date: when the clock is set, it may move later too."""
        self._expiry_scope: trio.CancelScope | None = None
        """Cancelled at the expiry in the hand-off and after the end. While bytes flow, the watch checks the expiry."""
        if terms.limits.ends_with_certificates:
            self.end_with_certificates()

    @property
    def _log(self) -> Any:
        # Made for each message: with thousands of idle pairings, a kept logger would cost each of them a KiB.
        traces = {f"{party}_traceparent": leg.traceparent for party, leg in self.legs.items() if leg.traceparent}
        key = {} if self.meet is None else {"meet": self.meet}
        return _logger(self.route, self.id).bind(**key, **traces)

    # --- for the outside ---------------------------------------------------------------------------------------

    @property
    def route(self) -> str:
        """The name of its route."""
        return self.terms.route

    @property
    def meet(self) -> str | None:
        """The key by which its parties met; None if they had none."""
        return self.legs["func1"].meet

    @property
    def limits(self) -> PairingLimits:
        """Its time limits."""
        return self.terms.limits

    @property
    def bytes_moved(self) -> dict[PartyName, int]:
        """Bytes delivered so far, by the party that sent them."""
        pumps = self._pumps
        return {party: pumps[party].moved if party in pumps else 0 for party in self.legs}

    @property
    def is_handed_off(self) -> bool:
        """Whether the hand-off of both legs is done, and bytes may flow."""
        return bool(self._pumps)

    def expire_at(self, when: float, outcome: Outcome, detail: str) -> None:
        """End the pairing at ``when`` (Trio's clock) at the latest."""
        if when < self._fixed_end.when:
            self._fixed_end = _Expiry(when, outcome, detail)
            self._apply_expiry()

    def release(self) -> None:
        """The task that attended the waiting leg calls this when it does not use the leg any more."""
        if self._released is not None:
            self._released.set()

    def end_with_certificates(self) -> None:
        """End the pairing when the first certificate of its parties expires, plus certificate_grace. Idempotent."""
        when, party = min((leg.expires_at(), party) for party, leg in self.legs.items())
        grace = self.limits.certificate_grace
        detail = f"the certificate of {party} has expired" + (f", {grace:g} s ago" if grace else "")
        self._certificates_end = _Expiry(when + grace, Outcome.CERTIFICATE_EXPIRED, detail)
        self._apply_expiry()

    def recompute_expiry(self) -> None:
        """The clock was set: compute again when certificates end the pairing, if they do."""
        if self._certificates_end is not None:
            self.end_with_certificates()

    @property
    def _expiry(self) -> _Expiry:
        certificates, fixed = self._certificates_end, self._fixed_end
        return fixed if certificates is None or fixed.when <= certificates.when else certificates

    def _apply_expiry(self) -> None:
        if self._expiry_scope is not None:
            self._expiry_scope.deadline = self._expiry.when
        self._wake_watch.set()

    # --- its life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hand off, carry bytes, close, and set :attr:`record`. A bug in here ends this pairing alone."""
        started = trio.current_time()
        ending = self._ending
        try:
            with trio.CancelScope(deadline=self._expiry.when) as self._expiry_scope:
                if self._released is not None:
                    with trio.move_on_after(self.limits.handoff_timeout):
                        # Soon: the task that attended the waiting leg only has to run once more.
                        await self._released.wait()
                    self._released = None
                await self._hand_off()
            if self._expiry_scope.cancelled_caught:
                ending.decide(self._expiry.outcome, "relay", self._expiry.detail)
            self._expiry_scope = None
            if ending.outcome is None:
                await self._forward()
        except Exception:
            self._log.exception("a bug in frelay ended this pairing")
            ending.decide(Outcome.INTERNAL_ERROR, "relay", "see the log")
        except BaseException:  # a cancellation; the pumps' nursery raises a group of them
            ending.decide(Outcome.DRAINED, "relay", "the relay stopped")
            raise
        finally:
            try:
                await self._close_legs()
            finally:
                self.record = self._make_record(trio.current_time() - started)
                log_record(self.record, self._log)

    async def _close_legs(self) -> None:
        """Close both as the ending demands; nested, so that an error with one leg does not leave the other open."""
        outcome, side = self._ending.outcome, self._ending.side
        func1, func2 = self.legs.values()
        if outcome is Outcome.CLOSED:
            try:
                func1.close()
            finally:
                func2.close()
        elif outcome is Outcome.HUNG_UP:
            gone, other = (func1, func2) if side == "func1" else (func2, func1)
            try:
                gone.cut()
            finally:
                # The last bytes from ``gone`` may still be on their way to the other, and an RST would destroy them.
                with trio.CancelScope(deadline=self._expiry.when) as self._expiry_scope:
                    await other.close_after_delivery(self.limits.stall_timeout)
        else:
            try:
                func1.cut()
            finally:
                func2.cut()

    def _make_record(self, duration: float) -> Record:
        ending, moved = self._ending, self.bytes_moved
        return Record(
            pairing=self.id,
            route=self.route,
            func1=self.legs["func1"].identity,
            func2=self.legs["func2"].identity,
            outcome=ending.outcome or Outcome.INTERNAL_ERROR,
            side=ending.side or "relay",
            detail=ending.detail,
            bytes_func1_to_func2=moved["func1"],
            bytes_func2_to_func1=moved["func2"],
            duration=duration,
            meet=self.meet,
        )

    # --- hand-off ----------------------------------------------------------------------------------------------

    async def _hand_off(self) -> None:
        async with trio.open_nursery() as nursery:
            for party in self.legs:
                nursery.start_soon(self._begin, party, nursery.cancel_scope)
        if self._ending.outcome is None:
            self._log.info(
                "handed off",
                func1_mode=self.legs["func1"].mode,
                func2_mode=self.legs["func2"].mode,
            )

    async def _begin(self, party: PartyName, both: trio.CancelScope) -> None:
        leg, other = self.legs[party], self.legs["func2" if party == "func1" else "func1"]
        message = Paired(
            pairing=self.id,
            route=self.route,
            peer=other.identity,
            role="client" if party == "func1" else "server",
            mode=leg.mode,
            limits=self.limits.for_paired(),
            meet=leg.meet,
            partner=leg.has_partner_list or None,
        )
        timeout = leg.begin_timeout(self.limits.handoff_timeout)
        try:
            with trio.move_on_after(timeout) as scope:
                await leg.begin(message)
            if scope.cancelled_caught:
                self._ending.decide(Outcome.HANDOFF_TIMEOUT, party, f"its hand-off took more than {timeout:g} s")
        except RemoteProtocolError as error:
            self._ending.decide(Outcome.PROTOCOL_ERROR, party, str(error))
        except ConnectionBroken as error:
            self._ending.decide(Outcome.HANDOFF_ABORTED, party, str(error))
        if self._ending.outcome is not None:
            both.cancel(reason=f"hand-off of {party}: {self._ending.outcome.value}")

    # --- bytes -------------------------------------------------------------------------------------------------

    def _probe(self, party: PartyName) -> TlsProbe | None:
        wanted = self.terms.require_inner_tls
        return TlsProbe(party) if wanted == "always" or (wanted and self.legs[party].is_raw) else None

    async def _forward(self) -> None:
        legs = self.legs
        self._pumps = self._forwarding.pumps_between(
            legs["func1"].stream(),
            legs["func2"].stream(),
            probes={party: self._probe(party) for party in legs},
            share=self._share,
        )
        for leg in legs.values():
            leg.forget_admission()
        async with trio.open_nursery() as nursery:
            for party in self._pumps:
                nursery.start_soon(self._pump, party)
            await self._watch()
            nursery.cancel_scope.cancel(reason=f"pairing ended: {self._ending.outcome}")

    async def _pump(self, party: PartyName) -> None:
        try:
            await self._pumps[party].run()
        except Cut as cut:
            if cut.outcome is Outcome.RESET and cut.side in self._pumps_done:
                # The party had ended its direction before, and all of that was delivered.
                self._ending.decide(Outcome.HUNG_UP, cut.side, cut.detail)
            elif cut.only_writing and self._hang_up is None:
                # What the party sent before is still on its way. The other pump carries it, and finds out how it ends.
                self._hang_up = cut.detail
            else:
                self._ending.decide(cut.outcome, cut.side, cut.detail)
        else:
            self._pumps_done |= {party}
            if self._hang_up is not None:
                self._ending.decide(Outcome.HUNG_UP, party, self._hang_up)
            elif len(self._pumps_done) == len(self._pumps):
                self._ending.decide(Outcome.CLOSED, "both")
        self._wake_watch.set()

    # --- the watch ---------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Return once the ending is decided, by a pump, by the expiry or by a time limit."""
        pumps, legs, ending, now = self._pumps, self.legs, self._ending, trio.current_time()
        samples: dict[PartyName, Sample] = {
            "func1": Sample(pumps["func1"], legs["func2"].sock, now),
            "func2": Sample(pumps["func2"], legs["func1"].sock, now),
        }
        watch = Watch(self.limits, ending, samples)
        while True:
            now = trio.current_time()
            if now >= self._expiry.when:
                ending.decide(self._expiry.outcome, "relay", self._expiry.detail)
            watch.check(now, is_half_closed=bool(self._pumps_done))
            if ending.outcome is not None:
                return
            self._wake_watch = trio.Event()
            with trio.move_on_at(min(watch.next_check(now), self._expiry.when)):
                await self._wake_watch.wait()
