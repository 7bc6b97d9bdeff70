"""Legs without frames: for functions that do not speak frelay/1.

The route and the handshake decide which of three kinds a leg is:

* :class:`BareLeg`: outer mTLS without ALPN. Any TLS client; it stays in TLS to the end (docs/protocol.md, section 6).
* :class:`HelloLeg`: the same on a route with ``handoff = "hello"``, for the oldest clients. The client sends one line,
  gets it back once, and from then on has a raw socket, without a close_notify in either direction (section 9).
* :class:`PlainLeg`: no outer TLS at all (section 8).

The relay can tell such a function nothing before it is paired. So these legs wait in silence, and a refusal is a close.
What they send early stays in the kernel.

In the hello hand-off no close_notify marks where TLS ends. The relay's side is still exact: OpenSSL reads record
by record, so raw bytes of the client are still in the kernel when the relay stops reading TLS. The client's side is
not: its TLS library may read ahead and swallow raw bytes that arrive with the echo. So the relay sends nothing raw
until the kernel says that the echo was acknowledged and ``hello_settle`` seconds have passed, in which the client can
read it. That is a guess about the client, the only one in frelay; tickets need none.
"""

from __future__ import annotations

import socket
from functools import cached_property
from typing import Final

import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.legs import LINGER_TIME, TlsLeg
from frelay.net.shares import holder_at
from frelay.net.slots import Slot
from frelay.net.sockets import close, close_after_linger
from frelay.net.streams import RawStream
from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.leg import Leg, LegGone
from frelay.protocol.messages import Mode, Paired, PartyName
from frelay.protocol.refusal import Refusal
from frelay.tls.stream import TlsStream
from frelay.tls.trust import VerifiedPeer

__all__ = ["BareLeg", "HelloLeg", "PlainLeg"]

# The protocol's limit for the line, its line end included.
_LINE_LIMIT: Final = 512
# How often the kernel is asked whether the echo was acknowledged, in seconds; it does not notify.
_POLL_INTERVAL: Final = 0.005


async def _attend_silent(leg: Leg, ping_interval: float) -> LegGone:
    """Watch a leg that may not be read yet; returns once its connection has ended."""
    sock = leg.sock
    try:
        await trio.lowlevel.wait_readable(sock)
        while True:
            if leg.is_gone():
                return LegGone("left")
            # The party sent early data, which must stay unread. So the socket is readable from now on, and the relay
            # has to ask the kernel from time to time whether the connection still stands.
            if is_dead(sock):
                return LegGone("the connection broke")
            await trio.sleep(ping_interval)
    except OSError as error:
        return LegGone(str(error))


class BareLeg(TlsLeg):
    """A leg without frames: any TLS client. Until it is paired, at most one record of what it sends is read."""

    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone:
        return await _attend_silent(self, ping_interval)

    def is_gone(self) -> bool:
        # A client that ends in order sends close_notify, and to the kernel that is data like any other.
        return super().is_gone() or self.tls.has_ended()

    async def refuse(self, refusal: Refusal) -> None:
        await self.end_in_order(b"")


class HelloLeg(TlsLeg):
    """A leg whose client asks for a raw socket by sending a line and waiting to get it back."""

    mode: Mode = "handoff"

    def __init__(self, stream: TlsStream, peer: VerifiedPeer, address: str, slot: Slot, *, settle: float) -> None:
        super().__init__(stream, peer, address, slot)
        self._settle = settle
        self._line = b""

    async def receive_line(self) -> bytes:
        """Read the client's line and keep it for the echo; raises RemoteProtocolError or ConnectionBroken."""
        while not self._line.endswith(b"\n"):
            data = await self.tls.receive_some(_LINE_LIMIT)
            if not data:
                raise RemoteProtocolError("the client left before its line was whole")
            self._line += data
            if len(self._line) > _LINE_LIMIT:
                raise RemoteProtocolError(f"more than {_LINE_LIMIT} bytes without the end of the line")
            if b"\n" in self._line[:-1]:
                raise RemoteProtocolError("TLS data after the line; only raw bytes may follow it")
        return self._line

    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone:
        return await _attend_silent(self, ping_interval)

    def begin_timeout(self, handoff_timeout: float) -> float:
        return handoff_timeout + self._settle

    async def begin(self, message: Paired) -> None:
        await self.tls.send_all(self._line)
        sock = self.tls.leave_without_close_notify()
        self.become_raw(sock)
        while unacknowledged(sock) > 0:
            if is_dead(sock):
                raise ConnectionBroken("the client went away before it acknowledged the echo")
            await trio.sleep(_POLL_INTERVAL)
        await trio.sleep(self._settle)

    async def refuse(self, refusal: Refusal) -> None:
        await self.end_in_order(b"")


class PlainLeg(Leg):
    """A leg of a route without outer TLS: a bare socket, admitted by its address."""

    mode: Mode = "handoff"

    def __init__(self, sock: socket.socket, party: PartyName, address: str, slot: Slot) -> None:
        self._raw = RawStream(sock)
        self.party = party
        self.identity = self.address = address
        self.slot = slot

    @cached_property
    def holder(self) -> str:
        return holder_at(self.address.rpartition(":")[0].strip("[]"))

    @property
    def sock(self) -> socket.socket:
        return self._raw.sock

    def stream(self) -> RawStream:
        return self._raw

    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone:
        return await _attend_silent(self, ping_interval)

    async def refuse(self, refusal: Refusal) -> None:
        await close_after_linger(self.sock, LINGER_TIME)

    def close(self) -> None:
        close(self.sock)
