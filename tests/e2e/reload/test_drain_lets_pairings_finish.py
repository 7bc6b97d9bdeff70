"""SIGTERM: nothing new comes in, waiting legs are told, pairings may finish, and the exit code says whether all did."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import signal
import socket
import threading
import time
from functools import partial

import pytest
import structlog.testing
import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import Plan
from frelay.relay.backend import Backend, Prepared, Staged
from frelay.relay.local import LocalBackend
from frelay.relay.run import make_relay
from frelay.relay.workers.supervisor import Supervisor
from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block, join_all, join_ends
from support.party import TLS_HEADER, pair
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT

MIB = 1024 * 1024
TRANSFERS: list[tuple[Mode, Mode]] = [
    ("raw", "raw"),
    ("raw", "tunnel"),
    ("tunnel", "raw"),
    ("bare", "tunnel"),
    ("bare", "bare"),
]


def drain_timeout(seconds: float) -> str:
    return f"[relay]\ndrain_timeout = {seconds}\n"


def connect(port: int) -> int:
    with socket.socket() as sock:
        sock.settimeout(10)
        return sock.connect_ex(("127.0.0.1", port))


async def draining(relay: RelayProcess, number: signal.Signals = signal.SIGTERM) -> None:
    relay.signal(number)
    await relay.log("draining")


# --- what may finish -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_five_transfers_of_8_mib_are_completed(site: Site, number: signal.Signals) -> None:
    """TESTPLAN 45: the signal comes in mid-transfer; nothing new is accepted, all complete, exit code 0."""
    data = block(8 * MIB)
    half = len(data) // 2
    async with site.process(OPEN) as relay:
        port = relay.own_port()
        pairs = await join_all(site, relay, TRANSFERS)
        received: list[str] = []

        async def transfer(one: End, two: End, is_half_way: trio.Event, may_go_on: trio.Event) -> None:
            async def send() -> None:
                await one.send(data[:half])
                await may_go_on.wait()
                await one.send(data[half:])
                await one.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                digest = hashlib.sha256(await two.receive_exactly(half))
                is_half_way.set()
                digest.update(await two.receive_to_end())
                received.append(digest.hexdigest())
            await two.send(b"thanks")
            await two.send_eof()
            assert await one.receive_to_end() == b"thanks"

        may_go_on = trio.Event()
        async with trio.open_nursery() as nursery:
            for one, two in pairs:
                is_half_way = trio.Event()
                nursery.start_soon(transfer, one, two, is_half_way, may_go_on)
                await is_half_way.wait()
            await draining(relay, number)
            assert connect(port) == errno.ECONNREFUSED
            may_go_on.set()
        assert received == [hashlib.sha256(data).hexdigest()] * 5
        assert await relay.exit_code() == 0
        assert len(relay.logged("pairing ended", outcome="closed")) == 5
        assert relay.logged("stopped", clean=True)


async def test_listeners_are_closed_before_the_log_says_draining(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """TESTPLAN 45: once the log says that the relay drains, nobody can connect, not even in the same moment."""
    answers: list[int] = []
    async with site.relay(OPEN) as relay:
        port = relay.own_port()

        class DialsAtOnce:
            """A log whose reader connects in the moment in which a line is written."""

            def info(self, event: str, **fields: object) -> None:
                if event == "draining":
                    answers.append(connect(port))

        assert connect(port) == 0
        monkeypatch.setattr(relay.relay._backend, "_log", DialsAtOnce())
        relay.relay.drain(reason="the test says so")
        monkeypatch.undo()
    assert answers == [errno.ECONNREFUSED]


@pytest.mark.load
async def test_at_the_deadline_what_is_left_is_cut(site: Site) -> None:
    """TESTPLAN 45: outcome drained, cut by RST in every mode, exit code 1, and not before the time."""
    limit = 1.0
    async with site.process(OPEN, sections=drain_timeout(limit)) as relay:
        pairs = await join_all(site, relay)
        began = time.monotonic()
        await draining(relay)
        for one, two in pairs:
            assert await one.ended() == "reset"
            assert time.monotonic() - began >= limit
            assert await two.ended() == "reset"
        assert await relay.exit_code() == 1
        assert len(relay.logged("pairing ended", outcome="drained", side="relay")) == len(PAIRS_OF_MODES)
        assert relay.logged("stopped", clean=False)


async def test_who_finishes_does_not_wait_for_who_is_cut(site: Site) -> None:
    """TESTPLAN 45: one that is cut makes it exit code 1, and harms none of those that finish."""
    async with site.process(OPEN, sections=drain_timeout(2)) as relay:
        one, two = await join_ends(site, relay)
        three, _four = await join_ends(site, relay)
        await draining(relay)
        await one.send_eof()
        assert await two.receive() == b""
        await two.send(b"done")
        await two.send_eof()
        assert await one.receive_to_end() == b"done"
        assert await three.ended() == "reset"
        assert await relay.exit_code() == 1
        assert len(relay.logged("pairing ended", outcome="closed")) == 1
        assert len(relay.logged("pairing ended", outcome="drained")) == 1


@pytest.mark.load
async def test_an_idle_relay_ends_at_once(site: Site) -> None:
    """Without any leg there is nothing to wait for."""
    async with site.process(OPEN, sections=drain_timeout(60)) as relay:
        began = time.monotonic()
        await draining(relay)
        assert await relay.exit_code() == 0
        assert time.monotonic() - began < 20


# --- who is not paired ---------------------------------------------------------------------------------------------


async def test_who_waits_is_told_when_to_come_back(site: Site) -> None:
    """DRAINING and REFUSED draining with a time to retry after; a leg without frames gets an orderly end."""
    async with site.process(OPEN) as relay:
        framed = await site.party(relay, "func1")
        await framed.join()
        await framed.expect("WAITING")
        bare = await site.party(relay, "func1", alpn=())
        await relay.log("waiting", count=2)
        relay.signal(signal.SIGTERM)
        assert (await framed.expect("DRAINING"))["reconnect_in"] > 0
        refusal = await framed.refusal()
        assert refusal["code"] == "draining"
        assert refusal["retry_after"] > 0
        assert await End(bare, "bare").ended() == "eof"
        framed.close()
        bare.close()
        assert await relay.exit_code() == 0


async def test_who_is_just_joining_is_told_too(site: Site) -> None:
    """A connection that was accepted before the signal is refused if it asks soon, and is not paired any more."""
    async with site.process(OPEN) as relay:
        one, two = await join_ends(site, relay)  # keeps the relay alive
        late = await site.party(relay, "func1")  # its handshake is finished, so it was accepted
        await draining(relay)
        await late.join()
        refusal = await late.refusal()
        assert refusal["code"] == "draining"
        one.party.close()
        two.party.close()


@pytest.mark.load
async def test_a_silent_stranger_does_not_hold_it_up(site: Site) -> None:
    """The relay waits only a few seconds for a connection that says nothing."""
    async with site.process(OPEN, sections="[limits]\nhandshake_timeout = 60\n") as relay:
        silent = await site.connect(relay, "func1")
        one, two = await join_ends(site, relay)  # so the silent one was accepted, as it came first
        one.party.close()
        two.party.close()
        began = time.monotonic()
        await draining(relay)
        assert await relay.exit_code() == 0
        assert time.monotonic() - began < 20
        assert await silent.ended() in ("eof", "reset")


# --- signals during the drain ----------------------------------------------------------------------------------


@pytest.mark.load
async def test_a_second_sigterm_ends_it_now(site: Site) -> None:
    """TESTPLAN 46: every pairing is cut at once, exit code 1, long before drain_timeout."""
    async with site.process(OPEN, sections=drain_timeout(600)) as relay:
        pairs = await join_all(site, relay)
        await draining(relay)
        began = time.monotonic()
        relay.signal(signal.SIGTERM)
        for one, two in pairs:
            assert await one.ended() == "reset"
            assert await two.ended() == "reset"
        assert await relay.exit_code() == 1
        assert time.monotonic() - began < 20
        assert len(relay.logged("pairing ended", outcome="drained")) == len(PAIRS_OF_MODES)


async def test_a_second_sigterm_in_the_middle_of_a_hand_off(site: Site) -> None:
    """TESTPLAN 46: a second signal also ends, at once, a pairing whose legs have not been handed off yet."""
    async with site.process(OPEN, sections="[limits]\nhandoff_timeout = 600\n") as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        await one.hand_off(TLS_HEADER)
        await draining(relay)
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() == 1
        assert (await relay.log("pairing ended"))["outcome"] == "drained"
        assert await one.ended() == "reset"


async def test_the_deadline_holds_for_a_hand_off_too(site: Site) -> None:
    """TESTPLAN 45: a pairing in the middle of its hand-off is cut at the deadline like any other."""
    sections = drain_timeout(0.5) + "[limits]\nhandoff_timeout = 600\n"
    async with site.process(OPEN, sections=sections) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        await draining(relay)
        assert await relay.exit_code() == 1
        assert (await relay.log("pairing ended"))["outcome"] == "drained"


@pytest.mark.load
async def test_a_second_sigterm_does_not_wait_for_strangers(site: Site) -> None:
    """TESTPLAN 46: a connection in the middle of its handshake does not delay the end."""
    took: list[float] = []
    # A relay that waited for the stranger would take 3.5 s each time; this one takes as long only on a busy machine.
    while len(took) < 3 and min(took, default=math.inf) >= 2.5:
        async with site.process(OPEN, sections="[limits]\nhandshake_timeout = 60\n") as relay:
            await site.connect(relay, "func1")
            one, two = await join_ends(site, relay)
            await draining(relay)
            began = time.monotonic()
            relay.signal(signal.SIGTERM)
            assert await one.ended() == "reset"
            assert await two.ended() == "reset"
            assert await relay.exit_code() == 1
            took.append(time.monotonic() - began)
    assert min(took) < 2.5


async def test_sighup_during_the_drain_is_harmless(site: Site) -> None:
    """TESTPLAN 46: a SIGHUP makes no reload, no new listener and no early end: the drain goes on as before."""
    async with site.process(OPEN) as relay:
        one, two = await join_ends(site, relay)
        await draining(relay)
        site.write(OPEN + OPEN.replace('"demo"', '"late"'))
        relay.signal(signal.SIGHUP)
        await relay.log("reload ignored: draining")
        assert not relay.logged("listening", route="late")
        await one.send(b"still here")
        assert await two.receive_exactly(10) == b"still here"
        await one.send_eof()
        assert await two.receive() == b""
        await two.send_eof()
        assert await relay.exit_code() == 0


def storm(pid: int, over: threading.Event) -> None:
    try:
        while not over.wait(0.0005):
            os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        pass  # it has ended, and was waited for


async def test_sighups_until_the_very_end(site: Site) -> None:
    """TESTPLAN 46: a SIGHUP in the last moment of the process does not turn exit code 0 into a death by signal."""
    for _ in range(3):
        async with site.process(OPEN, options=["--no-watch"]) as relay:
            over = threading.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, partial(storm, relay.process.pid, over))
                await draining(relay)
                code = await relay.exit_code()
                over.set()
            assert code == 0


async def test_a_reload_that_is_overtaken_by_the_drain(site: Site) -> None:
    """TESTPLAN 46: a reload that was under way opens no listener any more: nothing would ever close it."""
    async with site.relay(OPEN) as relay:
        one, _two = await join_ends(site, relay)
        # A FIFO as CA bundle: the reload waits in the middle of its work until it is written.
        content = site.ca_path.read_bytes()
        site.ca_path.unlink()
        os.mkfifo(site.ca_path)
        site.write(OPEN + OPEN.replace('"demo"', '"late"'))
        relay.relay.request_reload()
        with await trio.to_thread.run_sync(lambda: open(site.ca_path, "wb")) as fifo:
            relay.relay.drain(reason="the test says so")
            fifo.write(content)
        refused = await relay.log("reload refused, the old configuration stays")
        assert "draining" in refused["problem"]
        assert not relay.logged("listening", route="late")
        assert not relay.logged("reloaded")
        await one.send(b"x")


async def test_a_drain_on_the_heels_of_a_reload(site: Site) -> None:
    """A listener that was opened a moment ago and has not accepted yet closes like any other."""
    async with site.relay(OPEN) as relay:
        site.write(OPEN + OPEN.replace('"demo"', '"late"'))
        await relay.relay.reload()
        relay.relay.drain(reason="the test says so")
    assert relay.logged("listening", route="late")
    assert relay.logged("stopped", clean=True)


@pytest.mark.parametrize(("workers", "backend"), [(1, LocalBackend), (2, Supervisor)])
async def test_a_drain_before_the_relay_listens(
    site: Site, monkeypatch: pytest.MonkeyPatch, workers: int, backend: type[Backend]
) -> None:
    """A signal while the first names are resolved ends the relay; it does not begin to listen."""
    staging = backend.stage
    relay = make_relay(load(site.write(OPEN, sections=f"[relay]\nworkers = {workers}\n")), watch_files=False)

    async def stage(self: Backend, new: Config, prepared: Prepared, changes: Plan) -> Staged:
        relay.drain(reason="the test says so")
        return await staging(self, new, prepared, changes)

    monkeypatch.setattr(backend, "stage", stage)
    with structlog.testing.capture_logs() as events, trio.fail_after(TIMEOUT):
        assert await relay.run() == 0
    told = [event["event"] for event in events]
    assert "listening" not in told
    assert "ready" not in told
    assert told[-1] == "stopped"
