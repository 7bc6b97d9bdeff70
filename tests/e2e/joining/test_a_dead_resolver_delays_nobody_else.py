"""A name server that never answers delays those who need that name, and nobody else.

A look-up is a call that cannot be cancelled, in a thread that its caller abandons when it gives up. Here the test
decides how long a look-up takes; the last test shows the same with a real name server that never answers.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio

from support.admin import ADMIN, admin, route_body
from support.ends import OPEN, End, join_ends
from support.party import Party, pair
from support.relay import RelayInProcess, RelayProcess
from support.services import Service, call, dialling, echo, serving
from support.site import DEMO, Site
from support.tools import needs_root, tool
from support.waiting import TIMEOUT, eventually

DEAD: Final = "dead.example"
# More than Trio has threads for everything in a process.
CALLERS: Final = 60
LIMITS: Final = f"[limits]\nmax_waiting_per_party = {CALLERS}\nmax_pre_auth_per_ip = {CALLERS + 4}\n"
TO_THE_DEAD: Final = dialling(f"{DEAD}:443", options=", connect_timeout = 100").replace('"demo"', '"dead"')


class HeldLookUps:
    """Look-ups of :data:`DEAD`, which wait until the test makes them fail."""

    def __init__(self) -> None:
        self.under_way = 0
        self.begun = 0
        self._answer = threading.Event()

    def wait(self) -> None:
        self.begun += 1
        self.under_way += 1
        self._answer.wait()
        self.under_way -= 1
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def release(self) -> None:
        self._answer.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldLookUps]:
    """A system whose name server answers for all names but one."""
    look_ups, ask = HeldLookUps(), socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        numeric = socket.AI_NUMERICHOST & (options.get("flags") or (arguments[4] if len(arguments) > 4 else 0))
        if host in (DEAD, DEAD.encode()) and not numeric:
            look_ups.wait()
        return ask(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        yield look_ups
    finally:
        look_ups.release()


async def crowd(site: Site, relay: RelayInProcess, held: HeldLookUps) -> list[Party]:
    """More callers than threads, for a service whose name gets no answer."""
    callers: list[Party] = []

    async def come() -> None:
        party = await site.party(relay, "func1", route="dead")
        await party.join()
        await party.expect("WAITING")
        callers.append(party)

    async with trio.open_nursery() as nursery:
        for _ in range(CALLERS):
            nursery.start_soon(come)
    await eventually(lambda: held.under_way > 0, "a look-up has begun")
    return callers


async def test_reloads_and_other_services_do_not_wait_with_its_callers(site: Site, held: HeldLookUps) -> None:
    """TESTPLAN 51: sixty callers cost one thread; a reload, an edit and a service with a good name still work."""
    async with serving(echo) as service:
        named = Service("localhost", int(service.address.rpartition(":")[2]))
        routes = TO_THE_DEAD + dialling(named, more="require_inner_tls = false")
        async with site.relay(routes, sections=LIMITS) as relay:
            callers = await crowd(site, relay, held)
            with trio.fail_after(TIMEOUT):
                await relay.relay.reload()
                end = await call(site, relay)
                await end.send(b"question")
                assert await end.receive_exactly(8) == b"question"
            assert held.under_way == held.begun == 1
            assert relay.waiting("dead") == (CALLERS, 0)
            # A caller that gives up leaves no thread of its own: the next one shares the look-up that still runs.
            for caller in callers:
                await caller.send_frame("LEAVE")
            await eventually(lambda: relay.waiting("dead") == (0, 0), "all have gone")
            await crowd(site, relay, held)
            assert held.begun == 1
            held.release()
            await relay.log("pairing ended", outcome="dial-failed")


async def test_the_admin_api_does_not_wait_with_its_callers(site: Site, held: HeldLookUps) -> None:
    """Adding a route by the API does not wait either."""
    (site.directory / "routes.d").mkdir()
    sections = ADMIN + LIMITS + '[relay]\nroutes_dir = "routes.d"\n'
    async with site.relay(TO_THE_DEAD, sections=sections) as relay, admin(site) as api:
        await crowd(site, relay, held)
        assert (await api.get("/v1/status")).status_code == 200
        assert (await api.put("/v1/routes/new", json=route_body())).status_code == 201
        assert (await api.post("/v1/reload")).status_code == 200
        assert held.under_way == 1


async def test_a_listener_by_name_stops_no_bytes(site: Site, held: HeldLookUps) -> None:
    """A reload waits for the look-up of an address; all pairings continue meanwhile."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        site.write(OPEN + DEMO.replace('"demo"', '"new"').replace("127.0.0.1:0", f"{DEAD}:9001"))
        relay.relay.request_reload()
        await eventually(lambda: held.under_way == 1, "the reload asks for the name")
        with trio.fail_after(TIMEOUT):
            await talk(one, two)
        assert not relay.logged("reload refused, the old configuration stays")
        held.release()
        refused = await relay.log("reload refused, the old configuration stays")
        assert f"cannot listen on {DEAD}:9001: Temporary failure in name resolution" in refused["problem"]
        await talk(one, two)


async def talk(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"


async def test_a_listener_by_name_is_bound(site: Site) -> None:
    """At all addresses of the name."""
    async with site.relay(DEMO.replace("127.0.0.1:0", "localhost:0")) as relay:
        addresses = {address.rpartition(":")[0] for address in relay.relay.bound("demo")}
        assert "127.0.0.1" in addresses


# --- a real one -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def with_deaf_name_server(site: Site, routes: str, sections: str) -> AsyncIterator[tuple[RelayProcess, Any]]:
    """A relay process whose only name server takes every question and never answers; with the server's socket."""
    needs_root("a resolv.conf of its own for one process")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.53.53", 53))
        server.setblocking(False)
        own = site.directory / "resolv.conf"
        # Each try is longer than the whole test may take.
        own.write_text("nameserver 127.0.53.53\noptions timeout:30 attempts:3\n")
        script = f"mount --bind '{own}' /etc/resolv.conf && exec \"$@\""
        launcher = [tool("unshare"), "--mount", "sh", "-c", script, "sh"]
        async with site.process(routes, sections=sections, launcher=launcher) as relay:
            yield relay, trio.socket.from_stdlib_socket(server.dup())


async def test_with_a_name_server_that_is_deaf(site: Site) -> None:
    """TESTPLAN 51: reloads work, functions are paired, and the end of the relay does not wait for it either."""
    async with with_deaf_name_server(site, TO_THE_DEAD + DEMO, LIMITS) as (relay, server):
        for _ in range(45):
            caller = await site.party(relay, "func1", route="dead")
            await caller.join()
            await caller.expect("WAITING")
        with trio.fail_after(TIMEOUT):
            assert b"\x04dead\x07example" in await server.recv(512)
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        site.hang_up()
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() == 0
        server.close()
