"""Raw legs joined by two pumps on a readiness set of the test's own, and the parties' ends of them."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from frelay.config.model import TcpSection
from frelay.net.sockets import close_with_reset, tune
from frelay.pairing.pipes import PipePool
from frelay.pairing.raw_pump import RawPump, splice_is_available
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import Interest, PolledSocket
from frelay.protocol.outcome import Side
from support.rounds import CountedRounds
from support.streams import SocketMaker, tcp_pair

__all__ = ["PAYLOAD", "SPLICE", "TIMEOUT", "Bench", "Joined", "bench", "chat", "eof", "needs_splice", "receive", "send"]

TIMEOUT = 20.0
FORTH: tuple[Side, Side] = ("func1", "func2")
BACK: tuple[Side, Side] = ("func2", "func1")

# Large enough to fill a pump's buffer, so that the pump splices; small enough to be full soon.
BUFFER = 65536
SPLICE: Callable[..., int] | None = getattr(os, "splice", None)

PAYLOAD = os.urandom(1 << 20)

needs_splice = pytest.mark.skipif(not splice_is_available(), reason="no splice(2) here")


class Joined:
    """Two raw legs joined by two pumps; ``one`` and ``two`` are the parties' ends."""

    def __init__(
        self, readiness: ReadinessSet, pipes: PipePool, splice: Callable[..., int] | None, pair: SocketMaker
    ) -> None:
        inner1, self.one = pair(BUFFER)
        inner2, self.two = pair(BUFFER)
        self.inner = inner1, inner2
        for sock in self.inner:
            if sock.family != socket.AF_UNIX:
                tune(sock, TcpSection())
        socket1, socket2 = PolledSocket(inner1), PolledSocket(inner2)
        self.forth = RawPump(socket1, socket2, sides=FORTH, readiness=readiness, pipes=pipes, splice=splice)
        self.back = RawPump(socket2, socket1, sides=BACK, readiness=readiness, pipes=pipes, splice=splice)
        self.failures: list[Exception] = []
        self.ended = 0

    async def carry(self, pump: RawPump) -> None:
        try:
            await pump.run()
        except Exception as error:
            self.failures.append(error)
        finally:
            self.ended += 1

    def close(self) -> None:
        for sock in (*self.inner, self.one, self.two):
            close_with_reset(sock)

    async def clog(self) -> int:
        """Write PAYLOAD again and again until func1 must wait for func2, which does not read; returns how much went."""
        sent = 0
        while True:
            try:
                sent += self.one.send(PAYLOAD[sent % len(PAYLOAD) :])
            except BlockingIOError:
                # Let the pump run, and the kernel, which may have made room meanwhile.
                await trio.sleep(0.01)
                if self.forth.is_blocked and not select.select([], [self.one], [], 0)[1]:
                    return sent

    async def unclog(self, count: int) -> None:
        """Read ``count`` bytes of PAYLOAD, repeated."""
        received = 0
        while received < count:
            start = received % len(PAYLOAD)
            size = min(count - received, len(PAYLOAD) - start)
            assert await receive(self.two, size) == PAYLOAD[start : start + size]
            received += size


class Bench:
    """A readiness set that runs, and any number of pairs of legs on it."""

    nursery: trio.Nursery

    def __init__(self) -> None:
        self.readiness = CountedRounds()
        self.pipes = PipePool()
        self.all: list[Joined] = []

    def join(
        self, splice: Callable[..., int] | None = SPLICE, *, starts: bool = True, pair: SocketMaker = tcp_pair
    ) -> Joined:
        joined = Joined(self.readiness, self.pipes, splice, pair)
        self.all.append(joined)
        if starts:
            self.start(joined)
        return joined

    def start(self, joined: Joined) -> None:
        for pump in (joined.forth, joined.back):
            self.nursery.start_soon(joined.carry, pump)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as root:
            found = Bench()
            root.start_soon(found.readiness.run)
            try:
                async with trio.open_nursery() as found.nursery:
                    yield found
                    found.nursery.cancel_scope.cancel()
                assert all(joined.ended == 2 for joined in found.all)
                assert found.pipes.in_use == 0
                assert len(found.readiness) == 0
            finally:
                for joined in found.all:
                    joined.close()
            found.pipes.close()
            root.cancel_scope.cancel()


async def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes."""
    data = b""
    while len(data) < count:
        await trio.lowlevel.wait_readable(sock)
        part = sock.recv(count - len(data))
        assert part, f"EOF after {len(data)} of {count} bytes"
        data += part
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        await trio.lowlevel.wait_writable(sock)
        view = view[sock.send(view) :]


async def eof(sock: socket.socket) -> bool:
    await trio.lowlevel.wait_readable(sock)
    return sock.recv(1) == b""


async def chat(joined: Joined) -> None:
    """Exchange small messages until both pumps wait only for the next arrival."""
    for source, sink in ((joined.one, joined.two), (joined.two, joined.one)):
        await send(source, b"hello")
        assert await receive(sink, 5) == b"hello"
    assert (joined.forth.interest, joined.back.interest) == (Interest.ARRIVAL, Interest.ARRIVAL)
