"""What the readiness set promises: no spin, no pairing that waits for or suffers from another one.

``test_sleeping_for_trio.py`` is about how it sleeps in Trio's place.
"""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest
import trio
import trio.testing

import frelay.pairing.readiness as readiness_module
from frelay.net.sockets import close_with_reset
from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Cut
from frelay.pairing.raw_pump import RawPump, carry_arrivals
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import PolledSocket
from frelay.protocol.outcome import Outcome
from support.descriptors import open_descriptors, opened_since
from support.joined import PAYLOAD, SPLICE, TIMEOUT, Joined, bench, chat, eof, needs_splice, receive, send
from support.rounds import nothing_is_ready, settled
from support.streams import tcp_pair
from support.waiting import eventually


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


# --- rounds -----------------------------------------------------------------------------------------------------------


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


# --- faults -----------------------------------------------------------------------------------------------------------


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
