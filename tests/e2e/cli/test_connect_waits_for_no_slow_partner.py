"""A partner that stops in the middle of its handshake delays its own caller, and no other."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final

from support.connects import dial, offering, port_here, still_echoes
from support.services import echo, serving
from support.site import Site

MORE_THAN_JOIN_AT_ONCE: Final = 10


async def test_at_a_port(site: Site) -> None:
    async with (
        serving(echo) as service,
        site.relay() as relay,
        port_here(site, relay) as (here, place),
        AsyncExitStack() as callers,
    ):
        for _ in range(MORE_THAN_JOIN_AT_ONCE):
            slow = await site.party(relay, "func2")
            await slow.join()
            await slow.expect("WAITING")
            await callers.enter_async_context(await dial(place))
            await slow.expect("PAIRED")
            await slow.hand_off()
        async with offering(site, relay, service.address), await dial(place) as caller:
            await still_echoes(caller)
        assert not here.said("hung-up")


async def test_at_a_service(site: Site) -> None:
    async with serving(echo) as service, site.relay() as relay, offering(site, relay, service.address) as there:
        for _ in range(MORE_THAN_JOIN_AT_ONCE):
            slow = await site.party(relay, "func1")
            await slow.join()
            await slow.expect("WAITING")
            await slow.expect("PAIRED")
            await slow.hand_off()
        async with port_here(site, relay) as (_, place), await dial(place) as caller:
            await still_echoes(caller)
        assert there.process.returncode is None
