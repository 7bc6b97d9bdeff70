"""``unix:PATH`` in place of a TCP address: ``--listen unix:PATH`` on one side, ``--to unix:PATH`` on the other."""

from __future__ import annotations

import signal
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from support.connects import dial, offering, port_here, still_echoes
from support.ends import block
from support.services import Handler, echo, serving
from support.site import Site
from support.waiting import TIMEOUT, eventually

DATA = block(3_000_000, 1)


@asynccontextmanager
async def serving_unix(path: Path, handler: Handler, backlog: int = 16) -> AsyncIterator[str]:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen(backlog)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(sock)])
        yield f"unix:{path}"
        nursery.cancel_scope.cancel()


async def reversed_at_the_end(stream: trio.SocketStream) -> None:
    async with stream:
        heard = b"".join([bytes(data) async for data in stream])
        await stream.send_all(heard[::-1])


async def test_both_sides_and_both_ends(site: Site) -> None:
    """Megabytes both ways, with half-close from end to end."""
    async with (
        serving_unix(site.directory / "service", reversed_at_the_end) as service,
        site.relay() as relay,
        offering(site, relay, service),
        port_here(site, relay, at=f"unix:{site.directory}/port") as (_, place),
    ):
        assert place == f"unix:{site.directory}/port"
        async with await dial(place) as caller, trio.open_nursery() as nursery:

            async def put() -> None:
                await caller.send_all(DATA)
                await caller.send_eof()

            nursery.start_soon(put)
            with trio.fail_after(TIMEOUT):
                assert b"".join([bytes(data) async for data in caller]) == DATA[::-1]


async def test_a_partner_that_is_killed(site: Site) -> None:
    """The caller's connection ends; a Unix socket has no reset unless bytes are unread. The port goes on."""
    async with (
        serving(echo) as service,
        site.relay() as relay,
        port_here(site, relay, at=f"unix:{site.directory}/port") as (here, place),
    ):
        async with await dial(place) as caller:
            async with offering(site, relay, service.address):
                await still_echoes(caller)
            assert (await here.say("ended"))["clean"] is False
        async with offering(site, relay, service.address), await dial(place) as fresh:
            await still_echoes(fresh)


async def test_it_is_for_its_owner_alone_and_goes_with_the_port(site: Site) -> None:
    path = site.directory / "port"
    async with site.relay() as relay:
        async with port_here(site, relay, at=f"unix:{path}", lives=False) as (here, _):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            here.process.send_signal(signal.SIGTERM)
            assert await here.exit_code() == 0
        assert not path.exists()


async def test_what_a_killed_one_has_left_is_replaced(site: Site) -> None:
    path = site.directory / "port"
    async with serving(echo) as service, site.relay() as relay, offering(site, relay, service.address):
        async with port_here(site, relay, at=f"unix:{path}", lives=False) as (here, _):
            here.process.kill()
            await here.exit_code()
        assert path.is_socket()
        async with port_here(site, relay, at=f"unix:{path}") as (_, place), await dial(place) as caller:
            await still_echoes(caller)


async def test_a_socket_that_took_its_place_is_left_alone(site: Site) -> None:
    path = site.directory / "port"
    async with site.relay() as relay, port_here(site, relay, at=f"unix:{path}", lives=False) as (here, _):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            here.process.send_signal(signal.SIGTERM)
            assert await here.exit_code() == 0
            assert path.exists()


async def test_a_service_whose_queue_is_full_is_waited_for(site: Site) -> None:
    """Unlike for TCP the kernel returns EAGAIN there, which is neither a connection nor a failure."""
    path = site.directory / "service"
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(0)
    crowd = trio.socket.socket(socket.AF_UNIX)
    await crowd.connect(str(path))
    with listener, crowd:
        async with (
            site.relay() as relay,
            offering(site, relay, f"unix:{path}") as there,
            port_here(site, relay) as (_, place),
            await dial(place) as caller,
        ):
            await there.say("connected")
            await eventually(lambda: not there.said("failed"), "it waits")
            for _ in range(2):
                served, _ = await listener.accept()
            async with trio.SocketStream(served) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(echo, stream)
                await still_echoes(caller)
                nursery.cancel_scope.cancel()
