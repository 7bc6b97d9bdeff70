"""asyncio's (reader, writer): back-pressure both ways, half-close, and a cut that is never taken for an end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

import frelay.client.asyncio
import frelay.client.trio
from frelay.client.options import Options
from frelay.client.trio import TrioWire
from support.clients import options
from support.site import Site
from support.waiting import TIMEOUT

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def against_trio(
    site: Site,
    here: Callable[[Pair], Awaitable[None]],
    there: Callable[[TrioWire], Awaitable[None]],
    **more: Any,
) -> None:
    """Run ``here`` on asyncio's pair in a thread, and ``there`` on the other end."""

    async def run_here(address: str, given: Options) -> None:
        async with asyncio.timeout(TIMEOUT):
            await here(await frelay.client.asyncio.connect(address, **given))

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    trio.to_thread.run_sync,
                    lambda: asyncio.run(run_here(address, options(site, "func1", "func2", **more))),
                )
                await there(await frelay.client.trio.connect(address, **options(site, "func2", "func1")))


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
async def test_drain_waits_for_a_reader_that_does_not_read(site: Site, mode: str) -> None:
    """The writer's buffer stays small while the other side does not read, and everything arrives when it reads."""
    chunk, is_full, total = b"w" * 262_144, trio.Event(), 0
    token = trio.lowlevel.current_trio_token()

    async def here(pair: Pair) -> None:
        nonlocal total
        reader, writer = pair
        told = False
        while True:
            writer.write(chunk)
            total += len(chunk)
            assert writer.transport.get_write_buffer_size() < 4 * len(chunk)
            try:
                async with asyncio.timeout(0.5 if not told else TIMEOUT):
                    await writer.drain()
            except TimeoutError:
                told = True
                token.run_sync_soon(is_full.set)
                await writer.drain()
                break
        writer.write_eof()
        assert await reader.read() == b"thanks"
        writer.close()
        await writer.wait_closed()

    async def there(wire: TrioWire) -> None:
        await is_full.wait()
        got = 0
        async for data in wire:
            got += len(data)
        assert got == total
        await wire.send_all(b"thanks")
        await wire.aclose()

    await against_trio(site, here, there, mode=mode)


async def test_a_reader_that_is_not_read_holds_its_sender_back(site: Site) -> None:
    """The reader's limit pauses the socket, so the other side's send_all blocks, and nothing is lost."""
    size, is_blocked = 64 * 1024 * 1024, asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def here(pair: Pair) -> None:
        reader, writer = pair
        loops.append(asyncio.get_running_loop())
        await is_blocked.wait()
        assert len(reader._buffer) < 1_000_000  # type: ignore[attr-defined]
        assert len(await reader.read()) == size
        writer.close()
        await writer.wait_closed()

    async def there(wire: TrioWire) -> None:
        is_sent = False

        async def send() -> None:
            nonlocal is_sent
            await wire.send_all(bytes(size))
            is_sent = True
            await wire.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.5)
            assert not is_sent
            loops[0].call_soon_threadsafe(is_blocked.set)
        assert await wire.receive_some() == b""
        await wire.aclose()

    await against_trio(site, here, there)


async def test_an_end_without_close_notify_is_an_error(site: Site) -> None:
    """The reader gives what had arrived, and then raises ConnectionResetError; never a clean end."""

    async def here(pair: Pair) -> None:
        reader, writer = pair
        assert await reader.readexactly(4) == b"half"
        with pytest.raises(ConnectionError):
            await reader.read()
        writer.close()
        with pytest.raises(ConnectionError):
            await writer.wait_closed()

    async def there(wire: TrioWire) -> None:
        await wire.send_all(b"half")
        await wire._transport.send_eof()
        with pytest.raises(trio.BrokenResourceError):
            await wire.receive_some()
        await trio.aclose_forcefully(wire)

    await against_trio(site, here, there)


async def test_close_lets_what_was_written_arrive(site: Site) -> None:
    """write() of megabytes and close() at once, while bytes of the other side are unread."""

    async def here(pair: Pair) -> None:
        _, writer = pair
        writer.write(bytes(5_000_000))
        writer.close()
        await writer.wait_closed()
        assert writer.get_extra_info("peercert")["subjectAltName"] == (("DNS", "func2.demo"),)

    async def there(wire: TrioWire) -> None:
        await wire.send_all(b"never read" * 1000)
        got = 0
        async for data in wire:
            got += len(data)
        assert got == 5_000_000
        await wire.aclose()

    await against_trio(site, here, there)
