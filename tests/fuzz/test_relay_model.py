"""TESTPLAN 22: whatever functions and operators do, in whatever order, the relay does what a small model says.

Hypothesis chooses the events. Real parties do them with a real relay, in this process and on loopback.
:class:`World` keeps what must be true: which legs wait where and in which order, which are paired, how many bytes were
carried, and what was counted. Both are compared after every event, down to the order of each queue, so that the first
event that goes wrong is shown. In the end nothing may be left: no leg, no task, no pipe, no ticket, no descriptor.

Rules are plain functions, and a relay is asynchronous. So the state machine runs in a thread of its own, and each rule
is a call into the Trio of the test (:func:`trio.from_thread.run`), which returns once relay and model agree again.
Nothing depends on chance in between, so that a failure can be shrunk. Many callers at one moment have a rule of their
own.

More than a few examples, by hand::

    FRELAY_EXAMPLES=2000 pytest tests/fuzz/test_relay_model.py
"""

from __future__ import annotations

import os
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final, Literal
from unittest import mock

import pytest
import structlog
import trio
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.joining import listener
from frelay.joining.lobby import LEG_PARTIES, opposite
from frelay.joining.route import LiveRoute
from frelay.journal import Entry, HandshakeDone
from frelay.protocol.messages import LegParty, Mode, PartyName
from frelay.relay.control import RelayControl
from frelay.relay.run import make_relay
from frelay.relay.views import LocalViews
from support.descriptors import open_descriptors, opened_since
from support.ends import End, block
from support.party import Party
from support.site import Site
from support.waiting import TIMEOUT

EXAMPLES: Final = int(os.environ.get("FRELAY_EXAMPLES", "50"))
STEPS: Final = 40

# --- who and where -------------------------------------------------------------------------------------------------

CERTIFICATES: Final[dict[str, list[str]]] = {
    "left": ["left.demo"],
    # Another certificate of the same name: revoking one of the two does not revoke the other.
    "twin": ["left.demo"],
    "right": ["right.demo"],
    # One certificate that may be either party, by different names: it must not meet itself through a retry.
    "both": ["one.both.demo", "two.both.demo"],
    "stranger": ["stranger.demo"],
}
KNOWN: Final = ["left", "twin", "right", "both"]
SIDES: Final[tuple[PartyName, PartyName]] = ("func1", "func2")

Wiring = Literal["straight", "crossed"]
_ONE: Final = {"left": "dns:left.demo", "twin": "dns:left.demo", "both": "dns:one.both.demo"}
_TWO: Final = {"right": "dns:right.demo", "both": "dns:two.both.demo"}
ADMITTED: Final[dict[Wiring, dict[PartyName, dict[str, str]]]] = {
    "straight": {"func1": _ONE, "func2": _TWO},
    "crossed": {"func1": _TWO, "func2": _ONE},
}
"""By wiring and party, which certificates are admitted and under which name."""

# No time limit may end anything: the model has no clock.
UNHURRIED: Final = """
[relay]
drain_timeout = 600
[limits]
handshake_timeout = 600
join_timeout = 600
handoff_timeout = 600
wait_timeout = 600
ping_interval = 600
half_close_timeout = 600
"""
# The kernel's buffers on the way hold this much, even if nobody reads: no sender waits for room.
IN_FLIGHT: Final = 48 * 1024
BULK: Final = 300_000
CONTENT: Final = block(1 << 20)


def wired(name: str, wiring: Wiring) -> dict[str, Any]:
    """The keys of a route."""
    keys = {"name": name, "listen": "127.0.0.1:0", "require_inner_tls": False, "ticket_timeout": 600}
    return keys | {side: sorted(set(names.values())) for side, names in ADMITTED[wiring].items()}


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Caller:
    """A connection of a function, as the model sees it, and the party at its other end."""

    number: int
    certificate: str
    route: Route
    party: Party
    attempt: str
    address: str
    side: LegParty = "func1"
    identity: str = ""
    fits: dict[PartyName, str] = field(default_factory=dict)
    """Its name for each party that it may be, until it is paired."""
    meet: str | None = None
    entered: int = 0
    """Callers that wait are numbered as they come, over all queues."""
    mode: Mode = "handoff"
    meeting: Meeting | None = None
    end: End | None = None
    """Its end of the pairing, once it has done its part of the hand-off."""
    ticket: str = ""
    sent: int = 0
    has_ended: bool = False
    received: int = 0
    """How much of what the other one sent has arrived here."""

    def __str__(self) -> str:
        return f"{self.number} ({self.certificate} on {self.route.name})"

    @property
    def party_name(self) -> PartyName:
        assert self.side != "either"
        return self.side

    @property
    def other(self) -> Caller:
        assert self.meeting is not None
        return self.meeting.callers[opposite(self.party_name)]

    def settle(self, side: PartyName) -> None:
        self.side, self.identity = side, self.fits.get(side, self.identity)
        self.fits = {side: self.identity}

    @property
    def in_flight(self) -> int:
        return self.sent - self.other.received

    def words(self, start: int, count: int) -> bytes:
        """The bytes that it sends, ``count`` from ``start`` on; no two callers send the same."""
        start = (self.number * 77_773 + start) % len(CONTENT)
        return (CONTENT[start : start + count] + CONTENT)[:count]

    def is_retry_of(self, other: Caller) -> bool:
        is_same = self.certificate == other.certificate or bool({*self.fits.values()} & {*other.fits.values()})
        return self.attempt == other.attempt and is_same


@dataclass(eq=False)
class Meeting:
    """Two callers that are paired."""

    pairing: str
    callers: dict[PartyName, Caller]

    @property
    def is_handed_off(self) -> bool:
        return all(caller.end is not None for caller in self.callers.values())

    @property
    def carried(self) -> list[int]:
        """Bytes that the relay must have delivered by now, by side."""
        return [self.callers[side].sent if self.is_handed_off else 0 for side in SIDES]


@dataclass(eq=False)
class Route:
    """A route until it is removed or replaced; a route that comes back is another one."""

    name: str
    wiring: Wiring
    queues: dict[LegParty, list[Caller]] = field(default_factory=lambda: {side: [] for side in LEG_PARTIES})
    meetings: list[Meeting] = field(default_factory=list)
    closed: str = ""
    """The code with which everybody is refused, once it is closed."""

    def __str__(self) -> str:
        return f"route {self.name}, {self.wiring}"

    def waiting(self) -> list[Caller]:
        return [caller for queue in self.queues.values() for caller in queue]

    def leave_queue(self, caller: Caller) -> None:
        self.queues[caller.side].remove(caller)


@dataclass
class Totals:
    """What was counted on a route."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    carried: list[int] = field(default_factory=lambda: [0, 0])


class Stage:
    """What all examples share: certificates, and the nursery that their relays run in."""

    def __init__(self, site: Site, nursery: trio.Nursery) -> None:
        self.site = site
        self.nursery = nursery
        for name, names in CERTIFICATES.items():
            site.add(name, site.ca.party(dns=names))
        self.contexts: dict[str, ssl.SSLContext] = {name: site.context(name) for name in CERTIFICATES}


class World:
    """A relay, all its callers, and the model of both."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.site = stage.site
        self.callers: list[Caller] = []
        self.joining: list[Caller] = []
        """Those of them that have shown a certificate and not said JOIN."""
        self.routes: dict[str, Route] = {}
        self.retired: list[Route] = []
        """Routes that were removed or replaced and still have pairings."""
        self.totals: dict[str, Totals] = {"": Totals()}
        self.revoked: set[str] = set()
        self.most_waiting, self.most_pairings = 16, 1024
        self.is_draining = False
        self._handshakes, self._handshakes_seen = 0, 0
        self._crl_number = 0
        self._numbers = self._entered = 0
        self._over = trio.Event()
        self._fault: BaseException | None = None
        self._patches = ExitStack()

    # --- its beginning and end -------------------------------------------------------------------------------------

    async def open(self) -> None:
        # How long a stopped listener waits for refusals to be sent. It is a clock, which the model lacks.
        self._patches.enter_context(mock.patch.object(listener, "_GOODBYE", 600))
        self.descriptors = open_descriptors()
        self.tasks = trio.lowlevel.current_statistics().tasks_living
        for leftover in (self.site.directory / "routes.d").glob("*"):
            leftover.unlink()
        self.write_list()
        self.write_file()
        self.relay = make_relay(load(self.site.config), watch_files=False)
        self.control = RelayControl(self.relay, LocalViews(self.relay))
        self.events = self._patches.enter_context(structlog.testing.capture_logs())
        self._patches.enter_context(self.relay.journal.listen(self._hear))
        self.routes["a"] = Route("a", "straight")
        self.totals["a"] = Totals()
        await self.stage.nursery.start(self._serve)

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            await self.relay.run(task_status=task_status)
        except Exception as fault:  # kept for the rule that caused it; raised here, it would end all examples
            self._fault = fault
        finally:
            self._over.set()

    def _hear(self, entry: Entry) -> None:
        self._handshakes_seen += isinstance(entry, HandshakeDone)

    async def close(self) -> None:
        """End by force what is left, and check that nothing of it remains."""
        try:
            self.relay.drain(reason="the example is over")
            self.relay.stop_now()
            for caller in tuple(self.callers):
                self.hang_up(caller)
            with trio.fail_after(TIMEOUT):
                await self._over.wait()
        finally:
            self._patches.close()
            self.site.hang_up()
        self.look_for_faults()
        inner = self.relay
        holdings = {
            "legs": inner.admission.legs,
            "slots": inner.admission.strangers.running,
            "strangers": inner.admission.strangers.holders,
            "pairings": len(inner.pairings),
            "pairings in all": inner.parts.forwarding.pairings,
            "retired": len(inner.parts.registry.retired),
            "pipes": inner.parts.forwarding.pipes.descriptors,
            "wires": len(inner.parts.forwarding.readiness),
            "tickets": len(inner.parts.shared.tickets),
        }
        assert not any(holdings.values()), holdings
        assert not opened_since(self.descriptors)
        assert trio.lowlevel.current_statistics().tasks_living == self.tasks

    def look_for_faults(self) -> None:
        if self._fault is not None:
            raise self._fault
        bugs = [event for event in self.events if "a bug in frelay" in event["event"]]
        assert not bugs, bugs

    # --- relay and model, compared ---------------------------------------------------------------------------------

    def as_it_is(self) -> dict[str, Any]:
        relay = self.relay

        def pairings(live: LiveRoute) -> list[Any]:
            return sorted(
                ([pairing.legs[side].address for side in SIDES], [pairing.bytes_moved[side] for side in SIDES])
                for pairing in live.pairings.values()
            )

        return {
            "waiting": {
                name: {side: [waiter.leg.address for waiter in live.lobby.waiting(side)] for side in LEG_PARTIES}
                for name, live in relay.routes.items()
            },
            "pairings": {name: pairings(live) for name, live in relay.routes.items()},
            "retired": sorted((live.name, pairings(live)) for live in relay.parts.registry.retired),
            "totals": {
                name: (
                    dict(totals.outcomes),
                    dict(totals.refusals),
                    [totals.bytes_func1_to_func2, totals.bytes_func2_to_func1],
                )
                for name, totals in relay.journal.totals.items()
            },
            "legs": relay.admission.legs,
            "slots": relay.admission.strangers.running,
            "tickets": len(relay.parts.shared.tickets),
            "handshakes": self._handshakes_seen,
        }

    def as_it_should_be(self) -> dict[str, Any]:
        def pairings(route: Route) -> list[Any]:
            return sorted(
                ([meeting.callers[side].address for side in SIDES], meeting.carried) for meeting in route.meetings
            )

        return {
            "waiting": {
                name: {side: [caller.address for caller in route.queues[side]] for side in LEG_PARTIES}
                for name, route in self.routes.items()
            },
            "pairings": {name: pairings(route) for name, route in self.routes.items()},
            "retired": sorted((route.name, pairings(route)) for route in self.retired),
            "totals": {
                name: (dict(totals.outcomes), dict(totals.refusals), totals.carried)
                for name, totals in self.totals.items()
            },
            "legs": len(self.callers),
            "slots": len(self.joining),
            "tickets": sum(caller.ticket != "" for caller in self.callers),
            "handshakes": self._handshakes,
        }

    async def agree(self) -> None:
        """Wait until the relay has got as far as the model; a failure shows both."""
        deadline = trio.current_time() + TIMEOUT
        while (found := self.as_it_is()) != (wanted := self.as_it_should_be()):
            self.look_for_faults()
            if trio.current_time() > deadline:
                assert found == wanted
            await trio.sleep(0.001)
        self.look_for_faults()

    # --- what the model knows of itself ----------------------------------------------------------------------------

    def paired(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.meeting is not None]

    def waiting(self) -> list[Caller]:
        return [caller for route in self.routes.values() for caller in route.waiting()]

    def meetings(self) -> list[Meeting]:
        return [meeting for route in (*self.routes.values(), *self.retired) for meeting in route.meetings]

    def _counted_under(self, name: str) -> Totals:
        return self.totals.get(name, self.totals[""])

    def _forget_routes_that_are_gone(self) -> None:
        self.retired = [route for route in self.retired if route.meetings]
        kept = {"", *self.routes, *(route.name for route in self.retired)}
        self.totals = {name: totals for name, totals in self.totals.items() if name in kept}

    def hang_up(self, caller: Caller) -> None:
        """Close its connections in whatever state, and forget it."""
        for party in {caller.party, *([caller.end.party] if caller.end is not None else [])}:
            party.close()
            self.site.parties.remove(party)
        self.callers.remove(caller)

    async def refused(self, caller: Caller, code: str) -> None:
        """It is told its refusal, and the refusal is counted."""
        if code == "draining" and caller not in self.joining:
            await caller.party.expect("DRAINING")
        assert (await caller.party.refusal())["code"] == code
        self._counted_under(caller.route.name).refusals[code] += 1
        if caller in self.joining:
            self.joining.remove(caller)
        self.hang_up(caller)

    # --- coming ----------------------------------------------------------------------------------------------------

    def _port(self, route: str) -> int:
        return int(self.relay.bound(route)[0].rpartition(":")[2])

    async def _connect(self, certificate: str, route: Route) -> Caller:
        party = await self.site.connect(self._port(route.name), context=self.stage.contexts[certificate])
        host, port = party.socket.getsockname()
        self._numbers += 1
        caller = Caller(self._numbers, certificate, route, party, party.attempt, f"{host}:{port}")
        self.callers.append(caller)
        return caller

    async def knock(self, certificate: str, route: Route) -> None:
        """Connect and show a certificate."""
        caller = await self._connect(certificate, route)
        await caller.party.handshake()
        if certificate in self.revoked:
            assert "REVOKED" in await caller.party.alert()
            self._counted_under(route.name).refusals["revoked"] += 1
            self.hang_up(caller)
        else:
            self._handshakes += 1
            self.joining.append(caller)

    def objection(self, caller: Caller, asked: PartyName | None) -> str | None:
        """The code with which its JOIN is refused; None if it is let in, and then its side and identity are settled."""
        route, certificate = caller.route, caller.certificate
        fits = {side: names[certificate] for side, names in ADMITTED[route.wiring].items() if certificate in names}
        if asked is not None:
            fits = {side: identity for side, identity in fits.items() if side == asked}
        if not fits:
            return "not-authorised"
        if len(fits) > 1 and caller.meet is None:
            return "protocol-error"
        caller.fits = fits
        caller.side, caller.identity = next(iter(fits.items()))
        if len(fits) > 1:
            caller.side = "either"
        if certificate in self.revoked:
            return "revoked"
        if route.closed:
            return route.closed
        if self._is_full(caller) and self._stale(caller) is None and self._spare(caller) is None:
            return "queue-full"
        return None

    def _is_full(self, caller: Caller) -> bool:
        # Those with a key have places of their own, more than there are callers here.
        return caller.meet is None and len(self._without_key(caller)) >= self.most_waiting

    def _without_key(self, caller: Caller) -> list[Caller]:
        return [other for other in caller.route.queues[caller.side] if other.meet is None]

    def _spare(self, caller: Caller) -> Caller | None:
        """The caller that is evicted from a full queue for it: the newest of those with most, if two more than it."""
        queue = self._without_key(caller)
        held = Counter(other.identity for other in queue)
        [(greediest, most)] = held.most_common(1)
        if most < held[caller.identity] + 2:
            return None
        return [other for other in queue if other.identity == greediest][-1]

    def _has_its_share(self, caller: Caller) -> bool:
        """Whether it may not be paired: the last 1/32 of the pairings, at least one, is for those with few of them."""
        meetings = caller.route.meetings
        free = self.most_pairings - len(meetings)
        held = sum(caller.identity in {other.identity for other in meeting.callers.values()} for meeting in meetings)
        return free <= 0 or (free <= max(1, self.most_pairings // 32) and held >= free)

    def _stale(self, caller: Caller) -> Caller | None:
        return next((other for other in caller.route.waiting() if caller.is_retry_of(other)), None)

    def _partners(self, caller: Caller) -> list[Caller]:
        """Those that it may be paired with, the longest wait first."""
        sides = {"func1": ("func2", "either"), "func2": ("func1", "either"), "either": LEG_PARTIES}[caller.side]
        found = [other for other in caller.route.waiting() if other.side in sides and other.meet == caller.meet]
        return sorted(found, key=lambda other: other.entered)

    async def join(
        self, caller: Caller, asked: PartyName | None, mode: Mode, attempt: str, meet: str | None = None
    ) -> None:
        """Send JOIN; then it is refused, waits, or is paired."""
        caller.mode, caller.attempt, caller.meet = mode, attempt, meet
        fields: dict[str, Any] = {} if asked is None else {"party": asked}
        fields |= {} if meet is None else {"meet": meet}
        await caller.party.send_frame("JOIN", {"attempt": attempt, "modes": [mode], **fields})
        code = self.objection(caller, asked)
        if code is not None:
            await self.refused(caller, code)
            return
        await self._is_let_in(caller)
        stale = self._stale(caller)
        if stale is not None:
            stale.route.leave_queue(stale)
            await self.refused(stale, "replaced")
        others = self._partners(caller)
        if others and self._has_its_share(caller):
            await self.refused(caller, "limit")
            return
        self.joining.remove(caller)
        while others and self._has_its_share(others[0]):
            other = others.pop(0)
            other.route.leave_queue(other)
            await self.refused(other, "limit")
        if others:
            other = others.pop(0)
            other.route.leave_queue(other)
            if other.side == "either":
                other.settle("func1" if caller.side == "either" else opposite(caller.party_name))
            caller.settle(opposite(other.party_name))
            await self._meet(caller, other)
            return
        spare = self._spare(caller) if self._is_full(caller) else None
        if spare is not None:
            spare.route.leave_queue(spare)
            await self.refused(spare, "queue-full")
        self._entered += 1
        caller.entered = self._entered
        caller.route.queues[caller.side].append(caller)

    async def _is_let_in(self, caller: Caller) -> None:
        told = await caller.party.expect("WAITING")
        party = None if caller.side == "either" else caller.side
        assert (told["route"], told["party"], told["identity"]) == (caller.route.name, party, caller.identity)
        assert told.get("meet") == caller.meet

    async def _meet(self, one: Caller, two: Caller) -> None:
        """Both are told of each other only."""
        told = {caller: await caller.party.expect("PAIRED") for caller in (one, two)}
        assert told[one]["pairing"] == told[two]["pairing"]
        meeting = Meeting(told[one]["pairing"], {one.party_name: one, two.party_name: two})
        one.route.meetings.append(meeting)
        for caller, words in told.items():
            caller.meeting = meeting
            role = "client" if caller.side == "func1" else "server"
            assert (words["route"], words["peer"]) == (caller.route.name, caller.other.identity)
            assert (words["role"], words["mode"], words.get("meet")) == (role, caller.mode, caller.meet)
            caller.ticket = words.get("ticket", "")
            if caller.mode == "tunnel":
                caller.end = End(caller.party, "tunnel")

    async def crowd(self, route: Route, certificates: Iterable[str]) -> None:
        """Many come at one moment. A race decides which of them are paired; all else is certain.

        As many as possible are paired; callers that waited before go first, in order. All that came, and their
        partners, leave again: what follows must not depend on the race, or no failure could be repeated.
        """
        before = {side: [caller for caller in route.queues[side] if caller.meet is None] for side in SIDES}
        came: list[Caller] = []

        async def come(certificate: str) -> None:
            caller = await self._connect(certificate, route)
            came.append(caller)
            await caller.party.handshake()
            await caller.party.join()
            assert self.objection(caller, None) is None
            await self._is_let_in(caller)

        async with trio.open_nursery() as nursery:
            for certificate in certificates:
                nursery.start_soon(come, certificate)
        self._handshakes += len(came)
        there = {side: [*before[side], *(caller for caller in came if caller.side == side)] for side in SIDES}
        expected = len(route.meetings) + min(len(callers) for callers in there.values())
        live = self.relay.routes[route.name]
        deadline = trio.current_time() + TIMEOUT
        while len(live.pairings) < expected:
            assert trio.current_time() < deadline, f"{len(live.pairings)} pairings where {expected} should be"
            await trio.sleep(0.001)
        known = {meeting.pairing for meeting in route.meetings}
        at = {caller.address: caller for caller in self.callers}
        for pairing in list(live.pairings.values()):
            if pairing.id not in known:
                await self._meet(*(at[pairing.legs[side].address] for side in SIDES))
        for side in SIDES:
            # In the order in which the relay let them in; the model only knows the beginning of that order.
            route.queues[side] = [at[waiter.leg.address] for waiter in live.lobby.waiting(side)]
            left = [caller for caller in route.queues[side] if caller.meet is None]
            assert set(left) == {caller for caller in there[side] if caller.meeting is None}
            stayed = [caller for caller in before[side] if caller.meeting is None]
            assert before[side][len(before[side]) - len(stayed) :] == stayed == left[: len(stayed)]
            if stayed:
                assert all(caller.meeting is None for caller in came if caller.side == side)
        for caller in came:
            if caller in route.queues[caller.side]:
                await self.leave(caller, "reset")
            elif caller in self.callers:
                await self.reset(caller)

    # --- going -----------------------------------------------------------------------------------------------------

    async def leave(self, caller: Caller, way: str) -> None:
        """Leave without having been paired."""
        if way == "LEAVE":
            await caller.party.send_frame("LEAVE")
        elif way == "close_notify":
            await caller.party.stream.send_all(caller.party.close_notify())
        elif way == "reset":
            caller.party.reset()
        caller.route.leave_queue(caller)
        self.hang_up(caller)

    async def give_up(self, caller: Caller) -> None:
        """Leave before JOIN."""
        caller.party.reset()
        self.joining.remove(caller)
        self.hang_up(caller)

    # --- pairings --------------------------------------------------------------------------------------------------

    async def hand_off(self, caller: Caller, early: int) -> None:
        """Do its part of the hand-off, directly followed by the first raw bytes."""
        first = caller.words(0, early)
        if caller.mode == "ticket":
            breaks_off = early % 2 == 1
            if breaks_off:
                caller.party.reset()
            second = await self.site.connect(self._port(caller.route.name), context=self.stage.contexts["left"])
            await second.send_raw(f"FRELAY/1 {caller.ticket}\n".encode() + first)
            caller.end, caller.ticket = End(second, "raw"), ""
            if not breaks_off:
                await caller.party.read_to_close_notify()
        else:
            await caller.party.hand_off(first)
            caller.end = End(caller.party, "raw")
        caller.sent += early

    async def send(self, caller: Caller, count: int) -> None:
        assert caller.end is not None
        await caller.end.send(caller.words(caller.sent, count))
        caller.sent += count

    async def receive(self, caller: Caller) -> None:
        """All that is on the way arrives, byte for byte, and then the end if there is one."""
        assert caller.end is not None
        other, count = caller.other, caller.other.in_flight
        assert await caller.end.receive_exactly(count) == other.words(caller.received, count)
        caller.received += count
        if other.has_ended:
            assert await caller.end.receive() == b""

    async def bulk(self, caller: Caller) -> None:
        """Send more than all buffers hold, so that the other one must read meanwhile."""
        other = caller.other
        await self.receive(other)
        assert other.end is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, caller, BULK)
            found = await other.end.receive_exactly(BULK)
        assert found == caller.words(other.received, BULK)
        other.received += BULK

    async def end(self, caller: Caller) -> None:
        """End its direction; the pairing is over once both have."""
        assert caller.end is not None
        assert caller.meeting is not None
        await caller.end.send_eof()
        caller.has_ended = True
        if caller.other.has_ended:
            for one in (caller, caller.other):
                await self.receive(one)
            self._part(caller.meeting, "closed")

    def _part(self, meeting: Meeting, outcome: str) -> None:
        """The pairing is over, and counts."""
        callers = tuple(meeting.callers.values())
        totals = self._counted_under(callers[0].route.name)
        totals.outcomes[outcome] += 1
        totals.carried = [before + now for before, now in zip(totals.carried, meeting.carried, strict=True)]
        callers[0].route.meetings.remove(meeting)
        for caller in callers:
            self.hang_up(caller)
        self._forget_routes_that_are_gone()

    async def _is_cut(self, caller: Caller) -> None:
        """Its connection is cut: what still arrived is a beginning of what was sent, and there was no orderly end."""
        assert caller.meeting is not None
        if caller.end is None:
            assert await caller.party.ended() == "reset"
            return
        found = b""
        try:
            while data := await caller.end.receive():
                found += data
        except (trio.BrokenResourceError, ssl.SSLEOFError):
            pass
        else:
            assert caller.other.has_ended, "a cut that looks like an end"
        expected = caller.other.words(caller.received, caller.other.in_flight) if caller.meeting.is_handed_off else b""
        assert expected.startswith(found)

    async def reset(self, caller: Caller) -> None:
        """Reset a connection of a pairing."""
        meeting, other = caller.meeting, caller.other
        assert meeting is not None
        (caller.end.party if caller.end is not None else caller.party).reset()
        if not meeting.is_handed_off:
            await self._is_cut(other)
            self._part(meeting, "handoff-aborted")
        elif not caller.has_ended:
            await self._is_cut(other)
            self._part(meeting, "reset")
        else:
            # What it had sent was delivered before. The relay may notice only at the next byte that it takes no more.
            assert other.end is not None
            with suppress(trio.BrokenResourceError):
                await other.end.send(b"?")
            count = caller.in_flight
            assert await other.end.receive_exactly(count) == caller.words(other.received, count)
            self._part(meeting, "hung-up")

    # --- what operators do -----------------------------------------------------------------------------------------

    def write_file(self, more: str = "") -> None:
        limits = f"max_waiting_per_party = {self.most_waiting}\nmax_pairings = {self.most_pairings}\n"
        keys = "".join(f"{key} = {_toml(value)}\n" for key, value in wired("a", "straight").items())
        self.site.write(f"[[route]]\n{keys}{more}", sections=UNHURRIED + limits, crl=True)

    def write_list(self) -> None:
        self._crl_number += 1
        revoked = [self.site.credentials[name] for name in sorted(self.revoked)]
        self.site.ca.write_crl(self.site.directory, self.site.ca.crl(revoked=revoked, number=self._crl_number))

    async def reload(self) -> None:
        await self.relay.reload()
        assert self.relay.last_reload_error is None

    async def set_limits(self, most_waiting: int, most_pairings: int) -> None:
        """They hold for callers that come from now on."""
        self.most_waiting, self.most_pairings = most_waiting, most_pairings
        self.write_file()
        await self.reload()

    async def reload_broken(self, how: str) -> None:
        """A reload that is refused changes nothing."""
        if how == "no list":
            (self.site.directory / "crl.pem").unlink()
        else:
            self.write_file(how)
        with pytest.raises(ConfigError):
            await self.relay.reload()
        assert self.relay.last_reload_error is not None
        self.write_file()
        self.write_list()

    async def put_route(self, name: str, wiring: Wiring) -> None:
        """Add a route, change its parties, or leave it as it is."""
        _, is_new = await self.control.put_route(name, wired(name, wiring), if_match=None, must_be_new=False)
        old = self.routes.get(name)
        assert is_new is (old is None)
        if old is None or old.wiring != wiring:
            self.routes[name] = Route(name, wiring)
            self.totals.setdefault(name, Totals())
        if old is not None and old.wiring != wiring:
            await self._retire(old)

    async def delete_route(self, name: str) -> None:
        await self.control.delete_route(name, if_match=None)
        await self._retire(self.routes.pop(name))

    async def _retire(self, route: Route) -> None:
        self.retired.append(route)
        self._forget_routes_that_are_gone()
        await self._close_route(route, "route-removed")

    async def _close_route(self, route: Route, code: str) -> None:
        route.closed = code
        sent_away = route.waiting()
        route.queues = {side: [] for side in LEG_PARTIES}
        for caller in sent_away:
            await self.refused(caller, code)

    async def revoke(self, certificate: str) -> None:
        """Revoke a certificate, or undo that; callers that are in by a revoked one are thrown out."""
        self.revoked ^= {certificate}
        self.write_list()
        await self.reload()
        for caller in self.waiting():
            if caller.certificate in self.revoked:
                caller.route.leave_queue(caller)
                await self.refused(caller, "revoked")
        for meeting in self.meetings():
            if any(caller.certificate in self.revoked for caller in meeting.callers.values()):
                for caller in meeting.callers.values():
                    await self._is_cut(caller)
                self._part(meeting, "revoked")

    async def drain(self) -> None:
        """Let no caller in any more; pairings go on."""
        self.is_draining = True
        self.relay.drain(reason="a rule")
        for route in (*self.routes.values(), *self.retired):
            await self._close_route(route, "draining")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


# --- the machine ---------------------------------------------------------------------------------------------------

picks = st.integers(0, 99)
sides = st.sampled_from(SIDES)
keys = st.sampled_from([None, None, "one", "two"])
pairs_of_modes = st.tuples(*[st.sampled_from(["handoff", "handoff", "tunnel", "ticket"])] * 2)


class RelayMachine(RuleBasedStateMachine):
    """The events; each may come whenever it is possible."""

    stage: ClassVar[Stage]

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.stage)
        trio.from_thread.run(self.world.open)

    def do(self, action: Callable[..., Awaitable[None]], *args: Any) -> None:
        async def patiently() -> None:
            with trio.fail_after(TIMEOUT):
                await action(*args)

        trio.from_thread.run(patiently)

    def teardown(self) -> None:
        trio.from_thread.run(self.world.close)

    @invariant()
    def relay_and_model_agree(self) -> None:
        trio.from_thread.run(self.world.agree)

    @initialize(
        waiting=st.sampled_from([1, 2, 16, 16]),
        pairings=st.sampled_from([1, 2, 1024, 1024]),
        modes=st.lists(pairs_of_modes, max_size=2),
    )
    def begin(self, waiting: int, pairings: int, modes: list[tuple[Mode, Mode]]) -> None:
        """Many examples start with limits and pairings, because few would reach an interesting state by themselves."""
        self.do(self.world.set_limits, waiting, pairings)
        for pair in modes:
            self._introduce(self.world.routes["a"], pair)

    # --- callers that can act --------------------------------------------------------------------------------------

    def there_is_room(self, for_so_many: int = 1) -> bool:
        return not self.world.is_draining and len(self.world.callers) + for_so_many < 16

    def not_handed_off(self) -> list[Caller]:
        world = self.world
        can_bring_tickets = {} if world.is_draining else world.routes
        return [
            caller
            for caller in world.paired()
            if caller.end is None and (caller.mode != "ticket" or caller.route.name in can_bring_tickets)
        ]

    def speakers(self) -> list[Caller]:
        return [caller for caller in self.world.paired() if caller.end is not None and not caller.has_ended]

    def readers(self) -> list[Caller]:
        return [caller for caller in self.world.paired() if caller.meeting is not None and caller.meeting.is_handed_off]

    def both(self) -> list[Caller]:
        readers = self.readers()
        return [caller for caller in self.speakers() if caller in readers]

    def breakers(self) -> list[Caller]:
        # The relay does not read a leg that is handed off and waits for the other one, so it does not know when that
        # goes. A caller with a ticket may break its connection.
        return [
            *self.readers(),
            *(caller for caller in self.world.paired() if caller.end is None and not caller.ticket),
        ]

    # --- functions -------------------------------------------------------------------------------------------------

    @precondition(there_is_room)
    @rule(certificate=st.sampled_from(sorted(CERTIFICATES)), which=picks)
    def knock(self, certificate: str, which: int) -> None:
        self.do(self.world.knock, certificate, pick(self.world.routes.values(), which))

    @precondition(lambda self: self.world.joining)
    @rule(
        which=picks,
        asked=st.none() | sides,
        mode=st.sampled_from(["handoff", "tunnel", "ticket"]),
        retry_of=st.none() | picks,
        meet=keys,
    )
    def join(self, which: int, asked: PartyName | None, mode: Mode, retry_of: int | None, meet: str | None) -> None:
        caller: Caller = pick(self.world.joining, which)
        attempt = caller.attempt if retry_of is None else pick(self.world.callers, retry_of).attempt
        self.do(self.world.join, caller, asked, mode, attempt, meet)

    @precondition(there_is_room)
    @rule(
        certificate=st.sampled_from(KNOWN),
        which=picks,
        side=sides,
        mode=st.sampled_from(["handoff", "tunnel"]),
        meet=keys,
    )
    def come(self, certificate: str, which: int, side: PartyName, mode: Mode, meet: str | None) -> None:
        """Connect and join in one event, because most other events need a caller that is in."""
        self._come(certificate, pick(self.world.routes.values(), which), side, mode, None, meet)

    @precondition(lambda self: self.there_is_room(2))
    @rule(which=picks, modes=pairs_of_modes)
    def introduce(self, which: int, modes: tuple[Mode, Mode]) -> None:
        """Two come, and those that are paired now do their hand-off: so most examples get pairings that send."""
        self._introduce(pick(self.world.routes.values(), which), modes)

    def _introduce(self, route: Route, modes: tuple[Mode, Mode]) -> None:
        for certificate, mode in zip(("left", "right"), modes, strict=True):
            self._come(certificate, route, "func1", mode, None)
        for caller in self.not_handed_off():
            self.do(self.world.hand_off, caller, 0)

    @precondition(lambda self: self.there_is_room() and self.world.waiting())
    @rule(which=picks, certificate=st.none() | st.sampled_from(KNOWN), side=sides, meet=keys)
    def come_again(self, which: int, certificate: str | None, side: PartyName, meet: str | None) -> None:
        """A waiting caller comes with the same attempt on a new connection; or another one uses that attempt."""
        caller: Caller = pick(self.world.waiting(), which)
        self._come(certificate or caller.certificate, caller.route, side, "handoff", caller.attempt, meet)

    def _come(
        self,
        certificate: str,
        route: Route,
        side: PartyName,
        mode: Mode,
        attempt: str | None,
        meet: str | None = None,
    ) -> None:
        world, before = self.world, len(self.world.joining)
        self.do(world.knock, certificate, route)
        for caller in world.joining[before:]:
            # With a key, a certificate of both parties may leave it to the relay.
            asked = side if certificate == "both" and (meet is None or mode == "tunnel") else None
            self.do(world.join, caller, asked, mode, attempt or caller.attempt, meet)

    @precondition(lambda self: self.there_is_room(6) and self.world.most_waiting > 2 and self.world.most_pairings > 2)
    @rule(which=picks, certificates=st.lists(st.sampled_from(["left", "right", "twin"]), min_size=2, max_size=6))
    def crowd(self, which: int, certificates: list[str]) -> None:
        world = self.world
        welcome = [name for name in certificates if name not in world.revoked]
        self.do(world.crowd, pick(world.routes.values(), which), welcome)

    @precondition(lambda self: self.world.waiting())
    @rule(which=picks, way=st.sampled_from(["LEAVE", "close_notify", "close", "reset"]))
    def leave(self, which: int, way: str) -> None:
        self.do(self.world.leave, pick(self.world.waiting(), which), way)

    @precondition(lambda self: self.world.joining)
    @rule(which=picks)
    def give_up(self, which: int) -> None:
        self.do(self.world.give_up, pick(self.world.joining, which))

    @precondition(lambda self: self.not_handed_off())
    @rule(which=picks, early=st.sampled_from([0, 1, 997]))
    def hand_off(self, which: int, early: int) -> None:
        self.do(self.world.hand_off, pick(self.not_handed_off(), which), early)

    @precondition(lambda self: self.speakers())
    @rule(which=picks, count=st.sampled_from([1, 5, 997, 16384, 16385]))
    def send(self, which: int, count: int) -> None:
        caller: Caller = pick(self.speakers(), which)
        if caller.in_flight + count <= IN_FLIGHT:
            self.do(self.world.send, caller, count)

    @precondition(lambda self: self.readers())
    @rule(which=picks)
    def receive(self, which: int) -> None:
        self.do(self.world.receive, pick(self.readers(), which))

    @precondition(lambda self: self.both())
    @rule(which=picks)
    def bulk(self, which: int) -> None:
        self.do(self.world.bulk, pick(self.both(), which))

    @precondition(lambda self: self.speakers())
    @rule(which=picks, answered=st.booleans())
    def end(self, which: int, answered: bool) -> None:
        caller: Caller = pick(self.speakers(), which)
        self.do(self.world.end, caller)
        if answered and caller.meeting is not None and caller.other in self.speakers():
            self.do(self.world.end, caller.other)

    @precondition(lambda self: self.breakers())
    @rule(which=picks, having_ended=st.booleans())
    def reset(self, which: int, having_ended: bool) -> None:
        caller: Caller = pick(self.breakers(), which)
        if having_ended and caller in self.both() and not caller.other.has_ended:
            self.do(self.world.end, caller)
            self.do(self.world.agree)
        self.do(self.world.reset, caller)

    # --- operators -------------------------------------------------------------------------------------------------

    @rule()
    def look(self) -> None:
        """Nothing happens; nor in a relay that has drained and ended."""

    @precondition(lambda self: not self.world.is_draining)
    @rule()
    def reload(self) -> None:
        self.do(self.world.reload)

    @precondition(lambda self: not self.world.is_draining)
    @rule(waiting=st.sampled_from([1, 2, 16]), pairings=st.sampled_from([1, 2, 1024]))
    def set_limits(self, waiting: int, pairings: int) -> None:
        self.do(self.world.set_limits, waiting, pairings)

    @precondition(lambda self: not self.world.is_draining)
    @rule(how=st.sampled_from(["no list", "[[route", 'nonsense = "x"\n', '[[route]]\nname = "a"\n']))
    def reload_broken(self, how: str) -> None:
        self.do(self.world.reload_broken, how)

    @precondition(lambda self: not self.world.is_draining)
    @rule(name=st.sampled_from(["b", "c"]), wiring=st.sampled_from(["straight", "crossed"]))
    def put_route(self, name: str, wiring: Wiring) -> None:
        self.do(self.world.put_route, name, wiring)

    @precondition(lambda self: not self.world.is_draining and len(self.world.routes) > 1)
    @rule(which=picks)
    def delete_route(self, which: int) -> None:
        self.do(self.world.delete_route, pick(self.world.routes.keys() - {"a"}, which))

    @precondition(lambda self: not self.world.is_draining)
    @rule(certificate=st.sampled_from(KNOWN))
    def revoke(self, certificate: str) -> None:
        self.do(self.world.revoke, certificate)

    @precondition(lambda self: not self.world.is_draining and len(self.world.callers) > 3)
    @rule()
    def drain(self) -> None:
        self.do(self.world.drain)


def pick(candidates: Iterable[Any], which: int) -> Any:
    """One of them, by a number, so that it stays the same one while an example is shrunk."""
    found = sorted(candidates, key=str)
    chosen = found[which % len(found)]
    note(f"# {chosen}")
    return chosen


@pytest.mark.load
@pytest.mark.timeout(120 + 5 * EXAMPLES)
async def test_whatever_happens_is_what_the_model_says(site: Site) -> None:
    """TESTPLAN 22."""
    async with trio.open_nursery() as nursery:
        RelayMachine.stage = Stage(site, nursery)
        bounds = settings(
            deadline=None,
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        await trio.to_thread.run_sync(partial(run_state_machine_as_test, RelayMachine, settings=bounds))
