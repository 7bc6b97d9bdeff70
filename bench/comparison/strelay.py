"""The frames of syncthing's relay protocol that two parties need to meet; without I/O.

A frame is a header of three big-endian 32-bit numbers, magic, type and length of the payload, and the payload in XDR:
numbers take four bytes, and bytes have their length in front and are filled up to a multiple of four.

A party that wants to be found joins the relay over TLS with JOIN_RELAY. Another one asks there, also over TLS, with
CONNECT and the first one's id, which is the SHA-256 of its certificate. Both get an INVITATION with a key of the
session. Each dials again in plain TCP and sends the key with JOIN_SESSION. After the RESPONSE all bytes are theirs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

__all__ = [
    "ALPN",
    "ALREADY_CONNECTED",
    "CONNECT",
    "INVITATION",
    "JOIN_RELAY",
    "JOIN_SESSION",
    "PING",
    "PONG",
    "RESPONSE",
    "Frames",
    "frame",
    "opaque",
    "response_of",
    "session_key_of",
]

ALPN: Final = "bep-relay"
PING, PONG, JOIN_RELAY, JOIN_SESSION, RESPONSE, CONNECT, INVITATION = range(7)
ALREADY_CONNECTED: Final = 2
"""A code of RESPONSE."""

_MAGIC: Final = 0x9E79BC40
_HEADER: Final = struct.Struct(">III")
# The relay's own limit is 1 KiB.
_MOST: Final = 1024


def opaque(data: bytes) -> bytes:
    """Bytes, in XDR."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _take_opaque(payload: bytes) -> tuple[bytes, bytes]:
    """The bytes that a payload begins with, and the rest; raises ValueError."""
    if len(payload) < 4:
        raise ValueError("a payload that ends before its field")
    length = int.from_bytes(payload[:4])
    end = 4 + length + -length % 4
    if len(payload) < end:
        raise ValueError(f"a field of {length} bytes in a payload of {len(payload)}")
    return payload[4 : 4 + length], payload[end:]


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEADER.pack(_MAGIC, kind, len(payload)) + payload


def response_of(payload: bytes) -> tuple[int, str]:
    """Code (0 is success) and message of a RESPONSE; raises ValueError."""
    if len(payload) < 4:
        raise ValueError("a response without a code")
    message, _ = _take_opaque(payload[4:])
    return int.from_bytes(payload[:4]), message.decode("utf-8", "replace")


def session_key_of(payload: bytes) -> bytes:
    """The key in an INVITATION; raises ValueError."""
    _, rest = _take_opaque(payload)  # from whom
    return _take_opaque(rest)[0]


@dataclass
class Frames:
    """Frames out of a stream of bytes."""

    _rest: bytes = b""

    @property
    def missing(self) -> int:
        """How many bytes may be read without reading into what follows this frame."""
        if len(self._rest) < _HEADER.size:
            return _HEADER.size - len(self._rest)
        return _HEADER.size + self._length() - len(self._rest)

    def _length(self) -> int:
        magic, _, length = _HEADER.unpack_from(self._rest)
        if magic != _MAGIC or length > _MOST:
            raise ValueError("not a frame of this protocol")
        return int(length)

    def receive(self, data: bytes) -> tuple[int, bytes] | None:
        """Take at most :attr:`missing` bytes; gives (type, payload) once a frame is whole. Raises ValueError."""
        self._rest += data
        if len(self._rest) < _HEADER.size or len(self._rest) < _HEADER.size + self._length():
            return None
        kind = int(_HEADER.unpack_from(self._rest)[1])
        payload, self._rest = self._rest[_HEADER.size :], b""
        return kind, payload
