"""What the ranks of a group send each other inside of the inner TLS. Standard library only.

A message goes in pieces of at most PIECE bytes, each behind a header. So a word to the whole group, such as ABORT,
waits behind one piece at most, and not behind a message of a gigabyte::

    kind 1 | zero 1 | arguments 2 | sequence 4 | left 8 | min(left, PIECE) bytes

``left`` counts what is left of the message, this piece included; numbers are in network order. ``arguments`` is a
checksum of all that must be equal at all ranks of a call: root, operation, element type. ``sequence`` numbers the calls
that all ranks make together. The three and ``kind`` are the tag of the message. A rank that receives another tag than
it expects is out of step.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from frelay.errors import RemoteProtocolError

__all__ = [
    "FORMAT",
    "PIECE",
    "TAG",
    "Abort",
    "Hello",
    "Kind",
    "header",
    "make_tag",
    "read_roster",
    "sequence_of",
    "tag_text",
    "write_roster",
]

PIECE: Final = 262144
"""The longest piece. It is long enough that its header costs nothing, and short enough for ABORT to come in time."""

TAG: Final = struct.Struct("!BxHI")
FORMAT: Final = struct.Struct("!BxHIQ")

_VERSION: Final = 1
_MAGIC: Final = b"frelay group"
_HELLO: Final = struct.Struct("!12sBxxxII16s32s")
_ABORT: Final = struct.Struct("!i")
# An ABORT carries a sentence for a person, perhaps the text of a foreign exception.
_LONGEST_TEXT: Final = 1000
INSTANCE: Final = 16


class Kind(IntEnum):
    """The first byte of a header."""

    HELLO = 1
    ROSTER = 2
    ABORT = 3
    """The group has failed: which rank is to blame, and why. It may come between the pieces of a message."""
    REFUSED = 4
    """As ABORT, for one process alone: the group has another one in its place."""
    PING = 5
    PONG = 6
    SEND = 16
    BARRIER = 17
    BCAST = 18
    SCATTER = 19
    GATHER = 20
    ALLGATHER = 21
    ALLTOALL = 22
    REDUCE = 23
    ALLREDUCE = 24
    SCAN = 25
    CLOSE = 26


def make_tag(kind: Kind, sequence: int = 0, arguments: str = "") -> bytes:
    """The tag of a message; ``arguments`` is a text with all that must be equal at both ranks."""
    return TAG.pack(kind, zlib.crc32(arguments.encode()) & 0xFFFF if arguments else 0, sequence & 0xFFFFFFFF)


def header(tag: bytes, left: int) -> bytes:
    """The header of a piece."""
    return tag + left.to_bytes(8, "big")


def sequence_of(tag: bytes) -> int:
    """The number of the call in a tag; 0 for a message that belongs to none."""
    return int.from_bytes(tag[4:], "big")


def tag_text(tag: bytes) -> str:
    """A tag in words, such as ``bcast (call 7)``."""
    kind, _, sequence = TAG.unpack(tag)
    try:
        name = Kind(kind).name.lower()
    except ValueError:
        return f"a message of the unknown kind {kind}"
    return f"{name} (call {sequence})" if sequence else name


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message in both directions: who this is."""

    rank: int
    size: int
    instance: bytes
    """16 random bytes of this process's group: they tell two processes of one rank apart."""
    name: bytes
    """SHA-256 of the group's name."""

    def encode(self) -> bytes:
        """The payload of HELLO."""
        return _HELLO.pack(_MAGIC, _VERSION, self.rank, self.size, self.instance, self.name)

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Hello:
        """The Hello in a payload; raises RemoteProtocolError."""
        if len(data) != _HELLO.size or not data.startswith(_MAGIC):
            raise RemoteProtocolError("it is no member of a group")
        _, version, rank, size, instance, name = _HELLO.unpack(data)
        if version != _VERSION:
            raise RemoteProtocolError(
                f"it speaks version {version} of the group protocol, and this function {_VERSION}"
            )
        return cls(rank, size, instance, name)


@dataclass(frozen=True, slots=True)
class Abort:
    """The payload of ABORT and REFUSED."""

    rank: int | None
    """The rank to blame; None if nobody knows."""
    text: str

    def encode(self) -> bytes:
        """The payload."""
        return _ABORT.pack(-1 if self.rank is None else self.rank) + self.text[:_LONGEST_TEXT].encode()

    @classmethod
    def decode(cls, data: bytes | bytearray, size: int) -> Abort:
        """The Abort in a payload of a group of ``size`` ranks; raises RemoteProtocolError."""
        if len(data) < _ABORT.size:
            raise RemoteProtocolError("it sent an ABORT that is too short")
        (rank,) = _ABORT.unpack_from(data)
        text = bytes(data[_ABORT.size :]).decode("utf-8", "replace")
        return cls(rank if 0 <= rank < size else None, text)


def write_roster(instances: list[bytes]) -> bytes:
    """The payload of ROSTER: the instances of all ranks, in their order."""
    return b"".join(instances)


def read_roster(data: bytes | bytearray, size: int) -> list[bytes]:
    """The instances in a payload of ROSTER; raises RemoteProtocolError."""
    if len(data) != INSTANCE * size:
        raise RemoteProtocolError("it sent a roster of another size")
    return [bytes(data[at : at + INSTANCE]) for at in range(0, len(data), INSTANCE)]
