"""The messages of frelay/1 as types: what a frame's JSON object may hold, checked key by key.

Each frame type has one dataclass. Its fields are the payload's keys, and a field without a default is a required key,
so the class *is* the layout. Reading follows three rules of the contract: unknown keys are ignored, a missing required
key is a protocol error, and a known key with a wrong type is a protocol error. ``null`` is a value like any
other: it is right only where the layout allows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Final, Literal

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.frames import Frame, FrameType, encode_frame
from frelay.protocol.identity import parse_selector

__all__ = [
    "MAX_PARTNERS",
    "MODES",
    "REFUSAL_CODES",
    "Draining",
    "Join",
    "Leave",
    "LegParty",
    "Message",
    "Mode",
    "Paired",
    "PartyName",
    "Ping",
    "Pong",
    "Refused",
    "Role",
    "Waiting",
    "decode",
    "encode",
    "read_key",
    "read_partners",
    "read_traceparent",
]

PartyName = Literal["func1", "func2"]
LegParty = Literal["func1", "func2", "either"]
"""The party of a leg: "either" is a leg that may still become one or the other, until it is paired."""
Role = Literal["client", "server"]
Mode = Literal["handoff", "ticket", "tunnel"]

MODES: Final[tuple[Mode, ...]] = ("handoff", "ticket", "tunnel")
REFUSAL_CODES: Final = frozenset(
    {
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
    }
)

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")
# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, parent and flags. Version ff is invalid, and
# so are a trace or a parent of zeroes. A later version may have more after another dash; version 00 may not.
_TRACEPARENT: Final = re.compile(
    r"(?P<known>(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?P<more>-.*)?\Z", re.DOTALL
)
# Visible ASCII: with other characters, two spellings of one text would be two keys that never meet.
_KEY: Final = re.compile(r"[!-~]{1,128}\Z")
MAX_PARTNERS: Final = 16
"""How many selectors a JOIN may list as its partners; they bound the work of one comparison."""
# Long enough for any route name, identity or sentence of ours. Longer text comes from an attacker or a bug.
_MAX_TEXT: Final = 2100


@dataclass(frozen=True, slots=True)
class Join:
    """Party to relay: let me join. ``attempt`` names this try, so that a retry replaces its own stale leg.

    ``meet`` is the key of the legs that may be paired with this one; without it, only legs without a key may.
    ``partner`` lists selectors: a name of the other leg's certificate must match one of them.
    """

    TYPE: ClassVar = FrameType.JOIN
    attempt: str
    route: str | None = None
    party: PartyName | None = None
    wait: float | None = None
    modes: tuple[str, ...] = ("handoff",)
    traceparent: str | None = None
    meet: str | None = None
    partner: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pong:
    """Party to relay: still here; ``n`` is the PING's."""

    TYPE: ClassVar = FrameType.PONG
    n: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Party to relay: no longer waiting."""

    TYPE: ClassVar = FrameType.LEAVE


@dataclass(frozen=True, slots=True)
class Waiting:
    """Relay to party: admitted, and the other party is not here yet. Times in seconds.

    ``party`` is None for a leg that may still become either party. ``meet`` and ``partner`` repeat what JOIN asked for:
    a relay that does not know them leaves them out.
    """

    TYPE: ClassVar = FrameType.WAITING
    route: str
    party: PartyName | None
    identity: str
    deadline: float
    peer_seen: float | None
    meet: str | None = None
    partner: bool | None = None


@dataclass(frozen=True, slots=True)
class Ping:
    """Relay to party: answer with a PONG of the same ``n``."""

    TYPE: ClassVar = FrameType.PING
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """Relay to party: the other party is here. ``role`` is this party's side of the inner TLS.

    ``meet`` and ``partner`` repeat what JOIN asked for, as in :class:`Waiting`.
    """

    TYPE: ClassVar = FrameType.PAIRED
    pairing: str
    route: str
    peer: str
    role: Role
    mode: Mode
    limits: Mapping[str, Any] = field(default_factory=dict)
    ticket: str | None = None
    meet: str | None = None
    partner: bool | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """Relay to party: refused, and why; ``retry_after`` is in seconds, or None if a retry would not help."""

    TYPE: ClassVar = FrameType.REFUSED
    code: str
    reason: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Draining:
    """Relay to party: this relay is going away; dial again in ``reconnect_in`` seconds."""

    TYPE: ClassVar = FrameType.DRAINING
    reconnect_in: float


def read_traceparent(text: str) -> str | None:
    """The part of a W3C ``traceparent`` that version 00 defines, or None if it is ill-formed.

    That is no error, as the specification says: a function must not be refused for a bad trace context.
    """
    found = _TRACEPARENT.match(text)
    if found is None or (found["more"] is not None and text.startswith("00")):
        return None
    return found["known"]


def read_key(text: object) -> str:
    """A key for ``meet``: 1 to 128 characters of visible ASCII. Raises ValueError."""
    if not isinstance(text, str) or _KEY.match(text) is None:
        raise ValueError("1 to 128 characters of visible ASCII expected (! to ~, no space)")
    return text


def read_partners(texts: object) -> tuple[str, ...]:
    """A list for ``partner``: 1 to 16 selectors. Raises ValueError."""
    if not isinstance(texts, list | tuple) or not 0 < len(texts) <= MAX_PARTNERS:
        raise ValueError(f"a list of 1 to {MAX_PARTNERS} selectors expected")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError("a list of selectors expected")
        parse_selector(text)
    return tuple(texts)


Message = Join | Pong | Leave | Waiting | Ping | Paired | Refused | Draining


# --- reading: one check a key --------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise ValueError("printable text expected")
    return value


def _uuid(value: Any) -> str:
    if not isinstance(value, str) or _UUID.match(value) is None:
        raise ValueError("a UUID as text expected")
    return value.lower()


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number of seconds expected")
    try:
        seconds = float(value)
    except OverflowError:
        raise ValueError("a number of seconds expected, not one of that size") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError("a number of seconds, 0 or more, expected")
    return seconds


def _counter(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("an integer from 0 to 2^63-1 expected")
    return value


def _modes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(mode, str) for mode in value):
        raise ValueError("a list of modes expected")
    return tuple(value)


def _traceparent(value: Any) -> str | None:
    if not isinstance(value, str):
        raise ValueError("a W3C traceparent as text expected")
    return read_traceparent(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object expected")
    return value


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)} expected")
        return value

    return check


def _or_null(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_party: Final = _one_of("func1", "func2")
_CHECKS: Final[Mapping[type[Message], Mapping[str, Callable[[Any], Any]]]] = {
    Join: {
        "attempt": _uuid,
        "route": _text,
        "party": _party,
        "wait": _seconds,
        "modes": _modes,
        "traceparent": _traceparent,
        "meet": read_key,
        "partner": read_partners,
    },
    Pong: {"n": _counter},
    Leave: {},
    Waiting: {
        "route": _text,
        "party": _or_null(_party),
        "identity": _text,
        "deadline": _seconds,
        "peer_seen": _or_null(_seconds),
        "meet": read_key,
        "partner": _flag,
    },
    Ping: {"n": _counter},
    Paired: {
        "pairing": _text,
        "route": _text,
        "peer": _text,
        "role": _one_of("client", "server"),
        "mode": _one_of(*MODES),
        "ticket": _text,
        "limits": _object,
        "meet": read_key,
        "partner": _flag,
    },
    # Any text is accepted as a code, so that a code of a later version still reaches the user.
    Refused: {"code": _text, "reason": _text, "retry_after": _or_null(_seconds)},
    Draining: {"reconnect_in": _seconds},
}
_BY_TYPE: Final[Mapping[FrameType, type[Message]]] = {cls.TYPE: cls for cls in _CHECKS}
_REQUIRED: Final[Mapping[type[Message], frozenset[str]]] = {
    cls: frozenset(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    for cls in _CHECKS
}


def decode(frame: Frame) -> Message:
    """Make the message of a frame; raises RemoteProtocolError for a missing key or a wrong type."""
    cls = _BY_TYPE[frame.type]
    checks = _CHECKS[cls]
    values: dict[str, Any] = {}
    for key, value in frame.payload.items():
        if key in checks:
            try:
                values[key] = checks[key](value)
            except ValueError as error:
                raise RemoteProtocolError(f"{frame.type.name}.{key}: {error}") from None
    missing = _REQUIRED[cls] - values.keys()
    if missing:
        raise RemoteProtocolError(f"{frame.type.name} without {', '.join(sorted(missing))}")
    if cls is Join and "partner" in values and "meet" not in values:
        raise RemoteProtocolError("JOIN.partner: allowed only together with meet")
    return cls(**values)


_NULL_HAS_MEANING: Final[Mapping[type[Message], frozenset[str]]] = {
    Waiting: frozenset({"party", "peer_seen"}),
    Refused: frozenset({"retry_after"}),
}


def encode(message: Message) -> bytes:
    """Encode a message as a frame; raises LocalProtocolError if that is not possible."""
    meant = _NULL_HAS_MEANING.get(type(message), frozenset())
    payload = {
        f.name: value for f in fields(message) if (value := getattr(message, f.name)) is not None or f.name in meant
    }
    if isinstance(message, Refused) and message.code not in REFUSAL_CODES:
        raise LocalProtocolError(f"{message.code!r} is not a code of the protocol")
    return encode_frame(message.TYPE, payload)
