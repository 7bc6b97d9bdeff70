"""Back-pressure: what a leg sends before the other one is ready waits in the kernels, not in the relay.

So a function may send as soon as its own hand-off is done, and the relay's memory does not depend on how much it sends.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from support.handoffs import met
from support.party import TLS_HEADER, Party
from support.relay import RelayProcess
from support.rounds import settled
from support.site import Site

PATIENT = "[limits]\nhandoff_timeout = 60\n"
COUNT = 12
BLOCK = TLS_HEADER + bytes(range(256)) * 1024
# The relay has one buffer for each direction: the most that one read of a TLS leg or a raw leg takes.
PER_LEG = 64 * 1024
# Three send and three receive buffers of the largest size that the system permits are less than this.
MORE_THAN_KERNELS_HOLD = 256 * 1024 * 1024
# How much the interpreter's own memory varies.
NOISE = 3 * 1024 * 1024


def resident(relay: RelayProcess) -> int:
    """The relay's RSS in bytes."""
    for line in Path(f"/proc/{relay.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


async def flood(party: Party, *, tls: bool) -> int:
    """Write 16 KiB at a time until the relay takes no more; returns how many bytes it took."""
    sent = 0
    while True:
        data = BLOCK[:16384]
        if tls:
            party.tls.write(data)
            data = party.take_outgoing()
        with trio.move_on_after(0.5) as pause:
            await party.stream.send_all(data)
        if pause.cancelled_caught:
            return sent
        sent += len(data)
        assert sent < MORE_THAN_KERNELS_HOLD, "nothing holds it up"


@pytest.mark.load
@pytest.mark.parametrize(
    ("mode1", "mode2", "what_func2_does"),
    [
        ("handoff", "handoff", "has read nothing yet"),
        ("handoff", "handoff", "is half way"),
        ("tunnel", "handoff", "is half way"),
        ("handoff", "tunnel", "does not read"),
        ("handoff", "handoff", "does not read"),
    ],
)
async def test_the_relays_memory_does_not_grow(site: Site, mode1: str, mode2: str, what_func2_does: str) -> None:
    """TESTPLAN 18: a dozen functions write all they can to partners that are not ready."""
    async with site.process(sections=PATIENT) as relay:
        parties = []
        for _ in range(COUNT):
            one, two = await met(site, relay, mode1, mode2)
            if mode1 == "handoff":
                await one.hand_off()
            if what_func2_does == "is half way":
                await two.read_to_close_notify()
                await two.send_raw(two.close_notify()[:12])
            elif what_func2_does == "does not read" and mode2 == "handoff":
                await two.hand_off()
            parties.append(one)
        before = resident(relay)
        sent = [0] * COUNT

        async def write(index: int) -> None:
            sent[index] = await flood(parties[index], tls=mode1 == "tunnel")

        async with trio.open_nursery() as nursery:
            for index in range(COUNT):
                nursery.start_soon(write, index)
        # Each writer was stopped, and only after buffers were full.
        assert all(count > PER_LEG for count in sent)
        assert resident(relay) - before < COUNT * PER_LEG + NOISE


@pytest.mark.parametrize("mode1", ["handoff", "tunnel"])
async def test_what_waited_arrives_whole(site: Site, mode1: str) -> None:
    """TESTPLAN 18: megabytes, and then FIN or close_notify, sent before the other leg had answered."""
    size = 8 * 1024 * 1024
    expected = (BLOCK * (size // len(BLOCK) + 1))[:size]
    async with site.relay(sections=PATIENT) as relay:
        one, two = await met(site, relay, mode1, "handoff")
        if mode1 == "handoff":
            await one.hand_off()
        has_begun = trio.Event()

        async def talk() -> None:
            has_begun.set()
            if mode1 == "tunnel":
                await one.send(expected)
                await one.send_raw(one.close_notify())
            else:
                await one.send_raw(expected)
                await one.send_eof()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk)
                await has_begun.wait()
                await settled(0.1)
                await two.hand_off()
                digest, count = hashlib.sha256(), 0
                while data := await two.receive_raw():
                    digest.update(data)
                    count += len(data)
        assert (count, digest.digest()) == (size, hashlib.sha256(expected).digest())
