"""TESTPLAN 22: whatever functions and operators do, in whatever order, the relay does what a small model says.

Hypothesis chooses the events; a real relay, in this process and on loopback, is put through them by real parties; and
:class:`World` keeps beside it what must be true: who waits where and in which order, who is paired with whom, how many
bytes were carried, and what was counted. Both are compared after every event, down to the order of each queue, so that
the first one to go wrong is the one that is shown. Once all is over nothing may be left: no leg, no task, no pipe, no
ticket, no descriptor.

Rules are plain functions and a relay is not. So the state machine runs in a thread of its own, and each rule is a call
into the Trio of the test (:func:`trio.from_thread.run`), which returns once relay and model agree again. Nothing is
left to chance in between, so that a failure can be shrunk; what happens when many come at once has a rule of its own.

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
from frelay.joining.lobby import opposite
from frelay.joining.route import LiveRoute
from frelay.journal import Entry, HandshakeDone
from frelay.protocol.messages import Mode, PartyName
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
    # Another certificate of the same name: to revoke one of the two is not to revoke the other.
    "twin": ["left.demo"],
    "right": ["right.demo"],
    # One certificate that is either party, by different names: it must not meet itself through a retry.
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

# No limit may strike: the model has no clock.
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
# So much fits into the kernel's buffers on the way, whoever reads or does not: nobody ever waits for room.
IN_FLIGHT: Final = 48 * 1024
BULK: Final = 300_000
CONTENT: Final = block(1 << 20)


def wired(name: str, wiring: Wiring) -> dict[str, Any]:
    """The keys of a route."""
    keys = {"name": name, "listen": "127.0.0.1:0", "require_inner_tls": False, "ticket_timeout": 600}
    return keys | {side: sorted(set(names.values())) for side, names in ADMITTED[wiring].items()}


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Guest:
    """A connection of a function, as the model sees it, and the hand on its other end."""

    number: int
    certificate: str
    route: Route
    party: Party
    attempt: str
    address: str
    side: PartyName = "func1"
    identity: str = ""
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
    def other(self) -> Guest:
        assert self.meeting is not None
        return self.meeting.guests[opposite(self.side)]

    @property
    def in_flight(self) -> int:
        return self.sent - self.other.received

    def words(self, start: int, count: int) -> bytes:
        """What it sends, ``count`` bytes from ``start`` on; no two guests say the same."""
        start = (self.number * 77_773 + start) % len(CONTENT)
        return (CONTENT[start : start + count] + CONTENT)[:count]

    def is_retry_of(self, other: Guest) -> bool:
        is_same = self.certificate == other.certificate or self.identity == other.identity
        return self.attempt == other.attempt and is_same


@dataclass(eq=False)
class Meeting:
    """Two guests that are paired."""

    pairing: str
    guests: dict[PartyName, Guest]

    @property
    def is_handed_off(self) -> bool:
        return all(guest.end is not None for guest in self.guests.values())

    @property
    def carried(self) -> list[int]:
        """Bytes that the relay must have delivered by now, by side."""
        return [self.guests[side].sent if self.is_handed_off else 0 for side in SIDES]


@dataclass(eq=False)
class Route:
    """A route for as long as it is what it was: one that is replaced, or comes back, is another."""

    name: str
    wiring: Wiring
    queues: dict[PartyName, list[Guest]] = field(default_factory=lambda: {"func1": [], "func2": []})
    meetings: list[Meeting] = field(default_factory=list)
    closed: str = ""
    """The code with which everybody is refused, once it is closed."""

    def __str__(self) -> str:
        return f"route {self.name}, {self.wiring}"

    def waiting(self) -> list[Guest]:
        return [*self.queues["func1"], *self.queues["func2"]]


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
    """A relay, everybody who is connected to it, and the model of both."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.site = stage.site
        self.guests: list[Guest] = []
        self.joining: list[Guest] = []
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
        self._numbers = 0
        self._over = trio.Event()
        self._fault: BaseException | None = None
        self._patches = ExitStack()

    # --- its beginning and end -------------------------------------------------------------------------------------

    async def open(self) -> None:
        # How long a leg may still speak to a listener that was stopped: a constant, and a clock that the model lacks.
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
        """End what is left, by force, and see that nothing is left of it."""
        try:
            self.relay.drain(reason="the example is over")
            self.relay.stop_now()
            for guest in tuple(self.guests):
                self.hang_up(guest)
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
                name: {side: [place.leg.address for place in live.lobby.waiting(side)] for side in SIDES}
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
                ([meeting.guests[side].address for side in SIDES], meeting.carried) for meeting in route.meetings
            )

        return {
            "waiting": {
                name: {side: [guest.address for guest in route.queues[side]] for side in SIDES}
                for name, route in self.routes.items()
            },
            "pairings": {name: pairings(route) for name, route in self.routes.items()},
            "retired": sorted((route.name, pairings(route)) for route in self.retired),
            "totals": {
                name: (dict(totals.outcomes), dict(totals.refusals), totals.carried)
                for name, totals in self.totals.items()
            },
            "legs": len(self.guests),
            "slots": len(self.joining),
            "tickets": sum(guest.ticket != "" for guest in self.guests),
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

    def paired(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.meeting is not None]

    def waiting(self) -> list[Guest]:
        return [guest for route in self.routes.values() for guest in route.waiting()]

    def meetings(self) -> list[Meeting]:
        return [meeting for route in (*self.routes.values(), *self.retired) for meeting in route.meetings]

    def _counted_under(self, name: str) -> Totals:
        return self.totals.get(name, self.totals[""])

    def _forget_routes_that_are_gone(self) -> None:
        self.retired = [route for route in self.retired if route.meetings]
        kept = {"", *self.routes, *(route.name for route in self.retired)}
        self.totals = {name: totals for name, totals in self.totals.items() if name in kept}

    def hang_up(self, guest: Guest) -> None:
        """Close its connections, however they stand, and forget it."""
        for party in {guest.party, *([guest.end.party] if guest.end is not None else [])}:
            party.close()
            self.site.parties.remove(party)
        self.guests.remove(guest)

    async def refused(self, guest: Guest, code: str) -> None:
        """It is told so in as many words, and that counts."""
        if code == "draining" and guest not in self.joining:
            await guest.party.expect("DRAINING")
        assert (await guest.party.refusal())["code"] == code
        self._counted_under(guest.route.name).refusals[code] += 1
        if guest in self.joining:
            self.joining.remove(guest)
        self.hang_up(guest)

    # --- coming ----------------------------------------------------------------------------------------------------

    def _port(self, route: str) -> int:
        return int(self.relay.bound(route)[0].rpartition(":")[2])

    async def _connect(self, certificate: str, route: Route) -> Guest:
        party = await self.site.connect(self._port(route.name), context=self.stage.contexts[certificate])
        host, port = party.socket.getsockname()
        self._numbers += 1
        guest = Guest(self._numbers, certificate, route, party, party.attempt, f"{host}:{port}")
        self.guests.append(guest)
        return guest

    async def knock(self, certificate: str, route: Route) -> None:
        """Show a certificate."""
        guest = await self._connect(certificate, route)
        await guest.party.handshake()
        if certificate in self.revoked:
            assert "REVOKED" in await guest.party.alert()
            self._counted_under(route.name).refusals["revoked"] += 1
            self.hang_up(guest)
        else:
            self._handshakes += 1
            self.joining.append(guest)

    def objection(self, guest: Guest, asked: PartyName | None) -> str | None:
        """The code with which its JOIN is refused; None if it is let in, and then its side and identity are settled."""
        route, certificate = guest.route, guest.certificate
        fits = {side: names[certificate] for side, names in ADMITTED[route.wiring].items() if certificate in names}
        if asked is not None:
            fits = {side: identity for side, identity in fits.items() if side == asked}
        if not fits:
            return "not-authorised"
        if len(fits) > 1:
            return "protocol-error"
        [(guest.side, guest.identity)] = fits.items()
        if certificate in self.revoked:
            return "revoked"
        if route.closed:
            return route.closed
        if self._is_full(guest) and self._stale(guest) is None and self._spare(guest) is None:
            return "queue-full"
        return None

    def _is_full(self, guest: Guest) -> bool:
        return len(guest.route.queues[guest.side]) >= self.most_waiting

    def _spare(self, guest: Guest) -> Guest | None:
        """Who gives up a place in a full queue for it: the last of those of whom most wait, if two more than of its."""
        queue = guest.route.queues[guest.side]
        held = Counter(other.identity for other in queue)
        [(greediest, most)] = held.most_common(1)
        if most < held[guest.identity] + 2:
            return None
        return [other for other in queue if other.identity == greediest][-1]

    def _has_its_share(self, guest: Guest) -> bool:
        """Whether it may not be paired: the last 1/32 of the pairings, at least one, is for those with few of them."""
        meetings = guest.route.meetings
        free = self.most_pairings - len(meetings)
        held = sum(guest.identity in {other.identity for other in meeting.guests.values()} for meeting in meetings)
        return free <= 0 or (free <= max(1, self.most_pairings // 32) and held >= free)

    def _stale(self, guest: Guest) -> Guest | None:
        return next((other for other in guest.route.waiting() if guest.is_retry_of(other)), None)

    async def join(self, guest: Guest, asked: PartyName | None, mode: Mode, attempt: str) -> None:
        """Say JOIN; and be refused, wait, or be paired."""
        guest.mode, guest.attempt = mode, attempt
        fields: dict[str, Any] = {} if asked is None else {"party": asked}
        await guest.party.send_frame("JOIN", {"attempt": attempt, "modes": [mode], **fields})
        code = self.objection(guest, asked)
        if code is not None:
            await self.refused(guest, code)
            return
        await self._is_let_in(guest)
        stale = self._stale(guest)
        if stale is not None:
            stale.route.queues[stale.side].remove(stale)
            await self.refused(stale, "replaced")
        others = guest.route.queues[opposite(guest.side)]
        if others and self._has_its_share(guest):
            await self.refused(guest, "limit")
            return
        self.joining.remove(guest)
        while others and self._has_its_share(others[0]):
            await self.refused(others.pop(0), "limit")
        if others:
            await self._meet(guest, others.pop(0))
            return
        spare = self._spare(guest) if self._is_full(guest) else None
        if spare is not None:
            spare.route.queues[spare.side].remove(spare)
            await self.refused(spare, "queue-full")
        guest.route.queues[guest.side].append(guest)

    async def _is_let_in(self, guest: Guest) -> None:
        told = await guest.party.expect("WAITING")
        assert (told["route"], told["party"], told["identity"]) == (guest.route.name, guest.side, guest.identity)

    async def _meet(self, one: Guest, two: Guest) -> None:
        """Both are told of each other, and of nobody else."""
        told = {guest: await guest.party.expect("PAIRED") for guest in (one, two)}
        assert told[one]["pairing"] == told[two]["pairing"]
        meeting = Meeting(told[one]["pairing"], {one.side: one, two.side: two})
        one.route.meetings.append(meeting)
        for guest, words in told.items():
            guest.meeting = meeting
            role = "client" if guest.side == "func1" else "server"
            assert (words["route"], words["peer"]) == (guest.route.name, guest.other.identity)
            assert (words["role"], words["mode"]) == (role, guest.mode)
            guest.ticket = words.get("ticket", "")
            if guest.mode == "tunnel":
                guest.end = End(guest.party, "tunnel")

    async def crowd(self, route: Route, certificates: Iterable[str]) -> None:
        """Many come in one moment. Who of them meets whom is theirs to race for, and what else is so is not.

        As many are paired as can be; whoever waited before goes first, and in order. All who came, and whom they met,
        leave again: what follows must not depend on the race, or no failure could be repeated.
        """
        before = {side: list(route.queues[side]) for side in SIDES}
        came: list[Guest] = []

        async def come(certificate: str) -> None:
            guest = await self._connect(certificate, route)
            came.append(guest)
            await guest.party.handshake()
            await guest.party.join()
            assert self.objection(guest, None) is None
            await self._is_let_in(guest)

        async with trio.open_nursery() as nursery:
            for certificate in certificates:
                nursery.start_soon(come, certificate)
        self._handshakes += len(came)
        there = {side: [*before[side], *(guest for guest in came if guest.side == side)] for side in SIDES}
        expected = len(route.meetings) + min(len(guests) for guests in there.values())
        live = self.relay.routes[route.name]
        deadline = trio.current_time() + TIMEOUT
        while len(live.pairings) < expected:
            assert trio.current_time() < deadline, f"{len(live.pairings)} pairings where {expected} should be"
            await trio.sleep(0.001)
        known = {meeting.pairing for meeting in route.meetings}
        at = {guest.address: guest for guest in self.guests}
        for pairing in list(live.pairings.values()):
            if pairing.id not in known:
                await self._meet(*(at[pairing.legs[side].address] for side in SIDES))
        for side in SIDES:
            # In the order in which the relay let them in, of which only the beginning is known.
            left = route.queues[side] = [at[place.leg.address] for place in live.lobby.waiting(side)]
            assert set(left) == {guest for guest in there[side] if guest.meeting is None}
            stayed = [guest for guest in before[side] if guest.meeting is None]
            assert before[side][len(before[side]) - len(stayed) :] == stayed == left[: len(stayed)]
            if stayed:
                assert all(guest.meeting is None for guest in came if guest.side == side)
        for guest in came:
            if guest in route.queues[guest.side]:
                await self.leave(guest, "reset")
            elif guest in self.guests:
                await self.reset(guest)

    # --- going -----------------------------------------------------------------------------------------------------

    async def leave(self, guest: Guest, way: str) -> None:
        """Go without having met anybody."""
        if way == "LEAVE":
            await guest.party.send_frame("LEAVE")
        elif way == "close_notify":
            await guest.party.stream.send_all(guest.party.close_notify())
        elif way == "reset":
            guest.party.reset()
        guest.route.queues[guest.side].remove(guest)
        self.hang_up(guest)

    async def give_up(self, guest: Guest) -> None:
        """Go before JOIN."""
        guest.party.reset()
        self.joining.remove(guest)
        self.hang_up(guest)

    # --- pairings --------------------------------------------------------------------------------------------------

    async def hand_off(self, guest: Guest, early: int) -> None:
        """Do its part of the hand-off, with the first raw bytes on the heels of it."""
        first = guest.words(0, early)
        if guest.mode == "ticket":
            breaks_off = early % 2 == 1
            if breaks_off:
                guest.party.reset()
            second = await self.site.connect(self._port(guest.route.name), context=self.stage.contexts["left"])
            await second.send_raw(f"FRELAY/1 {guest.ticket}\n".encode() + first)
            guest.end, guest.ticket = End(second, "raw"), ""
            if not breaks_off:
                await guest.party.read_to_close_notify()
        else:
            await guest.party.hand_off(first)
            guest.end = End(guest.party, "raw")
        guest.sent += early

    async def send(self, guest: Guest, count: int) -> None:
        assert guest.end is not None
        await guest.end.send(guest.words(guest.sent, count))
        guest.sent += count

    async def receive(self, guest: Guest) -> None:
        """All that is under way arrives, byte for byte, and the end behind it if there is one."""
        assert guest.end is not None
        other, count = guest.other, guest.other.in_flight
        assert await guest.end.receive_exactly(count) == other.words(guest.received, count)
        guest.received += count
        if other.has_ended:
            assert await guest.end.receive() == b""

    async def bulk(self, guest: Guest) -> None:
        """More than any buffer holds, so that somebody must read meanwhile."""
        other = guest.other
        await self.receive(other)
        assert other.end is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, guest, BULK)
            found = await other.end.receive_exactly(BULK)
        assert found == guest.words(other.received, BULK)
        other.received += BULK

    async def end(self, guest: Guest) -> None:
        """Say that there is no more; the pairing is over once both have."""
        assert guest.end is not None
        assert guest.meeting is not None
        await guest.end.send_eof()
        guest.has_ended = True
        if guest.other.has_ended:
            for one in (guest, guest.other):
                await self.receive(one)
            self._part(guest.meeting, "closed")

    def _part(self, meeting: Meeting, outcome: str) -> None:
        """The pairing is over, and counts."""
        guests = tuple(meeting.guests.values())
        totals = self._counted_under(guests[0].route.name)
        totals.outcomes[outcome] += 1
        totals.carried = [before + now for before, now in zip(totals.carried, meeting.carried, strict=True)]
        guests[0].route.meetings.remove(meeting)
        for guest in guests:
            self.hang_up(guest)
        self._forget_routes_that_are_gone()

    async def _is_cut(self, guest: Guest) -> None:
        """Its connection is broken off: what still came is a beginning of what was sent, and no end was made up."""
        assert guest.meeting is not None
        if guest.end is None:
            assert await guest.party.ended() == "reset"
            return
        found = b""
        try:
            while data := await guest.end.receive():
                found += data
        except (trio.BrokenResourceError, ssl.SSLEOFError):
            pass
        else:
            assert guest.other.has_ended, "a cut that looks like an end"
        expected = guest.other.words(guest.received, guest.other.in_flight) if guest.meeting.is_handed_off else b""
        assert expected.startswith(found)

    async def reset(self, guest: Guest) -> None:
        """Break a pairing off."""
        meeting, other = guest.meeting, guest.other
        assert meeting is not None
        (guest.end.party if guest.end is not None else guest.party).reset()
        if not meeting.is_handed_off:
            await self._is_cut(other)
            self._part(meeting, "handoff-aborted")
        elif not guest.has_ended:
            await self._is_cut(other)
            self._part(meeting, "reset")
        else:
            # What it had said was delivered, and is not taken back. That it takes no more may show with the next byte.
            assert other.end is not None
            with suppress(trio.BrokenResourceError):
                await other.end.send(b"?")
            count = guest.in_flight
            assert await other.end.receive_exactly(count) == guest.words(other.received, count)
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
        """They hold for whoever comes next."""
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
        """Add a route, change who its parties are, or leave it as it is."""
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
        route.queues = {"func1": [], "func2": []}
        for guest in sent_away:
            await self.refused(guest, code)

    async def revoke(self, certificate: str) -> None:
        """Revoke a certificate, or let it back in; whoever is in by one that is revoked is out."""
        self.revoked ^= {certificate}
        self.write_list()
        await self.reload()
        for guest in self.waiting():
            if guest.certificate in self.revoked:
                guest.route.queues[guest.side].remove(guest)
                await self.refused(guest, "revoked")
        for meeting in self.meetings():
            if any(guest.certificate in self.revoked for guest in meeting.guests.values()):
                for guest in meeting.guests.values():
                    await self._is_cut(guest)
                self._part(meeting, "revoked")

    async def drain(self) -> None:
        """Take nobody in any more; who is paired goes on."""
        self.is_draining = True
        self.relay.drain(reason="a rule")
        for route in (*self.routes.values(), *self.retired):
            await self._close_route(route, "draining")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


# --- the machine ---------------------------------------------------------------------------------------------------

picks = st.integers(0, 99)
sides = st.sampled_from(SIDES)
pairs_of_modes = st.tuples(*[st.sampled_from(["handoff", "handoff", "tunnel", "ticket"])] * 2)


class RelayMachine(RuleBasedStateMachine):
    """The events, each of which may come whenever it can."""

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
        """With limits and pairings from the start in many examples: few would get by themselves to where these tell."""
        self.do(self.world.set_limits, waiting, pairings)
        for pair in modes:
            self._introduce(self.world.routes["a"], pair)

    # --- who can do something --------------------------------------------------------------------------------------

    def there_is_room(self, for_so_many: int = 1) -> bool:
        return not self.world.is_draining and len(self.world.guests) + for_so_many < 16

    def not_handed_off(self) -> list[Guest]:
        world = self.world
        can_bring_tickets = {} if world.is_draining else world.routes
        return [
            guest
            for guest in world.paired()
            if guest.end is None and (guest.mode != "ticket" or guest.route.name in can_bring_tickets)
        ]

    def speakers(self) -> list[Guest]:
        return [guest for guest in self.world.paired() if guest.end is not None and not guest.has_ended]

    def readers(self) -> list[Guest]:
        return [guest for guest in self.world.paired() if guest.meeting is not None and guest.meeting.is_handed_off]

    def both(self) -> list[Guest]:
        readers = self.readers()
        return [guest for guest in self.speakers() if guest in readers]

    def breakers(self) -> list[Guest]:
        # A leg that has been handed off and waits for the other one is not read, and so not known to be gone. And one
        # whose ticket is out may break off.
        return [*self.readers(), *(guest for guest in self.world.paired() if guest.end is None and not guest.ticket)]

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
    )
    def join(self, which: int, asked: PartyName | None, mode: Mode, retry_of: int | None) -> None:
        guest: Guest = pick(self.world.joining, which)
        attempt = guest.attempt if retry_of is None else pick(self.world.guests, retry_of).attempt
        self.do(self.world.join, guest, asked, mode, attempt)

    @precondition(there_is_room)
    @rule(certificate=st.sampled_from(KNOWN), which=picks, side=sides, mode=st.sampled_from(["handoff", "tunnel"]))
    def come(self, certificate: str, which: int, side: PartyName, mode: Mode) -> None:
        """Knock and join in one, since most of what follows needs somebody who is in."""
        self._come(certificate, pick(self.world.routes.values(), which), side, mode, None)

    @precondition(lambda self: self.there_is_room(2))
    @rule(which=picks, modes=pairs_of_modes)
    def introduce(self, which: int, modes: tuple[Mode, Mode]) -> None:
        """Two come, and whoever is paired by now does its part of the hand-off: the way to most pairings that talk."""
        self._introduce(pick(self.world.routes.values(), which), modes)

    def _introduce(self, route: Route, modes: tuple[Mode, Mode]) -> None:
        for certificate, mode in zip(("left", "right"), modes, strict=True):
            self._come(certificate, route, "func1", mode, None)
        for guest in self.not_handed_off():
            self.do(self.world.hand_off, guest, 0)

    @precondition(lambda self: self.there_is_room() and self.world.waiting())
    @rule(which=picks, certificate=st.none() | st.sampled_from(KNOWN), side=sides)
    def come_again(self, which: int, certificate: str | None, side: PartyName) -> None:
        """Somebody who waits comes with the same attempt on a new connection; or somebody else says so."""
        guest: Guest = pick(self.world.waiting(), which)
        self._come(certificate or guest.certificate, guest.route, side, "handoff", guest.attempt)

    def _come(self, certificate: str, route: Route, side: PartyName, mode: Mode, attempt: str | None) -> None:
        world, before = self.world, len(self.world.joining)
        self.do(world.knock, certificate, route)
        for guest in world.joining[before:]:
            asked = side if certificate == "both" else None
            self.do(world.join, guest, asked, mode, attempt or guest.attempt)

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
        guest: Guest = pick(self.speakers(), which)
        if guest.in_flight + count <= IN_FLIGHT:
            self.do(self.world.send, guest, count)

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
        guest: Guest = pick(self.speakers(), which)
        self.do(self.world.end, guest)
        if answered and guest.meeting is not None and guest.other in self.speakers():
            self.do(self.world.end, guest.other)

    @precondition(lambda self: self.breakers())
    @rule(which=picks, having_ended=st.booleans())
    def reset(self, which: int, having_ended: bool) -> None:
        guest: Guest = pick(self.breakers(), which)
        if having_ended and guest in self.both() and not guest.other.has_ended:
            self.do(self.world.end, guest)
            self.do(self.world.agree)
        self.do(self.world.reset, guest)

    # --- operators -------------------------------------------------------------------------------------------------

    @rule()
    def look(self) -> None:
        """Nothing happens; and nothing happens in a relay that has drained and is gone."""

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

    @precondition(lambda self: not self.world.is_draining and len(self.world.guests) > 3)
    @rule()
    def drain(self) -> None:
        self.do(self.world.drain)


def pick(candidates: Iterable[Any], which: int) -> Any:
    """One of them; by a number, so that it stays the same one while an example shrinks around it."""
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
