"""When a party ends its direction and closes, the other one still gets every byte.

The other party may still be sending, and its bytes come to a closed socket, which answers with a reset. The relay must
not pass this reset on while earlier bytes are on their way, because an RST destroys them.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
import trio

from frelay.net.tcp import is_dead, unacknowledged
from support.ends import OPEN, PLAIN, Mode, block, join_ends, pause_reading
from support.party import TLS_HEADER, pair
from support.rounds import settled
from support.site import Site
from support.through_faults import direct
from support.waiting import TIMEOUT, eventually


async def test_the_tail_arrives_although_the_sender_has_closed_with_input_unread(site: Site) -> None:
    async with site.relay() as relay:
        server = await site.party(relay, "func1")
        client = await site.party(relay, "func2")
        await pair(server, client)
        await server.hand_off()
        await client.hand_off()
        await client.send_raw(TLS_HEADER)
        assert await server.receive_exactly(3) == TLS_HEADER
        answer = TLS_HEADER + bytes(range(256)) * 8000

        async def answer_and_go() -> None:
            await server.send_raw(answer)
            await server.send_eof()
            # A close with unread input sends RST, which destroys what has not left this host. No relay can help that.
            sock = server.socket._sock  # type: ignore[attr-defined]
            await eventually(lambda: unacknowledged(sock) == 0, "the answer is under way")
            server.close()

        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_and_go)
            while data := await client.receive_raw(16384):
                received += data
                if len(received) == len(data):
                    # Sent to a socket that its party does not read any more.
                    await client.send_raw(bytes(1000))
        assert received == answer
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("hung-up", "func1")
        assert record["bytes_func1_to_func2"] == len(answer)


@direct
@pytest.mark.parametrize(
    ("modes", "then"),
    [
        (("raw", "raw"), "nothing"),
        *product([("raw", "raw"), ("raw", "tunnel"), ("raw", "bare"), ("plain", "plain")], ["words", "the end"]),
    ],
    ids=lambda it: it if isinstance(it, str) else " to ".join(it),
)
async def test_all_of_it_arrives_although_the_relay_still_held_some(
    site: Site, modes: tuple[Mode, Mode], then: Literal["nothing", "words", "the end"]
) -> None:
    """The reset comes while the relay waits for a slow reader. The bytes go on, whichever pump gets the reset."""
    with trio.fail_after(TIMEOUT):
        async with site.relay(PLAIN if modes[0] == "plain" else OPEN) as relay:
            one, two = await join_ends(site, relay, *modes)
            pause_reading(two)
            await two.send(b"what nobody reads")
            (pairing,) = relay.relay.pairings
            pump = pairing._pumps["func1"]
            answer = bytearray()
            still = 0
            while still < 5:
                if not pump.is_blocked:
                    answer += (part := block(50_000, len(answer)))
                    await one.send(part)
                await settled(0.005)
                still = still + 1 if pump.is_blocked else 0
            await one.send_eof()
            sock = one.party.socket._sock  # type: ignore[attr-defined]
            await eventually(lambda: unacknowledged(sock) == 0, "the answer has left func1's host")
            one.party.close()
            await eventually(lambda: is_dead(pairing.legs["func1"].sock), "the reset has come")
            if then == "words":
                await two.send(b"what nobody will ever read")
            if then == "the end":
                await two.send_eof()
            await settled(0.01)
            assert await two.receive_to_end() == answer
            record = await relay.outcome()
            assert (record["outcome"], record["side"]) == ("hung-up", "func1")
            assert record["bytes_func1_to_func2"] == len(answer)
