"""Strangers by the dozen, in a process of their own, so that what they do costs the test's own parties nothing.

As a program: ``hostile.py PORT [--sources FIRST-LAST] KIND=COUNT...`` keeps so many of each kind connected, each for as
long as the relay lets it, until it is killed. The kinds are the functions below whose names begin with ``be_``. The
connections come from 127.0.1.1 to 127.0.1.8 (``--sources`` changes that), not from the address of the test's parties.
When all have been connected at the same time, it prints a line.
"""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from itertools import count

import trio

__all__ = ["strangers"]

_SOURCES = "127.0.1.1-127.0.1.8"


async def be_silent(stream: trio.SocketStream) -> None:
    """Say nothing."""
    await stream.receive_some(1)


async def be_one_byte(stream: trio.SocketStream) -> None:
    """Say the first byte of a handshake."""
    await stream.send_all(b"\x16")
    await stream.receive_some(1)


async def be_half(stream: trio.SocketStream) -> None:
    """Say the first half of a ClientHello."""
    hello = _client_hello()
    await stream.send_all(hello[: len(hello) // 2])
    await stream.receive_some(1)


async def be_whole(stream: trio.SocketStream) -> None:
    """Say a whole ClientHello, and never read the relay's answer."""
    await stream.send_all(_client_hello())
    while await stream.receive_some(65536):
        pass


async def be_in_pieces(stream: trio.SocketStream) -> None:
    """Say a ClientHello whose first record has only four bytes."""
    hello = _client_hello()
    await stream.send_all(hello[:3] + b"\x00\x04" + hello[5:9])
    await stream.receive_some(1)


async def be_half_a_ticket(stream: trio.SocketStream) -> None:
    """Say the beginning of a ticket line."""
    await stream.send_all(b"FRELAY/1 0123456789abcdef")
    await stream.receive_some(1)


async def be_restless(stream: trio.SocketStream) -> None:
    """Say a whole ClientHello, go, and come back at once."""
    await stream.send_all(_client_hello())
    await trio.sleep(0.01)


async def be_garbage(stream: trio.SocketStream) -> None:
    """Say something that is no TLS, and wait for the end."""
    await stream.send_all(b"\x00\xffgarbage" * 20)
    while await stream.receive_some(4096):
        pass


async def be_slow(stream: trio.SocketStream) -> None:
    """Say a ClientHello, a byte a second."""
    for byte in _client_hello():
        await stream.send_all(bytes([byte]))
        await trio.sleep(1)


async def be_unknown(stream: trio.SocketStream) -> None:
    """Make the relay do a whole handshake, and show no certificate."""
    tls = trio.SSLStream(stream, _careless())
    await tls.do_handshake()
    await tls.receive_some(1)


def _careless() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@cache
def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    try:
        _careless().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


async def _be(kind: str, source: str, port: int, is_connected: trio.Event) -> None:
    while True:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port, local_address=source) as stream:
                is_connected.set()
                await globals()[f"be_{kind}"](stream)
        except (OSError, trio.BrokenResourceError, ssl.SSLError):
            await trio.sleep(0.01)


async def _be_all(port: int, sources: str, kinds: dict[str, int]) -> None:
    first, last = (int(ipaddress.IPv4Address(one)) for one in sources.split("-"))
    numbers, events = count(), []
    async with trio.open_nursery() as nursery:
        for kind, many in kinds.items():
            for _ in range(many):
                source = str(ipaddress.IPv4Address(first + next(numbers) % (last - first + 1)))
                events.append(trio.Event())
                nursery.start_soon(_be, kind, source, port, events[-1])
        for event in events:
            await event.wait()
        print("all are connected", flush=True)


@asynccontextmanager
async def strangers(port: int, *, sources: str = _SOURCES, **kinds: int) -> AsyncIterator[None]:
    """So many of each kind, until the context ends; all have been connected when it begins."""
    command = [sys.executable, __file__, str(port), "--sources", sources, *(f"{kind}={n}" for kind, n in kinds.items())]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(run)
        assert process.stdout is not None
        try:
            said = await process.stdout.receive_some()
            assert said, "it is alive"
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    port, *rest = sys.argv[1:]
    sources = rest[1] if rest[0] == "--sources" else _SOURCES
    pairs = (word.partition("=") for word in rest if "=" in word)
    trio.run(_be_all, int(port), sources, {kind: int(many) for kind, _, many in pairs})
