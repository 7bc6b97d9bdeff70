"""However many functions connect at one moment, each is paired, or told cleanly why not, and nothing is left of them.

For the figure of the plan::

    FRELAY_BURST=5000 pytest tests/e2e/test_a_burst_of_connects_is_served_or_refused.py -s
"""

from __future__ import annotations

import os
import ssl
from collections import Counter

import pytest
import trio

from rig import DEMO, PATIENCE, Party, RelayProcess, Site, eventually, pair

COUNT = int(os.environ.get("FRELAY_BURST", "300"))
# The functions come from as many addresses as it takes to stay below max_pre_auth_per_ip; that one closes unheard.
A_SOURCE = 30
# All deadlines are far away: with every handshake made by this process it may take a while.
LIMITS = "[limits]\nhandshake_timeout = 600\njoin_timeout = 600\nwait_timeout = 600\nhandoff_timeout = 600\n"


async def come(site: Site, relay: RelayProcess, number: int, context: ssl.SSLContext, told: Counter[str]) -> None:
    """Connect, join, and go as soon as the relay has said what becomes of it."""
    source = f"127.0.2.{1 + number // A_SOURCE}"
    stream = await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address=source)
    party = Party(stream, context, "localhost")
    site.parties.append(party)
    await party.handshake()
    await party.join()
    while (found := await party.next_frame()) is not None:
        name, payload = found
        if name == "PING":
            await party.send_frame("PONG", payload)
        elif name == "PAIRED":
            told["paired"] += 1
            await party.hand_off()
            await party.send_eof()
            assert await party.receive_raw() == b""
            break
        elif name == "REFUSED":
            told[payload["code"]] += 1
            assert await party.next_frame() is None
            break
    party.close()


@pytest.mark.timeout(60 + COUNT)
async def test_a_burst(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """TESTPLAN 37: every single one gets an answer of the protocol; a queue has 16 places, so it may be a refusal."""
    contexts = [site.context(name) for name in ("func1", "func2")]
    told: Counter[str] = Counter()
    async with site.process(sections=LIMITS) as relay:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(COUNT):
                nursery.start_soon(come, site, relay, number, contexts[number % 2], told)
            # Whoever waits when all others have gone has nobody to come any more.
            await eventually(lambda: sum(told.values()) >= COUNT - 16, "nearly all have their answer", PATIENCE + COUNT)
            while sum(told.values()) < COUNT:
                late = await site.party(relay, "func1")
                await late.join()
                other = await site.party(relay, "func2")
                await other.join()
                await trio.sleep(0.05)
                late.close()
                other.close()
        seconds = trio.current_time() - began
        assert set(told) <= {"paired", "queue-full"}
        assert sum(told.values()) == COUNT
        assert not relay.logged("cannot accept")
        site.hang_up()
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
    if "FRELAY_BURST" in os.environ:
        with capsys.disabled():
            print(f"\n{COUNT} connects at once: {dict(told)} in {seconds:.1f} s")


async def test_over_the_limit_of_one_address_it_is_a_close(site: Site) -> None:
    """TESTPLAN 37: nothing was spoken yet, so nothing can be said; those within the limit are served."""
    route = DEMO + "max_waiting_per_party = 1000\n"
    async with site.relay(route, sections="[limits]\nmax_pre_auth_per_ip = 5\nhandshake_timeout = 60\n") as relay:
        ends: Counter[str] = Counter()

        async def come_silently() -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address="127.0.2.1")
            try:
                ends["eof" if await stream.receive_some(1) == b"" else "answer"] += 1
            except trio.BrokenResourceError:
                ends["reset"] += 1
            finally:
                await trio.aclose_forcefully(stream)

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(come_silently)
            await eventually(lambda: sum(ends.values()) == 95, "all but five are closed")
            assert set(ends) == {"eof"}
            await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
            nursery.cancel_scope.cancel()
