"""A party whose connection a test controls byte by byte.

:class:`Party` is a function written from docs/protocol.md on the standard library's ``ssl`` with memory BIOs, so a test
decides which TLS record goes out when, and what goes out in the same segment. It shares no code with frelay::

    one = await site.party(relay, "func1")                   # handshake done; site.connect() stops before it
    two = await site.party(relay, "func2")
    paired1, paired2 = await pair(one, two)                  # JOIN, WAITING, PAIRED on both
    await one.hand_off(); await two.hand_off()               # both raw now
    await one.send_raw(TLS_HEADER + b"...")
    assert await two.receive_exactly(...) == ...
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import uuid
from collections.abc import Mapping
from typing import Any, Final

import trio

from support.waiting import TIMEOUT

__all__ = ["TLS_HEADER", "TYPES", "Party", "frame", "pair"]

TLS_HEADER: Final = b"\x16\x03\x01"
"""How the first bytes of a raw leg must begin where require_inner_tls holds."""

TYPES: Final = {
    "JOIN": 0x01,
    "PONG": 0x02,
    "LEAVE": 0x03,
    "WAITING": 0x11,
    "PING": 0x12,
    "PAIRED": 0x13,
    "REFUSED": 0x14,
    "DRAINING": 0x15,
}
_NAMES: Final = {code: name for name, code in TYPES.items()}


def frame(name: str | int, payload: Mapping[str, Any] | bytes = b"") -> bytes:
    """A frame on the wire; ``name`` may be any type code and ``payload`` any bytes, right or wrong."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    code = name if isinstance(name, int) else TYPES[name]
    return struct.pack(">BBH", code, 0, len(body)) + body


class Party:
    """One party's connection, byte by byte. Not safe for two tasks in the same direction."""

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self.stream = stream
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_hostname)
        self.attempt = str(uuid.uuid4())
        self.leftover = b""
        """Raw bytes that arrived early; the relay must never send any before our close_notify."""
        self._frames = b""

    @property
    def socket(self) -> trio.socket.SocketType:
        return self.stream.socket

    # --- TLS ---------------------------------------------------------------------------------------------------

    def take_outgoing(self) -> bytes:
        """Take the TLS bytes that wait to be sent out of the BIO."""
        return self.outgoing.read()

    async def flush(self) -> None:
        data = self.take_outgoing()
        if data:
            await self.stream.send_all(data)

    async def pull(self) -> bool:
        """Feed received bytes into TLS; False at EOF."""
        data = await self.stream.receive_some(65536)
        if not data:
            self.incoming.write_eof()
            return False
        self.incoming.write(data)
        return True

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                await self.pull()
            else:
                await self.flush()
                return

    def send_now(self, data: bytes) -> None:
        """Send raw bytes before any other task runs; they must fit into the send buffer."""
        assert self.socket._sock.send(data) == len(data)  # type: ignore[attr-defined]

    async def send(self, data: bytes) -> None:
        """Send application data inside the outer TLS."""
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view[:16384]) :]
            await self.flush()

    async def receive(self, size: int = 16384) -> bytes:
        """Application data of the outer TLS, ``b""`` after close_notify; truncation is SSLEOFError."""
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                await self.flush()
                await self.pull()
            except ssl.SSLZeroReturnError:
                return b""

    def take_in(self) -> None:
        """Feed all received bytes into TLS, so that a close sends FIN; with unread bytes it would send RST."""
        try:
            while data := self.socket._sock.recv(65536):  # type: ignore[attr-defined]
                self.incoming.write(data)
        except BlockingIOError:
            pass

    def close_notify(self) -> bytes:
        """The record of our close_notify, not sent yet."""
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        return self.take_outgoing()

    # --- frames ------------------------------------------------------------------------------------------------

    async def send_frame(self, name: str | int, payload: Mapping[str, Any] | bytes = b"") -> None:
        await self.send(frame(name, payload))

    async def next_frame(self) -> tuple[str, dict[str, Any]] | None:
        """The next frame as (name, payload); None when the relay ended its TLS stream."""
        while True:
            if len(self._frames) >= 4:
                code, _, length = struct.unpack(">BBH", self._frames[:4])
                if len(self._frames) >= 4 + length:
                    body, self._frames = self._frames[4 : 4 + length], self._frames[4 + length :]
                    return _NAMES[code], json.loads(body)
            data = await self.receive()
            if not data:
                assert not self._frames, "the stream ended inside a frame"
                return None
            self._frames += data

    async def expect(self, name: str, *, pong: bool = True) -> dict[str, Any]:
        """The payload of the next frame, which must be ``name``; PINGs before it are answered."""
        with trio.fail_after(TIMEOUT):
            while True:
                found = await self.next_frame()
                assert found is not None, f"{name} expected, the relay ended the stream"
                if found[0] == "PING" and name != "PING" and pong:
                    await self.send_frame("PONG", found[1])
                    continue
                assert found[0] == name, f"{name} expected, got {found}"
                return found[1]

    async def join(self, **fields: Any) -> None:
        await self.send_frame("JOIN", {"attempt": self.attempt, **fields})

    async def refusal(self) -> dict[str, Any]:
        """The payload of REFUSED; an orderly end of the relay's TLS stream must follow it."""
        payload = await self.expect("REFUSED")
        with trio.fail_after(TIMEOUT):
            assert await self.next_frame() is None
        return payload

    async def alert(self) -> str:
        """OpenSSL's name of the fatal alert that the relay sends, e.g. ``TLSV1_ALERT_UNKNOWN_CA``; it must send one.

        In TLS 1.3 the relay may judge the certificate when the client's handshake is done already, so we read on.
        """
        with trio.fail_after(TIMEOUT):
            try:
                await self.handshake()
                found: object = await self.receive()
            except ssl.SSLError as error:
                # For a few alerts Python has no name, only OpenSSL's sentence.
                name = str(error.reason or error).upper().replace(" ", "_")
                if "ALERT" in name:
                    return name
                found = error
        raise AssertionError(f"an alert expected, got {found!r}")

    async def read_to_close_notify(self) -> None:
        """Read the outer TLS to the relay's close_notify; keeps raw bytes behind it in ``leftover``."""
        with trio.fail_after(TIMEOUT):
            assert await self.receive() == b""
        assert self._frames == b""
        self.leftover = self.incoming.read()

    async def hand_off(self, raw: bytes = b"") -> None:
        """Read to the relay's close_notify and answer it; ``raw`` goes out in the same segment."""
        await self.read_to_close_notify()
        assert self.leftover == b"", "raw bytes before our close_notify"
        await self.stream.send_all(self.close_notify() + raw)

    # --- raw ---------------------------------------------------------------------------------------------------

    async def send_raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive_raw(self, size: int = 65536) -> bytes:
        if self.leftover:
            data, self.leftover = self.leftover[:size], self.leftover[size:]
            return data
        return await self.stream.receive_some(size)

    async def receive_exactly(self, count: int, *, raw: bool = True) -> bytes:
        parts, left = [], count
        while left:
            data = await (self.receive_raw(min(left, 65536)) if raw else self.receive(left))
            assert data, f"EOF with {left} of {count} bytes missing"
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    async def send_eof(self) -> None:
        """FIN."""
        await self.stream.send_eof()

    def reset(self) -> None:
        """Close by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    async def ended(self) -> str:
        """How the connection ended: "eof" or "reset"; bytes before are dropped."""
        with trio.fail_after(TIMEOUT):
            try:
                while await self.receive_raw():
                    pass
            except trio.BrokenResourceError:
                return "reset"
            return "eof"


async def pair(one: Party, two: Party, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """JOIN on both, in this order; returns both PAIRED payloads."""
    await one.join(**fields)
    await one.expect("WAITING")
    await two.join(**fields)
    await two.expect("WAITING")
    return await one.expect("PAIRED"), await two.expect("PAIRED")
