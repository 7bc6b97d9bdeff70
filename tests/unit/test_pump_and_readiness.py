"""What the pumps promise besides the bytes: no spin, no harm to other pairings, and little memory while nothing moves.

``tests/fuzz/test_half_close.py`` tests the bytes themselves, with every order of writes, pauses and ends.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import frelay.pairing.raw_pump as raw_pump_module
import frelay.pairing.readiness as readiness_module
from frelay.config.model import TcpSection
from frelay.net.sockets import close_with_reset, tune
from frelay.net.streams import RawStream
from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Cut
from frelay.pairing.raw_pump import RawPump, carry_arrivals, splice_is_available
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import Interest, PolledSocket
from frelay.pairing.stream_pump import StreamPump
from frelay.protocol.outcome import Outcome, Side
from support.descriptors import open_descriptors, opened_since
from support.rounds import CountedRounds, nothing_is_ready, settled
from support.streams import SocketMaker, tcp_pair, unix_pair
from support.waiting import eventually

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


# --- spins ---------------------------------------------------------------------------------------------------------


async def test_a_leg_that_hung_up_behind_back_pressure_does_not_spin() -> None:
    """epoll reports HUP even unasked: both directions are shut, input is unread, and no pump waits for the socket."""
    async with bench() as found:
        joined = found.join()
        joined.two.shutdown(socket.SHUT_WR)  # func2 ends its direction, so func1's socket is shut for writing
        await eventually(lambda: joined.ended == 1)
        sent = await joined.clog()
        joined.one.shutdown(socket.SHUT_WR)
        await nothing_is_ready(found.readiness, 0.01)
        assert joined.forth.is_blocked
        await joined.unclog(sent)
        assert await eof(joined.two)
        await eventually(lambda: joined.ended == 2)
        assert joined.failures == []


async def eof(sock: socket.socket) -> bool:
    await trio.lowlevel.wait_readable(sock)
    return sock.recv(1) == b""


async def test_a_reset_behind_back_pressure_is_noticed() -> None:
    """No pump reads from the socket at that moment, and an idle receiver must not keep the pairing alive."""
    async with bench() as found:
        joined = found.join()
        await joined.clog()
        close_with_reset(joined.one)
        await eventually(lambda: joined.ended >= 1)
        [cut] = joined.failures
        assert isinstance(cut, Cut)
        assert (cut.outcome, cut.side) == (Outcome.RESET, "func1")
        await nothing_is_ready(found.readiness, 0.01)


@pytest.mark.parametrize("has_ended", [False, True])
async def test_once_nothing_is_written_to_a_leg_only_a_read_tells_how_it_broke(has_ended: bool) -> None:
    """Linux then reports a reset before FIN like one after it, except to the last read; so the pump must read."""
    async with bench() as found:
        joined = found.join()
        await send(joined.two, b"the last of func2")
        joined.two.shutdown(socket.SHUT_WR)
        await eventually(lambda: joined.ended == 1, "func2's direction")
        count = 0
        while not joined.forth.is_blocked:
            count += joined.one.send(PAYLOAD[count % len(PAYLOAD) :][:5000])
            await settled(0.001)
        if has_ended:
            joined.one.shutdown(socket.SHUT_WR)
        await eventually(lambda: unacknowledged(joined.one) == 0, "all has left func1's host")
        joined.one.close()  # with input unread, so this is a reset
        await eventually(lambda: is_dead(joined.inner[0]), "the reset has come")
        await nothing_is_ready(found.readiness, 0.01)
        await joined.unclog(count)
        await eventually(lambda: joined.ended == 2)
        if has_ended:
            assert joined.failures == []
            assert await eof(joined.two)
        else:
            (cut,) = joined.failures
            assert isinstance(cut, Cut)
            assert (cut.outcome, cut.side) == (Outcome.RESET, "func1")


# --- urgent bytes --------------------------------------------------------------------------------------------------


@needs_splice
async def test_an_urgent_byte_in_the_middle_of_bulk_is_no_end() -> None:
    """splice stops before it for good, and returns 0, as at the end, once FIN has come: the rest would be lost."""
    async with bench() as found:
        joined = found.join(starts=False)
        before, after = os.urandom(20_000), os.urandom(100)
        joined.one.send(before)
        joined.one.send(b"!", socket.MSG_OOB)
        joined.one.send(after)
        joined.one.shutdown(socket.SHUT_WR)
        # All of it has come, FIN included, before the pump first reads.
        found.start(joined)
        assert await receive(joined.two, 20_101) == before + b"!" + after
        assert await eof(joined.two)
        await nothing_is_ready(found.readiness, 0.01)
        assert joined.failures == []


# --- arrivals ------------------------------------------------------------------------------------------------------


async def chat(joined: Joined) -> None:
    """Exchange small messages until both pumps wait only for the next arrival."""
    for source, sink in ((joined.one, joined.two), (joined.two, joined.one)):
        await send(source, b"hello")
        assert await receive(sink, 5) == b"hello"
    assert (joined.forth.interest, joined.back.interest) == (Interest.ARRIVAL, Interest.ARRIVAL)


async def test_the_end_that_comes_with_the_last_message_is_not_missed() -> None:
    """epoll reports an arrival once, and the read that follows takes the bytes and leaves the FIN."""
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        joined.one.send(b"bye")
        joined.one.shutdown(socket.SHUT_WR)
        assert await receive(joined.two, 3) == b"bye"
        assert await eof(joined.two)
        await send(joined.two, b"you too")
        assert await receive(joined.one, 7) == b"you too"
        await nothing_is_ready(found.readiness, 0.01)
        assert joined.failures == []


async def test_what_comes_with_an_urgent_byte_is_not_missed() -> None:
    """A read stops before the urgent byte and after it, with more bytes to come."""
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        for _ in range(3):
            joined.one.send(b"before")
            joined.one.send(b"!", socket.MSG_OOB)
            joined.one.send(b"after")
            assert await receive(joined.two, 12) == b"before!after"
            await nothing_is_ready(found.readiness, 0.01)
        await chat(joined)


async def test_the_reset_of_a_chatty_leg_is_noticed() -> None:
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        close_with_reset(joined.one)
        await eventually(lambda: len(joined.failures) == 1)
        (cut,) = joined.failures
        assert isinstance(cut, Cut)
        assert (cut.outcome, cut.side) == (Outcome.RESET, "func1")
        await nothing_is_ready(found.readiness, 0.01)


async def test_a_message_that_is_larger_than_the_copies_does_not_stop_the_flow() -> None:
    """Small, exactly one buffer, large, and small again, each in one piece: after each the next is reported too."""
    async with bench() as found:
        joined = found.join()
        for size in (10, 16 * 1024, 10, 16 * 1024 + 1, 10, 60_000, 1, 16 * 1024, 16 * 1024):
            message = os.urandom(size)
            await send(joined.one, message)
            assert await receive(joined.two, size) == message
        await nothing_is_ready(found.readiness, 0.01)


async def test_after_small_messages_a_read_requests_no_more_until_one_is_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def noted(descriptor: int, count: int) -> bytes:
        asked.append(count)
        return os.read(descriptor, count)

    monkeypatch.setattr(raw_pump_module, "read", noted)
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        for _ in range(100):
            await send(joined.one, b"message")
            assert await receive(joined.two, 7) == b"message"
        small = 479
        assert asked[-1] == small
        for size in (small - 1, small + 1):
            for _ in range(100):
                await send(joined.one, b"message")
                assert await receive(joined.two, 7) == b"message"
            asked.clear()
            rounds, message = found.readiness.rounds, os.urandom(size)
            await send(joined.one, message)
            assert await receive(joined.two, size) == message
            # All of it in the round that reported its arrival.
            assert asked == ([small] if size < small else [small, 16 * 1024])
            assert found.readiness.rounds == rounds + 1
        for size in (small, 1, 20_000, 3 * small, small):
            message = os.urandom(size)
            await send(joined.one, message)
            assert await receive(joined.two, size) == message
        await nothing_is_ready(found.readiness, 0.01)


async def test_a_unix_sockets_short_read_is_not_taken_for_all() -> None:
    """It ends where descriptors were sent along, even if more bytes follow."""
    async with bench() as found:
        joined = found.join(pair=unix_pair)
        for source, sink in ((joined.one, joined.two), (joined.two, joined.one)):
            await send(source, b"hello")
            assert await receive(sink, 5) == b"hello"
        for _ in range(3):
            socket.send_fds(joined.one, [b"with one"], [0])
            joined.one.send(b" and more")
            assert await receive(joined.two, 17) == b"with one and more"
        await nothing_is_ready(found.readiness, 0.01)


async def test_a_message_does_not_wait_for_the_bulk_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as found:
        bulky, chatty = found.join(), found.join()
        await chat(chatty)
        served: list[str] = []
        step, send_on = RawPump.step, carry_arrivals

        def noted_step(pump: RawPump) -> None:
            served.append("bulk")
            step(pump)

        def noted_arrivals(pumps: list[RawPump]) -> None:
            served.extend("message" for _ in pumps)
            send_on(pumps)

        monkeypatch.setattr(RawPump, "step", noted_step)
        monkeypatch.setattr(readiness_module, "carry_arrivals", noted_arrivals)
        bulky.one.send(b"x")
        chatty.one.send(b"x")
        found.readiness.serve([(bulky.forth.source.fd, select.EPOLLIN), (chatty.forth.source.fd, select.EPOLLIN)])
        assert served == ["message", "bulk"]


async def test_of_much_bulk_a_round_serves_some_in_turn_and_no_end_waits() -> None:
    async with bench() as found:
        bulky, chatty = [found.join() for _ in range(40)], found.join()
        await chat(chatty)
        for joined in bulky:
            joined.one.send(b"x")
        chatty.one.shutdown(socket.SHUT_WR)
        # epoll reports them again and again in the same order.
        ready = [(joined.forth.source.fd, select.EPOLLIN) for joined in bulky]
        end = chatty.forth.source.fd, select.EPOLLIN | select.EPOLLRDHUP
        moved = []
        for told in ([*ready, end], ready, ready):
            found.readiness.serve(told)
            moved.append(sum(joined.forth.moved for joined in bulky))
            assert chatty.forth.has_finished
        assert moved == [16, 32, 40]


async def test_both_ends_of_a_pairing_in_one_round() -> None:
    """In one round the sink's reset ends the pump and its source's FIN is served, in either order."""
    for _ in range(20):
        async with bench() as found:
            joined = found.join()
            await chat(joined)
            joined.one.send(b"bye")
            joined.one.shutdown(socket.SHUT_WR)
            close_with_reset(joined.two)
            await eventually(lambda joined=joined: joined.ended == 2)  # type: ignore[misc]
            assert all(isinstance(cut, Cut) and cut.side == "func2" for cut in joined.failures)
            assert joined.failures


async def test_an_end_in_the_same_round_does_not_hide_why_the_pump_ended() -> None:
    """Its sink is served first, and the event of its source is already in the list of this round."""
    bug = RuntimeError("a bug")
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        joined.one.shutdown(socket.SHUT_WR)
        joined.forth.fail(bug)
        carry_arrivals([joined.forth])
        await eventually(lambda: joined.ended == 1)
        assert joined.failures == [bug]


async def test_an_idle_pump_has_the_kernel_check_its_source_again() -> None:
    """It finds what epoll has not reported: here, because the test removes the pump from the set's table."""
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        del found.readiness._expecting[joined.forth.source.fd]
        joined.forth.interest, wanted = Interest.NOTHING, joined.forth.interest
        await send(joined.one, b"unheard")
        await nothing_is_ready(found.readiness, 0.01)
        joined.forth.interest = wanted
        joined.forth.on_idle()
        assert await receive(joined.two, 7) == b"unheard"
        await chat(joined)


@pytest.mark.parametrize("what", ["a full sink", "a reset", "an end", "a message"])
async def test_a_bug_behind_an_arrival_ends_that_pairing_and_no_other(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever part of the step the bug is; and an error of ours is not taken for an error of the sink."""
    bug = OSError(errno.ENOSPC, "no room in epoll")
    async with bench() as found:
        healthy, sick = found.join(), found.join()
        for joined in (healthy, sick):
            await chat(joined)
        if what == "a full sink":
            filled = 0
            while select.select([], [sick.inner[1]], [], 0)[1]:
                filled += sick.inner[1].send(bytes(1000))
        refresh = found.readiness.refresh

        def break_for_the_sick(polled: PolledSocket) -> None:
            if polled is sick.forth.source and polled.reader is not None:
                raise bug
            refresh(polled)

        monkeypatch.setattr(found.readiness, "refresh", break_for_the_sick)
        if what == "a reset":
            close_with_reset(sick.one)
        elif what == "an end":
            sick.one.shutdown(socket.SHUT_WR)
        else:
            sick.one.send(bytes(16 * 1024))
        healthy.one.send(b"hello")
        assert await receive(healthy.two, 5) == b"hello"
        await eventually(lambda: sick.ended == 2)
        assert sick.failures == [bug, bug]
        assert healthy.ended == 0


async def test_a_pump_that_failed_reads_nothing_more() -> None:
    """It may hold bytes: what came after them must not be sent before them."""
    async with bench() as found:
        joined = found.join()
        await chat(joined)
        joined.one.send(b"after the gap")
        joined.forth.fail(RuntimeError("a bug"))
        carry_arrivals([joined.forth])
        await eventually(lambda: joined.ended == 1)
        assert joined.forth.moved == 5
        with pytest.raises(BlockingIOError):
            joined.two.recv(1)


# --- faults --------------------------------------------------------------------------------------------------------


@needs_splice
async def test_a_bug_in_one_pump_ends_that_pairing_and_no_other() -> None:
    """One task steps the pumps of all pairings: an exception in a step must not end it."""
    bug = RuntimeError("a bug")

    def broken_splice(*_: object, **__: object) -> int:
        raise bug

    async with bench() as found:
        healthy, sick = found.join(), found.join(broken_splice)
        await send(healthy.one, b"before")
        assert await receive(healthy.two, 6) == b"before"
        await send(sick.one, bytes(65536))
        await eventually(lambda: sick.ended == 2)
        assert sick.failures == [bug, bug]
        assert healthy.ended == 0
        await send(healthy.one, os.urandom(500_000))
        assert len(await receive(healthy.two, 500_000)) == 500_000
        await nothing_is_ready(found.readiness, 0.01)


@pytest.mark.load
async def test_when_all_is_cancelled_at_once_the_pumps_still_leave_nothing() -> None:
    """The set's own task may end before the pumps do, with bytes in their pipes."""
    before = open_descriptors()
    readiness, pipes = ReadinessSet(), PipePool()
    joined = Joined(readiness, pipes, SPLICE, tcp_pair)
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            nursery.start_soon(joined.carry, joined.forth)
            nursery.start_soon(joined.carry, joined.back)
            await joined.clog()
            nursery.cancel_scope.cancel()
    assert joined.failures == []
    assert pipes.in_use == 0
    joined.close()
    # A pipe with bytes is closed, not pooled: its next user would deliver them.
    assert pipes.descriptors == 0
    assert not opened_since(before)


# --- what an idle pairing holds ------------------------------------------------------------------------------------


@needs_splice
async def test_a_pairing_that_falls_silent_after_bulk_gives_its_pipe_back() -> None:
    """A burst leaves a pump with an empty pipe: a thousand idle pairings must not keep two descriptors each."""
    async with bench() as found:
        joined = found.join()
        await send(joined.one, bytes(16384))
        assert len(await receive(joined.two, 16384)) == 16384
        await nothing_is_ready(found.readiness, 0.01)
        joined.forth.on_idle()
        joined.back.on_idle()
        assert found.pipes.in_use == 0
        # The next bulk transfer takes a pipe again.
        data = os.urandom(200_000)
        await send(joined.one, data)
        assert await receive(joined.two, len(data)) == data


@needs_splice
async def test_an_idle_pump_keeps_a_pipe_that_holds_bytes() -> None:
    async with bench() as found:
        joined = found.join()
        sent = await joined.clog()
        assert found.pipes.in_use == 1
        joined.forth.on_idle()
        assert found.pipes.in_use == 1
        await joined.unclog(sent)


async def test_what_was_delivered_late_is_not_kept() -> None:
    """A pump that once had a full sink must not keep a copy of those bytes while it is idle."""
    async with bench() as found:
        pairs = [found.join(None) for _ in range(5)]
        gc.collect()
        tracemalloc.start()
        try:
            sent = [await joined.clog() for joined in pairs]
            held = tracemalloc.get_traced_memory()[0]
            for joined, count in zip(pairs, sent, strict=True):
                await joined.unclog(count)
            await nothing_is_ready(found.readiness, 0.01)
            left = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert left < held / 2


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


# --- pipes ---------------------------------------------------------------------------------------------------------


@needs_splice
async def test_without_a_free_pipe_the_bytes_are_copied() -> None:
    async with bench() as found:
        found.pipes = PipePool(capacity=1)
        taken = found.pipes.take()
        assert taken is not None
        assert found.pipes.take() is None
        assert found.pipes.descriptors == 2
        joined = found.join()
        data = os.urandom(200_000)
        await send(joined.one, data)
        assert await receive(joined.two, len(data)) == data
        found.pipes.give(taken, is_empty=True)
        assert found.pipes.take() is taken
        found.pipes.give(taken, is_empty=False)
        assert found.pipes.descriptors == 0
