"""Writes of any size arrive as the same bytes: single bytes, prime sizes, and questions that wait for answers."""

from __future__ import annotations

from itertools import chain

import pytest
import trio

from support.ends import MODES, OPEN, PAIRS_OF_MODES, End, Mode, block, join_ends
from support.site import Site

# Around each size that matters on the way: TLS records (16384), the pump's buffer, pages, a pipe's slots.
PRIMES = (2, 3, 5, 7, 11, 101, 1009, 4093, 4099, 16381, 16411, 65521, 65537, 300007)


async def send_in_pieces(end: End, data: bytes, sizes: tuple[int, ...]) -> None:
    position = 0
    for size in sizes:
        await end.send(data[position : position + size])
        position += size
    assert position == len(data)
    await end.send_eof()


@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_prime_sizes_and_single_bytes_both_ways(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 24: 1-byte and prime-sized writes, both ways at once."""
    sizes = tuple(chain([1] * 200, *zip(PRIMES, [1] * len(PRIMES), strict=True), reversed(PRIMES)))
    data = {1: block(sum(sizes), 1), 2: block(sum(sizes), 2)}
    received = {}
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)

        async def receive(number: int, end: End) -> None:
            received[number] = await end.receive_to_end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_pieces, one, data[1], sizes)
            nursery.start_soon(send_in_pieces, two, data[2], tuple(reversed(sizes)))
            nursery.start_soon(receive, 1, two)
            nursery.start_soon(receive, 2, one)
        ended = await relay.outcome()
    assert received == data
    assert ended["outcome"] == "closed"


@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_200_ping_pongs(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 24: 200 round trips, each after the one before; the relay holds no bytes until more come."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        with trio.fail_after(60):
            for number in range(200):
                question = f"ping {number}".encode() * (1 + number % 7)
                await one.send(question)
                assert await two.receive_exactly(len(question)) == question
                answer = f"pong {number}".encode()
                await two.send(answer)
                assert await one.receive_exactly(len(answer)) == answer


@pytest.mark.parametrize("mode", MODES)
async def test_ping_pongs_go_on_after_bulk(site: Site, mode: Mode) -> None:
    """A pump that splices after a bulk transfer still passes single bytes on at once, and then copies again."""
    bulk = block(3_000_017)
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode, mode)
        with trio.fail_after(60):
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.send, bulk)
                    assert await two.receive_exactly(len(bulk)) == bulk
                for number in range(50):
                    await one.send(bytes([number]))
                    assert await two.receive_exactly(1) == bytes([number])
                    await two.send(bytes([number]))
                    assert await one.receive_exactly(1) == bytes([number])
        pipes = relay.relay.parts.forwarding.pipes
        assert pipes.in_use == 0, "a pairing that is chatty again holds no pipe"
        if mode == "raw":
            assert pipes.descriptors > 0, "the bulk was not spliced, so this test shows nothing"
