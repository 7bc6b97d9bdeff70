"""A pairing: two legs from the moment they are matched until both are closed, and the record of how it ended.

Its task owns both legs. It brings each through its hand-off, opens one child nursery with the two pumps, and then
watches: the parent of the pumps is the one place with timers. The pumps report by raising
(:class:`~frelay.pairing.pump.Cut`) or by returning; the first reason to end stays
(:class:`~frelay.protocol.outcome.Ending`), and the legs are closed accordingly: in order after a clean end, by RST
after any other, so that no function can take a cut for the end of its peer's data.

The watch samples rather than being told: it compares the pumps' counters every quarter of the shortest time limit, so
moving a byte costs no timer. Each limit may therefore strike up to a quarter late, and never early.
"""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import structlog
import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.net.shares import Pool
from frelay.net.streams import RawStream
from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.bandwidth import Bandwidth, Share
from frelay.pairing.leg import Leg
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Cut, Pump, TlsProbe
from frelay.pairing.raw_pump import RawPump
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import PolledSocket
from frelay.pairing.stream_pump import Budget, StreamPump
from frelay.protocol.messages import Paired, PartyName
from frelay.protocol.outcome import Ending, Outcome, Record, Side

__all__ = ["Forwarding", "Pairing", "PairingLimits", "PairingTerms", "log_record", "new_pairing_id", "new_pairing_pool"]

# Sampling more often than this would cost more than it tells.
_SHORTEST_SAMPLE: Final = 0.02
# All pairings look at common moments, so many times in an interval: with thousands of them idle, one wake-up of the
# process then serves dozens; and dozens cost milliseconds, which everybody else can bear.
_MOMENTS: Final = 128


@dataclass(frozen=True, slots=True)
class PairingLimits:
    """The time limits of one pairing, in seconds, and whether its certificates are one."""

    handoff_timeout: float
    half_close_timeout: float
    idle_timeout: float
    stall_timeout: float
    max_lifetime: float
    ends_with_certificates: bool = True
    """Whether it ends with the first notAfter of its parties."""
    certificate_grace: float = 0.0
    """How long it may outlive that notAfter."""

    def told(self) -> dict[str, float]:
        """What PAIRED tells the functions about them."""
        return {
            "half_close_timeout": self.half_close_timeout,
            "idle_timeout": self.idle_timeout,
            "stall_timeout": self.stall_timeout,
            "max_lifetime": self.max_lifetime,
        }

    @property
    def sample_interval(self) -> float:
        """How often the watch looks, in seconds."""
        return max(_SHORTEST_SAMPLE, min(self.half_close_timeout, self.idle_timeout, self.stall_timeout) / 4)


@dataclass(frozen=True, slots=True)
class PairingTerms:
    """What a route says about its pairings. A pairing keeps the terms with which it began."""

    route: str
    """The name of the route."""
    limits: PairingLimits
    require_inner_tls: bool | Literal["always"]
    """Which legs must begin with a TLS record: the raw ones (True), all ("always") or none (False)."""
    bandwidth: Bandwidth | None = None
    """The budget of bytes a second that all pairings of the route share; None if there is no limit."""


def new_pairing_id() -> str:
    """A random id, which no other pairing has."""
    return secrets.token_hex(8)


def new_pairing_pool() -> Pool[str]:
    """Pairings by their ids. The last one in 32 goes only to those who hold few."""
    return Pool(part=32, least=1)


@dataclass(slots=True)
class Forwarding:
    """What all pairings of a relay share to move bytes, and who has how many of them."""

    readiness: ReadinessSet = field(default_factory=ReadinessSet)
    pipes: PipePool = field(default_factory=PipePool)
    pool: Pool[str] = field(default_factory=new_pairing_pool)

    @property
    def pairings(self) -> int:
        """How many there are."""
        return len(self.pool)


def _logger(route: str, pairing: str) -> Any:
    return structlog.get_logger("frelay.pairing").bind(route=route, pairing=pairing)


def log_record(record: Record, log: Any = None) -> None:
    """Write the one line of a pairing that has ended, or could not begin; ``log`` is its own logger, if it has one."""
    told: dict[str, Any] = {} if record.detail is None else {"detail": record.detail}
    (log or _logger(record.route, record.pairing)).info(
        "pairing ended",
        outcome=record.outcome.value,
        side=record.side,
        bytes_func1_to_func2=record.bytes_func1_to_func2,
        bytes_func2_to_func1=record.bytes_func2_to_func1,
        duration=round(record.duration, 3),
        func1=record.func1,
        func2=record.func2,
        **told,
    )


class _Sample:
    """What the watch knows of one pump, and of the bytes behind it that the receiver's kernel has not taken yet."""

    __slots__ = ("_in_kernel", "blocked_since", "changed_at", "moved", "pump", "sink")

    def __init__(self, pump: Pump, sink: socket.socket, now: float) -> None:
        self.pump = pump
        self.sink = sink
        self.moved = 0
        self.changed_at = now
        self.blocked_since: float | None = None
        self._in_kernel = 0

    def take(self, now: float) -> None:
        # The pump alone cannot tell a slow reader from a stalled one: Linux says "writable" again only once a third of
        # the send buffer, megabytes of it, is free. Nor does it know of bytes that wait there after it has finished.
        moved, in_kernel = self.pump.moved, unacknowledged(self.sink)
        if in_kernel and is_dead(self.sink):
            # A party that hung up. They will not be taken, and say nothing of what is still delivered from it.
            in_kernel = 0
        if moved != self.moved or in_kernel != self._in_kernel or self.pump.is_held_back:
            self.moved, self._in_kernel = moved, in_kernel
            self.changed_at, self.blocked_since = now, None
        else:
            self.pump.on_idle()
        # Since the first sample that saw it blocked, not the last that did not: late at worst, never early.
        is_pending = self.pump.is_blocked or in_kernel > 0
        self.blocked_since = (self.blocked_since or now) if is_pending else None


_Expiry = tuple[float, Outcome, str]
"""When a pairing has to end, on Trio's clock, and the outcome and detail of its record then."""


class Pairing:
    """Two legs joined: made by the route when it matches them, and carried on by :meth:`run` until both are closed."""

    __slots__ = (
        "_bound",
        "_certificates_end",
        "_ending",
        "_expiry",
        "_forwarding",
        "_hang_up",
        "_poke",
        "_pumps",
        "_pumps_done",
        "_released",
        "_share",
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
        """Set once the task that attended the waiting leg has let go of it; of no use after that."""
        self._forwarding: Final = forwarding
        self._share: Final = None if terms.bandwidth is None else Share(terms.bandwidth)
        self._ending: Final = Ending()
        self._poke = trio.Event()
        self._pumps: dict[PartyName, Pump] = {}
        """By the party whose bytes they carry."""
        self._pumps_done: frozenset[PartyName] = frozenset()
        self._hang_up: str | None = None
        """How it was found that a party takes nothing more, while what it sent before is still being delivered."""
        lifetime = terms.limits.max_lifetime
        self._expiry: _Expiry = (
            trio.current_time() + lifetime,
            Outcome.MAX_LIFETIME,
            f"max_lifetime of {lifetime:g} s reached",
        )
        self._certificates_end: _Expiry | None = None
        """Apart from the other, because it is a date: when the clock is set it moves, and may move away."""
        self._bound: trio.CancelScope | None = None
        """What holds the expiry while no bytes flow: in the hand-off, and after the end. In between the watch does."""
        if terms.limits.ends_with_certificates:
            self.end_with_certificates()

    @property
    def _log(self) -> Any:
        # Made when there is something to say: thousands of pairings are idle, and a logger each is a KiB each.
        traces = {f"{party}_traceparent": leg.traceparent for party, leg in self.legs.items() if leg.traceparent}
        return _logger(self.route, self.id).bind(**traces)

    # --- for the outside ---------------------------------------------------------------------------------------

    @property
    def route(self) -> str:
        """The name of its route."""
        return self.terms.route

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
        """Whether both legs are through their hand-off, and bytes may flow."""
        return bool(self._pumps)

    def expire_at(self, when: float, outcome: Outcome, detail: str) -> None:
        """End the pairing at ``when`` (Trio's clock) at the latest."""
        if when < self._expiry[0]:
            self._expiry = (when, outcome, detail)
            self._obey_expiry()

    def release(self) -> None:
        """The task that attended the waiting leg has let go of it."""
        if self._released is not None:
            self._released.set()

    def end_with_certificates(self) -> None:
        """End the pairing once the first certificate of its parties has expired, and its grace is over. Idempotent."""
        when, party = min((leg.expires_at(), party) for party, leg in self.legs.items())
        grace = self.limits.certificate_grace
        detail = f"the certificate of {party} has expired" + (f", {grace:g} s ago" if grace else "")
        self._certificates_end = (when + grace, Outcome.CERTIFICATE_EXPIRED, detail)
        self._obey_expiry()

    def reckon_expiry(self) -> None:
        """The clock was set: reckon again when certificates end the pairing, if they do."""
        if self._certificates_end is not None:
            self.end_with_certificates()

    @property
    def _end(self) -> _Expiry:
        """When the pairing has to end, and what it is to be told as."""
        other = self._certificates_end
        return self._expiry if other is None or self._expiry[0] <= other[0] else other

    def _obey_expiry(self) -> None:
        if self._bound is not None:
            self._bound.deadline = self._end[0]
        self._poke.set()

    # --- its life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hand off, pump, watch, close, and set :attr:`record`. A fault in here ends this pairing alone."""
        started = trio.current_time()
        ending = self._ending
        try:
            with trio.CancelScope(deadline=self._end[0]) as self._bound:
                if self._released is not None:
                    with trio.move_on_after(self.limits.handoff_timeout):
                        # The task that attended the waiting leg only has to run once more to let go.
                        await self._released.wait()
                    self._released = None
                await self._hand_off()
            if self._bound.cancelled_caught:
                _, outcome, detail = self._end
                ending.decide(outcome, "relay", detail)
            self._bound = None
            if ending.outcome is None:
                await self._forward()
        except Exception:
            self._log.exception("a bug in frelay ended this pairing")
            ending.decide(Outcome.INTERNAL_ERROR, "relay", "see the log")
        except BaseException:  # a cancellation; from the pumps' nursery it comes as a group of them
            ending.decide(Outcome.DRAINED, "relay", "the relay stopped")
            raise
        finally:
            try:
                await self._close_legs()
            finally:
                self.record = self._make_record(trio.current_time() - started)
                log_record(self.record, self._log)

    async def _close_legs(self) -> None:
        """Close both in the way that the ending asks for; nested, so that no trouble with one leaves the other open."""
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
                # The end of what ``gone`` sent may still be under way to the other; an RST would destroy it.
                with trio.CancelScope(deadline=self._end[0]) as self._bound:
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
            limits=self.limits.told(),
        )
        timeout = leg.patience(self.limits.handoff_timeout)
        try:
            with trio.move_on_after(timeout) as patience:
                await leg.begin(message)
            if patience.cancelled_caught:
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

    def _make_pumps(self) -> dict[PartyName, Pump]:
        one, two = self.legs["func1"].stream(), self.legs["func2"].stream()
        forth: tuple[Side, Side] = ("func1", "func2")
        back: tuple[Side, Side] = ("func2", "func1")
        share, readiness = self._share, self._forwarding.readiness
        if share is None and isinstance(one, RawStream) and isinstance(two, RawStream):
            socket1, socket2 = PolledSocket(one.sock), PolledSocket(two.sock)
            pipes = self._forwarding.pipes
            return {
                "func1": RawPump(
                    socket1, socket2, sides=forth, readiness=readiness, pipes=pipes, probe=self._probe("func1")
                ),
                "func2": RawPump(
                    socket2, socket1, sides=back, readiness=readiness, pipes=pipes, probe=self._probe("func2")
                ),
            }
        budgets: tuple[Budget | None, Budget | None] = (None, None)
        if share is not None:
            socket1, socket2 = PolledSocket(one.sock), PolledSocket(two.sock)
            budgets = Budget(share, socket1, socket2), Budget(share, socket2, socket1)
        probe1, probe2 = self._probe("func1"), self._probe("func2")
        return {
            "func1": StreamPump(one, two, sides=forth, readiness=readiness, probe=probe1, budget=budgets[0]),
            "func2": StreamPump(two, one, sides=back, readiness=readiness, probe=probe2, budget=budgets[1]),
        }

    async def _forward(self) -> None:
        self._pumps = self._make_pumps()
        for leg in self.legs.values():
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
                # It had said all it wanted to say before, and that arrived.
                self._ending.decide(Outcome.HUNG_UP, cut.side, cut.detail)
            elif cut.only_writing and self._hang_up is None:
                # What it had said before, all of it perhaps, is still on its way: the other pump finds out.
                self._hang_up = cut.detail
            else:
                self._ending.decide(cut.outcome, cut.side, cut.detail)
        else:
            self._pumps_done |= {party}
            if self._hang_up is not None:
                self._ending.decide(Outcome.HUNG_UP, party, self._hang_up)
            elif len(self._pumps_done) == len(self._pumps):
                self._ending.decide(Outcome.CLOSED, "both")
        self._poke.set()

    # --- the watch ---------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Return once the ending is decided, by a pump or by a limit."""
        interval = self.limits.sample_interval
        samples: dict[PartyName, _Sample] = {
            "func1": _Sample(self._pumps["func1"], self.legs["func2"].sock, trio.current_time()),
            "func2": _Sample(self._pumps["func2"], self.legs["func1"].sock, trio.current_time()),
        }
        half_closed_at = math.inf
        while True:
            now = trio.current_time()
            if self._pumps_done:
                half_closed_at = min(half_closed_at, now)
            for sample in samples.values():
                sample.take(now)
            self._judge(now, samples, half_closed_at)
            if self._ending.outcome is not None:
                return
            self._poke = trio.Event()
            # The last moment before the interval is over: late is what a limit must not be.
            moment = interval / _MOMENTS
            with trio.move_on_at(min((now + interval) // moment * moment, self._end[0])):
                await self._poke.wait()

    def _judge(self, now: float, samples: dict[PartyName, _Sample], half_closed_at: float) -> None:
        limits, ending = self.limits, self._ending
        when, outcome, detail = self._end
        if now >= when:
            ending.decide(outcome, "relay", detail)
        for party, sample in samples.items():
            if sample.blocked_since is not None and now - sample.blocked_since >= limits.stall_timeout:
                receiver: Side = "func2" if party == "func1" else "func1"
                ending.decide(
                    Outcome.STALL_TIMEOUT, receiver, f"{receiver} accepted no byte for {limits.stall_timeout:g} s"
                )
        if any(sample.blocked_since is not None for sample in samples.values()):
            return  # bytes are pending: that is not silence, and stall_timeout bounds it
        last_change = max(sample.changed_at for sample in samples.values())
        if now - max(half_closed_at, last_change) >= limits.half_close_timeout:
            ending.decide(
                Outcome.HALF_CLOSE_TIMEOUT,
                "relay",
                f"one direction had ended, and the other was silent for {limits.half_close_timeout:g} s",
            )
        if now - last_change >= limits.idle_timeout:
            ending.decide(Outcome.IDLE_TIMEOUT, "relay", f"no byte either way for {limits.idle_timeout:g} s")
