"""Whatever a relay or another function sends, each of the three clients raises only a FrelayError. With real sockets.

tests/fuzz/test_whatever_a_client_hears.py tries the steps that they share with thousands of inputs.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Final

import pytest
import trio

import frelay
from frelay.protocol.messages import Mode
from support.clients import CLIENTS, Client, ask, options, run_function
from support.der import san_der
from support.party import Party, frame
from support.site import Site
from support.waiting import TIMEOUT, eventually
from support.wires import PAIRED, WAITING, fake_relay, read_frame

# --- the relay --------------------------------------------------------------------------------------------------------

PAYLOADS: Final = {
    "a text that steers": frame("REFUSED", {"code": "x\x1b[2J", "reason": "y\nz", "retry_after": 1}),
    "a lone surrogate": frame("REFUSED", b'{"code": "limit", "reason": "\\ud800", "retry_after": null}'),
    "no UTF-8": frame("WAITING", b'{"route": "\xff"}'),
    "deep JSON": frame("PAIRED", b"[" * 4096),
    "a huge integer": frame("PING", b'{"n": ' + b"9" * 4000 + b"}"),
    "NaN": frame("WAITING", b'{"route": "r", "party": "func1", "identity": "i", "deadline": NaN, "peer_seen": null}'),
    "another relay's line": b"HTTP/1.1 200 OK\r\n\r\n",
    "PAIRED of no mode": WAITING + frame("PAIRED", {"mode": "hand-off", "role": "client"}),
    "raw bytes for TLS": PAIRED + b"x" * 1000,
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("what", PAYLOADS)
async def test_a_relay_may_say_anything(site: Site, client: Client, what: str) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(PAYLOADS[what])
        with suppress(OSError):
            tls.recv(1)

    with fake_relay(site, script) as address:
        with pytest.raises(frelay.FrelayError) as caught:
            await run_function(client, address, ask(b""), options(site, "func1", "func2"))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("says", [b"", b"\0" * 100, b"\x15\x03\x03\x00\x02\x02\x28", b"\x16\x03\x03\xff\xff" * 1000])
async def test_what_is_no_relay_may_say_anything(site: Site, client: Client, says: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
                await stream.send_all(says)
                await stream.send_eof()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        with pytest.raises(frelay.RelayUnreachable) as caught:
            await run_function(client, address, ask(b""), options(site, "func1", "func2"))
        assert str(caught.value).isprintable()
        nursery.cancel_scope.cancel()


def test_a_flood_of_pings_leaves_other_tasks_their_turn(site: Site) -> None:
    """asyncio's sock_recv and sock_sendall do not yield to other tasks if they can finish at once."""
    has_flooded: list[bool] = []

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(WAITING)
        pings = b"".join(frame("PING", {"n": number}) for number in range(500))
        tls.setblocking(False)
        # Send without end, and drop the PONGs, so that neither side waits for the other.
        with suppress(ssl.SSLEOFError, ConnectionError, ssl.SSLZeroReturnError):
            while True:
                has_flooded.append(True)
                for action in (lambda: tls.sendall(pings), lambda: tls.recv(65536)):
                    with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        if action() == b"":
                            return

    async def run(address: str) -> None:
        statuses: list[object] = []
        given = options(site, "func1", "func2", on_status=statuses.append, wait=None)
        task = asyncio.create_task(frelay.client.asyncio.connect(address, **given))
        async with asyncio.timeout(TIMEOUT * 2):
            while len(statuses) < 100:
                assert not task.done()
                await asyncio.sleep(0)
        # The promise: this task ran during the flood. And it can cancel the other task.
        task.cancel()
        with suppress(asyncio.CancelledError, frelay.FrelayError):
            await task

    with fake_relay(site, script) as address:
        asyncio.run(run(address))
    assert has_flooded


# --- the other function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_certificate_that_ssl_cannot_decode_names_nobody(
    site: Site, client: Client, mode: Mode, role: str
) -> None:
    """The CA has signed it, and the relay never sees it, because the functions' TLS is between themselves."""
    cert, key = site.ca.odd(san_der(dns=[b"\xff.demo", b"func2.demo"])).write(site.directory, "undecodable")
    me, other = ("func1", "func2") if role == "client" else ("func2", "func1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "client" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(cert, key)
    if role == "client":
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(site.ca_path)

    async def attack(party: Party) -> None:
        await party.join()
        with suppress(AssertionError):
            await party.expect("WAITING")
        await party.expect("PAIRED")
        await party.hand_off()
        stream = trio.SSLStream(party.stream, context, server_side=role == "client")
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.do_handshake()
            await stream.receive_some(1)

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        party = await site.party(relay, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack, party)
            with pytest.raises(frelay.PeerIdentityMismatch, match="no usable name"):
                await run_function(client, address, ask(b""), options(site, me, other, mode=mode))
        await party.stream.aclose()
        with trio.fail_after(TIMEOUT):
            await eventually(lambda: relay.legs == 0, "nothing is held")


@pytest.mark.parametrize("says", [b"\x16\x03\x01\x00\x02\xff\xff", b"\x16\x03\x03" + b"\xff" * 3000, b"\x16\x03\x01"])
@pytest.mark.parametrize("me", ["func1", "func2"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_another_function_may_say_anything(site: Site, client: Client, me: str, says: bytes) -> None:
    other = "func2" if me == "func1" else "func1"

    async def babble(party: Party) -> None:
        await party.join()
        await party.expect("WAITING")
        await party.expect("PAIRED")
        await party.hand_off()
        await party.stream.send_all(says)
        party.socket.shutdown(socket.SHUT_WR)
        with suppress(trio.BrokenResourceError):
            await party.receive_raw()

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        party = await site.party(relay, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(babble, party)
            with pytest.raises(frelay.PeerGone) as caught:
                await run_function(client, address, ask(b""), options(site, me, other))
            assert str(caught.value).isprintable()
        await party.stream.aclose()
