"""Any bytes, in any pieces, give frames and messages, or RemoteProtocolError, in little memory.

``fuzz_frames.py`` has the checks of the codec and of one session, also for coverage-guided fuzzing. Here are the
strategies that know what a message looks like. Then the two ends of a leg are connected: as long as each sends only
what its own state allows, neither may find a fault in the other, in whatever pieces the bytes come and however the
messages cross.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.frames import HEADER_SIZE, MAX_PAYLOAD, Frame, FrameDecoder, FrameType, encode_frame
from frelay.protocol.messages import (
    MODES,
    REFUSAL_CODES,
    Draining,
    Join,
    Leave,
    Message,
    Paired,
    Ping,
    Pong,
    Refused,
    Waiting,
    decode,
    encode,
)
from frelay.protocol.session import PartySession, RelaySession, State
from fuzz_frames import KNOWN, LEAVE, check_decoder, check_session, party_session, relay_session, run_decoder, same

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(unhurried, max_examples=250)

# --- strategies ----------------------------------------------------------------------------------------------------

# Numbers at the limits of messages, and at the limits of machine integers.
numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -0.0, 1e999, 2**63 - 1, 2**63, 10**400, 10**3999, -(10**3999), 1e308, 5e-324]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
printable = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=60)
seconds = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
counters = st.integers(0, 2**63 - 1)
attempts = st.uuids().map(str)
parties = st.sampled_from(["func1", "func2"])
finite = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.dictionaries(printable, inner, max_size=4) | st.lists(inner, max_size=4),
    max_leaves=8,
)

STRATEGIES: Final[dict[type[Message], st.SearchStrategy[Message]]] = {
    Join: st.builds(
        Join,
        attempt=attempts,
        route=st.none() | printable,
        party=st.none() | parties,
        wait=st.none() | seconds,
        modes=st.lists(st.sampled_from([*MODES, "later"]), min_size=1, max_size=4).map(tuple),
    ),
    Pong: st.builds(Pong, counters),
    Leave: st.just(Leave()),
    Waiting: st.builds(Waiting, printable, parties, printable, seconds, st.none() | seconds),
    Ping: st.builds(Ping, counters),
    Paired: st.builds(
        Paired,
        pairing=printable,
        route=printable,
        peer=printable,
        role=st.sampled_from(["client", "server"]),
        mode=st.sampled_from(MODES),
        limits=st.dictionaries(printable, finite, max_size=4),
        ticket=st.none() | printable,
    ),
    Refused: st.builds(Refused, st.sampled_from(sorted(REFUSAL_CODES)), printable, st.none() | seconds),
    Draining: st.builds(Draining, seconds),
}
messages: st.SearchStrategy[Message] = st.one_of(*STRATEGIES.values())


def wire(code: int, body: bytes, reserved: int = 0, length: int | None = None) -> bytes:
    return bytes([code, reserved]) + (len(body) if length is None else length).to_bytes(2, "big") + body


def dumped(value: Any) -> bytes:
    """JSON with everything that Python's encoder accepts, also NaN and lone surrogates."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def doubled(draw: st.DrawFn) -> bytes:
    """An object that has one key twice."""
    members = draw(st.lists(st.tuples(st.text(max_size=5), values), min_size=1, max_size=4))
    members.insert(draw(st.integers(0, len(members))), (draw(st.sampled_from(members))[0], draw(values)))
    return b"{" + b",".join(dumped(name) + b":" + dumped(value) for name, value in members) + b"}"


@st.composite
def nested(draw: st.DrawFn) -> bytes:
    """Brackets, closed or not; nested, but not deeper than every JSON reader can go."""
    depth = draw(st.integers(1, 60))
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
    missing = draw(st.sampled_from([0, 0, 1, depth]))
    return b'{"x":' + opening * depth + b"1" + closing * (depth - missing) + b"}"


bodies = st.one_of(
    st.dictionaries(st.text(max_size=8), values, max_size=5).map(dumped),
    values.map(dumped),
    doubled(),
    nested(),
    st.binary(max_size=80),
    st.sampled_from(
        [b"", b"{}", b"{" * 90, b"\xef\xbb\xbf{}", b'{"n":NaN}', b'{"n":"\\ud800"}', b'{"n":"\xed\xa0\x80"}']
    ),
    # As large as a frame may be, and larger.
    st.integers(MAX_PAYLOAD - 20, MAX_PAYLOAD + 20).map(lambda size: b'{"x":"' + b"y" * (size - 8) + b'"}'),
)
codes = st.one_of(st.sampled_from(sorted(KNOWN)), st.integers(0, 255))
frames = st.one_of(
    messages.map(encode),
    st.builds(wire, codes, bodies),
    st.builds(wire, codes, bodies, st.sampled_from([0, 0, 0, 1, 255]), st.none() | st.integers(0, 0xFFFF)),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A conversation in which a few bytes were changed, lost, added or repeated."""
    data = bytearray(b"".join(draw(st.lists(frames, min_size=1, max_size=5))))
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "drop", "insert", "repeat", "truncate"]))
        if kind == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
        else:
            del data[at:]
    return bytes(data)


streams = st.one_of(st.lists(frames, max_size=6).map(b"".join), mutated(), st.binary(max_size=200))


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """``data`` in pieces, empty ones among them."""
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


# --- the codec -----------------------------------------------------------------------------------------------------


@thorough
@given(st.data(), streams)
def test_the_decoder_does_what_the_model_does_however_the_bytes_are_cut(data: st.DataObject, stream: bytes) -> None:
    """TESTPLAN 21."""
    check_decoder(stream, data.draw(cuts(stream)))


@unhurried
@given(codes, st.integers(0, 255), st.integers(0, 0xFFFF))
def test_a_header_is_judged_without_its_payload(code: int, reserved: int, length: int) -> None:
    """TESTPLAN 21: an announced size alone never makes the decoder hold or wait for more than a frame."""
    decoder = FrameDecoder()
    decoder.feed(wire(code, b"", reserved, length))
    is_right = reserved == 0 and length <= MAX_PAYLOAD and (code >= 0x80 or code in KNOWN)
    if is_right and length:
        assert decoder.next_frame() is None
    elif not is_right or code in KNOWN - {LEAVE}:
        with pytest.raises(RemoteProtocolError):
            decoder.next_frame()
    else:
        decoder.next_frame()


@unhurried
@given(st.sampled_from(FrameType), st.integers(1, 2040), st.sampled_from([b"[", b'{"":', b"[{}, "]), st.booleans())
def test_any_depth_of_nesting_is_an_answer(type_: FrameType, depth: int, opening: bytes, closes: bool) -> None:
    """TESTPLAN 21: a reader may give up at any depth, but only with RemoteProtocolError."""
    closing = b"}" if opening.startswith(b"{") else b"]"
    inner = b"1" if opening.startswith(b"{") else b""
    body = b'{"x":' + opening * depth + inner + (closing * depth if closes else b"") + b"}"
    assume(len(body) <= MAX_PAYLOAD)
    found, raised, _, _ = run_decoder([wire(type_, body)])
    assert raised or (closes and len(found) == 1)


# --- the messages --------------------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 2100 and value.isprintable()


def is_seconds(value: Any) -> bool:
    # An integer that is too large for a float is refused as a time.
    return type(value) in (int, float) and 0 <= value < 1.8e308 and not math.isinf(value)


def is_counter(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**63 - 1


def is_uuid(value: Any) -> bool:
    try:
        return type(value) is str and str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def is_one_of(*allowed: str) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and value in allowed


def is_null_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


is_null_or_seconds: Final = is_null_or(is_seconds)

RULES: Final[dict[FrameType, dict[str, Callable[[Any], bool]]]] = {
    FrameType.JOIN: {
        "attempt": is_uuid,
        "route": is_text,
        "party": is_one_of("func1", "func2"),
        "wait": is_seconds,
        "modes": lambda value: type(value) is list and bool(value) and all(type(mode) is str for mode in value),
    },
    FrameType.PONG: {"n": is_counter},
    FrameType.LEAVE: {},
    FrameType.WAITING: {
        "route": is_text,
        "party": is_one_of("func1", "func2"),
        "identity": is_text,
        "deadline": is_seconds,
        "peer_seen": is_null_or_seconds,
    },
    FrameType.PING: {"n": is_counter},
    FrameType.PAIRED: {
        "pairing": is_text,
        "route": is_text,
        "peer": is_text,
        "role": is_one_of("client", "server"),
        "mode": is_one_of("handoff", "ticket", "tunnel"),
        "ticket": is_text,
        "limits": lambda value: type(value) is dict,
    },
    FrameType.REFUSED: {"code": is_text, "reason": is_text, "retry_after": is_null_or_seconds},
    FrameType.DRAINING: {"reconnect_in": is_seconds},
}
OPTIONAL: Final = {"JOIN.route", "JOIN.party", "JOIN.wait", "JOIN.modes", "PAIRED.ticket", "PAIRED.limits"} | {
    "REFUSED.retry_after"
}
likely = st.one_of(
    values,
    attempts,
    attempts.map(str.upper),
    st.sampled_from(["func1", "func2", "client", "server", "handoff", "Handoff", "tunnel ", ["handoff"], [], [1], {}]),
    st.text(min_size=2098, max_size=2103) | st.integers(2099, 2101).map(lambda size: "x" * size),
    seconds,
    counters,
)


@st.composite
def payloads(draw: st.DrawFn) -> tuple[FrameType, dict[str, Any]]:
    """A payload close to a valid one: most values are right, some are wrong or missing, some keys are unknown."""
    message = draw(messages)
    payload = json.loads(encode(message)[4:])
    for key in draw(st.lists(st.sampled_from([*RULES[message.TYPE], "later", ""]), max_size=3)):
        if draw(st.booleans()):
            payload[key] = draw(likely)
        else:
            payload.pop(key, None)
    return message.TYPE, payload


@thorough
@given(payloads())
def test_a_message_is_read_exactly_if_every_key_is_right(found: tuple[FrameType, dict[str, Any]]) -> None:
    """TESTPLAN 21: field by field; a value of any other kind is a RemoteProtocolError and nothing else."""
    type_, payload = found
    rules = RULES[type_]
    is_right = all(rules[key](value) for key, value in payload.items() if key in rules) and all(
        key in payload or f"{type_.name}.{key}" in OPTIONAL for key in rules
    )
    try:
        message = decode(Frame(type_, payload))
    except RemoteProtocolError:
        assert not is_right
    else:
        assert is_right
        assert message.TYPE is type_
        for key, value in payload.items():
            if key in rules:
                if key == "attempt":
                    value = value.lower()
                if rules[key] in (is_seconds, is_null_or_seconds) and value is not None:
                    value = float(value)  # an integer of more than 53 bits is not quite the same number
                assert getattr(message, key) == (tuple(value) if key == "modes" else value)


def test_seconds_may_be_an_integer_that_no_float_is() -> None:
    """JSON allows this; the test above would rarely find it."""
    message = decode(Frame(FrameType.DRAINING, {"reconnect_in": 2**63 - 1}))
    assert isinstance(message, Draining)
    assert message.reconnect_in == 2.0**63


@thorough
@given(messages)
def test_every_message_comes_back_from_the_wire_as_it_went(message: Message) -> None:
    data = encode(message)
    assert len(data) <= HEADER_SIZE + MAX_PAYLOAD
    [frame], raised, _, held = run_decoder([data])
    assert (raised, held) == (False, 0)
    assert decode(frame) == message


@unhurried
@given(st.sampled_from(FrameType), st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_what_the_encoder_takes_the_decoder_takes(type_: FrameType, payload: dict[str, Any]) -> None:
    """What the encoder refuses is a LocalProtocolError: that is a bug of ours."""
    try:
        data = encode_frame(type_, payload)
    except LocalProtocolError:
        return
    [frame], raised, _, held = run_decoder([data])
    assert (raised, held) == (False, 0)
    assert same(dict(frame.payload), payload)


# --- the sessions --------------------------------------------------------------------------------------------------


@thorough
@given(st.data(), st.sampled_from([relay_session, party_session]), st.integers(0, 4), streams)
@example(None, relay_session, 3, encode(Pong(1)) + encode(Leave()))
@example(None, party_session, 1, b"\x80\x00\x00\x00" * 65)
def test_a_session_gives_messages_or_one_kind_of_error(
    data: st.DataObject | None, make: Callable[[int], RelaySession | PartySession], steps: int, stream: bytes
) -> None:
    """TESTPLAN 21: in every state, and with the same verdict in whatever pieces the bytes come."""
    check_session(make, steps, stream, *([data.draw(cuts(stream))] if data is not None else []))


class Meeting(RuleBasedStateMachine):
    """A party and a relay that obey their own states, on two wires that deliver at any time, in any pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.party, self.relay = PartySession(), RelaySession()
        self.to_relay, self.to_party = b"", b""
        self.sent_by_party: list[Message] = []
        self.sent_by_relay: list[Message] = []
        self.heard_by_party: list[Message] = []
        self.heard_by_relay: list[Message] = []
        self.unanswered: list[int] = []

    def party_says(self, message: Message) -> None:
        self.to_relay += self.party.send(message)
        self.sent_by_party.append(message)

    def relay_says(self, message: Message) -> None:
        self.to_party += self.relay.send(message)
        self.sent_by_relay.append(message)

    # What the party may do.

    @precondition(lambda self: self.party.state is State.JOINING)
    @rule(message=STRATEGIES[Join])
    def join(self, message: Message) -> None:
        self.party_says(message)

    @precondition(lambda self: self.unanswered and self.party.state in (State.JOINED, State.WAITING))
    @rule()
    def pong(self) -> None:
        self.party_says(Pong(self.unanswered.pop(0)))

    @precondition(lambda self: self.party.state in (State.JOINED, State.WAITING))
    @rule()
    def leave(self) -> None:
        self.party_says(Leave())

    # What the relay may do.

    @precondition(lambda self: self.relay.state is State.JOINED)
    @rule(message=STRATEGIES[Waiting])
    def wait(self, message: Message) -> None:
        self.relay_says(message)

    @precondition(lambda self: self.relay.state is State.WAITING and not self.relay.pong_due)
    @rule()
    def ping(self) -> None:
        data = self.relay.ping()
        self.to_party += data
        self.sent_by_relay.append(Ping(json.loads(data[4:])["n"]))

    @precondition(lambda self: self.relay.state in (State.JOINED, State.WAITING))
    @rule(message=STRATEGIES[Paired])
    def pair(self, message: Message) -> None:
        self.relay_says(message)

    @precondition(lambda self: self.relay.state in (State.JOINING, State.JOINED, State.WAITING))
    @rule(message=STRATEGIES[Refused])
    def refuse(self, message: Message) -> None:
        self.relay_says(message)

    @precondition(lambda self: self.relay.state is State.WAITING)
    @rule(message=STRATEGIES[Draining])
    def drain(self, message: Message) -> None:
        self.relay_says(message)

    # What the network may do.

    @rule(data=st.data())
    def deliver_to_relay(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, len(self.to_relay)))
        self.heard_by_relay += self.relay.receive(self.to_relay[:size])
        self.to_relay = self.to_relay[size:]

    @rule(data=st.data())
    def deliver_to_party(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, len(self.to_party)))
        heard = self.party.receive(self.to_party[:size])
        self.to_party = self.to_party[size:]
        self.heard_by_party += heard
        self.unanswered += [message.n for message in heard if isinstance(message, Ping)]

    # What must hold.

    @invariant()
    def what_was_heard_was_said_in_this_order(self) -> None:
        assert self.heard_by_relay == self.sent_by_party[: len(self.heard_by_relay)]
        assert self.heard_by_party == self.sent_by_relay[: len(self.heard_by_party)]

    @invariant()
    def only_the_last_word_makes_anyone_deaf(self) -> None:
        if not self.to_relay and not any(isinstance(message, Refused) for message in self.sent_by_relay):
            assert self.heard_by_relay == self.sent_by_party
        if not self.to_party and not any(isinstance(message, Leave) for message in self.sent_by_party):
            assert self.heard_by_party == self.sent_by_relay

    @invariant()
    def nobody_is_paired_who_was_not_told(self) -> None:
        if self.party.state is State.PAIRED:
            assert any(isinstance(message, Paired) for message in self.heard_by_party)
        if self.relay.state is State.PAIRED:
            assert any(isinstance(message, Join) for message in self.heard_by_relay)

    def teardown(self) -> None:
        self.relay.receive(self.to_relay)
        self.party.receive(self.to_party)
        self.relay.end_of_stream()
        self.party.end_of_stream()


TestMeeting = Meeting.TestCase
TestMeeting.settings = settings(thorough, max_examples=150, stateful_step_count=30)
