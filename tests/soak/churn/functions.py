"""Good functions, in every mode: their scenes must succeed each time."""

from __future__ import annotations

import random
from typing import Final, get_args

import trio

import frelay.client.trio
from frelay.protocol.messages import Mode
from soak.churn.ground import Ground
from soak.churn.streams import BLOCK, TLS_HEADER, carry, expect, expect_end, flood, is_cut, reset

__all__ = ["Functions"]

_MODES: Final[tuple[Mode, ...]] = get_args(Mode)


class Functions:
    """Good functions; only in :meth:`reset` one of the two crashes."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_

    async def _meet(self, route: str) -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        """Two functions, end-to-end mTLS between them, each in a mode of its own."""
        met: dict[str, trio.abc.HalfCloseableStream] = {}

        async def connect(me: str) -> None:
            mode = self._random.choice(_MODES)
            options = self._ground.options(me, mode)
            met[me] = await frelay.client.trio.connect(self._ground.address(route), **options)

        async with trio.open_nursery() as nursery:
            for me in ("func1", "func2"):
                nursery.start_soon(connect, me)
        return met["func1"], met["func2"]

    async def bulk(self, route: str) -> None:
        """Some megabytes each way, at once."""
        one, two = await self._meet(route)
        async with one, two, trio.open_nursery() as nursery:
            for source, sink in ((one, two), (two, one)):
                nursery.start_soon(carry, source, sink, self._random.randrange(1 << 16, 1 << 20))

    async def talk(self, route: str) -> None:
        """Small messages back and forth."""
        one, two = await self._meet(route)
        async with one, two:
            for number in range(self._random.randrange(20, 100)):
                message = BLOCK[number : number + 64]
                await one.send_all(message)
                await expect(two, message)
                await two.send_all(message)
                await expect(one, message)

    async def half(self, route: str) -> None:
        """A question, the end of that direction, and only then the answer."""
        one, two = await self._meet(route)
        async with one, two:
            for source, sink in ((one, two), (two, one)):
                await carry(source, sink, self._random.randrange(1, 1 << 17))

    async def slow(self) -> None:
        """A reader that takes its time."""
        one, two = await self._meet("slow")
        async with one, two, trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, BLOCK)
            left = len(BLOCK)
            while left:
                left -= len(await two.receive_some(min(left, 1 << 17)))
                await trio.sleep(0.05)

    async def reset(self) -> None:
        """One of the two closes abruptly, while both ways carry bytes."""
        ends = list(await self._meet("reset"))
        self._random.shuffle(ends)
        gone, other = ends
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, other)
            nursery.start_soon(flood, gone)
            await gone.receive_some()
            await trio.aclose_forcefully(gone)
            await is_cut(other)
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(other)

    async def service(self) -> None:
        """A function calls a service, which is an echo inside its own TLS."""
        options = self._ground.options("func1", self._random.choice(_MODES))
        async with await frelay.client.trio.connect(self._ground.address("service"), **options) as wire:
            message = BLOCK[: self._random.randrange(1, 1 << 16)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.send_all, message)
                await expect(wire, message)

    async def bare(self) -> None:
        """Two TLS clients that know nothing of frelay."""
        ends = [
            trio.SSLStream(
                await self._ground.dial("bare"), self._ground.bare_context(name), server_hostname="localhost"
            )
            for name in ("func1", "func2")
        ]
        async with trio.open_nursery() as nursery:
            for source, sink in (ends, reversed(ends)):
                nursery.start_soon(source.send_all, BLOCK[:100_000])
                nursery.start_soon(expect, sink, BLOCK[:100_000])
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.aclose)

    async def plain(self) -> None:
        """Two plain sockets; half of the times one is reset at the end."""
        one, two = await self._ground.dial("plain"), await self._ground.dial("plain")
        async with one, two:
            await one.send_all(TLS_HEADER)
            await expect(two, TLS_HEADER)
            await two.send_all(TLS_HEADER)
            await expect(one, TLS_HEADER)
            if self._random.random() < 0.5:
                reset(one)
                await is_cut(two)
            else:
                await one.send_eof()
                await expect_end(two)
                await two.send_eof()
                await expect_end(one)
