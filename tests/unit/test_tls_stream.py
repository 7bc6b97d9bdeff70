"""Both streams of a leg obey Trio's contract, and the TLS stream can be left without losing a byte that follows.

The other side is ``Party`` where a test decides about single records, and ``ClientStream``, our
own stream with the client's part, where Trio's generic checks want the same kind at both ends.
"""

from __future__ import annotations

import gc
import socket
import ssl
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL import crypto

from frelay.errors import ConnectionBroken, LocalProtocolError, RemoteProtocolError, Truncated
from frelay.net.streams import RawStream
from frelay.pki.authority import Authority
from frelay.tls.stream import TlsStream
from support.party import Party
from support.records import ALERT, CLOSE_NOTIFY, HANDSHAKE, PLAIN_CLOSE_NOTIFY, RecordForge, log_keys
from support.site import Site
from support.streams import SocketMaker, client_context, clog, server_context, tcp_pair, tls_over, unix_pair
from support.waiting import eventually

TIMEOUT = 20.0

# --- makers --------------------------------------------------------------------------------------------------------


async def tls_pair(site: Site, sockets: SocketMaker, *, clogged: bool = False) -> tuple[TlsStream, TlsStream]:
    streams = await tls_over(sockets(4096 if clogged else None), server_context(site), client_context(site))
    if clogged:
        for stream in streams:
            clog(stream.sock, stream.connection.send)
    return streams


async def raw_pair(sockets: SocketMaker, *, clogged: bool = False) -> tuple[RawStream, RawStream]:
    one, other = sockets(4096 if clogged else None)
    if clogged:
        for sock in (one, other):
            clog(sock, sock.send)
    return RawStream(one), RawStream(other)


@asynccontextmanager
async def server_and_party(
    site: Site, *, keylog: Path | None = None, buffer: int | None = None
) -> AsyncIterator[tuple[TlsStream, Party]]:
    """Our stream and a ``Party``, after the handshake; both are closed at the end."""
    one, other = tcp_pair(buffer)
    server = TlsStream(one, server_context(site))
    context = site.context("func1") if keylog is None else log_keys(site.context("func1"), keylog)
    party = Party(trio.SocketStream(trio.socket.from_stdlib_socket(other)), context, "localhost")
    try:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                nursery.start_soon(party.handshake)
            yield server, party
    finally:
        server.close()
        party.close()


async def read_to_end(receive: Callable[[], Awaitable[bytes]]) -> None:
    while await receive():
        pass


# --- Trio's contract -----------------------------------------------------------------------------------------------


async def test_the_tls_stream_keeps_trios_contract(site: Site) -> None:
    with trio.fail_after(4 * TIMEOUT):
        await trio.testing.check_half_closeable_stream(partial(tls_pair, site, tcp_pair), None)
        await trio.testing.check_half_closeable_stream(
            partial(tls_pair, site, unix_pair), partial(tls_pair, site, unix_pair, clogged=True)
        )


async def test_the_raw_stream_keeps_trios_contract() -> None:
    with trio.fail_after(4 * TIMEOUT):
        await trio.testing.check_half_closeable_stream(partial(raw_pair, tcp_pair), None)
        await trio.testing.check_half_closeable_stream(
            partial(raw_pair, unix_pair), partial(raw_pair, unix_pair, clogged=True)
        )


async def test_closing_twice_at_once_is_no_error(site: Site) -> None:
    server, client = await tls_pair(site, unix_pair, clogged=True)
    async with trio.open_nursery() as nursery:
        # The first one waits for room for its close_notify; the other two find it busy, and only close.
        for _ in range(3):
            nursery.start_soon(server.aclose)
    await trio.aclose_forcefully(client)


# --- ends ----------------------------------------------------------------------------------------------------------


async def test_close_notify_is_a_clean_end_for_good(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        await party.send(b"last words")
        await party.stream.send_all(party.close_notify())
        assert await server.receive_some() == b"last words"
        assert await server.receive_some() == b""
        assert server.ended_by_peer
        party.close()
        assert await server.receive_some() == b""


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 23], ids=lambda cut: f"after {cut} bytes of the record")
async def test_fin_without_close_notify_is_a_truncation(site: Site, cut: int) -> None:
    """A truncation attack in its simplest form; the end may also be in the middle of a close_notify."""
    async with server_and_party(site) as (server, party):
        await party.send(b"data")
        await party.stream.send_all(party.close_notify()[:cut])
        await party.send_eof()
        assert await server.receive_some() == b"data"
        for _ in range(2):
            with pytest.raises(Truncated) as caught:
                await server.receive_some()
            assert isinstance(caught.value, trio.BrokenResourceError)
        assert not server.ended_by_peer


async def test_rst_is_neither_an_end_nor_a_truncation(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        party.reset()
        with pytest.raises(ConnectionBroken, match="ECONNRESET") as caught:
            await server.receive_some()
        assert not isinstance(caught.value, Truncated)
        assert isinstance(caught.value, trio.BrokenResourceError)


@pytest.mark.parametrize(
    "forged",
    [PLAIN_CLOSE_NOTIFY, b"\x15\x03\x03\x00\x02\x02\x28", b"\x17\x03\x03\x00\x03abc", b"GET / HTTP/1.0\r\n\r\n"],
    ids=["close_notify in the clear", "fatal alert in the clear", "unencrypted data", "no TLS"],
)
async def test_bytes_that_anybody_could_have_written_are_no_end(site: Site, forged: bytes) -> None:
    """TESTPLAN 17."""
    async with server_and_party(site) as (server, party):
        await party.stream.send_all(forged)
        with pytest.raises(RemoteProtocolError) as caught:
            await server.receive_some()
        assert isinstance(caught.value, trio.BrokenResourceError)
        assert not server.ended_by_peer


async def test_our_end_leaves_the_other_direction_open(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        await server.send_all(b"question")
        await server.send_eof()
        assert await party.receive() == b"question"
        assert await party.receive() == b""
        for number in range(3):
            await party.send(b"answer %d" % number)
            assert await server.receive_some() == b"answer %d" % number
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(b"more")


async def test_our_end_does_not_swallow_input_that_is_there_already(site: Site) -> None:
    """There must be no second SSL_shutdown: with input pending it would end the reading side."""
    async with server_and_party(site) as (server, party):
        await party.send(b"early")
        await server.send_eof()
        await server.send_eof()
        assert await server.receive_some() == b"early"
        await party.send(b"late")
        assert await server.receive_some() == b"late"


# --- cancellation --------------------------------------------------------------------------------------------------


async def test_a_cancelled_send_breaks_the_sending_half_and_no_more(site: Site) -> None:
    async with server_and_party(site, buffer=4096) as (server, party):
        with trio.move_on_after(0.05) as scope:
            await server.send_all(bytes(10_000_000))
        assert scope.cancelled_caught
        for send in (partial(server.send_all, b"x"), server.wait_send_all_might_not_block, server.send_eof):
            with pytest.raises(trio.BrokenResourceError, match="middle of a record"):
                await send()
        await party.send(b"still here")
        assert await server.receive_some() == b"still here"
        await party.stream.send_all(party.close_notify())
        assert await server.receive_some() == b""
        # The party must read a truncation and never a clean end.
        await server.aclose()
        with pytest.raises((ssl.SSLEOFError, trio.BrokenResourceError)):
            await read_to_end(party.receive)


async def test_a_send_that_is_cancelled_before_it_began_breaks_nothing(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.send_all(b"never")
        await server.send_all(b"ever")
        assert await party.receive() == b"ever"


async def test_a_cancelled_receive_loses_nothing(site: Site, tmp_path: Path) -> None:
    """At every offset of a record: the part that OpenSSL has read stays inside OpenSSL."""
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        for offset in range(len(forge.record(b"probe")) + 1):
            if offset == 0:
                forge = RecordForge(party.tls, keylog)
            record = forge.record(b"probe")
            await party.stream.send_all(record[:offset])
            if offset < len(record):
                with trio.move_on_after(0.001) as scope:
                    await server.receive_some()
                assert scope.cancelled_caught
            await party.stream.send_all(record[offset:])
            assert await server.receive_some() == b"probe"


# --- detach --------------------------------------------------------------------------------------------------------


async def test_detach_waits_for_both_close_notify(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        with pytest.raises(LocalProtocolError):
            server.detach()
        await server.send_eof()
        with pytest.raises(LocalProtocolError):
            server.detach()
        await party.stream.send_all(party.close_notify())
        with pytest.raises(LocalProtocolError):
            server.detach()  # sent, but not read: the next byte may still belong to TLS
        assert await server.receive_some() == b""
        sock = server.sock
        assert server.detach() is sock
        sock.close()


async def test_detach_is_refused_while_our_own_close_notify_is_missing(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        await party.stream.send_all(party.close_notify())
        assert await server.receive_some() == b""
        with pytest.raises(LocalProtocolError):
            server.detach()


async def test_detach_is_refused_when_our_close_notify_is_stuck(site: Site) -> None:
    """A close_notify whose sending was cancelled does not count as sent."""
    server, client = await tls_pair(site, unix_pair, clogged=True)
    try:
        with trio.move_on_after(0.05) as scope:
            await server.send_eof()
        assert scope.cancelled_caught
        for send in (server.send_eof, partial(server.send_all, b"x")):
            with pytest.raises(trio.BrokenResourceError):
                await send()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_to_end, server.receive_some)
            await client.send_eof()
        assert server.ended_by_peer
        with pytest.raises(LocalProtocolError):
            server.detach()
    finally:
        server.close()
        client.close()


async def test_after_detach_the_stream_is_closed_and_the_socket_is_not(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        await server.send_eof()
        await party.hand_off()
        assert await server.receive_some() == b""
        with server.detach() as sock:
            for use in (server.receive_some, partial(server.send_all, b"x"), server.send_eof, server.do_handshake):
                with pytest.raises(trio.ClosedResourceError):
                    await use()
            with pytest.raises(trio.ClosedResourceError):
                server.detach()
            await server.aclose()
            server.close()
            raw = RawStream(sock)
            await party.send_raw(b"ping")
            assert await raw.receive_some() == b"ping"
            await raw.send_all(b"pong")
            assert await party.receive_raw() == b"pong"


async def test_raw_bytes_behind_close_notify_are_whole_wherever_the_stream_is_cut(site: Site) -> None:
    """TESTPLAN 14, without a relay around it: every offset of [close_notify][raw]."""
    raw = b"\x16\x03\x01 raw bytes"
    size = 24 + len(raw)
    for offset in range(size + 1):
        async with server_and_party(site) as (server, party):
            await server.send_eof()
            everything = party.close_notify() + raw
            assert len(everything) == size
            await party.send_raw(everything[:offset])
            ended = trio.Event()

            async def read_end(server: TlsStream = server, ended: trio.Event = ended) -> None:
                assert await server.receive_some() == b""
                ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_end)
                await trio.testing.wait_all_tasks_blocked()
                assert ended.is_set() == (offset >= 24)
                await party.send_raw(everything[offset:])
            stream = RawStream(server.detach())
            found = b""
            while len(found) < len(raw):
                found += await stream.receive_some()
            stream.close()
            assert found == raw


async def test_after_detach_the_tls_state_is_freed_at_once(site: Site) -> None:
    """Some 50 KiB for each leg. Reference counting frees them: nothing waits for the cycle collector."""
    async with server_and_party(site) as (server, party):
        await server.send_eof()
        await party.stream.send_all(party.close_notify())
        assert await server.receive_some() == b""
        state = weakref.ref(server.connection)
        gc.collect()
        gc.disable()
        try:
            with server.detach():
                assert state() is None
        finally:
            gc.enable()


# --- floods --------------------------------------------------------------------------------------------------------


async def test_a_flood_of_key_updates_leaves_everybody_else_their_turn(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19: one read must not continue as long as records without data come."""
    keylog, count = tmp_path / "keys", 2000
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        flood = b"".join(forge.key_update(request=number % 2 == 0) for number in range(count)) + forge.record(b"data")
        # All of it is in the kernel before the first byte is read.
        await party.send_raw(flood)
        await eventually(lambda: len(server.sock.recv(len(flood), socket.MSG_PEEK)) == len(flood), "the flood")
        turns = 0

        async def neighbour() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            assert await server.receive_some() == b"data"
            nursery.cancel_scope.cancel()
        assert turns >= count
        # The request to update our own key is answered once, before the data.
        await server.send_all(b"answer")
        assert await party.receive() == b"answer"


async def test_a_key_update_that_cannot_be_answered_disturbs_nobody(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19: reading waits until it can write the answer, and a sender may wait for room at the same time."""
    keylog = tmp_path / "keys"
    one, other = unix_pair(4096)
    server = TlsStream(one, server_context(site))
    context = log_keys(site.context("func1"), keylog)
    party = Party(trio.SocketStream(trio.socket.from_stdlib_socket(other)), context, "localhost")
    got: list[bytes] = []

    async def read() -> None:
        got.append(await server.receive_some())

    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            nursery.start_soon(party.handshake)
        clog(one, server.connection.send)
        forge = RecordForge(party.tls, keylog)
        await party.send_raw(forge.key_update(request=True) + forge.key_update() + forge.record(b"data"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            nursery.start_soon(server.send_all, b"answer")
            await trio.testing.wait_all_tasks_blocked()
            received = b""
            while not received.endswith(b"answer"):
                received += await party.receive()
    assert got == [b"data"]
    assert received.strip(b"x") == b"answer"
    server.close()
    party.close()


async def test_a_socket_into_which_tls_has_spoken_on_is_not_given_back(site: Site, tmp_path: Path) -> None:
    """OpenSSL answers a request for a KeyUpdate when it reads the next one, even after our close_notify."""
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        await server.send_eof()
        await party.send_raw(forge.key_update(request=True) + forge.key_update() + forge.close_notify())
        assert await server.receive_some() == b""
        with pytest.raises(RemoteProtocolError, match="KeyUpdate"):
            server.detach()


@pytest.mark.parametrize("when", ["before", "after", "once after"])
async def test_key_updates_that_are_not_answered_too_late_do_no_harm(site: Site, tmp_path: Path, when: str) -> None:
    """A request before our close_notify, no request, or only one: the first byte of the socket is a raw one."""
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        if when == "before":
            await party.send_raw(forge.key_update(request=True) + forge.record(b"data"))
            assert await server.receive_some() == b"data"
        await server.send_all(b"last")
        await server.send_eof()
        updates = b"" if when == "before" else forge.key_update(request=when == "once after")
        if when == "after":
            updates += forge.key_update()
        await party.send_raw(updates + forge.close_notify())
        assert await server.receive_some() == b""
        with server.detach() as sock:
            sock.send(b"raw")
            assert await party.receive() == b"last"
            await party.read_to_close_notify()
            assert party.leftover in (b"", b"raw")
            assert party.leftover or await party.receive_raw() == b"raw"


async def test_empty_records_are_borne_a_few_times_and_then_refused(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19."""
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        await party.send_raw(b"".join(forge.record(b"") for _ in range(30)) + forge.record(b"data"))
        assert await server.receive_some() == b"data"
        await party.send_raw(b"".join(forge.record(b"") for _ in range(1000)))
        with pytest.raises(RemoteProtocolError):
            await server.receive_some()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x04\x00\x00\x15" + bytes(21), HANDSHAKE),
        (b"\x01\x00\x00\x02\x03\x03", HANDSHAKE),
        (b"\x18\x00\x00\x01\x07", HANDSHAKE),
        (b"\x02\x28", ALERT),
        (b"\x01\x5a" * 100, ALERT),
        (b"\x01", 20),
    ],
    ids=["ticket", "ClientHello", "odd KeyUpdate", "fatal alert", "warnings", "CCS"],
)
async def test_records_that_no_client_may_send_now_are_refused(
    site: Site, tmp_path: Path, content: bytes, kind: int
) -> None:
    """TESTPLAN 19: tickets from the client, a renegotiation, and similar ones."""
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        await party.send_raw(RecordForge(party.tls, keylog).record(content, kind))
        with pytest.raises(RemoteProtocolError):
            await server.receive_some()


async def test_padding_is_not_data(site: Site, tmp_path: Path) -> None:
    keylog = tmp_path / "keys"
    async with server_and_party(site, keylog=keylog) as (server, party):
        forge = RecordForge(party.tls, keylog)
        await party.send_raw(forge.record(b"x", padding=16000) + forge.record(CLOSE_NOTIFY, ALERT, padding=16000))
        assert await server.receive_some() == b"x"
        assert await server.receive_some() == b""


# --- other legs ----------------------------------------------------------------------------------------------------


def leave_an_error_in_the_queue() -> None:
    """A certificate with our CA as issuer and a signature of another: OpenSSL queues more errors than it returns."""
    authority, forger = Authority.create("one name"), ec.generate_private_key(ec.SECP256R1())
    name = authority.certificate.subject
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(name)
        .public_key(forger.public_key())
        .serial_number(1)
        .not_valid_before(authority.certificate.not_valid_before_utc)
        .not_valid_after(authority.certificate.not_valid_after_utc)
        .sign(forger, SHA256())
    )
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(authority.certificate))
    with pytest.raises(crypto.X509StoreContextError, match="signature failure"):
        crypto.X509StoreContext(store, crypto.X509.from_cryptography(leaf)).verify_certificate()


async def test_the_fault_of_one_connection_is_not_found_in_another(site: Site) -> None:
    """The error queue of OpenSSL belongs to the thread: the error of a failed verification must not end another leg."""
    async with server_and_party(site) as (server, party):
        got: list[bytes] = []

        async def read() -> None:
            got.append(await server.receive_some())

        leave_an_error_in_the_queue()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            leave_an_error_in_the_queue()
            await party.send(b"data")
        assert got == [b"data"]
        leave_an_error_in_the_queue()
        await server.send_all(b"answer")
        assert await party.receive() == b"answer"
        leave_an_error_in_the_queue()
        await server.send_eof()
        assert await party.receive() == b""


async def test_both_halves_of_a_broken_stream_say_that_it_broke(site: Site) -> None:
    """To the second half OpenSSL says only that there was an error, and not which one; the stream knows it."""
    for first, second in ((0, 1), (1, 0)):
        async with server_and_party(site) as (server, party):
            party.reset()
            halves = (server.receive_some, partial(server.send_all, b"x"))
            for half in (halves[first], halves[second]):
                with pytest.raises(ConnectionBroken) as caught:
                    await half()
                assert not isinstance(caught.value, RemoteProtocolError | Truncated)


# --- without waiting -----------------------------------------------------------------------------------------------

RECORD = 16384


def room(records: int = 3) -> memoryview:
    return memoryview(bytearray(records * RECORD))


async def received_now(server: TlsStream, into: memoryview) -> int:
    """Receive the data when there is some, or when ``receive_some`` has more to say."""
    while (count := server.receive_now(into)) == 0:
        await trio.lowlevel.wait_readable(server.sock)
    return count


async def test_what_is_there_is_received_record_after_record(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        into = room()
        assert server.receive_now(into) == 0
        for word in (b"one ", b"two ", b"three"):
            await party.send(word)
        text = b""
        while len(text) < 13:
            count = await received_now(server, into)
            text += into[:count]
        assert text == b"one two three"
        assert server.receive_now(into) == 0


async def test_a_record_that_has_no_room_waits_for_the_next_call(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        data = bytes(range(256)) * 300  # not quite five records
        async with trio.open_nursery() as nursery:
            nursery.start_soon(party.send, data)
            text, into = b"", room(2)
            while len(text) < len(data):
                count = await received_now(server, into)
                assert 0 < count <= len(into)
                text += into[:count]
        assert text == data


async def test_the_end_behind_data_is_told_after_the_data(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        await party.send(b"last words")
        await party.stream.send_all(party.close_notify())
        into, text = room(), b""
        while (count := await received_now(server, into)) > 0:
            text += into[:count]
        assert text == b"last words"
        assert server.ended_by_peer
        assert server.receive_now(into) == -1
        assert await server.receive_some() == b""


@pytest.mark.parametrize("ends_by", ["FIN", "RST", "garbage"])
async def test_a_fault_behind_data_is_told_after_the_data_and_told_again(site: Site, ends_by: str) -> None:
    async with server_and_party(site) as (server, party):
        await party.send(b"last words")
        if ends_by == "garbage":
            await party.stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        text, into = b"", room()
        while len(text) < 10 and (count := await received_now(server, into)) > 0:
            text += into[:count]
        assert text == b"last words"
        if ends_by == "RST":
            party.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if ends_by != "garbage":
            party.close()
        assert await received_now(server, into) == -1
        expected = {"FIN": Truncated, "RST": ConnectionBroken, "garbage": RemoteProtocolError}[ends_by]
        for _ in range(2):
            with pytest.raises(expected):
                await server.receive_some()
            assert server.receive_now(into) == -1


async def test_what_is_not_sent_now_is_the_rest(site: Site) -> None:
    async with server_and_party(site, buffer=4096) as (server, party):
        data = bytes(range(256)) * 4096
        sent = server.send_now(memoryview(data))
        assert sent < len(data)
        received = bytearray()

        async def read() -> None:
            while len(received) < len(data):
                received.extend(await party.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await server.send_rest(data[sent:])
        assert received == data
        assert server.send_now(memoryview(b"more")) == 4
        assert await party.receive() == b"more"


async def test_until_the_rest_has_gone_nothing_else_can_be_said(site: Site) -> None:
    """A part of a record was sent: a close_notify in the middle of it would be garbage."""
    async with server_and_party(site, buffer=4096) as (server, _):
        data = memoryview(bytes(1 << 20))
        while server.send_now(data) == len(data):
            pass
        with pytest.raises(ConnectionBroken):
            await server.send_eof()
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.send_rest(bytes(data))
        with pytest.raises(ConnectionBroken):
            await server.send_all(b"more")


async def test_sending_on_a_connection_that_broke_says_so(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        party.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        party.close()
        await trio.lowlevel.wait_readable(server.sock)
        with pytest.raises(ConnectionBroken):
            server.send_now(memoryview(b"hello"))


async def test_last_words_and_close_notify_come_in_one_segment(site: Site) -> None:
    async with server_and_party(site) as (server, party):
        before = segments_out(server.sock)
        await server.send_last(b"last words")
        assert await party.receive() == b"last words"
        assert await party.receive() == b""
        assert segments_out(server.sock) - before == 1
        assert server.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 0


def segments_out(sock: socket.socket) -> int:
    """Segments with data that the kernel has sent: tcpi_data_segs_out in include/uapi/linux/tcp.h."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 156)[0])


@pytest.mark.parametrize("way", ["send_now", "send_all"])
async def test_a_handshake_message_in_pieces_is_the_partys_fault(site: Site, tmp_path: Path, way: str) -> None:
    """Until OpenSSL has the rest, it must read before it writes, and another task waits for reading already."""
    async with server_and_party(site, keylog=tmp_path / "keys") as (server, party):
        forge = RecordForge(party.tls, tmp_path / "keys")
        await party.send_raw(forge.record(b"\x18\x00\x00\x01", HANDSHAKE))
        await trio.lowlevel.wait_readable(server.sock)
        assert server.receive_now(room()) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, server.sock)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RemoteProtocolError, match="in pieces"):
                await send_one_way_or_the_other(server, way)
            nursery.cancel_scope.cancel()


async def send_one_way_or_the_other(stream: TlsStream, way: str) -> None:
    if way == "send_now":
        stream.send_now(memoryview(b"hello"))
    else:
        await stream.send_all(b"hello")
