"""What the pump between two raw legs promises besides the bytes: it misses no event, and holds little while it is idle.

``tests/fuzz/test_half_close.py`` tests the bytes themselves, with every order of writes, pauses and ends.
"""

from __future__ import annotations

import gc
import os
import socket
import tracemalloc

import pytest

import frelay.pairing.raw_pump as raw_pump_module
from frelay.net.sockets import close_with_reset
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Cut
from frelay.pairing.raw_pump import carry_arrivals
from frelay.pairing.stepping import Interest
from frelay.protocol.outcome import Outcome
from support.joined import bench, chat, eof, needs_splice, receive, send
from support.rounds import nothing_is_ready
from support.streams import unix_pair
from support.waiting import eventually

# --- urgent bytes -----------------------------------------------------------------------------------------------------


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


# --- arrivals ---------------------------------------------------------------------------------------------------------


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


# --- what an idle pairing holds ---------------------------------------------------------------------------------------


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


# --- pipes ------------------------------------------------------------------------------------------------------------


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
