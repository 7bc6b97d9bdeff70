"""Parts of several ranks in one message, for gather, scatter and allgather. Standard library only.

Layout: one length of 8 bytes for each part, then the bytes of the small parts. The first bit of a length says that the
part is large, and so not in this message: its owner sends it by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from frelay.client.group.buffers import EMPTY
from frelay.errors import RemoteProtocolError

__all__ = ["SMALL_PART", "Bundle", "Part", "pack", "unpack"]

SMALL_PART: Final = 16384
"""The most bytes of a part that travels in a bundle."""

_LARGE: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part: its bytes, or only their number."""

    length: int
    data: memoryview | None

    @classmethod
    def of(cls, data: memoryview) -> Part:
        """The part for ``data``."""
        return cls(len(data), data if len(data) <= SMALL_PART else None)

    @property
    def is_large(self) -> bool:
        """Whether the bytes come in a message of their own."""
        return self.data is None


def pack(parts: Sequence[Part]) -> memoryview:
    """The message with these parts."""
    lengths = [part.length | (_LARGE if part.is_large else 0) for part in parts]
    small = [EMPTY if part.data is None else part.data for part in parts]
    return memoryview(b"".join((struct.pack(f"!{len(parts)}Q", *lengths), *small)))


def unpack(message: bytearray | memoryview, count: int) -> list[Part]:
    """The ``count`` parts in a message; raises RemoteProtocolError."""
    view, at = memoryview(message), 8 * count
    if len(view) < at:
        raise RemoteProtocolError("a bundle of parts is too short")
    parts = []
    for number in struct.unpack_from(f"!{count}Q", view):
        if number & _LARGE:
            parts.append(Part(number ^ _LARGE, None))
        else:
            parts.append(Part(number, view[at : at + number]))
            at += number
    if at != len(view):
        raise RemoteProtocolError("a bundle of parts has not the length that it states")
    return parts


class Bundle:
    """The buffers of several parts: those that came in bundles, and room for the large ones."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._buffers: Final = [bytearray(EMPTY if part.data is None else part.data) for part in parts]
        self._lengths: Final = [part.length for part in parts]
        self.missing: Final = [number for number, part in enumerate(parts) if part.is_large]
        """The numbers of the large parts."""

    def make_room(self, number: int) -> memoryview:
        """The buffer for a large part, to receive into; raises RemoteProtocolError."""
        try:
            self._buffers[number] = bytearray(self._lengths[number])
        except (MemoryError, OverflowError):
            raise RemoteProtocolError(f"there is no memory for a part of {self._lengths[number]} bytes") from None
        return memoryview(self._buffers[number])

    def put(self, number: int, data: memoryview) -> None:
        """Copy ``data`` in as the part of this number."""
        self._buffers[number] = bytearray(data)

    def buffer(self, number: int) -> bytearray:
        """The part of this number."""
        return self._buffers[number]

    def turned(self, by: int) -> list[bytearray]:
        """All parts, where the first belongs to rank ``by`` and the others to the ranks that follow it in a circle."""
        size = len(self._buffers)
        return [self._buffers[(rank - by) % size] for rank in range(size)]
