"""The readiness set sleeps in Trio's place: bytes cost no turn of Trio's loop, and Trio misses nothing."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from frelay.net.sockets import close_with_reset
from frelay.pairing import readiness as module
from frelay.pairing.pipes import PipePool
from frelay.pairing.raw_pump import RawPump
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import PolledSocket
from support.streams import tcp_pair
from support.waiting import TIMEOUT, eventually


@asynccontextmanager
async def joined(readiness: ReadinessSet) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """The parties' ends of two raw legs that ``readiness`` joins."""
    inner1, one = tcp_pair(65536)
    inner2, two = tcp_pair(65536)
    try:
        async with trio.open_nursery() as nursery:
            polled, pipes = (PolledSocket(inner1), PolledSocket(inner2)), PipePool()
            for source, sink in (polled, polled[::-1]):
                pump = RawPump(source, sink, sides=("func1", "func2"), readiness=readiness, pipes=pipes)
                nursery.start_soon(pump.run)
            # Wait until something sleeps on this set.
            await eventually(lambda: len(readiness) == 2)
            yield one, two
            nursery.cancel_scope.cancel()
    finally:
        for sock in (inner1, inner2, one, two):
            close_with_reset(sock)


@asynccontextmanager
async def running(readiness: ReadinessSet) -> AsyncIterator[trio.Nursery]:
    """Run ``readiness`` in the nursery that this yields, until the end of the block, within PATIENCE seconds."""
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.run)
            yield nursery
            nursery.cancel_scope.cancel()


async def say(sender: socket.socket, receiver: socket.socket, message: bytes = b"hello") -> None:
    sender.send(message)
    await trio.lowlevel.wait_readable(receiver)
    assert receiver.recv(100) == message


class CountedTurns(trio.abc.Instrument):
    """Counts the turns of Trio's loop."""

    turns = 0

    def after_io_wait(self, timeout: float) -> None:
        self.turns += 1


async def test_bytes_cost_no_turn_of_trios_loop() -> None:
    readiness = ReadinessSet()
    async with running(readiness), joined(readiness) as (one, two):
        await say(one, two)
        assert readiness.sleeps_for_trio
        counted = CountedTurns()
        trio.lowlevel.add_instrument(counted)

        def talk() -> None:
            """Exchange messages in a thread of its own, without Trio."""
            one.setblocking(True)
            two.setblocking(True)
            for _ in range(500):
                one.send(b"hello")
                assert two.recv(100) == b"hello"

        await trio.to_thread.run_sync(talk)
        trio.lowlevel.remove_instrument(counted)
        # The turns that it takes to start a thread and to learn that it is done.
        assert counted.turns < 20


async def test_deadlines_threads_and_tasks_are_heard_while_bytes_flow() -> None:
    readiness = ReadinessSet()
    async with running(readiness), joined(readiness) as (one, two):
        over = False

        def flood() -> None:
            while not over:
                one.send(b"hello")
                two.recv(100)

        one.setblocking(True)
        two.setblocking(True)
        async with trio.open_nursery() as talking:
            talking.start_soon(trio.to_thread.run_sync, flood)
            for _ in range(20):
                await trio.sleep(0.001)
                assert await trio.to_thread.run_sync(os.getpid) == os.getpid()
                left, right = trio.socket.socketpair()
                with left, right:
                    await left.send(b"x")
                    assert await right.recv(1) == b"x"
            over = True


async def test_a_deadline_is_kept_while_nothing_flows() -> None:
    readiness = ReadinessSet()
    async with running(readiness), joined(readiness):
        for _ in range(5):
            with trio.move_on_after(0.01) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught


async def test_a_signal_is_heard_while_it_sleeps() -> None:
    readiness = ReadinessSet()
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with running(readiness) as nursery, joined(readiness) as (one, two):
            await say(one, two)
            for _ in range(5):
                nursery.start_soon(trio.to_thread.run_sync, os.kill, os.getpid(), signal.SIGUSR1)
                assert await anext(signals) == signal.SIGUSR1


async def test_two_sets_in_one_run_both_move_their_bytes() -> None:
    """If both slept for one Trio, each would miss the other's sockets: for the second set a task waits instead."""
    first, second = ReadinessSet(), ReadinessSet()
    with trio.fail_after(TIMEOUT):
        # The second begins after the first and outlives it.
        async with trio.open_nursery() as outer:
            async with running(first), joined(first) as (one, two):
                await say(one, two)
                outer.start_soon(second.run)
                async with joined(second) as (three, four):
                    for _ in range(3):
                        await say(one, two)
                        await say(three, four)
                    assert (first.sleeps_for_trio, second.sleeps_for_trio) == (True, False)
            # It goes on when the first has ended.
            async with joined(second) as (three, four):
                await say(three, four)
            third = ReadinessSet()
            outer.start_soon(third.run)
            async with joined(third) as (one, two):
                await say(one, two)
                assert third.sleeps_for_trio
            outer.cancel_scope.cancel()


async def test_where_trios_set_cannot_be_seen_a_task_sleeps_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_FDINFO", tmp_path / "nothing")
    readiness = ReadinessSet()
    async with running(readiness), joined(readiness) as (one, two):
        await say(one, two)
        await say(two, one)
        assert not readiness.sleeps_for_trio
    assert "small messages cost more than they should" in capsys.readouterr().out


async def test_a_bug_while_sleeping_for_trio_ends_the_run_with_it() -> None:
    """Trio logs what an instrument raises and goes on without it; such a relay would move no byte."""

    class Sick(ReadinessSet):
        def serve(self, ready: Iterable[tuple[int, int]], trio_epoll: int = -1) -> bool:
            raise RuntimeError("a bug")

    readiness = Sick()
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a bug"), flatten_subgroups=True):
        async with running(readiness), joined(readiness) as (one, _):
            one.send(b"hello")
            await trio.sleep_forever()
