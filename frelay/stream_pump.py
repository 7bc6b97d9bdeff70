"""The pump between two streams, whose bytes pass through the process: receive, send, repeat.

At least one of the two is in TLS, or the route has a budget of bytes a second (:mod:`frelay.bandwidth`), which what
goes through the kernel alone could not be held to.
"""

from __future__ import annotations

import os
import socket
from typing import Final, Protocol

import trio

from frelay.bandwidth import Share
from frelay.errors import ConnectionBroken, RemoteProtocolError, Truncated
from frelay.outcome import Outcome, Side
from frelay.pump import Cut, TlsProbe
from frelay.sockets import broken

__all__ = ["Stream", "StreamPump"]

# What one receive of a stream pump asks for.
_STREAM_CHUNK: Final = 64 * 1024
# Eight whole TLS records, at two segments of 64 KiB each way: with less, a wake-up costs more than its bytes do.
_ROOM: Final = 128 * 1024
# After so many rounds everybody else gets a turn; about 1 ms, most of it in the ciphers.
_STREAM_ROUNDS: Final = 4

_room: Final = memoryview(bytearray(_ROOM))


class Stream(Protocol):
    """What a :class:`StreamPump` needs of either end."""

    @property
    def sock(self) -> socket.socket:
        """The socket under it."""

    def receive_now(self, room: memoryview) -> int:
        """Bytes received into ``room``; 0 if the socket must become readable first; -1: ask :meth:`receive_some`."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` bytes; ``b""`` at the end."""

    def send_now(self, data: memoryview) -> int:
        """How many bytes of ``data`` the kernel took without waiting."""

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`send_now` has left."""

    async def send_eof(self) -> None:
        """End this direction."""


class StreamPump:
    """Carries bytes from one stream to another through the process.

    It waits only when there is nothing to receive, or no room to send: what is there goes through one buffer that all
    such pumps share, and between the receiving and the sending no other gets a turn. (So one thread a process may run
    such pumps, as in a relay.)
    """

    __slots__ = ("_probe", "_share", "_sides", "_sink", "_source", "is_blocked", "is_held_back", "moved")

    def __init__(
        self,
        source: Stream,
        sink: Stream,
        *,
        sides: tuple[Side, Side],
        probe: TlsProbe | None = None,
        share: Share | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._sides = sides
        self._probe = probe
        self._share = share
        self.moved = 0
        self.is_blocked = False
        self.is_held_back = False

    async def run(self) -> None:
        """Receive and send until the source ends; raises Cut."""
        is_over = False
        while not is_over:
            if self._probe is None and self._share is None:
                is_over = await self._flow()
            else:
                is_over = await self._pass_on_some()

    async def _flow(self) -> bool:
        """Carry what comes, as long as nothing but bytes does; whether the direction has ended."""
        source, sink, rounds = self._source, self._sink, 0
        while True:
            try:
                count = source.receive_now(_room)
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[0]) from None
            if count < 0:
                return await self._pass_on_some()
            if not count:
                await trio.lowlevel.wait_readable(source.sock)
                rounds = 0
                continue
            try:
                sent = sink.send_now(_room[:count])
                self.moved += sent
                if sent < count:
                    rest = bytes(_room[sent:count])
                    self.is_blocked = True
                    await sink.send_rest(rest)
                    self.is_blocked = False
                    self.moved += len(rest)
                    rest, rounds = b"", 0
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[1]) from None
            rounds += 1
            if rounds == _STREAM_ROUNDS:
                await trio.lowlevel.checkpoint()
                rounds = 0

    async def _pass_on_some(self) -> bool:
        """Carry one portion, or the end; whether the direction has ended."""
        held, share = b"", self._share
        while True:
            try:
                data = await self._source.receive_some(_STREAM_CHUNK if share is None else share.portion)
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[0]) from None
            if self._probe is None:
                break
            if not data:
                self._probe.check_end(len(held))
            held += data
            if not data or self._probe.check(held) is not None:
                data, held, self._probe = held, b"", None
                break
        if data and share is not None:
            self.is_held_back = True
            await share.spend(len(data))
            self.is_held_back = False
            self._check_source()
        try:
            if not data:
                await self._sink.send_eof()
                return True
            self.is_blocked = True
            sent = self._sink.send_now(memoryview(data))
            if sent < len(data):
                await self._sink.send_rest(data[sent:])
            self.is_blocked = False
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise _cut(error, self._sides[1]) from None
        self.moved += len(data)
        return False

    def _check_source(self) -> None:
        # The kernel gives what came before a reset first, and at the rate of a budget that may last for minutes. As
        # with back-pressure, the other party is to know at once.
        number = self._source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise Cut(Outcome.RESET, self._sides[0], str(broken(OSError(number, os.strerror(number)))))

    def rest(self) -> None:
        """There is nothing to give up."""


def _cut(error: ConnectionBroken | RemoteProtocolError, side: Side) -> Cut:
    if isinstance(error, Truncated):
        return Cut(Outcome.TRUNCATED, side, str(error))
    if isinstance(error, RemoteProtocolError):
        return Cut(Outcome.PROTOCOL_ERROR, side, str(error))
    return Cut(Outcome.RESET, side, str(error))
