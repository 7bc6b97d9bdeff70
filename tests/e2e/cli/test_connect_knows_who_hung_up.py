"""A caller that hangs up before a partner comes gives its place back; one that only ended its direction is served."""

from __future__ import annotations

import socket

import pytest
import trio

from support.connects import dial, offering, port_here, reset
from support.services import serving
from support.site import Site
from support.waiting import TIMEOUT, eventually


async def banner(stream: trio.SocketStream) -> None:
    """A service that sends first, reads everything, and sends it back."""
    await stream.send_all(b"hello ")
    heard = b"".join([bytes(data) async for data in stream])
    await stream.send_all(heard)


@pytest.fixture(params=["tcp4", "tcp6", "unix"])
def at(request: pytest.FixtureRequest, site: Site) -> str:
    return {"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0", "unix": f"unix:{site.directory}/port"}[request.param]


@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.0\r\n\r\n"])
@pytest.mark.parametrize("how", ["reset", "close", "end, then close"])
async def test_its_place_is_free_at_once(site: Site, at: str, how: str, says: bytes) -> None:
    async with site.relay() as relay, port_here(site, relay, at=at) as (here, place):
        caller = await dial(place)
        if says:
            await caller.send_all(says)
        await here.say("waiting")
        assert relay.waiting() == (1, 0)
        if how == "end, then close":
            await caller.send_eof()
            # One check cannot tell whether it is still there.
            await trio.sleep(0.1)
            assert relay.waiting() == (1, 0)
        if how == "reset":
            reset(caller)
        else:
            await caller.aclose()
        await here.say("hung-up")
        await eventually(lambda: relay.waiting() == (0, 0), "its place is free")
        assert not here.said("failed")


@pytest.mark.parametrize("says", [b"", b"all that I have to say"])
async def test_who_ends_its_direction_early_is_served(site: Site, at: str, says: bytes) -> None:
    """Like ``printf x | nc -N``, and like ``nc -N </dev/null`` at a service that sends first."""
    async with site.relay() as relay, port_here(site, relay, at=at) as (here, place), await dial(place) as caller:
        if says:
            await caller.send_all(says)
        await caller.send_eof()
        await here.say("waiting")
        async with serving(banner) as service, offering(site, relay, service.address):
            with trio.fail_after(TIMEOUT):
                assert b"".join([bytes(data) async for data in caller]) == b"hello " + says
        assert not here.said("hung-up")


async def test_the_next_one_in_the_queue_gets_the_place(site: Site) -> None:
    """Eight join at once. After twenty callers hung up, no join is left for any of them."""
    async with site.relay() as relay, port_here(site, relay) as (here, place):
        callers = [await dial(place) for _ in range(28)]
        await eventually(lambda: relay.waiting() == (8, 0), "eight join")
        for caller in callers[:20]:
            await caller.aclose()
        await here.say("hung-up", 20)
        await eventually(lambda: relay.waiting() == (8, 0), "the last eight join")
        assert len(here.said("waiting")) <= 16
        for caller in callers[20:]:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await caller.aclose()
        await eventually(lambda: relay.waiting() == (0, 0), "nobody joins")
