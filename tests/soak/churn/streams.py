"""What the scenes do with a stream of any kind: send bytes that must arrive, and end it in every way."""

from __future__ import annotations

import random
import socket
import struct
from typing import Final

import trio

from soak.churn.ground import Trouble

__all__ = ["BLOCK", "TLS_HEADER", "carry", "expect", "expect_end", "flood", "is_cut", "reset"]

TLS_HEADER: Final = b"\x16\x03\x01"
BLOCK: Final = random.Random(1).randbytes(1 << 21)
"""The bytes that scenes send, or a part of them."""


async def carry(source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream, size: int) -> None:
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await source.send_all(BLOCK[:size])
            await source.send_eof()

        nursery.start_soon(send)
        await expect(sink, BLOCK[:size])
        await expect_end(sink)


async def expect(stream: trio.abc.ReceiveStream, wanted: bytes) -> None:
    at = 0
    while at < len(wanted):
        data = await stream.receive_some(min(len(wanted) - at, 1 << 16))
        if not data:
            raise Trouble(f"the end came with {len(wanted) - at} bytes missing")
        if data != wanted[at : at + len(data)]:
            raise Trouble("other bytes arrived than were sent")
        at += len(data)


async def expect_end(stream: trio.abc.ReceiveStream) -> None:
    if await stream.receive_some(1):
        raise Trouble("more bytes arrived than were sent")


async def flood(stream: trio.abc.SendStream) -> None:
    try:
        while True:
            await stream.send_all(BLOCK[: 1 << 17])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # that is the point


async def is_cut(stream: trio.abc.ReceiveStream) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        return
    raise Trouble("a cut was passed on as an end")


def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
