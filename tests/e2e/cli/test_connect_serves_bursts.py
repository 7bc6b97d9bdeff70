"""Many callers at once through ``--listen`` and ``--to`` are all served, within the limits of both."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trio
import trio.lowlevel

from support.connects import dial, offering, port_here, still_echoes
from support.ports import free_port
from support.services import echo, serving
from support.site import DEMO, Site
from support.tools import running, tool, wait_listening
from support.waiting import TIMEOUT, eventually


async def run(line: list[str]) -> str:
    with trio.fail_after(TIMEOUT * 5):
        done = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def test_redis_benchmark_at_its_defaults(site: Site) -> None:
    """50 connections at once, which stay open."""
    benchmark, server, service = tool("redis-benchmark"), tool("redis-server"), free_port()
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(site.directory)]
    async with running([server, "--port", str(service), *options]), site.relay() as relay:
        await wait_listening(service)
        async with offering(site, relay, f"127.0.0.1:{service}") as there, port_here(site, relay) as (here, place):
            port = place.rpartition(":")[2]
            text = await run([benchmark, "-p", port, "-n", "2000", "-t", "ping_mbulk,set", "--csv"])
            assert "SET" in text
            assert not here.said("failed")
            assert not there.said("failed")
            assert not relay.logged("refused")


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


async def test_curl_with_sixty_at_once(site: Site) -> None:
    with _Server(("127.0.0.1", 0), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            async with (
                site.relay() as relay,
                offering(site, relay, f"127.0.0.1:{server.server_port}"),
                port_here(site, relay) as (here, place),
            ):
                curl = [tool("curl"), "--no-progress-meter", "--fail", "--noproxy", "*"]
                curl += ["--parallel", "--parallel-immediate", "--parallel-max", "60"]
                assert await run([*curl, f"http://{place}/[1-60]"]) == "hello" * 60
                assert not here.said("failed")
                assert not relay.logged("refused")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.load
async def test_legs_grow_with_callers_and_go_again(site: Site) -> None:
    """At most eight wait on each side, and one when no more callers come."""
    most = [0, 0]

    async def watch() -> None:
        while True:
            waiting = relay.waiting()
            most[:] = [max(most[0], waiting[0]), max(most[1], waiting[1])]
            await trio.lowlevel.checkpoint()

    async def call() -> None:
        async with await dial(place) as caller:
            await still_echoes(caller)
            served.append(1)
            await over.wait()

    served: list[int] = []
    over = trio.Event()
    async with (
        serving(echo) as service,
        site.relay() as relay,
        offering(site, relay, service.address) as there,
        port_here(site, relay) as (_, place),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(watch)
        for _ in range(40):
            nursery.start_soon(call)
        await eventually(lambda: len(served) == 40, "all are served at once", TIMEOUT * 2)
        assert most[0] <= 8
        assert 1 < most[1] <= 8
        over.set()
        await eventually(lambda: relay.waiting() == (0, 1), "one leg waits for the next caller", TIMEOUT * 2)
        assert there.process.returncode is None
        assert not there.said("failed")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_concurrency_is_kept(site: Site, concurrency: int) -> None:
    """Further callers wait, and then are served."""
    now = most = 0

    async def counted(stream: trio.SocketStream) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            await echo(stream)
        finally:
            now -= 1

    async def call() -> None:
        async with await dial(place) as caller:
            await still_echoes(caller)
            await trio.sleep(0.05)

    async with (
        serving(counted) as service,
        site.relay() as relay,
        offering(site, relay, service.address, "--concurrency", str(concurrency)),
        port_here(site, relay) as (_, place),
    ):
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as calls:
                for _ in range(12):
                    calls.start_soon(call)
        assert most <= concurrency


@pytest.mark.parametrize("limit", ["max_waiting_per_party = 1", "max_pairings = 2", "wait_timeout = 0.3"])
async def test_what_passes_by_itself_is_tried_again(site: Site, limit: str) -> None:
    """``queue-full``, ``limit`` and ``wait-timeout`` within ``--wait``, without --retry."""

    async def call(count: int) -> None:
        async with await dial(place) as caller:
            await still_echoes(caller, str(count).encode())
        served.append(count)

    served: list[int] = []
    async with (
        serving(echo) as service,
        site.relay(f"{DEMO}{limit}\n") as relay,
        port_here(site, relay, "--wait", "120") as (here, place),
        trio.open_nursery() as calls,
    ):
        for count in range(4):
            calls.start_soon(call, count)
        if limit.startswith("wait"):
            await eventually(lambda: len(relay.logged("refused", code="wait-timeout")) >= 4, "the relay has given up")
        async with offering(site, relay, service.address):
            await eventually(lambda: len(served) == 4, "all are served", TIMEOUT * 5)
            assert not here.said("failed")


async def test_it_ends_with_the_wait(site: Site) -> None:
    """A caller without a partner is cut then, and the text says how long it waited."""
    async with (
        site.relay(DEMO + "wait_timeout = 0.3\n") as relay,
        port_here(site, relay, "--wait", "2") as (here, place),
    ):
        async with await dial(place) as caller:
            with trio.fail_after(TIMEOUT), pytest.raises(trio.BrokenResourceError):
                await caller.receive_some(1)
        assert (await here.say("failed"))["reason"] == "wait-timeout: nobody came within 2 s"
