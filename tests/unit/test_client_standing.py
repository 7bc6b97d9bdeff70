"""What a listener decides, without I/O: the legs that wait, the pauses, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.client.plans import Plans
from frelay.client.retry import NoRelay, Retry
from frelay.client.standing import Action, End, GiveUp, Leg, Rejoin, Standing, Start, Tell, Wait
from frelay.errors import (
    CertificateError,
    FrelayError,
    PeerGone,
    PeerIdentityMismatch,
    Refused,
    RelayTooOld,
    RelayUnreachable,
)
from frelay.protocol.messages import Paired, Waiting
from support.clients import options
from support.site import Site

WAITING = Waiting("demo", "func2", "dns:func2.demo", 60.0, None)
PAIRED = Paired("1", "demo", "dns:func1.demo", "server", "handoff")
NOBODY_CAME = Refused("wait-timeout", "nobody came", 0.0)


class Files:
    """The plans of a listener whose files are good, unless ``error`` is set."""

    def __init__(self) -> None:
        self.error: FrelayError | None = None
        self.read = 0

    def current(self) -> Any:
        if self.error is not None:
            raise self.error

    def read_again(self) -> None:
        self.read += 1


class Listener:
    """A listener without I/O, and its clock."""

    def __init__(self, lowest: int = 2, highest: int | None = None, most: int = 10, retry: Retry | None = None) -> None:
        self.now = 1000.0
        self.files = Files()
        plans: Any = self.files
        self.standing = Standing(
            plans, Rejoin(retry), lambda: self.now, lowest=lowest, highest=highest or lowest, most=most
        )

    def start(self) -> list[Leg]:
        """The legs that start now; nothing else happens."""
        legs = []
        while isinstance(action := self.standing.next(), Start):
            legs.append(action.leg)
        assert isinstance(action, Wait), action
        return legs

    def pair(self, leg: Leg) -> None:
        self.standing.status(leg, PAIRED)

    def serve(self, leg: Leg) -> None:
        self.standing.joined(leg)
        self.standing.accepted(leg)
        self.standing.released(leg)

    def next(self) -> Action:
        return self.standing.next()

    def fail(self, leg: Leg, error: FrelayError) -> Action:
        self.standing.failed(leg, error)
        return self.standing.next()


def test_a_leg_is_replaced_before_its_wire_is_served() -> None:
    listener = Listener()
    first, second = listener.start()
    listener.standing.status(first, WAITING)
    assert listener.start() == []
    listener.pair(first)
    (third,) = listener.start()
    assert listener.standing.unpaired == (second, third)
    assert listener.standing.in_handshake == 1
    listener.serve(first)
    assert listener.start() == []
    assert listener.standing.in_handshake == 0


def test_wires_that_nobody_accepts_stop_further_legs() -> None:
    """Callers then wait at the relay."""
    listener = Listener()
    ready = []
    while legs := listener.start():
        for leg in legs:
            listener.pair(leg)
            listener.standing.joined(leg)
            ready.append(leg)
    assert len(ready) == 2
    listener.standing.accepted(ready[0])
    listener.standing.released(ready[0])
    assert len(listener.start()) == 2


def test_all_legs_together_are_limited() -> None:
    """Callers that stop in the middle of their handshake take no more than their share."""
    listener = Listener(most=5)
    listener.start()
    for _ in range(5):
        listener.pair(listener.standing.unpaired[0])
        listener.start()
    assert listener.standing.unpaired == ()
    assert listener.standing.in_handshake == 5


def test_a_wait_timeout_is_no_failure() -> None:
    listener = Listener()
    first, second = listener.start()
    listener.standing.status(first, WAITING)
    listener.standing.failed(first, NOBODY_CAME)
    assert len(listener.start()) == 1
    # But a relay that did not even accept the leg in time is one.
    told = listener.fail(second, NOBODY_CAME)
    assert isinstance(told, Tell)
    assert told.pause


def test_a_lost_relay_pauses_all_legs_and_is_told_once() -> None:
    listener = Listener(retry=Retry(first=2.0, longest=64.0))
    first, second = listener.start()
    error = RelayUnreachable("gone")
    told = listener.fail(first, error)
    assert isinstance(told, Tell)
    assert told.error is error
    assert told.pause is not None
    assert 1.0 <= told.pause <= 2.0
    listener.standing.failed(second, RelayUnreachable("gone, too"))
    wait = listener.next()
    assert isinstance(wait, Wait)
    assert wait.seconds == pytest.approx(told.pause)
    listener.now += told.pause
    again = listener.start()
    assert len(again) == 2
    told = listener.fail(again[0], error)
    assert isinstance(told, Tell)
    assert told.pause is not None
    assert 2.0 <= told.pause <= 4.0
    # After a leg was accepted, the pauses begin again.
    listener.standing.status(again[1], WAITING)
    listener.now += 100
    (leg,) = listener.start()
    told = listener.fail(leg, error)
    assert isinstance(told, Tell)
    assert told.pause is not None
    assert told.pause <= 2.0


@pytest.mark.parametrize(
    "error",
    [
        Refused("not-authorised", "x", None),
        Refused("revoked", "x", None),
        NoRelay("x"),
        RelayTooOld("x"),
        CertificateError("x"),
    ],
)
def test_what_no_pause_mends_ends_it_after_the_files_were_read_again(error: FrelayError) -> None:
    listener = Listener(lowest=1)
    for tries in range(3):
        (leg,) = listener.start()
        told = listener.fail(leg, error)
        assert isinstance(told, Tell)
        assert listener.files.read == tries + 1
        listener.now += told.pause or 0
    (leg,) = listener.start()
    assert listener.fail(leg, error) == End(error)
    assert listener.next() == End(error)


def test_a_passing_error_before_does_not_count() -> None:
    listener = Listener(lowest=1)
    for _ in range(20):
        (leg,) = listener.start()
        told = listener.fail(leg, RelayUnreachable("x"))
        assert isinstance(told, Tell)
        listener.now += told.pause or 0
    (leg,) = listener.start()
    assert isinstance(listener.fail(leg, Refused("not-authorised", "x", None)), Tell)


def test_files_that_cannot_be_read_start_no_leg() -> None:
    listener = Listener(lowest=1)
    listener.files.error = CertificateError("cert: there is no file x")
    told = listener.next()
    assert isinstance(told, Tell)
    listener.now += told.pause or 0
    listener.files.error = None
    assert len(listener.start()) == 1


def test_a_number_of_tries_is_kept() -> None:
    listener = Listener(lowest=1, retry=Retry(tries=1))
    (leg,) = listener.start()
    error = RelayUnreachable("x")
    told = listener.fail(leg, error)
    assert isinstance(told, Tell)
    listener.now += told.pause or 0
    (leg,) = listener.start()
    assert listener.fail(leg, error) == End(error)


@pytest.mark.parametrize("error", [PeerIdentityMismatch("dns:a", ["dns:b"]), PeerGone("x"), Refused("x", "x", None)])
def test_a_callers_failure_is_told_and_pauses_nobody(error: FrelayError) -> None:
    listener = Listener()
    first, _ = listener.start()
    listener.pair(first)
    assert listener.fail(first, error) == Tell(error)
    assert len(listener.start()) == 1


def test_callers_that_fail_again_and_again_hold_their_slots() -> None:
    """So that they cannot keep the process busy: later and later each time, but never for ever."""
    listener = Listener(lowest=1, most=3)
    joins = 0
    end = listener.now + 100
    while listener.now < end:
        match listener.next():
            case Start(leg):
                joins += 1
                listener.pair(leg)
                listener.standing.failed(leg, PeerGone("x"))
            case Wait(seconds):
                assert seconds is not None
                listener.now += seconds
            case other:
                assert isinstance(other, Tell)
    assert 50 < joins < 200


def test_a_relay_with_room_for_few_keeps_those() -> None:
    listener = Listener(lowest=3)
    legs = listener.start()
    for leg in legs[:2]:
        listener.standing.status(leg, WAITING)
    listener.standing.failed(legs[2], Refused("queue-full", "x", 5.0))
    assert listener.start() == []
    listener.now += 5.0
    assert len(listener.start()) == 1


def test_no_room_at_all_is_a_failure() -> None:
    listener = Listener(lowest=1)
    (leg,) = listener.start()
    told = listener.fail(leg, Refused("queue-full", "x", 5.0))
    assert isinstance(told, Tell)
    assert told.pause is not None
    assert told.pause > 5.0


def test_legs_grow_with_callers_and_go_again() -> None:
    listener = Listener(lowest=1, highest=8, most=64)
    for expected in (2, 4, 8, 8):
        leg = [*listener.start(), *listener.standing.unpaired][-1]
        listener.pair(leg)
        listener.serve(leg)
        listener.start()
        assert len(listener.standing.unpaired) == expected
    oldest = listener.standing.unpaired[0]
    given_up = []
    for _ in range(20):
        match listener.next():
            case GiveUp(leg):
                given_up.append(leg)
                listener.standing.gone(leg)
            case Wait(seconds):
                if seconds is None:
                    break
                listener.now += seconds
    assert listener.standing.unpaired == (oldest,)
    assert len(given_up) == 7


def test_a_leg_that_is_paired_while_it_is_given_up_is_kept() -> None:
    listener = Listener(lowest=1, highest=2)
    (leg,) = listener.start()
    listener.pair(leg)
    listener.serve(leg)
    _, newest = listener.start()
    listener.now += 60
    # The surplus is found when the listener looks, and PAIRED comes before it acts.
    listener.standing._lower_target(listener.now)
    listener.pair(newest)
    while isinstance(action := listener.next(), Start):
        pass
    assert isinstance(action, Wait)
    assert newest.is_paired


# --- the files --------------------------------------------------------------------------------------------------------


def test_one_plan_for_all_until_a_file_changes(site: Site) -> None:
    plans = Plans("localhost:9001", options(site, "func2", "func1"))
    plan = plans.current()
    assert plans.current() is plan
    renewed = site.ca.party(dns=["func2.demo"])
    renewed.write(site.directory, "func2")
    assert plans.current() is not plan


def test_files_that_seem_the_same_are_read_again_on_demand(site: Site) -> None:
    plans = Plans("localhost:9001", options(site, "func2", "func1"))
    plan = plans.current()
    plans.read_again()
    assert plans.current() is not plan


@pytest.mark.parametrize("which", [0, 1])
def test_a_half_renewed_pair_is_an_error_until_it_fits(site: Site, which: int, tmp_path: Path) -> None:
    plans = Plans("localhost:9001", options(site, "func2", "func1"))
    plans.current()
    new = site.ca.party(dns=["func2.demo"]).write(tmp_path, "new")
    paths = site.paths["func2"]
    paths[which].write_bytes(new[which].read_bytes())
    for _ in range(2):
        with pytest.raises(CertificateError, match="are no PEM certificate and its key"):
            plans.current()
    paths[1 - which].write_bytes(new[1 - which].read_bytes())
    plans.current()


# --- random histories -------------------------------------------------------------------------------------------------

ERRORS: tuple[FrelayError, ...] = (
    RelayUnreachable("x"),
    NOBODY_CAME,
    Refused("queue-full", "x", 5.0),
    Refused("limit", "x", 5.0),
    Refused("draining", "x", 1.0),
    PeerGone("x"),
    PeerIdentityMismatch("dns:a", ["dns:b"]),
)


class History:
    """A listener to which anything may happen; after each event it has neither too many legs nor too few."""

    def __init__(self, lowest: int, highest: int, most: int) -> None:
        self.listener = Listener(lowest, highest, most)
        self.lowest, self.highest, self.most = lowest, highest, most
        self.stages: dict[str, list[Leg]] = {name: [] for name in ("new", "paired", "ready", "accepted")}

    @property
    def legs(self) -> int:
        return sum(map(len, self.stages.values()))

    def act(self) -> float | None:
        """Do all that the listener says; gives how long it waits then."""
        while True:
            match self.listener.next():
                case Start(leg):
                    self.stages["new"].append(leg)
                case GiveUp(leg):
                    self.stages["new"].remove(leg)
                    self.listener.standing.gone(leg)
                case Wait(seconds):
                    assert self.legs <= self.most
                    assert len(self.stages["new"]) <= self.highest
                    return seconds
                case End():
                    raise AssertionError("none of these errors is for good")

    def happen(self, event: str, position: int, error: FrelayError) -> None:
        stage = {"status": "new", "pair": "new", "join": "paired", "accept": "ready", "release": "accepted"}.get(event)
        stage = stage or ("paired" if event == "fail late" else "new")
        if not self.stages[stage]:
            return
        leg = self.stages[stage][position % len(self.stages[stage])]
        standing = self.listener.standing
        if event == "status":
            standing.status(leg, WAITING)
            return
        self.stages[stage].remove(leg)
        match event:
            case "pair":
                self.listener.pair(leg)
                self.stages["paired"].append(leg)
            case "join":
                standing.joined(leg)
                self.stages["ready"].append(leg)
            case "accept":
                standing.accepted(leg)
                self.stages["accepted"].append(leg)
            case "release":
                standing.released(leg)
            case _:
                standing.failed(leg, error)


@given(
    st.integers(1, 4),
    st.integers(0, 8),
    st.integers(0, 20),
    st.lists(
        st.tuples(
            st.sampled_from(["status", "pair", "join", "accept", "release", "fail", "fail late", "time passes"]),
            st.integers(0, 99),
            st.sampled_from(ERRORS),
            st.floats(0.0, 20.0),
        ),
        max_size=80,
    ),
)
def test_whatever_happens_the_legs_stand_again(
    lowest: int, more: int, beyond: int, events: list[tuple[str, int, FrelayError, float]]
) -> None:
    """No slot is lost, and none is counted twice: in the end exactly ``lowest`` legs wait."""
    history = History(lowest, lowest + more, lowest + more + beyond)
    history.act()
    for event, position, error, seconds in events:
        if event == "time passes":
            history.listener.now += seconds
        else:
            history.happen(event, position, error)
        history.act()
    for event in ("join", "accept", "release"):
        while history.stages[{"join": "paired", "accept": "ready", "release": "accepted"}[event]]:
            history.happen(event, 0, ERRORS[0])
    # Pauses, held slots and the surplus end by themselves.
    for _ in range(1000):
        seconds_or_none = history.act()
        if seconds_or_none is None:
            break
        history.listener.now += seconds_or_none
    assert len(history.stages["new"]) == len(history.listener.standing.unpaired) == lowest
    assert history.listener.standing.in_handshake == 0
