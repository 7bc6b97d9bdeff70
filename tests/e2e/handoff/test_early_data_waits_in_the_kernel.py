"""What a party without frames sends before its partner has joined waits in the kernel, and all of it is delivered."""

from __future__ import annotations

import array
import fcntl
import socket
import termios
import tracemalloc

import pytest
import trio

from frelay.pairing.leg import Leg
from support.ends import OPEN, PLAIN, End, Mode, block, join_ends
from support.party import Party
from support.relay import RelayInProcess
from support.rounds import settled
from support.site import Site
from support.waiting import TIMEOUT, eventually

MIB = 1024 * 1024
ONE_RECORD = 16384
"""How much early data the relay's TLS may hold: to check whether close_notify comes next, it reads one record."""


async def lonely(site: Site, relay: RelayInProcess, mode: Mode) -> End:
    """A party that waits alone and may send at once."""
    if mode == "plain":
        party = await site.connect(relay, None)
    else:
        party = await site.party(relay, "func1", alpn=())
    await eventually(lambda: relay.waiting()[0] == 1, "func1 waits")
    return End(party, mode)


async def partner(site: Site, relay: RelayInProcess, mode: Mode) -> End:
    if mode == "plain":
        return End(await site.connect(relay, None), mode)
    if mode == "bare":
        return End(await site.party(relay, "func2", alpn=()), mode)
    party: Party = await site.party(relay, "func2")
    await party.join(modes=["handoff" if mode == "raw" else "tunnel"])
    await party.expect("WAITING")
    await party.expect("PAIRED")
    if mode == "raw":
        await party.hand_off()
    return End(party, mode)


def waiting_leg(relay: RelayInProcess) -> Leg:
    return relay.relay.routes["demo"].lobby.waiting("func1")[0].leg


def unread(sock: socket.socket) -> int:
    """How many bytes the kernel has received for ``sock`` that no process has read."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


ROUTES = {"bare": OPEN, "plain": PLAIN}
COMBINATIONS: list[tuple[Mode, Mode]] = [("bare", "raw"), ("bare", "tunnel"), ("bare", "bare"), ("plain", "plain")]


@pytest.mark.parametrize(("early", "late"), COMBINATIONS)
async def test_early_data_is_held_back_and_delivered_whole(site: Site, early: Mode, late: Mode) -> None:
    """TESTPLAN 30: the relay reads one record at most before the partner has joined."""
    data = block(50_000)
    async with site.relay(ROUTES[early]) as relay:
        one = await lonely(site, relay, early)
        await one.send(data)
        leg = waiting_leg(relay)
        await eventually(lambda: unread(leg.sock) >= len(data) - ONE_RECORD, "it is in the relay's kernel")
        await settled(0.05)
        assert unread(leg.sock) >= len(data) - ONE_RECORD
        two = await partner(site, relay, late)
        assert await two.receive_exactly(len(data)) == data
        await two.send(b"here I am")
        assert await one.receive_exactly(9) == b"here I am"


@pytest.mark.parametrize("size", [1, 40_000])
@pytest.mark.parametrize(("early", "late"), COMBINATIONS)
async def test_early_data_and_the_end_of_it(site: Site, early: Mode, late: Mode, size: int) -> None:
    """TESTPLAN 30: a party that ends its direction before its partner has joined is heard, and gets the answer."""
    question = block(size)
    async with site.relay(ROUTES[early]) as relay:
        one = await lonely(site, relay, early)
        await one.send(question)
        await one.send_eof()
        leg = waiting_leg(relay)
        await eventually(lambda: unread(leg.sock) >= size - ONE_RECORD, "it is in the relay's kernel")
        two = await partner(site, relay, late)
        assert await two.receive_to_end() == question
        await two.send(b"the answer")
        await two.send_eof()
        assert await one.receive_to_end() == b"the answer"
        assert (await relay.outcome())["outcome"] == "closed"


@pytest.mark.load
@pytest.mark.parametrize(("early", "late"), COMBINATIONS)
async def test_more_early_data_than_the_kernel_holds(site: Site, early: Mode, late: Mode) -> None:
    """TESTPLAN 30: the sender has to wait, the relay's memory does not grow, and all of it arrives in the end."""
    data = block(24 * MIB)
    sent = 0
    async with site.relay(ROUTES[early]) as relay:
        one = await lonely(site, relay, early)

        async def write() -> None:
            nonlocal sent
            for position in range(0, len(data), 65536):
                await one.send(data[position : position + 65536])
                sent += 65536
            await one.send_eof()

        async with trio.open_nursery() as nursery:
            tracemalloc.start()
            try:
                nursery.start_soon(write)
                moved_at, seen = trio.current_time(), -1

                def is_held_up() -> bool:
                    nonlocal moved_at, seen
                    if sent != seen:
                        moved_at, seen = trio.current_time(), sent
                    return trio.current_time() - moved_at > 0.3

                await eventually(is_held_up, "the sender is held up")
                assert 0 < sent < len(data)
                # In this process Python holds the sender's pieces and the relay's buffers.
                assert tracemalloc.get_traced_memory()[0] < 2 * MIB
            finally:
                tracemalloc.stop()
            two = await partner(site, relay, late)
            with trio.fail_after(TIMEOUT):
                assert await two.receive_to_end() == data


@pytest.mark.parametrize("mode", ["bare", "plain"])
async def test_a_party_that_resets_with_early_data_is_not_paired(site: Site, mode: Mode) -> None:
    """Its place is given up when the next party would be paired with it."""
    async with site.relay(ROUTES[mode], sections="[limits]\nping_interval = 0.2\n") as relay:
        one = await lonely(site, relay, mode)
        await one.send(block(40_000))
        leg = waiting_leg(relay)
        await eventually(lambda: unread(leg.sock) > 0, "it has arrived")
        one.party.reset()
        await eventually(lambda: relay.waiting() == (0, 0) and relay.legs == 0, "its place is free")
        one, two = await join_ends(site, relay, mode, mode)
        await one.send(b"the right one")
        assert await two.receive_exactly(13) == b"the right one"


async def test_early_data_of_a_refused_party_goes_nowhere(site: Site) -> None:
    """A bare party whose partner does not come is closed in order, although it has sent data that was never read."""
    async with site.relay(OPEN, sections="[limits]\nwait_timeout = 0.3\n") as relay:
        one = await lonely(site, relay, "bare")
        await one.send(b"hello?")
        assert await one.ended() == "eof", "close_notify, and no reset"
        assert (await relay.log("refused"))["code"] == "wait-timeout"
        assert not relay.logged("pairing ended")
