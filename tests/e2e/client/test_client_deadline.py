"""``wait`` is a deadline over everything: the look-up of a name, a silent server, a peer that never comes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

import frelay
from support.clients import CLIENTS, Client, answer, ask, meet, options, run_function
from support.descriptors import open_descriptors, opened_since
from support.ports import reserved_port
from support.site import Site
from support.waiting import eventually

# Far less than the 30 s and more that each of these takes without a deadline.
LATE = 10.0


async def took(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    await call()
    return time.monotonic() - began


@pytest.mark.load
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_look_up_that_hangs(site: Site, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's thread does not delay the function either, nor the end of asyncio.run()."""
    release = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **more: Any) -> Any:
        if host == "relay.nowhere" and socket.AI_NUMERICHOST not in (more.get("flags"), *args):
            release.wait(60)
        return real(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    given = options(site, "func1", "func2")
    given["wait"] = 0.3

    async def call() -> None:
        with pytest.raises(frelay.RelayUnreachable, match=r"relay\.nowhere"):
            await run_function(client, "relay.nowhere:9001", ask(b""), given)

    try:
        assert 0.25 < await took(call) < LATE
    finally:
        release.set()


@pytest.mark.load
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_server_that_says_nothing(site: Site, client: Client) -> None:
    before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = options(site, "func1", "func2")
        given["wait"] = 0.3

        async def call() -> None:
            with pytest.raises(frelay.RelayUnreachable):
                await run_function(client, f"127.0.0.1:{silent.getsockname()[1]}", ask(b""), given)

        assert 0.25 < await took(call) < LATE
    await eventually(lambda: not opened_since(before), "no descriptor is left")


@pytest.mark.parametrize("client", CLIENTS)
async def test_nobody_comes(site: Site, client: Client) -> None:
    """Refused("wait-timeout"), and the relay gets LEAVE."""
    async with site.relay() as relay:
        given = options(site, "func1", "func2")
        given["wait"] = 0.5
        with pytest.raises(frelay.Refused) as caught:
            await run_function(client, f"127.0.0.1:{relay.port()}", ask(b""), given)
        assert caught.value.code == "wait-timeout"
        assert caught.value.retry_after is not None
        await eventually(lambda: relay.waiting() == (0, 0), "the place is free")


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_retry_outlives_a_relay_that_is_not_there_yet(site: Site, client: Client) -> None:
    """The function comes first, and its connection is refused; with ``retry`` it joins once the relay is there."""
    with reserved_port() as port:
        given = options(site, "func1", "func2", retry=frelay.Retry(first=0.05, longest=0.2))
        heard: list[bytes] = []

        async def early() -> None:
            heard.append(await run_function(client, f"127.0.0.1:{port}", ask(b"early"), given))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(early)
            await trio.sleep(0.3)
            async with site.relay(f'[[route]]\nname = "demo"\nlisten = "127.0.0.1:{port}"\n' + PARTIES) as relay:
                late = await run_function("trio", f"127.0.0.1:{port}", answer(b"late"), options(site, "func2", "func1"))
                assert late == b"early"
                await eventually(lambda: heard == [b"late"], "the answer")
                await eventually(lambda: relay.legs == 0, "nothing is held")


PARTIES = 'func1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'


async def test_each_address_of_a_name_is_tried(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one refuses the connection, the second one is the relay."""
    real = socket.getaddrinfo
    with reserved_port() as nobody:
        async with site.relay() as relay:
            port_of_relay = relay.port()

            def getaddrinfo(host: Any, port: Any, *args: Any, **more: Any) -> Any:
                if host != "relay.twice":
                    return real(host, port, *args, **more)
                if more.get("flags"):
                    raise socket.gaierror(socket.EAI_NONAME, "a name")
                found = socket.AF_INET, socket.SOCK_STREAM, 6, ""
                return [(*found, ("127.0.0.1", nobody)), (*found, ("127.0.0.1", port_of_relay))]

            monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
            given = (options(site, "func1", "func2"), options(site, "func2", "func1"))
            for client in CLIENTS:
                heard = await meet((client, client), "relay.twice:9001", (ask(b"a"), answer(b"b")), given)
                assert heard == (b"b", b"a")
