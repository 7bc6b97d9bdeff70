"""A relay with hardly any file descriptors serves as many as they carry, and keeps some back for its own work.

Limit and budget belong to a process, so these tests use one process, however many workers the other tests run.
"""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import pytest
import trio

import frelay.joining.listener
import frelay.net.sockets
from support.admin import ADMIN, admin
from support.descriptors import open_descriptors
from support.party import pair
from support.ports import reserved_port
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

FEW: Final = ("/bin/sh", "-c", 'ulimit -n 64 && exec "$@"', "sh")
SOFT: Final = ("/bin/sh", "-c", 'ulimit -Sn 60 && ulimit -Hn 500 && exec "$@"', "sh")
LIMITS: Final = "[limits]\nhandshake_timeout = 60\nmax_pre_auth_per_ip = 256\n"


@asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[trio.SocketStream]]:
    """This many connections that send nothing."""
    streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(count)]
    try:
        yield streams
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def pairs_up(site: Site, relay: RelayProcess) -> None:
    with trio.fail_after(TIMEOUT):
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
    site.hang_up()


async def pairs_up_in_time(site: Site, relay: RelayProcess) -> None:
    """Pair soon after a flood, when some of its refusals may still be unread."""
    with trio.fail_after(TIMEOUT):
        while True:
            try:
                await pairs_up(site, relay)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.01)
            else:
                break


@pytest.mark.load
async def test_a_queue_of_connections_is_taken_with_hardly_any_descriptors(site: Site) -> None:
    """All of them come at once: the relay closes the connections that it evicts before it accepts the next ones."""
    async with site.process(sections=LIMITS, launcher=FEW, workers=1) as relay:
        relay.signal(signal.SIGSTOP)
        async with connections(relay.port(), 100):
            relay.signal(signal.SIGCONT)
            await relay.log("refused", code="limit")
        await pairs_up_in_time(site, relay)
        assert not relay.logged("cannot accept")


@pytest.mark.load
async def test_64_descriptors_and_100_connects(site: Site) -> None:
    """TESTPLAN 35: it still logs, reloads and answers its operator; and it serves again when they have gone."""
    async with site.process(sections=LIMITS + ADMIN, launcher=FEW, workers=1) as relay:
        await pairs_up(site, relay)
        async with connections(relay.port(), 100):
            full = "all places for strangers are taken"

            def gave_way() -> int:
                return sum(e.get("count", 1) for e in relay.logged("refused", code="limit") if full in e["reason"])

            await eventually(lambda: gave_way() >= 80, "all but a few gave way")
            assert len(open_descriptors(relay.process.pid)) < 60
            relay.signal(signal.SIGHUP)
            await relay.log("reloaded")
            async with admin(site) as api:
                status = (await api.get("/v1/status")).json()
                assert status["descriptors"]["limit"] == 64
                assert 0 < status["descriptors"]["legs"] < 64
                assert (await api.post("/v1/reload")).status_code == 200
            assert not relay.logged("cannot accept")
        await pairs_up_in_time(site, relay)


@pytest.mark.load
async def test_http_callers_leave_the_descriptors_that_a_reload_needs(site: Site) -> None:
    """With legs at their budget and more callers than both HTTP servers take, a revocation is still loaded."""
    few = (*FEW[:2], 'ulimit -n 160 && exec "$@"', "sh")
    limits = "[limits]\nmax_waiting_per_party = 300\nmax_pre_auth_per_ip = 300\nfd_budget = 1\n"
    site.ca.write_crl(site.directory, site.ca.crl())
    with reserved_port() as port:
        metrics = f'[metrics]\nlisten = "127.0.0.1:{port}"\n'
        async with (
            site.process(sections=limits + metrics + ADMIN, crl=True, launcher=few, workers=1) as relay,
            AsyncExitStack() as callers,
        ):
            waiting = 0
            while True:
                party = await site.party(relay, "func1")
                await party.join()
                if (await party.next_frame() or ("", {}))[0] != "WAITING":
                    break
                waiting += 1
            assert waiting > 16
            for _ in range(64):
                for stream in (
                    await trio.open_tcp_stream("127.0.0.1", port),
                    await trio.open_unix_socket(str(site.directory / "a.sock")),
                ):
                    await stream.send_all(b"G")
                    callers.push_async_callback(trio.aclose_forcefully, stream)
            async with admin(site) as api:
                site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func1"]], number=2))
                assert (await api.post("/v1/reload")).status_code == 200
            await relay.log("refused", count=waiting, code="revoked")
            assert not relay.logged("reload refused, the old configuration stays")


@pytest.mark.load
async def test_the_soft_limit_is_raised_to_the_hard_one(site: Site) -> None:
    """60 are too few for a relay and ten legs; the operator need not raise a soft limit below the hard one."""
    async with site.process(sections=LIMITS + ADMIN, launcher=SOFT, workers=1) as relay, admin(site) as api:
        assert (await api.get("/v1/status")).json()["descriptors"]["limit"] == 500
        async with connections(relay.port(), 60):
            await eventually(lambda: len(open_descriptors(relay.process.pid)) > 60, "all 60 have been accepted")
            assert not relay.logged("refused")


@pytest.mark.load
async def test_accept_does_not_spin_when_there_is_no_descriptor(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener stays readable, because nobody accepts the connection: the loop pauses and tries again."""
    original, tries, has_room = frelay.net.sockets.accept, 0, False

    def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
        nonlocal tries
        tries += 1
        if has_room:
            return original(listener)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(frelay.joining.listener, "accept", accept)
    async with site.relay() as relay:
        began = trio.current_time()
        async with connections(relay.port(), 1):
            await eventually(lambda: tries >= 5, "it tries again")
            elapsed = trio.current_time() - began
            # A tenth of a second between two tries.
            assert tries <= elapsed / 0.1 + 2
            assert len(relay.logged("cannot accept")) == 1, "one line, and not one a try"
            has_room = True
            await eventually(lambda: relay.legs == 1, "and in the end it is accepted")
