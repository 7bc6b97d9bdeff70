"""The messages are those of the table in docs/protocol.md, section 2: every key, every type, every default."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.frames import Frame, FrameType
from frelay.protocol.messages import (
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
    read_traceparent,
)

ATTEMPT = "0f8fad5b-d9cb-469f-a165-70867728950e"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

# For each type, a payload with all keys and the message that it means.
FULL: dict[FrameType, tuple[dict[str, Any], Message]] = {
    FrameType.JOIN: (
        {
            "attempt": ATTEMPT,
            "route": "shuffle",
            "party": "func2",
            "wait": 2.5,
            "modes": ["ticket", "tunnel"],
            "traceparent": TRACEPARENT,
            "meet": "job42/3-7",
            "partner": ["dns:rank7.acme", "uri:spiffe://acme/jobs/*"],
        },
        Join(
            *(ATTEMPT, "shuffle", "func2", 2.5, ("ticket", "tunnel"), TRACEPARENT),
            *("job42/3-7", ("dns:rank7.acme", "uri:spiffe://acme/jobs/*")),
        ),
    ),
    FrameType.PONG: ({"n": 3}, Pong(3)),
    FrameType.LEAVE: ({}, Leave()),
    FrameType.WAITING: (
        {
            "route": "shuffle",
            "party": "func1",
            "identity": "dns:func1.acme",
            "deadline": 60,
            "peer_seen": 1.5,
            "meet": "job42",
            "partner": True,
        },
        Waiting("shuffle", "func1", "dns:func1.acme", 60.0, 1.5, "job42", True),
    ),
    FrameType.PING: ({"n": 3}, Ping(3)),
    FrameType.PAIRED: (
        {
            "pairing": "ab12",
            "route": "shuffle",
            "peer": "dns:func2.acme",
            "role": "client",
            "mode": "ticket",
            "ticket": "00" * 32,
            "limits": {"idle_timeout": 3600},
            "meet": "job42",
            "partner": True,
        },
        Paired(
            *("ab12", "shuffle", "dns:func2.acme", "client", "ticket", {"idle_timeout": 3600}, "00" * 32),
            *("job42", True),
        ),
    ),
    FrameType.REFUSED: (
        {"code": "queue-full", "reason": "16 legs wait already", "retry_after": 5},
        Refused("queue-full", "16 legs wait already", 5.0),
    ),
    FrameType.DRAINING: ({"reconnect_in": 1}, Draining(1.0)),
}

REQUIRED: dict[FrameType, set[str]] = {
    FrameType.JOIN: {"attempt"},
    FrameType.PONG: {"n"},
    FrameType.LEAVE: set(),
    FrameType.WAITING: {"route", "party", "identity", "deadline", "peer_seen"},
    FrameType.PING: {"n"},
    FrameType.PAIRED: {"pairing", "route", "peer", "role", "mode"},
    FrameType.REFUSED: {"code", "reason"},
    FrameType.DRAINING: {"reconnect_in"},
}

ANY_TEXT: list[Any] = [None, True, 1, 1.5, [], {}, "", "line\nbreak", "nul\x00", "\ud800", "x" * 2101]
CHOICE: list[Any] = [None, True, 1, [], {}, "", "Func1", "func3", "CLIENT", "raw"]
KEY: list[Any] = [None, True, 1, [], {}, "", "with space", "tab\t", "\x7f", "\u00e9", "x" * 129, "line\n"]
PARTNERS: list[Any] = [
    *(None, True, 1, "dns:a.demo", {}, [], [1], [None], [["dns:a.demo"]], ["a.demo"], ["dns:"], ["dns:*"], ["cn:a"]),
    *(["spki:sha256:00"], ["dns:a.demo"] * 17, ["dns:a.demo", "dns:\u00e9.demo"], ["group:workers"]),
]
FLAG: list[Any] = [None, 0, 1, "true", [], {}]
SECONDS: list[Any] = [True, False, "1", [], {}, -1, -0.5, float("inf"), float("-inf"), float("nan"), 10**400]
COUNTER: list[Any] = [None, True, False, "1", 1.0, [], {}, -1, 2**63, 10**400]
WRONG: dict[str, list[Any]] = {
    "JOIN.attempt": [
        None,
        1,
        [],
        "",
        "x",
        ATTEMPT[:-1],
        ATTEMPT + "0",
        ATTEMPT + "\n",
        ATTEMPT.replace("-", ""),
        "{" + ATTEMPT + "}",
        "g" + ATTEMPT[1:],
    ],
    "JOIN.route": ANY_TEXT,
    "JOIN.party": CHOICE,
    "JOIN.wait": [None, *SECONDS],
    "JOIN.modes": [None, True, 1, "handoff", {}, [], ["handoff", 1], [None], [["handoff"]]],
    "JOIN.traceparent": [None, True, 1, 1.5, [], {}],
    "JOIN.meet": KEY,
    "JOIN.partner": PARTNERS,
    "PONG.n": COUNTER,
    "WAITING.route": ANY_TEXT,
    "WAITING.party": CHOICE[1:],
    "WAITING.identity": ANY_TEXT,
    "WAITING.deadline": [None, *SECONDS],
    "WAITING.peer_seen": SECONDS,
    "WAITING.meet": KEY,
    "WAITING.partner": FLAG,
    "PING.n": COUNTER,
    "PAIRED.pairing": ANY_TEXT,
    "PAIRED.route": ANY_TEXT,
    "PAIRED.peer": ANY_TEXT,
    "PAIRED.role": CHOICE,
    "PAIRED.mode": CHOICE,
    "PAIRED.ticket": ANY_TEXT,
    "PAIRED.limits": [None, True, 1, "x", []],
    "PAIRED.meet": KEY,
    "PAIRED.partner": FLAG,
    "REFUSED.code": ANY_TEXT,
    "REFUSED.reason": ANY_TEXT,
    "REFUSED.retry_after": SECONDS,
    "DRAINING.reconnect_in": [None, *SECONDS],
}


def test_the_table_of_wrong_values_has_every_key() -> None:
    assert WRONG.keys() == {f"{type_.name}.{key}" for type_, (payload, _) in FULL.items() for key in payload}


@pytest.mark.parametrize("type_", FrameType)
def test_every_message_is_read_with_all_its_keys(type_: FrameType) -> None:
    payload, message = FULL[type_]
    assert decode(Frame(type_, payload)) == message


@pytest.mark.parametrize("type_", FrameType)
def test_unknown_keys_are_ignored(type_: FrameType) -> None:
    """TESTPLAN 21."""
    payload, message = FULL[type_]
    assert decode(Frame(type_, {**payload, "later": [1, {"x": None}], "": 0, "N": "\ud800"})) == message


@pytest.mark.parametrize("name", WRONG)
def test_a_known_key_with_a_wrong_type_is_an_error_that_names_it(name: str) -> None:
    """TESTPLAN 21: also null, unless the layout gives it a meaning."""
    type_, _, key = name.partition(".")
    payload, _ = FULL[FrameType[type_]]
    for wrong in WRONG[name]:
        with pytest.raises(RemoteProtocolError, match=f"{type_}.{key}"):
            decode(Frame(FrameType[type_], {**payload, key: wrong}))


@pytest.mark.parametrize("type_", FrameType)
def test_a_required_key_must_be_there_and_the_others_need_not(type_: FrameType) -> None:
    payload = {key: value for key, value in FULL[type_][0].items() if (type_, key) != (FrameType.JOIN, "partner")}
    for key in payload:
        without = {name: value for name, value in payload.items() if name != key}
        if key in REQUIRED[type_]:
            with pytest.raises(RemoteProtocolError, match=f"{type_.name} without {key}"):
                decode(Frame(type_, without))
        else:
            decode(Frame(type_, without))


def test_partners_are_listed_only_for_a_key() -> None:
    """The key bounds how many legs one JOIN is compared with."""
    with pytest.raises(RemoteProtocolError, match=r"JOIN\.partner: allowed only together with meet"):
        decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT, "partner": ["dns:a.demo"]}))


def test_the_longest_key_and_the_longest_list_are_read() -> None:
    key, partners = "~" * 64 + '!<&"' * 16, [f"dns:n{number}.demo" for number in range(16)]
    message = decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT, "meet": key, "partner": partners}))
    assert message == Join(ATTEMPT, meet=key, partner=tuple(partners))


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(RemoteProtocolError, match="PAIRED without mode, pairing, peer, role, route"):
        decode(Frame(FrameType.PAIRED, {}))


def test_the_defaults_of_join() -> None:
    assert decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT})) == Join(ATTEMPT, None, None, None, ("handoff",))


def test_null_has_a_meaning_in_three_keys() -> None:
    waiting, _ = FULL[FrameType.WAITING]
    assert decode(Frame(FrameType.WAITING, {**waiting, "peer_seen": None, "party": None})) == Waiting(
        "shuffle", None, "dns:func1.acme", 60.0, None, "job42", True
    )
    assert decode(Frame(FrameType.REFUSED, {"code": "limit", "reason": "no", "retry_after": None})) == Refused(
        "limit", "no", None
    )


@pytest.mark.parametrize("seconds", [0, 0.0, -0.0, 1, 1.5, 1e300])
def test_seconds_may_be_any_number_from_zero_on(seconds: float) -> None:
    assert decode(Frame(FrameType.DRAINING, {"reconnect_in": seconds})) == Draining(float(seconds))


@pytest.mark.parametrize("number", [0, 1, 2**63 - 1])
def test_a_counter_may_be_any_integer_of_63_bits(number: int) -> None:
    assert decode(Frame(FrameType.PONG, {"n": number})) == Pong(number)


def test_an_attempt_is_compared_without_case() -> None:
    assert decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT.upper()})) == Join(ATTEMPT)


def test_modes_of_a_later_version_are_read() -> None:
    message = decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT, "modes": ["quantum", "tunnel"]}))
    assert message == Join(ATTEMPT, modes=("quantum", "tunnel"))


@pytest.mark.parametrize(
    "text",
    [TRACEPARENT, TRACEPARENT.replace("-01", "-00"), "cc" + TRACEPARENT[2:], TRACEPARENT.replace("-01", "-ff")],
)
def test_a_traceparent_is_read_as_it_stands(text: str) -> None:
    assert read_traceparent(text) == text


def test_of_a_later_traceparent_what_is_known_is_read() -> None:
    """W3C Trace Context, 4.3: later versions may add text after a dash."""
    assert read_traceparent("cc" + TRACEPARENT[2:] + "-what the future brings\n") == "cc" + TRACEPARENT[2:]


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", TRACEPARENT[:-1], TRACEPARENT + "0", TRACEPARENT + "\n", " " + TRACEPARENT, TRACEPARENT.upper()),
        *(
            "ff" + TRACEPARENT[2:],
            TRACEPARENT + "-more",
            "cc" + TRACEPARENT[2:] + "more",
            TRACEPARENT.replace("-", "_"),
        ),
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
        TRACEPARENT.replace("4bf", "\u0664bf"),
    ],
)
def test_an_ill_formed_traceparent_is_ignored_and_no_error(text: str) -> None:
    assert read_traceparent(text) is None
    assert decode(Frame(FrameType.JOIN, {"attempt": ATTEMPT, "traceparent": text})) == Join(ATTEMPT)


def test_a_code_of_a_later_version_reaches_the_person() -> None:
    assert decode(Frame(FrameType.REFUSED, {"code": "full-moon", "reason": "wait a day"})) == Refused(
        "full-moon", "wait a day"
    )


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", FrameType)
def test_what_is_written_is_what_the_table_says(type_: FrameType) -> None:
    payload, message = FULL[type_]
    data = encode(message)
    assert data[:2] == bytes([type_, 0])
    assert int.from_bytes(data[2:4], "big") == len(data) - 4
    assert json.loads(data[4:]) == payload


def test_what_was_not_said_is_not_written() -> None:
    assert json.loads(encode(Join(ATTEMPT))[4:]) == {"attempt": ATTEMPT, "modes": ["handoff"]}
    assert "ticket" not in json.loads(encode(Paired("1", "r", "dns:p", "client", "handoff"))[4:])


def test_null_is_written_where_it_has_a_meaning() -> None:
    assert json.loads(encode(Refused("limit", "no"))[4:])["retry_after"] is None
    waiting = json.loads(encode(Waiting("r", None, "dns:p", 1.0, None))[4:])
    assert waiting == {"route": "r", "party": None, "identity": "dns:p", "deadline": 1.0, "peer_seen": None}


def test_the_codes_are_those_of_the_contract() -> None:
    assert {
        "not-authorised",
        "unknown-route",
        "protocol-error",
        "wait-timeout",
        "pong-timeout",
        "queue-full",
        "replaced",
        "route-removed",
        "certificate-expired",
        "revoked",
        "limit",
        "draining",
    } == REFUSAL_CODES
    for code in REFUSAL_CODES:
        assert decode(Frame(FrameType.REFUSED, json.loads(encode(Refused(code, "because"))[4:]))) == Refused(
            code, "because"
        )


@pytest.mark.parametrize(
    "message",
    [
        Refused("made-up", "because"),
        Refused("limit", "x" * 5000),
        Refused("limit", "\ud800"),
        Draining(float("nan")),
        Join(ATTEMPT, wait=float("inf")),
        Paired("1", "r", "dns:p", "client", "handoff", {"x": object()}),
    ],
    ids=["code", "size", "surrogate", "nan", "inf", "type"],
)
def test_what_cannot_be_a_message_is_our_own_error(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)
