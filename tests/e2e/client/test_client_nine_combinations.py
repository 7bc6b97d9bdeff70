"""Any two of the three clients, in any modes, exchange megabytes and half-close both ways."""

from __future__ import annotations

import hashlib

import pytest
import trio

from frelay.protocol.messages import Mode
from support.clients import PAIRS_OF_CLIENTS, Client, answer, ask, meet, options
from support.ends import block
from support.site import DEMO, Site
from support.waiting import eventually

# Each mode on each side, also together with another mode.
MODES: tuple[tuple[Mode, Mode], ...] = (
    ("handoff", "handoff"),
    ("tunnel", "handoff"),
    ("handoff", "ticket"),
    ("ticket", "tunnel"),
)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("clients", PAIRS_OF_CLIENTS, ids="-".join)
async def test_two_clients_exchange_megabytes(site: Site, clients: tuple[Client, Client]) -> None:
    """In several pairs of modes, one after the other on one relay, which records a clean end for each."""
    question, reply = block(3_000_001, 1), block(2_000_003, 2)
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        for count, modes in enumerate(MODES, start=1):
            given = (options(site, "func1", "func2", mode=modes[0]), options(site, "func2", "func1", mode=modes[1]))
            heard = await meet(clients, address, (ask(question), answer(reply)), given)
            assert (digest(heard[0]), digest(heard[1])) == (digest(reply), digest(question)), modes
            await eventually(lambda count=count: len(relay.logged("pairing ended")) == count, "the record")  # type: ignore[misc]
            assert relay.logged("pairing ended")[-1]["outcome"] == "closed", (modes, relay.logged("pairing ended"))
        await eventually(lambda: relay.legs == 0, "the relay holds nothing")


async def test_the_clients_wait_for_each_other_over_ipv6(site: Site) -> None:
    async with site.relay(DEMO.replace("127.0.0.1", "[::1]")) as relay:
        address = f"[::1]:{relay.port()}"
        given = (options(site, "func1", "func2"), options(site, "func2", "func1"))
        with trio.fail_after(60):
            assert await meet(("blocking", "asyncio"), address, (ask(b"a"), answer(b"b")), given) == (b"b", b"a")
