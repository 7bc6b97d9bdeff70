"""The channel between a supervisor and a worker: JSON messages and descriptors on a Unix stream socket.

::

    length u32 (be) | JSON, UTF-8              a message; a length of 0 has no JSON and only carries descriptors

Descriptors (SCM_RIGHTS) need bytes to travel with. So they are sent first, with empty messages, as many at a time as
the kernel takes, and the next message says how many belong to it; the kernel keeps the order of both. If the receiver
has no room for a descriptor, the kernel drops it without telling the sender, and the receiver sees that some are
missing.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from frelay.errors import FrelayError

__all__ = ["Channel", "ChannelEnded", "Received"]

_LENGTH: Final = struct.Struct(">I")
# SCM_MAX_FD of Linux.
_MOST_DESCRIPTORS: Final = 253
_PIECE: Final = 65536


class ChannelEnded(FrelayError):
    """The other process has ended or has closed the channel."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message, and the sockets that came with it. ``is_complete`` is False if this process had no room for some."""

    message: dict[str, Any]
    sockets: list[socket.socket]
    is_complete: bool

    def close(self) -> None:
        """Close the sockets."""
        for sock in self.sockets:
            sock.close()


class Channel:
    """One end of the channel. Only one task may use a direction at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Final = trio.socket.from_stdlib_socket(sock)
        self._buffer: Final = bytearray()
        self._descriptors: deque[tuple[int, array.array[int]]] = deque()
        """Received descriptors, each group with the number of bytes that had been received by then."""
        self._taken = 0
        """How many bytes have been taken from the buffer."""

    def close(self) -> None:
        """Close this end; the other end notices."""
        while self._descriptors:
            for descriptor in self._descriptors.popleft()[1]:
                socket.close(descriptor)
        self._sock.close()

    async def send(self, message: Mapping[str, Any], sockets: Sequence[socket.socket] = ()) -> None:
        """Send a message and duplicates of ``sockets``; raises ChannelEnded. A cancellation breaks the channel."""
        data = json.dumps({**message, "sockets": len(sockets)}).encode()
        try:
            for first in range(0, len(sockets), _MOST_DESCRIPTORS):
                some = [sock.fileno() for sock in sockets[first : first + _MOST_DESCRIPTORS]]
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", some))
                await self._send_all(_LENGTH.pack(0)[await self._sock.sendmsg([_LENGTH.pack(0)], [rights]) :])
            await self._send_all(_LENGTH.pack(len(data)) + data)
        except (OSError, trio.ClosedResourceError) as error:
            raise ChannelEnded from error

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._sock.send(view) :]

    async def receive(self) -> Received:
        """The next message; raises ChannelEnded."""
        try:
            while True:
                length = int.from_bytes(await self._take(_LENGTH.size), "big")
                if length:
                    return self._received(json.loads(await self._take(length)))
        except (OSError, trio.ClosedResourceError) as error:
            raise ChannelEnded from error

    def _received(self, message: dict[str, Any]) -> Received:
        # One read may return the end of this message and the beginning of the next one with its sockets.
        sockets = []
        while self._descriptors and self._descriptors[0][0] <= self._taken:
            sockets += [socket.socket(fileno=descriptor) for descriptor in self._descriptors.popleft()[1]]
        for sock in sockets:
            sock.setblocking(False)
        return Received(message, sockets, is_complete=len(sockets) == message.pop("sockets"))

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * struct.calcsize("i"))
            data, ancillary, _, _ = await self._sock.recvmsg(_PIECE, room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array.array("i")
                    found.frombytes(content[: len(content) - len(content) % found.itemsize])
                    # The kernel ends a read at the bytes that descriptors were sent with: they belong to these bytes.
                    self._descriptors.append((self._taken + len(self._buffer) + len(data), found))
            if not data:
                raise ChannelEnded
            self._buffer.extend(data)
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._taken += count
        return taken
