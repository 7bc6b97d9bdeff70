"""What the pump of a tunnel promises besides the bytes; ``tests/fuzz`` tests these in every order of writes and ends.

The pump is stepped as long as only bytes come. When anything else comes, the step must find it and wake the task for
it, because the socket may report no further event. The tests are about this change.
"""

from __future__ import annotations

import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from frelay.errors import RemoteProtocolError, Truncated
from frelay.net.sockets import close_with_reset
from frelay.net.streams import RawStream
from frelay.pairing.pump import Cut
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stream_pump import StreamPump
from frelay.protocol.outcome import Outcome, Side
from frelay.tls.stream import TlsStream
from support.joined import receive, send
from support.party import Party
from support.rounds import CountedRounds, nothing_is_ready, settled
from support.site import Site
from support.streams import server_context, tcp_pair
from support.waiting import eventually

TIMEOUT = 20.0
FORTH: tuple[Side, Side] = ("func1", "func2")


@dataclass
class Tunnel:
    """A pump from a party in TLS to a bare socket, ``far``."""

    readiness: CountedRounds
    party: Party
    far: socket.socket
    pump: StreamPump
    failures: list[Exception] = field(default_factory=list)
    has_ended: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        try:
            await self.pump.run()
        except Exception as error:
            self.failures.append(error)
        self.has_ended.set()

    async def hear(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            await trio.lowlevel.wait_readable(self.far)
            part = self.far.recv(count - len(data))
            assert part, f"EOF after {len(data)} of {count} bytes"
            data += part
        return data


class Strange(RawStream):
    """A sink with a bug."""

    def send_now(self, data: memoryview) -> int:
        raise ZeroDivisionError


@asynccontextmanager
async def tunnel(
    site: Site,
    *,
    buffer: int | None = None,
    sink_of: type[RawStream] = RawStream,
    readiness: CountedRounds | None = None,
) -> AsyncIterator[Tunnel]:
    one, near = tcp_pair()
    inner, far = tcp_pair(buffer)
    server = TlsStream(one, server_context(site))
    party = Party(trio.SocketStream(trio.socket.from_stdlib_socket(near)), site.context("func1"), "localhost")
    own = readiness is None
    readiness = readiness or CountedRounds()
    found = Tunnel(readiness, party, far, StreamPump(server, sink_of(inner), sides=FORTH, readiness=readiness))
    try:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as root:
                if own:
                    root.start_soon(readiness.run)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.do_handshake)
                    nursery.start_soon(party.handshake)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(found.run)
                    yield found
                    nursery.cancel_scope.cancel()
                assert not own or len(readiness) == 0
                root.cancel_scope.cancel()
    finally:
        server.close()
        party.close()
        for sock in (inner, far):
            close_with_reset(sock)


async def test_the_end_in_one_segment_with_the_last_bytes_is_not_missed(site: Site) -> None:
    """TLS reads both from the kernel at once, and then the kernel has nothing more to report."""
    async with tunnel(site) as found:
        await found.party.send(b"first")
        assert await found.hear(5) == b"first"
        found.party.tls.write(b"last")
        await found.party.stream.send_all(found.party.close_notify())
        assert await found.hear(4) == b"last"
        await found.has_ended.wait()
        assert found.failures == []
        await trio.lowlevel.wait_readable(found.far)
        assert found.far.recv(1) == b""
        assert found.pump.moved == 9


async def test_the_bytes_before_a_cut_arrive_and_the_cut_is_told(site: Site) -> None:
    async with tunnel(site) as found:
        await found.party.send(b"last")
        await found.party.stream.send_eof()  # without close_notify
        assert await found.hear(4) == b"last"
        await found.has_ended.wait()
        (cut,) = found.failures
        assert isinstance(cut, Cut)
        assert (cut.outcome, cut.side) == (Outcome.TRUNCATED, "func1")


async def test_what_a_full_sink_does_not_take_is_sent_later_and_counted(site: Site) -> None:
    async with tunnel(site, buffer=8192) as found:
        data = bytes(range(256)) * 4000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.party.send, data)
            await eventually(lambda: found.pump.is_blocked, "the sink is full")
            assert found.pump.moved < len(data)
            assert await found.hear(len(data)) == data
        await eventually(lambda: not found.pump.is_blocked, "nothing is held")
        assert found.pump.moved == len(data)
        # From here on the pump is stepped again.
        await found.party.send(b"more")
        assert await found.hear(4) == b"more"
        await nothing_is_ready(found.readiness, 0.01)


async def test_a_bug_in_a_step_ends_its_own_pump_alone(site: Site) -> None:
    async with (
        tunnel(site) as healthy,
        tunnel(site, sink_of=Strange, readiness=healthy.readiness) as sick,
    ):
        await sick.party.send(b"hello")
        await sick.has_ended.wait()
        assert [type(error) for error in sick.failures] == [ZeroDivisionError]
        await healthy.party.send(b"hello")
        assert await healthy.hear(5) == b"hello"
        assert not healthy.has_ended.is_set()


async def test_records_of_one_byte_keep_nobody_waiting(site: Site) -> None:
    """A step takes only a few of them, however many have come: each costs as much as a full one."""
    async with tunnel(site) as found:
        for _ in range(1000):
            found.party.tls.write(b"x")
        before = found.readiness.rounds
        await found.party.flush()
        assert await found.hear(1000) == b"x" * 1000
        assert found.readiness.rounds - before >= 50


@pytest.mark.parametrize("how", ["cut", "garbage"])
async def test_both_directions_report_the_same_cause(site: Site, how: str) -> None:
    """Whichever of the two finds it first: a cut does not become a reset because bytes were on their way there."""
    one, near = tcp_pair()
    server = TlsStream(one, server_context(site))
    party = Party(trio.SocketStream(trio.socket.from_stdlib_socket(near)), site.context("func1"), "localhost")
    try:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                nursery.start_soon(party.handshake)
            if how == "garbage":
                await party.send_raw(b"\x17\x03\x03\x00\x20" + bytes(32))
            await party.stream.send_eof()
            await trio.lowlevel.wait_readable(one)
            assert server.receive_now(memoryview(bytearray(1 << 17))) == -1
            with pytest.raises(Truncated if how == "cut" else RemoteProtocolError):
                await send_until_it_fails(server)
    finally:
        server.close()
        party.close()


async def send_until_it_fails(stream: TlsStream) -> None:
    """Send until it raises; the kernel may take the first bytes."""
    while True:
        stream.send_now(memoryview(b"hello"))
        await trio.sleep(0.001)


class Steps(trio.abc.Instrument):
    """Counts the steps of the tasks of pumps."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += "Tunnel.run" in task.name


async def test_a_message_costs_no_turn_of_the_pumps_task(site: Site) -> None:
    steps = Steps()
    async with tunnel(site) as found:
        await found.party.send(b"hello")
        assert await found.hear(5) == b"hello"
        trio.lowlevel.add_instrument(steps)
        try:
            for _ in range(20):
                await found.party.send(b"hello")
                assert await found.hear(5) == b"hello"
        finally:
            trio.lowlevel.remove_instrument(steps)
    assert steps.count == 0


class Reluctant(RawStream):
    """Takes few bytes without waiting, like a socket that is nearly full."""

    def send_now(self, data: memoryview) -> int:
        return super().send_now(data[:1000])


@pytest.mark.parametrize("sink_of", [RawStream, Reluctant])
async def test_a_stream_pump_keeps_nothing_while_it_waits(sink_of: type[RawStream]) -> None:
    (inner1, one), (inner2, two) = tcp_pair(1 << 20), tcp_pair(1 << 20)
    readiness = ReadinessSet()
    pump = StreamPump(RawStream(inner1), sink_of(inner2), sides=FORTH, readiness=readiness)
    await send(one, bytes(50_000))
    tracemalloc.start()
    try:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(readiness.run)
                nursery.start_soon(pump.run)
                assert await receive(two, 50_000) == bytes(50_000)
                await settled(0.01)
                assert pump.moved == 50_000
                assert tracemalloc.get_traced_memory()[0] < 50_000
                nursery.cancel_scope.cancel()
    finally:
        tracemalloc.stop()
        for sock in (inner1, inner2, one, two):
            close_with_reset(sock)
