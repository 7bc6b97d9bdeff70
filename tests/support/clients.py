"""The three clients of frelay behind one interface: each runs a function to its end.

A function *asks* (sends everything, ends its direction, reads to the end) or *answers* (reads to the end, then sends
everything). Both need half-close in both directions, and megabytes need back-pressure. It returns what it received::

    received = await run_function("asyncio", address, ask(b"question"), options(site, "func1", "func2"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final, Literal

import trio

import frelay
import frelay.client.asyncio
import frelay.client.trio
from frelay.client.options import Options
from support.site import Site
from support.waiting import TIMEOUT

__all__ = ["CLIENTS", "PAIRS_OF_CLIENTS", "Client", "Part", "answer", "ask", "meet", "options", "run_function"]

Client = Literal["blocking", "trio", "asyncio"]
CLIENTS: Final[tuple[Client, ...]] = ("blocking", "trio", "asyncio")
PAIRS_OF_CLIENTS: Final = tuple(product(CLIENTS, CLIENTS))


@dataclass(frozen=True)
class Part:
    """What a function does on its wire."""

    speaks_first: bool
    says: bytes


def ask(says: bytes) -> Part:
    return Part(True, says)


def answer(says: bytes) -> Part:
    return Part(False, says)


def options(site: Site, me: str, other: str, **more: Any) -> Options:
    """The arguments of ``connect`` for the function ``me``, which expects ``other``."""
    cert, key = site.paths[me]
    given = Options(
        cert=cert, key=key, ca=site.ca_path, peer=f"dns:{other}.demo", server_name="localhost", wait=TIMEOUT
    )
    given.update(more)  # type: ignore[typeddict-item]
    return given


def _blocking(address: str, part: Part, given: Options) -> bytes:
    def receive() -> bytes:
        parts = []
        while data := wire.recv(65536):
            parts.append(data)
        return b"".join(parts)

    with frelay.connect(address, **given) as wire:
        wire.settimeout(TIMEOUT)
        heard = b"" if part.speaks_first else receive()
        wire.sendall(part.says)
        wire.send_eof()
        return receive() if part.speaks_first else heard


async def _trio(address: str, part: Part, given: Options) -> bytes:
    async def receive() -> bytes:
        return b"".join([bytes(data) async for data in wire])

    async with await frelay.client.trio.connect(address, **given) as wire:
        heard = b"" if part.speaks_first else await receive()
        await wire.send_all(part.says)
        await wire.send_eof()
        return await receive() if part.speaks_first else heard


async def _asyncio(address: str, part: Part, given: Options) -> bytes:
    reader, writer = await frelay.client.asyncio.connect(address, **given)
    try:
        heard = b"" if part.speaks_first else await reader.read()
        writer.write(part.says)
        await writer.drain()
        writer.write_eof()
        return await reader.read() if part.speaks_first else heard
    finally:
        writer.close()
        await writer.wait_closed()


async def run_function(client: Client, address: str, part: Part, given: Options) -> bytes:
    """Join, do the part, and return what was received."""
    with trio.fail_after(TIMEOUT * 2):
        if client == "trio":
            return await _trio(address, part, given)
        call: Callable[[], bytes] = partial(_blocking, address, part, given)
        if client == "asyncio":
            call = partial(asyncio.run, _asyncio(address, part, given))
        return await trio.to_thread.run_sync(call)


async def meet(
    clients: tuple[Client, Client], address: str, parts: tuple[Part, Part], given: tuple[Options, Options]
) -> tuple[bytes, bytes]:
    """Run two functions at once; returns what each received."""
    heard: dict[int, bytes] = {}

    async def run(position: int) -> None:
        heard[position] = await run_function(clients[position], address, parts[position], given[position])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 0)
        nursery.start_soon(run, 1)
    return heard[0], heard[1]
