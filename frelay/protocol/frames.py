"""The frame layer of frelay/1: bytes in, (type, payload) out, and never more memory than one frame.

A frame on the wire, inside the outer TLS::

    0        1        2                 4
    | type u8 | 0 u8   | length u16 (be) | payload: one JSON object, UTF-8, at most 4096 bytes |

Rules:

1. A header is checked as soon as its four bytes are there, so an oversized frame is refused before a single byte of
   its payload is kept.
2. A type from 0x01 to 0x7f that is unknown is a protocol error. Types 0x80-0xff are advisory: a reader skips those that
   it does not know, and this version knows none of them. Rule 1 holds for them, too.
3. A payload is one JSON object, in a strict form: no duplicate keys (two readers could choose differently), no NaN or
   Infinity, no nesting deeper than Python's own parser allows.
4. Any bytes give frames or :class:`~frelay.errors.RemoteProtocolError`; nothing else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from frelay.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["ADVISORY", "HEADER_SIZE", "MAX_PAYLOAD", "Frame", "FrameDecoder", "FrameType", "encode_frame"]

_HEADER: Final = struct.Struct(">BBH")
HEADER_SIZE: Final = _HEADER.size
MAX_PAYLOAD: Final = 4096
ADVISORY: Final = 0x80
"""The first advisory type: from here on unknown types are skipped."""


class FrameType(IntEnum):
    """The frame types; each comment is the payload's layout (? marks an optional key)."""

    JOIN = 0x01  # {attempt: UUID text, route?: name, party?: "func1"|"func2", wait?: seconds, modes?: [mode]}
    PONG = 0x02  # {n: integer}
    LEAVE = 0x03  # {} or nothing
    WAITING = 0x11  # {route, party, identity, deadline: seconds, peer_seen: seconds|null}
    PING = 0x12  # {n: integer}
    PAIRED = 0x13  # {pairing, route, peer, role: "client"|"server", mode, ticket?: hex, limits: {...}}
    REFUSED = 0x14  # {code, reason, retry_after: seconds|null}
    DRAINING = 0x15  # {reconnect_in: seconds}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a known type, with its JSON object already parsed."""

    type: FrameType
    payload: Mapping[str, Any]


def encode_frame(type_: FrameType, payload: Mapping[str, Any]) -> bytes:
    """Encode one frame; raises LocalProtocolError if the payload is no JSON or does not fit the limit."""
    try:
        body = json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:  # NaN, a lone surrogate, or a type that JSON lacks
        raise LocalProtocolError(f"the payload of {type_.name} cannot be JSON: {error}") from None
    if len(body) > MAX_PAYLOAD:
        raise LocalProtocolError(f"a {type_.name} payload of {len(body)} bytes (at most {MAX_PAYLOAD})")
    return _HEADER.pack(type_, 0, len(body)) + body


class FrameDecoder:
    """Turns chunks of any size into frames.

    Pass what was read to :meth:`feed`, then call :meth:`next_frame` until it returns None. After that at most one
    incomplete frame stays inside.
    """

    __slots__ = ("_buffer", "advisory_skipped")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.advisory_skipped = 0
        """How many advisory frames were skipped; a caller may limit them."""

    def feed(self, data: bytes) -> None:
        """Take in bytes from the other side."""
        self._buffer += data

    def __len__(self) -> int:
        """How many bytes are held that belong to no complete frame yet."""
        return len(self._buffer)

    @property
    def missing(self) -> int:
        """How many bytes complete the header, or the frame, that is held in part; at least 1.

        Call it only after :meth:`next_frame` returned None. A caller that reads no more than this does not read beyond
        the end of the frame.
        """
        held = len(self._buffer)
        if held < HEADER_SIZE:
            return HEADER_SIZE - held
        return HEADER_SIZE + int(_HEADER.unpack_from(self._buffer)[2]) - held

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None when more bytes are needed; raises RemoteProtocolError."""
        while len(self._buffer) >= HEADER_SIZE:
            type_code, reserved, length = _HEADER.unpack_from(self._buffer)
            if reserved != 0:
                raise RemoteProtocolError(f"the second byte of a frame is {reserved:#04x}, not 0")
            if length > MAX_PAYLOAD:
                raise RemoteProtocolError(f"a frame announces {length} bytes (at most {MAX_PAYLOAD})")
            if type_code < ADVISORY and type_code not in _KNOWN:
                raise RemoteProtocolError(f"frame type {type_code:#04x} is unknown")
            end = HEADER_SIZE + length
            if len(self._buffer) < end:
                return None
            body = bytes(self._buffer[HEADER_SIZE:end])
            del self._buffer[:end]
            if type_code >= ADVISORY:
                self.advisory_skipped += 1
                continue
            type_ = FrameType(type_code)
            return Frame(type_, _parse(type_, body))
        return None


_KNOWN: Final = frozenset(int(type_) for type_ in FrameType)


def _parse(type_: FrameType, body: bytes) -> Mapping[str, Any]:
    if not body and type_ is FrameType.LEAVE:
        return {}
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError:
        # 4096 bytes of '[' are legal in length and far beyond the parser's depth.
        raise RemoteProtocolError(f"the payload of {type_.name} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise RemoteProtocolError(f"the payload of {type_.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"the payload of {type_.name} is not a JSON object")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
