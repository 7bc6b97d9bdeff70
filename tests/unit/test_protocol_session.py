"""What each end of a leg may send and must accept in each state, also when messages cross."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.messages import Draining, Join, Leave, Message, Paired, Ping, Pong, Refused, Waiting, encode
from frelay.protocol.session import PartySession, RelaySession, State

ATTEMPT = "0f8fad5b-d9cb-469f-a165-70867728950e"
JOIN = Join(ATTEMPT)
PONG = Pong(1)
LEAVE = Leave()
WAITING = Waiting("r", "func1", "dns:p", 60.0, None)
PING = Ping(1)
PAIRED = Paired("1", "r", "dns:p", "client", "handoff")
REFUSED = Refused("limit", "no")
DRAINING = Draining(1.0)
ALL: list[Message] = [JOIN, PONG, LEAVE, WAITING, PING, PAIRED, REFUSED, DRAINING]


def relay_in(state: State) -> RelaySession:
    """A relay's end in ``state``; the last state is reached by the party's LEAVE."""
    session = RelaySession()
    if state is not State.JOINING:
        session.receive(encode(JOIN))
    if state in (State.WAITING, State.PAIRED, State.OVER):
        session.send(WAITING)
    if state is State.PAIRED:
        session.send(PAIRED)
    if state is State.OVER:
        session.receive(encode(LEAVE))
    assert session.state is state
    return session


def party_in(state: State) -> PartySession:
    """A party's end in ``state``; the last state is reached by the relay's REFUSED."""
    session = PartySession()
    if state is not State.JOINING:
        session.send(JOIN)
    if state in (State.WAITING, State.PAIRED, State.OVER):
        session.receive(encode(WAITING))
    if state is State.PAIRED:
        session.receive(encode(PAIRED))
    if state is State.OVER:
        session.receive(encode(REFUSED))
    assert session.state is state
    return session


# In which states each message may be sent, and the state after it.
SAID_BY_RELAY: dict[type[Message], dict[State, State]] = {
    Waiting: {State.JOINED: State.WAITING},
    Ping: {State.WAITING: State.WAITING},
    Draining: {State.WAITING: State.WAITING},
    Paired: {State.JOINED: State.PAIRED, State.WAITING: State.PAIRED},
    Refused: {State.JOINING: State.OVER, State.JOINED: State.OVER, State.WAITING: State.OVER},
}
SAID_BY_PARTY: dict[type[Message], dict[State, State]] = {
    Join: {State.JOINING: State.JOINED},
    Pong: {State.JOINED: State.JOINED, State.WAITING: State.WAITING},
    Leave: {State.JOINED: State.OVER, State.WAITING: State.OVER},
}
HEARD_BY_RELAY: dict[type[Message], dict[State, State]] = {
    Join: {State.JOINING: State.JOINED},
    Leave: {State.JOINED: State.OVER, State.WAITING: State.OVER, State.PAIRED: State.OVER},
}
HEARD_BY_PARTY: dict[type[Message], dict[State, State]] = {
    Waiting: {State.JOINED: State.WAITING},
    Ping: {State.JOINED: State.JOINED, State.WAITING: State.WAITING},
    Draining: {State.JOINED: State.JOINED, State.WAITING: State.WAITING},
    Paired: {State.JOINED: State.PAIRED, State.WAITING: State.PAIRED},
    Refused: {State.JOINING: State.OVER, State.JOINED: State.OVER, State.WAITING: State.OVER},
}


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.TYPE.name)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(("make", "table"), [(relay_in, SAID_BY_RELAY), (party_in, SAID_BY_PARTY)])
def test_who_may_say_what_and_when(
    make: Callable[[State], RelaySession | PartySession],
    table: dict[type[Message], dict[State, State]],
    state: State,
    message: Message,
) -> None:
    session = make(state)
    after = table.get(type(message), {}).get(state)
    if after is None:
        with pytest.raises(LocalProtocolError, match=f"{message.TYPE.name} while {state.value}"):
            session.send(message)
        assert session.state is state
    else:
        assert session.send(message) == encode(message)
        assert session.state is after


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.TYPE.name)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(("make", "table"), [(relay_in, HEARD_BY_RELAY), (party_in, HEARD_BY_PARTY)])
def test_who_must_accept_what_and_when(
    make: Callable[[State], RelaySession | PartySession],
    table: dict[type[Message], dict[State, State]],
    state: State,
    message: Message,
) -> None:
    session = make(state)
    after = table.get(type(message), {}).get(state)
    if after is None:
        with pytest.raises(RemoteProtocolError, match=f"{message.TYPE.name} while {state.value}"):
            session.receive(encode(message))
    else:
        assert session.receive(encode(message)) == [message]
        assert session.state is after


def test_a_message_that_cannot_be_written_changes_nothing() -> None:
    party = PartySession()
    with pytest.raises(LocalProtocolError, match="bytes"):
        party.send(Join(ATTEMPT, route="x" * 5000))
    assert party.state is State.JOINING
    assert party.send(JOIN) == encode(JOIN)
    relay = relay_in(State.WAITING)
    with pytest.raises(LocalProtocolError, match="bytes"):
        relay.send(Refused("limit", "x" * 5000))
    assert relay.state is State.WAITING


# --- PING and PONG -------------------------------------------------------------------------------------------------


def test_a_ping_is_answered_once_and_with_its_number() -> None:
    relay = relay_in(State.WAITING)
    for number in (1, 2):
        assert json.loads(relay.ping()[4:]) == {"n": number}
        assert relay.pong_due
        assert relay.receive(encode(Pong(number))) == [Pong(number)]
        assert not relay.pong_due
    with pytest.raises(RemoteProtocolError, match="PONG"):
        relay.receive(encode(Pong(2)))


@pytest.mark.parametrize("number", [0, 2, 99])
def test_a_pong_with_another_number_is_an_error(number: int) -> None:
    relay = relay_in(State.WAITING)
    relay.ping()
    with pytest.raises(RemoteProtocolError, match="PONG"):
        relay.receive(encode(Pong(number)))


def test_one_ping_is_under_way_at_a_time() -> None:
    relay = relay_in(State.WAITING)
    relay.ping()
    with pytest.raises(LocalProtocolError):
        relay.ping()


@pytest.mark.parametrize("state", [State.JOINING, State.JOINED, State.PAIRED, State.OVER])
def test_only_a_waiting_leg_is_pinged(state: State) -> None:
    relay = relay_in(state)
    with pytest.raises(LocalProtocolError):
        relay.ping()
    assert not relay.pong_due


# --- races ---------------------------------------------------------------------------------------------------------


def test_a_pong_that_crosses_with_paired_is_taken_once() -> None:
    relay = relay_in(State.WAITING)
    relay.ping()
    relay.send(PAIRED)
    assert relay.receive(encode(PONG)) == [PONG]
    assert relay.state is State.PAIRED
    with pytest.raises(RemoteProtocolError, match="PONG while paired"):
        relay.receive(encode(PONG))


def test_a_leave_that_crosses_with_paired_is_taken() -> None:
    relay = relay_in(State.PAIRED)
    assert relay.receive(encode(LEAVE)) == [LEAVE]
    assert relay.state is State.OVER


@pytest.mark.parametrize("message", [JOIN, PONG, LEAVE], ids=lambda message: message.TYPE.name)
def test_what_crosses_with_refused_is_dropped(message: Message) -> None:
    relay = RelaySession()
    relay.send(REFUSED)
    assert relay.receive(encode(message)) == []
    assert relay.state is State.OVER


@pytest.mark.parametrize("message", [WAITING, PING, PAIRED, REFUSED, DRAINING], ids=lambda message: message.TYPE.name)
def test_what_crosses_with_leave_is_dropped(message: Message) -> None:
    party = party_in(State.JOINED)
    party.send(LEAVE)
    assert party.receive(encode(message)) == []
    assert party.state is State.OVER


# --- streams -------------------------------------------------------------------------------------------------------


def test_messages_in_one_chunk_come_out_in_order() -> None:
    party = PartySession()
    party.send(JOIN)
    assert party.receive(encode(WAITING) + encode(PING) + encode(PAIRED)) == [WAITING, PING, PAIRED]


def test_a_stream_may_end_between_frames_and_not_inside_one() -> None:
    for cut in range(len(encode(JOIN)) + 1):
        relay = RelaySession()
        relay.receive(encode(JOIN)[:cut])
        if cut in (0, len(encode(JOIN))):
            relay.end_of_stream()
        else:
            with pytest.raises(RemoteProtocolError, match="inside a frame"):
                relay.end_of_stream()


def advisory(count: int) -> bytes:
    return b"\x80\x00\x00\x00" * count


@pytest.mark.parametrize("make", [RelaySession, PartySession])
def test_advisory_frames_are_patience_with_a_bound(make: Callable[[], Any]) -> None:
    """TESTPLAN 21: 64 of them in the whole life of a leg, in one chunk or in many."""
    session = make()
    assert session.receive(advisory(64)) == []
    with pytest.raises(RemoteProtocolError, match="advisory"):
        session.receive(advisory(1))
    session = make()
    with pytest.raises(RemoteProtocolError, match="advisory"):
        session.receive(advisory(65))
