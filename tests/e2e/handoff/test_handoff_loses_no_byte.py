"""Raw bytes after a close_notify all reach the other function, in one segment with it or cut at any offset.

Earlier relays lost bytes here.
"""

from __future__ import annotations

import ssl

import pytest
import trio

from support.handoffs import client_hello, corked, met, relay_has_read, tcp_info
from support.party import TLS_HEADER, Party
from support.site import Site
from support.waiting import TIMEOUT

CLOSE_NOTIFY = 24
"""Bytes of a close_notify record in TLS 1.3: header, alert, content type, tag."""


async def test_close_notify_and_a_client_hello_in_one_segment(site: Site) -> None:
    """TESTPLAN 14: TCP_CORK makes them one segment, and the kernel confirms it."""
    async with site.relay() as relay:
        hello = client_hello(site)
        for other_was_first in (True, False):
            one, two = await met(site, relay)
            if other_was_first:
                await two.hand_off()
            await one.read_to_close_notify()
            before = tcp_info(one)
            with corked(one):
                await one.send_raw(one.close_notify())
                await one.send_raw(hello)
            if not other_was_first:
                await two.hand_off()
            assert await two.receive_exactly(len(hello)) == hello
            assert tcp_info(one).data_segments_sent - before.data_segments_sent == 1
            await one.send_eof()
            assert await two.receive_raw() == b""
            site.hang_up()


async def test_close_notify_and_raw_bytes_cut_at_every_offset(site: Site) -> None:
    """TESTPLAN 14: the relay has read and handled the first part before the second part is sent."""
    async with site.relay() as relay:
        hello = client_hello(site)
        # At each offset in the close_notify and around the first raw bytes; what follows is an ordinary stream.
        offsets = [*range(CLOSE_NOTIFY + 24), *range(CLOSE_NOTIFY + 24, CLOSE_NOTIFY + len(hello), 61)]
        for offset in offsets:
            one, two = await met(site, relay)
            first, second = (one, two) if offset % 2 else (two, one)
            if offset % 3:
                await second.hand_off()
            await first.read_to_close_notify()
            both = first.close_notify() + hello
            assert len(both) == CLOSE_NOTIFY + len(hello)
            await first.send_raw(both[:offset])
            await relay_has_read(relay)
            await first.send_raw(both[offset:])
            if not offset % 3:
                await second.hand_off()
            assert await second.receive_exactly(len(hello)) == hello, f"cut at {offset}"
            await first.send_eof()
            assert await second.receive_raw() == b"", f"cut at {offset}"
            site.hang_up()
        assert len(relay.logged("handed off")) == len(offsets)


async def test_close_notify_and_raw_bytes_one_at_a_time(site: Site) -> None:
    """TESTPLAN 14: each byte is a segment of its own, from both sides at once."""
    async with site.relay() as relay:
        hello = client_hello(site)[:200]
        one, two = await met(site, relay)
        for party in (one, two):
            await party.read_to_close_notify()

        async def dribble(party: Party) -> None:
            for byte in party.close_notify() + hello:
                await party.send_raw(bytes([byte]))
                await relay_has_read(relay)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble, one)
            nursery.start_soon(dribble, two)
        assert await two.receive_exactly(len(hello)) == hello
        assert await one.receive_exactly(len(hello)) == hello


async def test_200_hand_offs_with_raw_bytes_ahead_of_the_other_leg(site: Site) -> None:
    """TESTPLAN 14: each party sends its close_notify and first bytes in one segment, before the other has answered."""
    async with site.relay() as relay:
        for number in range(200):
            one, two = await met(site, relay)
            first, second = (one, two) if number % 2 else (two, one)
            hello, answer = (TLS_HEADER + word + number.to_bytes(4, "big") * 50 for word in (b"hello", b"answer"))
            for party, words in ((first, hello), (second, answer)):
                # The first gets only TLS while the second has not answered, and the other way round.
                await party.read_to_close_notify()
                assert party.leftover == b""
                before = tcp_info(party)
                with corked(party):
                    await party.send_raw(party.close_notify())
                    await party.send_raw(words)
                assert tcp_info(party).data_segments_sent - before.data_segments_sent == 1
                await relay_has_read(relay)
            assert await second.receive_exactly(len(hello)) == hello
            assert await first.receive_exactly(len(answer)) == answer
            await first.send_eof()
            await second.send_eof()
            assert await second.receive_raw() == b""
            assert await first.receive_raw() == b""
        ended = relay.logged("pairing ended")
        while len(ended) < 200:
            await relay_has_read(relay)
            ended = relay.logged("pairing ended")
        assert {record["outcome"] for record in ended} == {"closed"}
        assert {record["bytes_func1_to_func2"] + record["bytes_func2_to_func1"] for record in ended} == {417}


async def test_the_first_flight_of_inner_mtls_rides_with_close_notify(site: Site) -> None:
    """TESTPLAN 14: both functions' own TLS works with what the relay delivers, and they verify each other."""
    contexts = [ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)]
    for name, context in zip(("func1", "func2"), contexts, strict=True):
        context.load_cert_chain(*site.paths[name])
        context.load_verify_locations(site.ca_path)
        context.verify_mode = ssl.CERT_REQUIRED
    async with site.relay() as relay:
        one, two = await met(site, relay)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = contexts[0].wrap_bio(incoming, outgoing, server_hostname="func2.demo")
        names: list[object] = []

        async def be_client() -> None:
            await one.read_to_close_notify()
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            with corked(one):
                await one.send_raw(one.close_notify())
                await one.send_raw(outgoing.read())
            while True:
                incoming.write(await one.receive_raw())
                try:
                    client.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                break
            await one.send_raw(outgoing.read())

        async def be_server() -> None:
            await two.hand_off()
            stream = trio.SSLStream(two.stream, contexts[1], server_side=True)
            await stream.do_handshake()
            names.append(stream.getpeercert()["subjectAltName"])

        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(be_client)
                nursery.start_soon(be_server)
        assert names == [(("DNS", "func1.demo"),)]
        certificate = client.getpeercert()
        assert certificate is not None
        assert certificate["subjectAltName"] == (("DNS", "func2.demo"),)
