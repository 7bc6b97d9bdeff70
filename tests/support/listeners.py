"""A function that serves many, in each of the clients: it sends back what a caller sends, after the caller's end.

async with site.relay() as relay, serving_many("blocking", address, options(site, "func2", "func1")) as server:
    assert await call(address, options(site, "func1", "func2"), b"question") == b"question"
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

import frelay
import frelay.client.asyncio
import frelay.client.trio
from frelay.client.options import Options
from support.clients import Client, ask, run_function
from support.waiting import TIMEOUT
from support.wires import read_to_end

__all__ = ["Server", "call", "serving_many"]


class Server:
    """What a listener in a test has done so far."""

    def __init__(self) -> None:
        self.served = 0
        self.errors: list[frelay.FrelayError] = []
        """What ``on_error`` was told."""
        self.ended: BaseException | None = None
        """Why it ended by itself."""
        self.has_ended = False

    def arguments(self, given: Options, more: dict[str, Any]) -> dict[str, Any]:
        return {**given, "wait": None, "on_error": self.errors.append, **more}


async def call(address: str, given: Options, text: bytes = b"question") -> bytes:
    """What a caller hears."""
    return await run_function("trio", address, ask(text), given)


@asynccontextmanager
async def serving_many(client: Client, address: str, given: Options, **more: Any) -> AsyncIterator[Server]:
    """A listener of this client, until the end of the block."""
    serve = {"blocking": _blocking, "trio": _trio, "asyncio": _asyncio}[client]
    async with serve(address, given, more) as server:
        yield server


@asynccontextmanager
async def _blocking(address: str, given: Options, more: dict[str, Any]) -> AsyncIterator[Server]:
    server = Server()
    threads = []

    def handle(wire: frelay.Wire) -> None:
        try:
            with wire:
                wire.settimeout(TIMEOUT)
                wire.sendall(read_to_end(wire))
            server.served += 1
        except OSError:
            pass  # this caller was cut

    def accept(listener: frelay.Listener) -> None:
        try:
            for wire in listener:
                threads.append(threading.Thread(target=handle, args=(wire,)))
                threads[-1].start()
        except frelay.FrelayError as error:
            server.ended = error
        server.has_ended = True

    listener = frelay.listen(address, **server.arguments(given, more))
    accepting = threading.Thread(target=accept, args=(listener,))
    accepting.start()
    try:
        yield server
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(listener.close)
            for thread in (accepting, *threads):
                await trio.to_thread.run_sync(thread.join, TIMEOUT)


@asynccontextmanager
async def _trio(address: str, given: Options, more: dict[str, Any]) -> AsyncIterator[Server]:
    server = Server()

    async def handle(wire: trio.abc.HalfCloseableStream) -> None:
        try:
            async with wire:
                await wire.send_all(b"".join([bytes(data) async for data in wire]))
            server.served += 1
        except trio.BrokenResourceError:
            pass

    async def serve() -> None:
        try:
            async with frelay.client.trio.listen(address, **server.arguments(given, more)) as listener:
                await trio.serve_listeners(handle, [listener])
        except* frelay.FrelayError as group:
            # serve_listeners runs each listener in a nursery.
            (server.ended,) = group.exceptions
            while isinstance(server.ended, BaseExceptionGroup):
                (server.ended,) = server.ended.exceptions
        server.has_ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield server
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _asyncio(address: str, given: Options, more: dict[str, Any]) -> AsyncIterator[Server]:
    server = Server()
    stop: list[Callable[[], object]] = []
    is_started = threading.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await reader.read())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            server.served += 1
        except ConnectionError:
            pass

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        try:
            listener = await frelay.client.asyncio.start_server(handle, address, **server.arguments(given, more))
            async with listener:
                serving = loop.create_task(listener.serve_forever())
                stop.append(partial(loop.call_soon_threadsafe, serving.cancel))
                is_started.set()
                await serving
        except asyncio.CancelledError:
            pass
        except frelay.FrelayError as error:
            server.ended = error
        finally:
            is_started.set()
        server.has_ended = True

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    await trio.to_thread.run_sync(is_started.wait, TIMEOUT)
    try:
        yield server
    finally:
        with trio.CancelScope(shield=True):
            try:
                stop[0]()
            except (IndexError, RuntimeError):
                pass  # it has ended by itself
            await trio.to_thread.run_sync(thread.join, TIMEOUT)
