"""However many functions connect at one moment, each is paired or told why not, and then nothing of them is left.

For the figure of the plan::

    FRELAY_BURST=5000 pytest tests/e2e/joining/test_a_burst_of_connects_is_served_or_refused.py -s
"""

from __future__ import annotations

import os
import ssl
from collections import Counter

import pytest
import trio

from support.party import Party, pair
from support.relay import RelayProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

COUNT = int(os.environ.get("FRELAY_BURST", "300"))
# From several addresses, as most bursts do.
A_SOURCE = 30
# All deadlines are far away: this process makes every handshake, which may take long.
LIMITS = """
[limits]
handshake_timeout = 600
join_timeout = 600
wait_timeout = 600
pong_timeout = 600
handoff_timeout = 600
half_close_timeout = 600
"""


async def joined(site: Site, relay: RelayProcess, number: int, context: ssl.SSLContext, cut: list[int]) -> Party:
    """A party that has sent its JOIN. ``cut`` gets its number each time that the relay cut it before.

    This process makes all handshakes. On a busy machine one of them may stand still for so long that the relay gives
    its turn to another; a function then comes again.
    """
    source = f"127.0.2.{1 + number // A_SOURCE}"
    while True:
        stream = await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address=source)
        party = Party(stream, context, "localhost")
        site.parties.append(party)
        try:
            await party.handshake()
            await party.join()
        except trio.BrokenResourceError:
            cut.append(number)
        else:
            return party


async def come(
    site: Site, relay: RelayProcess, number: int, context: ssl.SSLContext, told: dict[int, str], cut: list[int]
) -> None:
    """Connect, join and go on to the end; ``told`` gets the last frame of the relay."""
    party = await joined(site, relay, number, context, cut)
    while (found := await party.next_frame()) is not None:
        name, payload = found
        if name == "PING":
            await party.send_frame("PONG", payload)
            continue
        told[number] = payload.get("code", name)
        if name == "PAIRED":
            await party.hand_off()
            await party.send_eof()
            assert await party.receive_raw() == b""
            break
        if name == "REFUSED":
            assert await party.next_frame() is None
            break
    party.close()


@pytest.mark.load
@pytest.mark.timeout(60 + COUNT)
async def test_a_burst(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """TESTPLAN 37: every one gets an answer of the protocol, maybe a refusal, because a queue has 16 places."""
    contexts = [site.context(name) for name in ("func1", "func2")]
    told: dict[int, str] = {}
    cut: list[int] = []
    async with site.process(sections=LIMITS) as relay:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(COUNT):
                nursery.start_soon(come, site, relay, number, contexts[number % 2], told, cut)

            def all_is_said() -> bool:
                """All have an answer and have ended, except those for which no partner is left."""
                waiting = [number % 2 for number, word in told.items() if word == "WAITING"]
                return len(told) == COUNT and len(set(waiting)) <= 1 and len(nursery.child_tasks) == len(waiting)

            await eventually(all_is_said, "all have their answer", TIMEOUT + COUNT)
            nursery.cancel_scope.cancel()
        seconds = trio.current_time() - began
        words = Counter(told.values())
        assert set(words) <= {"PAIRED", "queue-full", "WAITING"}
        assert words["WAITING"] <= 16
        assert not relay.logged("cannot accept")
        slow = [entry for entry in relay.logged("refused", code="limit") if "made no progress" in entry["reason"]]
        assert len(cut) <= sum(entry.get("count", 1) for entry in slow)
        site.hang_up()
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
    if "FRELAY_BURST" in os.environ:
        with capsys.disabled():
            print(f"\n{COUNT} connects at once: {dict(words)} in {seconds:.1f} s")


@pytest.mark.timeout(60 + COUNT)
async def test_200_from_one_address_are_all_paired(site: Site) -> None:
    """A NAT gateway or a balancer is one address: all functions behind it are served, maybe late, at the first try."""
    route = DEMO + "max_waiting_per_party = 200\n"
    contexts = [site.context(name) for name in ("func1", "func2")]
    words: Counter[str] = Counter()
    async with site.process(route) as relay:

        async def come_once(number: int) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", relay.port())
            party = Party(stream, contexts[number % 2], "localhost")
            site.parties.append(party)
            await party.handshake()
            await party.join()
            await party.expect("WAITING")
            await party.expect("PAIRED")
            words["PAIRED"] += 1
            await party.hand_off()
            await party.send_eof()

        with trio.fail_after(60 + COUNT):
            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(come_once, number)
        assert words == {"PAIRED": 200}
        assert not relay.logged("refused")
