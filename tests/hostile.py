"""Strangers by the dozen, in a process of their own, so that what they do costs the test's own parties nothing.

As a program: ``hostile.py PORT KIND=COUNT...`` keeps so many of each kind connected, each for as long as the relay lets
it, until it is killed. The kinds are the functions below whose names begin with ``be_``. They come from a few addresses
of 127.0.1.0/24, and so not from where the test's parties do.
"""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

__all__ = ["strangers"]

# Few enough of one address for max_pre_auth_per_ip: what is shown is not that limit.
_SOURCES = 8


async def be_silent(stream: trio.SocketStream) -> None:
    """Say nothing."""
    await stream.receive_some(1)


async def be_garbage(stream: trio.SocketStream) -> None:
    """Say what is no TLS, and wait for what comes of it."""
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


def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    try:
        _careless().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


async def _be(kind: str, number: int, port: int) -> None:
    source = f"127.0.1.{1 + number % _SOURCES}"
    while True:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port, local_address=source) as stream:
                await globals()[f"be_{kind}"](stream)
        except (OSError, trio.BrokenResourceError, ssl.SSLError):
            await trio.sleep(0.01)


async def _be_all(port: int, kinds: dict[str, int]) -> None:
    async with trio.open_nursery() as nursery:
        numbers = iter(range(sum(kinds.values())))
        for kind, count in kinds.items():
            for _ in range(count):
                nursery.start_soon(_be, kind, next(numbers), port)


@asynccontextmanager
async def strangers(port: int, **kinds: int) -> AsyncIterator[None]:
    """So many of each kind, for as long as the context."""
    command = [sys.executable, __file__, str(port), *(f"{kind}={count}" for kind, count in kinds.items())]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdin=subprocess.DEVNULL, check=False)
        process: trio.Process = await nursery.start(run)
        try:
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    trio.run(
        _be_all, int(sys.argv[1]), {kind: int(count) for kind, _, count in (a.partition("=") for a in sys.argv[2:])}
    )
