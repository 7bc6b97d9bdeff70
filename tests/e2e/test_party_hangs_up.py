"""A party that has had its say, ends and closes costs the other not a byte of it.

The other may still be sending, and its bytes meet a closed socket: a reset, which must not be passed on while what was
sent before is under way, for an RST destroys it.
"""

from __future__ import annotations

import trio

from frelay.tcp import unacknowledged
from rig import TLS_HEADER, Site, eventually, pair


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
            # To close with input unread is RST, and destroys what has not left this host: no relay could help that.
            sock = server.socket._sock  # type: ignore[attr-defined]
            await eventually(lambda: unacknowledged(sock) == 0, "the answer is under way")
            server.close()

        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_and_go)
            while data := await client.receive_raw(16384):
                received += data
                if len(received) == len(data):
                    # Into a socket that nobody reads any more.
                    await client.send_raw(bytes(1000))
        assert received == answer
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("hung-up", "func1")
        assert record["bytes_func1_to_func2"] == len(answer)
