"""The end of a wire through a relay: each direction ends alone, the last bytes arrive, and a cut is no end."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import sys
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

import frelay
from support.ends import block
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually
from support.wires import connect, in_thread, meet, options, read_to_end

# The side that closed first may miss the other's last close_notify, if that comes late. No data is lost by that.
IN_ORDER: Final = {"closed", "hung-up"}
BULK: Final = 3 * 1024 * 1024 + 1


@pytest.mark.parametrize("how", ["send_eof", "shutdown"])
@pytest.mark.parametrize("asking", ["func1", "func2"])
async def test_the_reply_comes_after_the_end_of_the_question(site: Site, asking: str, how: str) -> None:
    """TESTPLAN 25, with end-to-end TLS on top."""
    answering = "func2" if asking == "func1" else "func1"
    answer = block(BULK, 1)
    async with site.relay() as relay, meet(site, relay, names=(asking, answering)) as (one, two):
        await in_thread(one.sendall, b"question")
        await in_thread(one.send_eof if how == "send_eof" else partial(one.shutdown, socket.SHUT_WR))
        assert await in_thread(read_to_end, two) == b"question"

        async def reply() -> None:
            await in_thread(two.sendall, answer)
            await in_thread(two.send_eof if how == "send_eof" else partial(two.shutdown, socket.SHUT_WR))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reply)
            assert await in_thread(read_to_end, one) == answer
        await in_thread(one.close)
        await in_thread(two.close)
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("closed", "both")


async def test_an_answer_that_crosses_with_the_end_of_the_question_is_whole(site: Site) -> None:
    """The answer does not wait for our end: its bytes are on the way, or here, when we end our direction."""
    answer = block(100_000, 2)
    async with site.relay() as relay, meet(site, relay) as (one, two):
        await in_thread(two.sendall, answer)
        await in_thread(two.send_eof)
        await eventually(lambda: relay.relay.pairings[0].bytes_moved["func2"] > len(answer), "the answer was delivered")
        assert await in_thread(one.recv, 10) == answer[:10]
        await in_thread(one.send_eof)
        assert await in_thread(read_to_end, one) == answer[10:]
        assert await in_thread(read_to_end, two) == b""


@pytest.mark.parametrize("writing", ["func1", "func2"])
async def test_a_function_that_only_writes_loses_nothing_at_close(site: Site, writing: str) -> None:
    """Its socket holds no unread session ticket, which would make the kernel turn its close into a reset."""
    reading = "func2" if writing == "func1" else "func1"
    data = block(BULK, 3)
    async with site.relay() as relay, meet(site, relay, names=(writing, reading)) as (one, two):

        async def write() -> None:
            await in_thread(one.sendall, data)
            await in_thread(one.close)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            assert await in_thread(read_to_end, two) == data
            await in_thread(two.close)
        assert (await relay.outcome())["outcome"] in IN_ORDER


async def test_a_function_that_leaves_without_reading_loses_nothing_it_wrote(site: Site) -> None:
    """The other one has ended its direction at once, or has sent something that stays unread."""
    data = block(BULK, 4)
    async with site.relay() as relay, meet(site, relay) as (one, two):
        await in_thread(two.sendall, b"banner\r\n")
        await in_thread(two.send_eof)

        async def write() -> None:
            await in_thread(one.sendall, data)
            await in_thread(one.close)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            assert await in_thread(read_to_end, two) == data
        await in_thread(two.close)
        assert (await relay.outcome())["outcome"] == "closed"


async def test_close_tells_the_other_function(site: Site) -> None:
    async with site.relay() as relay, meet(site, relay) as (one, two):
        await in_thread(one.close)
        assert await in_thread(two.recv, 1) == b""
        assert await in_thread(two.recv, 1) == b"", "an end stays an end"
        await in_thread(two.close)
        assert (await relay.outcome())["outcome"] in IN_ORDER


async def test_a_function_that_is_killed_is_no_end(site: Site) -> None:
    """TESTPLAN 16, for the inner TLS: when a process dies, the kernel sends FIN, but that is no end of its data."""
    async with site.relay() as relay:
        function = Function(site, relay.port(), "func2")
        async with trio.open_nursery() as nursery:
            process = await function.start(nursery)
            wire = await connect(site, relay, "func1")
            assert await in_thread(wire.recv, 5) == b"begun"
            process.send_signal(signal.SIGKILL)
            with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                await in_thread(wire.recv, 1)
            wire.abandon()


async def test_a_relay_that_is_killed_is_no_end(site: Site) -> None:
    async with site.process() as relay, meet(site, relay) as (one, two):
        await in_thread(one.sendall, b"begun")
        assert await in_thread(two.recv, 5) == b"begun"
        relay.signal(signal.SIGKILL)
        for wire in (one, two):
            with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                await in_thread(wire.recv, 1)


async def test_a_drain_that_cuts_is_no_end(site: Site) -> None:
    async with site.process(sections="[relay]\ndrain_timeout = 0.1\n") as relay, meet(site, relay) as (one, two):
        await in_thread(one.sendall, b"begun")
        assert await in_thread(two.recv, 5) == b"begun"
        relay.signal(signal.SIGTERM)
        for wire in (one, two):
            with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                await in_thread(wire.recv, 1)
        assert await relay.exit_code() == 1
        await ended(relay)


async def ended(relay: RelayProcess) -> None:
    record = await relay.log("pairing ended")
    assert record["outcome"] == "drained"


class Function:
    """A function in its own process, which sends "begun" and then nothing more."""

    def __init__(self, site: Site, port: int, name: str) -> None:
        arguments = {
            key: str(value) if isinstance(value, Path) else value for key, value in options(site, name).items()
        }
        self._code = (
            "import json, sys, frelay\n"
            f"wire = frelay.connect('127.0.0.1:{port}', **json.loads(sys.argv[1]))\n"
            "wire.sendall(b'begun')\n"
            "wire.recv(1)\n"
        )
        self._arguments = json.dumps(arguments)

    async def start(self, nursery: trio.Nursery) -> trio.Process:
        command = [sys.executable, "-c", self._code, self._arguments]
        process: trio.Process = await nursery.start(partial(trio.run_process, command, check=False))
        return process


async def test_the_with_statement_ends_in_order(site: Site) -> None:
    """As in the README: only ``with``, and no other call."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"

        def one() -> bytes:
            with frelay.connect(address, **options(site, "func1")) as wire:
                wire.settimeout(TIMEOUT)
                wire.sendall(b"hello")
                return read_to_end(wire)

        def two() -> bytes:
            with frelay.connect(address, **options(site, "func2")) as wire:
                wire.settimeout(TIMEOUT)
                return wire.recv(5)

        came: dict[str, bytes] = {}

        async def run(name: str) -> None:
            came[name] = await in_thread(one if name == "one" else two)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "one")
            nursery.start_soon(run, "two")
        assert came == {"one": b"", "two": b"hello"}
        assert (await relay.outcome())["outcome"] in IN_ORDER
