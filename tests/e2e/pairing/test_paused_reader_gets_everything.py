"""A reader that pauses within the limits loses nothing, even if the writer has closed meanwhile."""

from __future__ import annotations

import hashlib

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block, join_all, join_ends, pause_reading
from support.relay import RelayInProcess
from support.site import Site
from support.through_faults import direct
from support.waiting import despite_stalls, eventually

MIB = 1024 * 1024


async def clogged(relay: RelayInProcess) -> None:
    """Wait until func1's pump holds bytes that func2 does not take, and nothing moves any more."""
    (pairing,) = relay.relay.pairings
    pump = pairing._pumps["func1"]
    quiet_since, moved = trio.current_time(), pump.moved

    def is_quiet() -> bool:
        nonlocal quiet_since, moved
        if pump.moved != moved or not pump.is_blocked:
            quiet_since, moved = trio.current_time(), pump.moved
        return trio.current_time() - quiet_since > 0.2

    await eventually(is_quiet, "the pump is blocked")


async def fill(end: End, chunk: bytes) -> int:
    """Send ``chunk`` again and again until all buffers to the reader are full; returns how many bytes were sent."""
    sent = 0
    sock = end.party.socket
    with trio.move_on_after(0.5) as scope:
        while True:
            await trio.lowlevel.wait_writable(sock)
            sent += await sock.send(chunk[sent % len(chunk) :])
            scope.deadline = trio.current_time() + 0.5
    return sent


@pytest.mark.load
@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_50_mib_to_a_paused_reader(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 26: the writer sends 50 MiB and closes, the reader resumes, all arrives."""
    piece = block(MIB)
    sent, received = hashlib.sha256(), hashlib.sha256()
    count = 0
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)

        async def write() -> None:
            for number in range(50):
                data = number.to_bytes(4, "big") + piece[4:]
                sent.update(data)
                await one.send(data)
            await one.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await clogged(relay)
            while data := await two.receive(1 << 20):
                received.update(data)
                count += len(data)
        assert count == 50 * MIB
        assert received.digest() == sent.digest()
        await two.send_eof()
        assert (await relay.outcome())["bytes_func1_to_func2"] == 50 * MIB


@pytest.mark.load
async def test_the_writer_has_closed_its_socket_long_before_the_reader_resumes(site: Site) -> None:
    """TESTPLAN 26: all that the writer's kernel took arrives, although the writer itself is gone."""
    chunk = block(MIB)
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        sent = await fill(one, chunk)
        await clogged(relay)
        one.party.close()
        received = await two.receive_to_end()
        assert len(received) == sent
        assert received == (chunk * (sent // len(chunk) + 1))[:sent]
        await two.send_eof()
        ended = await relay.outcome()
    assert (ended["outcome"], ended["bytes_func1_to_func2"]) == ("closed", sent)


@pytest.mark.load
@direct  # this network would take the last bytes from the kernel in which they should wait
async def test_a_pause_longer_than_half_close_timeout(site: Site) -> None:
    """Bytes that a reader has not taken yet are no silence, also after a half-close.

    The bytes fit into the relay's send buffer, so its pump has passed the end on long ago; the kernel still has them.
    """
    data = block(300_000)

    async def pause(limit: float) -> None:
        limits = f"[limits]\nhalf_close_timeout = {limit}\nstall_timeout = 120\n"
        async with site.relay(OPEN, sections=limits) as relay:
            pairs = await join_all(site, relay)
            for one, two in pairs:
                pause_reading(two)
                await one.send(data)
                await one.send_eof()
            for pairing in relay.relay.pairings:
                await eventually(lambda pairing=pairing: "func1" in pairing._pumps_done, "the end was passed on")  # type: ignore[misc]
            await trio.sleep(3.5 * limit)
            assert not relay.logged("pairing ended")
            for one, two in pairs:
                assert await two.receive_to_end() == data
                await two.send(b"thanks")
                await two.send_eof()
                assert await one.receive_to_end() == b"thanks"
            await eventually(lambda: len(relay.logged("pairing ended", outcome="closed")) == len(pairs), "all closed")

    await despite_stalls(pause, 0.5)
