"""Hostile or unlucky callers: each must be refused as the protocol says."""

from __future__ import annotations

import os
import random
import ssl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio

from frelay.protocol import messages
from frelay.protocol.messages import Message, Mode
from frelay.protocol.session import PartySession
from soak.churn.ground import Ground, Trouble
from soak.churn.streams import TLS_HEADER, expect, is_cut, reset

__all__ = ["Strangers"]


class _Party:
    """A function that speaks frelay/1 step by step, so that it can stop in the middle."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream: Final = stream
        self._session: Final = PartySession()
        self._received: list[Message] = []

    @classmethod
    async def join(cls, ground: Ground, route: str, name: str, mode: Mode) -> _Party:
        """A function that has received WAITING."""
        tls = trio.SSLStream(await ground.dial(route), ground.contexts[name], server_hostname="localhost")
        party = cls(tls)
        await tls.send_all(party._session.send(messages.Join(attempt=str(uuid.uuid4()), modes=(mode,))))
        await party.expect(messages.Waiting)
        return party

    async def expect(self, kind: type[Message]) -> Any:
        """The next message, which must be of this kind; PINGs before it are answered."""
        while True:
            while self._received:
                message = self._received.pop(0)
                if isinstance(message, messages.Ping) and kind is not messages.Ping:
                    await self.stream.send_all(self._session.send(messages.Pong(message.n)))
                elif isinstance(message, kind):
                    return message
                else:
                    raise Trouble(f"{kind.__name__} expected, got {message}")
            self._received += self._session.receive(bytes(await self.stream.receive_some()))

    async def say(self, message: Message) -> None:
        """Send a message."""
        await self.stream.send_all(self._session.send(message))

    def reset(self) -> None:
        """Close by RST."""
        reset(self.stream.transport_stream)

    def close(self) -> None:
        """Close without a close_notify."""
        self.stream.transport_stream.socket.close()


class Strangers:
    """Hostile or unlucky callers."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_

    async def cut(self) -> None:
        """Both are paired, and one of them never answers the close_notify."""
        parties = [await _Party.join(self._ground, "cut", name, "handoff") for name in ("func1", "func2")]
        for party in parties:
            await party.expect(messages.Paired)
        self._random.shuffle(parties)
        parties[0].reset()
        try:
            while await parties[1].stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        parties[1].close()

    async def ticket(self) -> None:
        """A ticket is good once: the second connection with it gets no answer."""
        one = await _Party.join(self._ground, "ticket", "func1", "ticket")
        two = await _Party.join(self._ground, "ticket", "func2", "tunnel")
        paired = await one.expect(messages.Paired)
        await two.expect(messages.Paired)
        line = f"FRELAY/1 {paired.ticket}\n".encode()
        first = await self._ground.dial("ticket")
        await first.send_all(line + TLS_HEADER)
        await expect(two.stream, TLS_HEADER)
        second = await self._ground.dial("ticket")
        await second.send_all(line)
        await _is_turned_away(second)
        reset(first)
        await is_cut(two.stream)
        one.close()
        two.close()

    async def lonely(self) -> None:
        """No partner comes; it answers a PING, and then leaves in one of three ways."""
        party = await _Party.join(self._ground, "lonely", "func1", "handoff")
        ping = await party.expect(messages.Ping)
        await party.say(messages.Pong(ping.n))
        how = self._random.randrange(3)
        if how == 0:
            await party.say(messages.Leave())
            with _broken_is_fine():
                await party.stream.receive_some()
        party.reset() if how == 1 else party.close()

    async def refused(self) -> None:
        """A certificate that the relay refuses."""
        name = self._random.choice(("stranger", "revoked", "foreign", "nobody"))
        try:
            await _Party.join(self._ground, "door", name, "handoff")
        except (trio.BrokenResourceError, ssl.SSLError):
            return
        except Trouble as error:
            if "not-authorised" in str(error):
                return
            raise
        raise Trouble(f"{name} was let in")

    async def garbage(self) -> None:
        """Bytes that are no TLS, or the request of a browser."""
        stream = await self._ground.dial("door")
        words = self._random.choice((os.urandom(200), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"FRELAY/1 " + b"0" * 65))
        await stream.send_all(words)
        await _is_turned_away(stream)

    async def frames(self) -> None:
        """A good certificate, and then bytes that are no frames."""
        tls = trio.SSLStream(
            await self._ground.dial("door"), self._ground.contexts["func1"], server_hostname="localhost"
        )
        await tls.send_all(
            self._random.choice((os.urandom(100), b"\x01\x00\x10\x00" + b"{" * 4096, b"\x55\x00\x00\x00"))
        )
        try:
            while await tls.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        tls.transport_stream.socket.close()

    async def silence(self) -> None:
        """It connects and sends nothing."""
        await _is_turned_away(await self._ground.dial("door"))

    async def drip(self) -> None:
        """A ClientHello, byte by byte."""
        stream = await self._ground.dial("door")
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                with _broken_is_fine():
                    for byte in TLS_HEADER + b"\x01\x00\x01\x00\x00\xfc\x03\x03" + bytes(60):
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(0.1)

            nursery.start_soon(drip)
            await _is_turned_away(stream)
            nursery.cancel_scope.cancel()


@contextmanager
def _broken_is_fine() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def _is_turned_away(stream: trio.SocketStream) -> None:
    """The connection ends; an alert may come before."""
    with _broken_is_fine():
        received = b""
        while data := await stream.receive_some():
            received += data
        if len(received) > 64:
            raise Trouble(f"{len(received)} bytes for a stranger")
    await trio.aclose_forcefully(stream)
