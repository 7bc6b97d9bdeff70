"""Legs in outer TLS, from the verified certificate to the paired leg, raw or in TLS; the hand-off is here.

Theory of operation: the hand-off
=================================

The functions want a raw TCP stream to each other; what each has is a TLS connection to the relay. Leaving TLS on a live
connection can fail in one way only: one side reads a byte that belongs to the other layer. Either TLS bytes that are
left on the wire are read as raw ones, or a TLS library that reads ahead swallows raw bytes. So the order is fixed
(docs/protocol.md, section 4), and the relay closes first:

1. The relay writes PAIRED and ``close_notify``. From then on it writes nothing in TLS.
2. The party reads both, answers with its own ``close_notify``, and owns a raw socket.
3. The relay reads that leg's TLS stream to its ``close_notify``. It reads record by record (see
   :mod:`frelay.tls.stream`), so raw bytes behind the ``close_notify`` stay in the kernel, even in one segment.
4. Only then may the relay send a raw byte to the party. That is safe even if the party's library reads ahead, because
   the party stopped reading TLS before it wrote the ``close_notify`` that the relay has now seen.

So a leg becomes raw when the *party* says so, never after a time-out or by a guess. The two legs of a pairing do this
independently: the one that is ready first waits, and what its party sends meanwhile waits in the kernel.

A party whose TLS library cannot give the socket back asks for a ticket instead (mode "ticket"). It brings the ticket on
a second connection (:mod:`frelay.joining.tickets`); its leg continues on that one, and the TLS connection is closed.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.tickets import TicketIssuer
from frelay.net.slots import Slot
from frelay.net.sockets import close_after_linger
from frelay.net.streams import BrokenStream, RawStream, TruncatedStream
from frelay.pairing.leg import Leg, LegGone
from frelay.protocol.messages import Draining, Join, Leave, Paired, PartyName, Waiting
from frelay.protocol.refusal import Refusal
from frelay.protocol.session import RelaySession, State
from frelay.tls.stream import TlsStream
from frelay.tls.trust import VerifiedPeer

__all__ = ["LINGER_TIME", "FramedLeg", "TlsLeg"]

# A refusal is one small record. If the party does not read it in this time, the connection is closed without it.
_REFUSAL_TIME: Final = 2.0
# How long the close after a refusal or an alert may wait for the other side, holding a descriptor.
LINGER_TIME: Final = 1.0


# Replaces the session of a leg that needs none any more.
_NO_SESSION: Final = RelaySession()


class TlsLeg(Leg):
    """What all kinds of leg in outer TLS share."""

    def __init__(self, stream: TlsStream, peer: VerifiedPeer, address: str, slot: Slot) -> None:
        self._stream: TlsStream | None = stream
        self._raw: RawStream | None = None
        self.peer = peer
        self.credential = peer.credential
        self.address = address
        self.slot = slot
        self._names_by_party: dict[PartyName, str] = {}
        """Filled while its party is not decided."""

    def admit_as(self, fits: Mapping[PartyName, str]) -> None:
        """Its certificate fits these parties of its route, by these names. With two, the leg is either party."""
        first = next(iter(fits))
        self.identity = fits[first]
        self.party = first if len(fits) == 1 else "either"
        self._names_by_party = {} if len(fits) == 1 else dict(fits)

    def settle(self, party: PartyName) -> None:
        super().settle(party)
        self.identity = self._names_by_party.get(party, self.identity)
        self._names_by_party = {}

    def identities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._names_by_party.values())) or (self.identity,)

    @property
    def sock(self) -> socket.socket:
        return self.stream().sock

    def stream(self) -> TlsStream | RawStream:
        if self._stream is not None:
            return self._stream
        if self._raw is not None:
            return self._raw
        raise trio.ClosedResourceError("this leg is closed")

    @property
    def tls(self) -> TlsStream:
        """The outer TLS; raises ClosedResourceError once the leg has left it."""
        if self._stream is None:
            raise trio.ClosedResourceError("this leg has left TLS")
        return self._stream

    def become_raw(self, sock: socket.socket) -> None:
        """From now on the leg is this bare socket. Its TLS state, about 50 KiB, is freed here."""
        self._raw = RawStream(sock)
        self._stream = None

    def close(self) -> None:
        stream: TlsStream | RawStream | None = self._stream or self._raw
        if stream is not None:
            stream.close()
        self._stream = self._raw = None

    async def end_in_order(self, last_frames: bytes) -> None:
        """Send the last frames, if any, and close_notify; linger; close."""
        sock = self.sock
        try:
            with trio.move_on_after(_REFUSAL_TIME):
                if last_frames:
                    await self.tls.send_last(last_frames)
                else:
                    await self.tls.send_eof()
            # Free the TLS state, 50 KiB, before the wait.
            self._stream = None
            await close_after_linger(sock, LINGER_TIME)
        except (ConnectionBroken, RemoteProtocolError):
            pass  # the party has gone, so it cannot be told
        finally:
            self.close()


class FramedLeg(TlsLeg):
    """A leg that speaks frelay/1 frames inside its outer TLS."""

    def __init__(self, stream: TlsStream, peer: VerifiedPeer, address: str, slot: Slot) -> None:
        super().__init__(stream, peer, address, slot)
        self._session = RelaySession()
        self._ping_is_out = False
        self._end_of_wait: LegGone | Refusal | None = None
        self.ticket_issuer: TicketIssuer | None = None
        """Issues its ticket, in mode "ticket"."""

    async def receive_join(self) -> Join:
        """The party's JOIN; raises RemoteProtocolError, ConnectionBroken or Truncated."""
        while True:
            data = await self.tls.receive_some()
            if not data:
                raise RemoteProtocolError("the party left without a JOIN")
            for message in self._session.receive(data):
                if isinstance(message, Join):
                    if self._session.state is not State.JOINED:
                        raise RemoteProtocolError("LEAVE came together with JOIN")
                    return message

    async def welcome(self, message: Waiting) -> None:
        await self.tls.send_all(self._session.send(message))

    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone | Refusal:
        # Kept for begin(): another task may match this leg before our caller has told the lobby.
        self._end_of_wait = await self._attend(ping_interval, pong_timeout)
        return self._end_of_wait

    async def _attend(self, ping_interval: float, pong_timeout: float) -> LegGone | Refusal:
        session = self._session
        try:
            while True:
                timeout = pong_timeout if session.pong_due else ping_interval
                with trio.move_on_after(timeout) as pause:
                    while True:
                        was_due = session.pong_due
                        data = await self.tls.receive_some()
                        if not data:
                            return LegGone("left (close_notify)")
                        if any(isinstance(message, Leave) for message in session.receive(data)):
                            return LegGone("left (LEAVE)")
                        if was_due and not session.pong_due:
                            break
                if not pause.cancelled_caught:
                    continue
                if session.pong_due:
                    text = f"no PONG within {pong_timeout:g} s"
                    return Refusal("pong-timeout", text, retry_after=0.0)
                self._ping_is_out = False
                with trio.move_on_after(pong_timeout) as pause:
                    await self.tls.send_all(session.ping())
                    self._ping_is_out = True
                if pause.cancelled_caught:
                    return LegGone(f"did not read PING within {pong_timeout:g} s")
        except RemoteProtocolError as error:
            return Refusal("protocol-error", str(error))
        except ConnectionBroken as error:
            return LegGone(str(error))

    async def begin(self, message: Paired) -> None:
        match self._end_of_wait:
            case Refusal(code="protocol-error", reason=text):
                raise RemoteProtocolError(text)
            case Refusal(reason=text) | LegGone(detail=text):
                raise ConnectionBroken(f"as it was paired: {text}")
        if self.mode == "ticket":
            await self._begin_by_ticket(message)
            return
        paired = self._session.send(message)
        if not self.is_raw:
            await self.tls.send_all(paired)
            await self._take_last_frame()
            return
        await self.tls.send_last(paired)
        while data := await self.tls.receive_some():
            self._take(data)
        self._session.end_of_stream()
        self.become_raw(self.tls.detach())

    def forget_admission(self) -> None:
        super().forget_admission()
        self._session, self.ticket_issuer = _NO_SESSION, None

    # --- tickets -----------------------------------------------------------------------------------------------

    def begin_timeout(self, handoff_timeout: float) -> float:
        if self.mode == "ticket" and self.ticket_issuer is not None:
            return self.ticket_issuer.timeout
        return handoff_timeout

    async def _begin_by_ticket(self, message: Paired) -> None:
        """Give the party a ticket, wait for the connection that brings it, and continue on that connection."""
        if self.ticket_issuer is None:
            raise AssertionError("a leg in ticket mode without a ticket issuer")
        with self.ticket_issuer.issue() as pending:
            await self.tls.send_all(self._session.send(replace(message, ticket=pending.ticket)))
            fault: ConnectionBroken | RemoteProtocolError | None = None
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    nonlocal fault
                    try:
                        # A close_notify does not mean that the party has left: its ticket may be on the way.
                        while data := await self.tls.receive_some():
                            self._take(data)
                    except (BrokenStream, TruncatedStream):
                        # Nor does a broken connection: some TLS libraries cannot close one in order before they open
                        # another.
                        pass
                    except (ConnectionBroken, RemoteProtocolError) as error:
                        fault = error
                        nursery.cancel_scope.cancel(reason="the party broke the protocol")

                nursery.start_soon(watch)
                await pending.arrived.wait()
                nursery.cancel_scope.cancel(reason="the ticket was brought")
            if not pending.arrived.is_set():
                raise fault or AssertionError("neither a ticket nor a fault")
            await self._change_over(*pending.take())

    async def _change_over(self, sock: socket.socket, slot: Slot) -> None:
        old, old_slot = self.tls, self.slot
        self.become_raw(sock)
        slot.charge(old_slot.holders)
        self.slot = slot
        try:
            with trio.move_on_after(_REFUSAL_TIME):
                await old.aclose()
        finally:
            old.close()
            old_slot.release()

    async def _take_last_frame(self) -> None:
        """Read the PONG to a PING that crossed with PAIRED, and not a byte more: what follows belongs to the tunnel.

        An unread PONG would be forwarded to the other function as its first bytes.
        """
        session = self._session
        # A PING that was cancelled before it was written counts as due, but no PONG will come.
        while (session.pong_due and self._ping_is_out) or session.is_inside_frame:
            data = await self.tls.receive_some(session.missing)
            if not data:
                raise ConnectionBroken("as it was paired: left (close_notify)")
            self._take(data)

    def _take(self, data: bytes) -> None:
        if any(isinstance(message, Leave) for message in self._session.receive(data)):
            raise ConnectionBroken("as it was paired: left (LEAVE)")

    async def refuse(self, refusal: Refusal) -> None:
        session = self._session
        frames = b""
        if refusal.reconnect_in is not None and session.state is State.WAITING:
            frames += session.send(Draining(refusal.reconnect_in))
        if session.state in (State.JOINING, State.JOINED, State.WAITING):
            frames += session.send(refusal.message())
        await self.end_in_order(frames)
