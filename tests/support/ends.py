"""Two ends of a pairing that look the same whatever their mode, and bulk traffic between them.

A test about bytes should not depend on how a leg carries them. So an :class:`End` is a ``Party`` that is paired, with
the same methods for all modes::

    one, two = await join_ends(site, relay, "raw", "bare")       # any of MODES, or "plain" on a plain route
    await one.send(b"question")
    await one.send_eof()                                          # FIN, or close_notify
    assert await two.receive_to_end() == b"question"

Of the relay only its log line "handed off" is needed, so this works with a relay process too. :func:`exchange` moves
megabytes in a thread of its own, since Trio would slow it down.
"""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Final, Literal

import trio

from support.party import Party, pair
from support.relay import RelayInProcess, RelayProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

__all__ = [
    "MODES",
    "OPEN",
    "PAIRS_OF_MODES",
    "PLAIN",
    "Channel",
    "Digests",
    "End",
    "Mode",
    "block",
    "churn",
    "end_by_reset",
    "end_in_order",
    "exchange",
    "join_all",
    "join_ends",
    "pause_reading",
    "thread_socket",
]

Mode = Literal["raw", "tunnel", "bare", "plain"]

MODES: Final[tuple[Mode, ...]] = ("raw", "tunnel", "bare")
PAIRS_OF_MODES: Final = tuple(product(MODES, MODES))

OPEN: Final = DEMO + "require_inner_tls = false\n"
"""A route whose raw legs may carry any bytes, so that a test can choose them."""

PLAIN: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["127.0.0.0/8"]
require_inner_tls = false
"""


def block(size: int, seed: int = 0) -> bytes:
    """Bytes in which no part repeats."""
    return random.Random(seed).randbytes(size)


_TCP_CLOSE: Final = 7  # include/net/tcp_states.h


class End:
    """One party of a pairing. Sending and receiving may be done by two tasks at once."""

    def __init__(self, party: Party, mode: Mode) -> None:
        self.party: Final = party
        self.mode: Final = mode
        self._decrypted = b""
        self._eof_was_sent = False

    @property
    def is_tls(self) -> bool:
        return self.mode in ("tunnel", "bare")

    async def send(self, data: bytes) -> None:
        await (self.party.send(data) if self.is_tls else self.party.send_raw(data))

    async def receive(self, size: int = 65536) -> bytes:
        """Up to ``size`` bytes, ``b""`` at the end of the direction."""
        if self._decrypted:
            data, self._decrypted = self._decrypted[:size], self._decrypted[size:]
            return data
        return await (self.party.receive(size) if self.is_tls else self.party.receive_raw(size))

    async def receive_exactly(self, count: int) -> bytes:
        """``count`` bytes; an earlier end is a failure."""
        parts, left = [], count
        while left:
            data = await self.receive(min(left, 65536))
            assert data, f"the end came with {left} of {count} bytes missing"
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    async def receive_to_end(self) -> bytes:
        """All bytes up to the end of the direction."""
        parts = []
        while data := await self.receive():
            parts.append(data)
        return b"".join(parts)

    async def send_eof(self) -> None:
        """End our direction: FIN, or close_notify and no FIN."""
        self._eof_was_sent = True
        if not self.is_tls:
            await self.party.send_eof()
            return
        # ``unwrap`` reads too, and treats data that is still unread as a fault.
        try:
            while data := self.party.tls.read(65536):
                self._decrypted += data
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        await self.party.stream.send_all(self.party.close_notify())

    async def ended(self) -> str:
        """How the connection ended: "eof", "reset", or "truncated"; bytes before are dropped."""
        with trio.fail_after(TIMEOUT):
            try:
                while await self.receive():
                    pass
            except trio.BrokenResourceError:
                return "reset"
            except ssl.SSLEOFError:
                return "reset" if self._is_dead() else "truncated"
            return "reset" if not self.is_tls and self._is_dead() else "eof"

    def _is_dead(self) -> bool:
        # Linux reports a reset once. If a task that was sending got the error, a read shows only an end.
        state: int = self.party.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return not self._eof_was_sent and state == _TCP_CLOSE


async def _seated(site: Site, relay: RelayInProcess | RelayProcess, name: str, mode: Mode, route: str) -> Party:
    if mode == "plain":
        return await site.connect(relay, None, route=route)
    return await site.party(relay, name, route=route, alpn=() if mode == "bare" else ("frelay/1",))


async def join_ends(
    site: Site,
    relay: RelayInProcess | RelayProcess,
    mode1: Mode = "raw",
    mode2: Mode = "raw",
    *,
    route: str = "demo",
    names: tuple[str, str] = ("func1", "func2"),
) -> tuple[End, End]:
    """Pair func1 and func2 of ``route``; returns once the relay forwards their bytes. One call at a time a route."""

    def count() -> int:
        return len(relay.logged("handed off", route=route))

    before, had_waited = count(), len(relay.logged("waiting", route=route))
    wanted: dict[Mode, list[str]] = {"raw": ["handoff"], "tunnel": ["tunnel"]}
    one = await _seated(site, relay, names[0], mode1, route)
    if mode1 in wanted:
        await one.join(modes=wanted[mode1])
        await one.expect("WAITING")
    else:
        # A party without frames is not told, so wait for the log. On a plain route this also settles who is first.
        await eventually(lambda: len(relay.logged("waiting", route=route)) > had_waited, "func1 waits")
    two = await _seated(site, relay, names[1], mode2, route)
    if mode2 in wanted:
        await two.join(modes=wanted[mode2])
        await two.expect("WAITING")
    for party, mode in ((one, mode1), (two, mode2)):
        if mode in wanted:
            await party.expect("PAIRED")
        if mode == "raw":
            await party.hand_off()
    await eventually(lambda: count() > before, "both legs handed off")
    return End(one, mode1), End(two, mode2)


async def join_all(
    site: Site, relay: RelayInProcess | RelayProcess, pairs_of_modes: Sequence[tuple[Mode, Mode]] = PAIRS_OF_MODES
) -> list[tuple[End, End]]:
    """A pairing for each of these combinations, all on one route."""
    return [await join_ends(site, relay, mode1, mode2) for mode1, mode2 in pairs_of_modes]


def pause_reading(end: End, buffer: int = 65536) -> None:
    """Limit the receive buffer of ``end``, so that the kernel takes little more than ``buffer`` bytes while unread."""
    end.party.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)


# --- churn ----------------------------------------------------------------------------------------------------------

_CHURNED: Final = block(200_000)


async def end_in_order(one: End, two: End) -> None:
    """Some bulk, both ends, both closed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send, _CHURNED)
        assert await two.receive_exactly(len(_CHURNED)) == _CHURNED
    await one.send_eof()
    assert await two.receive() == b""
    await two.send_eof()
    assert await one.receive() == b""
    one.party.close()
    two.party.close()


async def end_by_reset(victim: End, other: End) -> None:
    """Some bytes, then RST from ``victim``; ``other`` sees it and closes."""
    await other.send(_CHURNED[:1000])
    await victim.receive_exactly(1000)
    victim.party.reset()
    assert await other.ended() == "reset"
    other.party.close()


async def cut_in_mid_hand_off(
    site: Site, relay: RelayInProcess | RelayProcess, random_: random.Random, route: str = "demo"
) -> None:
    """One party leaves between PAIRED and its close_notify, in one of several ways."""
    parties: list[Party] = [await site.party(relay, name, route=route) for name in ("func1", "func2")]
    await pair(*parties)
    random_.shuffle(parties)
    leaver, other = parties
    if random_.random() < 0.5:
        await other.hand_off(b"first words")
    random_.choice([leaver.reset, leaver.close])()
    await other.ended()
    other.close()


async def churn(site: Site, relay: RelayInProcess | RelayProcess, count: int, *, seed: int) -> None:
    """``count`` pairings, one after the other: a third ends in order, a third by reset, a third in mid-hand-off."""
    random_ = random.Random(seed)
    for number in range(count):
        if number % 3 == 2:
            await cut_in_mid_hand_off(site, relay, random_)
            continue
        ends = list(await join_ends(site, relay, *random_.choice(PAIRS_OF_MODES)))
        if number % 3 == 0:
            await end_in_order(*ends)
        else:
            random_.shuffle(ends)
            await end_by_reset(*ends)
        site.hang_up()
    site.hang_up()


# --- bulk, in threads -----------------------------------------------------------------------------------------------

_CHUNK: Final = 256 * 1024
_BLOCK: Final = random.Random(1).randbytes(_CHUNK)


@dataclass
class Channel:
    """A TLS layer on a socket: the outer TLS of a tunnel, or the functions' own TLS, alone or inside a tunnel."""

    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    below: Channel | None = None
    """The tunnel that carries it."""

    def take(self) -> bytes:
        """What is to be sent on the socket now."""
        data = self.outgoing.read()
        if self.below is None:
            return data
        if data:
            self.below.tls.write(data)
        return self.below.take()

    def feed(self, data: bytes) -> None:
        """What came from the socket."""
        if self.below is None:
            self.incoming.write(data)
            return
        self.below.feed(data)
        try:
            while plain := self.below.tls.read(65536):
                self.incoming.write(plain)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass

    @classmethod
    def over(cls, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None) -> Channel:
        """A TLS layer before its handshake."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server_side, server_hostname=server_hostname)
        return cls(tls, incoming, outgoing)

    @classmethod
    def of(cls, end: End) -> Channel | None:
        """The outer TLS of ``end``, None for a raw one."""
        party = end.party
        return cls(party.tls, party.incoming, party.outgoing) if end.is_tls else None


@dataclass
class Digests:
    """SHA-256 of what was sent and of what came, and how much came."""

    sent: str
    received: str
    count: int


@dataclass
class _Traffic:
    """The state of one exchange."""

    left: int
    seed: int
    index: int = 0
    pending: memoryview = field(default_factory=lambda: memoryview(b""))

    def next_chunk(self) -> bytes:
        """The next bytes to send; each chunk carries its number, so that a swapped chunk is found."""
        size = min(_CHUNK, self.left)
        chunk = (self.seed.to_bytes(8, "big") + self.index.to_bytes(8, "big") + _BLOCK[16:])[:size]
        self.left -= size
        self.index += 1
        return chunk


def thread_socket(end: End) -> socket.socket:
    """The socket of ``end`` for use outside Trio; Trio may not use it any more."""
    sock = socket.socket(fileno=os.dup(end.party.socket.fileno()))
    sock.setblocking(False)
    return sock


def _wait(sock: socket.socket, *, to_write: bool) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if to_write else 0))
    ready = poll.poll(TIMEOUT * 1000)
    assert ready, f"nothing moved for {TIMEOUT} s"
    return ready[0][1]


def _shake_hands(sock: socket.socket, channel: Channel) -> None:
    while True:
        try:
            channel.tls.do_handshake()
            finished = True
        except ssl.SSLWantReadError:
            finished = False
        unsent = memoryview(channel.take())
        while unsent:
            _wait(sock, to_write=True)
            unsent = unsent[sock.send(unsent) :]
        if finished:
            return
        _wait(sock, to_write=False)
        data = sock.recv(65536)
        assert data, "the connection ended within the handshake"
        channel.feed(data)


def exchange(sock: socket.socket, channel: Channel | None, size: int, seed: int, *, handshake: bool = False) -> Digests:
    """Send ``size`` bytes while receiving as many; then end our direction and read the other's end.

    Blocks; run it in a thread. With ``channel`` the bytes go through that TLS layer. Closes ``sock``.
    """
    traffic = _Traffic(left=size, seed=seed)
    sent, received, count = hashlib.sha256(), hashlib.sha256(), 0
    with sock:
        if channel is not None and handshake:
            _shake_hands(sock, channel)
        while traffic.left or traffic.pending or count < size:
            if not traffic.pending and traffic.left:
                chunk = traffic.next_chunk()
                sent.update(chunk)
                if channel is not None:
                    channel.tls.write(chunk)
                    chunk = channel.take()
                traffic.pending = memoryview(chunk)
            events = _wait(sock, to_write=bool(traffic.pending))
            if events & select.POLLOUT and traffic.pending:
                try:
                    traffic.pending = traffic.pending[sock.send(traffic.pending) :]
                except BlockingIOError:
                    pass
            if events & ~select.POLLOUT:
                data = _receive(sock, channel, size - count)
                count += len(data)
                received.update(data)
        _end_and_read_end(sock, channel)
    return Digests(sent.hexdigest(), received.hexdigest(), count)


def _receive(sock: socket.socket, channel: Channel | None, limit: int) -> bytes:
    try:
        data = sock.recv(_CHUNK)
    except BlockingIOError:
        return b""
    assert data, "the connection ended early"
    if channel is None:
        return data
    channel.feed(data)
    parts, size = [], 0
    try:
        while size < limit:
            parts.append(channel.tls.read(65536))
            size += len(parts[-1])
    except ssl.SSLWantReadError:
        pass
    return b"".join(parts)


def _end_and_read_end(sock: socket.socket, channel: Channel | None) -> None:
    sock.setblocking(True)
    sock.settimeout(TIMEOUT)
    if channel is None:
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"", "more bytes than were sent"
        return
    try:
        channel.tls.unwrap()
        is_over = True
    except ssl.SSLWantReadError:
        is_over = False
    sock.sendall(channel.take())
    while not is_over:
        data = sock.recv(_CHUNK)
        assert data, "FIN instead of close_notify"
        channel.feed(data)
        try:
            channel.tls.unwrap()
            is_over = True
        except ssl.SSLWantReadError:
            pass
    if channel.below is not None:
        _end_and_read_end(sock, channel.below)
        return
    # Closing alone sends no FIN: the descriptor is a duplicate.
    sock.shutdown(socket.SHUT_WR)
