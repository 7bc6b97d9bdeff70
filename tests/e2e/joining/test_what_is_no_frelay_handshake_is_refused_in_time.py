"""TESTPLAN 10: old TLS, foreign protocols, garbage and silence are refused, by an alert where TLS has one, and in time.

If the answer should be prompt, handshake_timeout is a minute, so that no test passes because the time was over.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import Site
from support.streams import read_to_end
from support.waiting import eventually

PATIENT: Final = "[limits]\nhandshake_timeout = 60\njoin_timeout = 60\n"


@asynccontextmanager
async def raw(relay: RelayInProcess) -> AsyncIterator[trio.SocketStream]:
    stream = await trio.open_tcp_stream("127.0.0.1", relay.port())
    async with stream:
        yield stream


async def lives_on(site: Site, relay: RelayInProcess) -> None:
    for party in site.parties:
        party.close()
    await eventually(lambda: relay.legs == 0, "all slots free")
    await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


def alerts(data: bytes) -> list[tuple[int, int]]:
    """(level, description) of the plaintext alerts in ``data``, which must hold nothing else."""
    found = []
    while data:
        kind, _, length = struct.unpack(">BHH", data[:5])
        assert kind == 21, f"a record of type {kind} before any handshake"
        found.append((data[5], data[6]))
        data = data[5 + length :]
    return found


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_older_tls_is_refused_by_an_alert(site: Site, version: ssl.TLSVersion) -> None:
    async with site.relay(sections=PATIENT) as relay:
        context = site.context()
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = version, version
        party = await site.connect(relay, context=context)
        assert await party.alert() == "TLSV1_ALERT_PROTOCOL_VERSION"
        await relay.log("refused", code="protocol-error")
        await lives_on(site, relay)


@pytest.mark.parametrize(
    "offered", [("h2",), ("http/1.1",), ("h2", "http/1.1"), ("frelay/2",), ("frelay/1.0",), ("FRELAY/1",)]
)
async def test_a_foreign_alpn_is_refused_by_its_alert(site: Site, offered: tuple[str, ...]) -> None:
    async with site.relay(sections=PATIENT) as relay:
        party = await site.connect(relay, alpn=offered)
        assert "NO_APPLICATION_PROTOCOL" in await party.alert()
        await relay.log(
            "refused", code="protocol-error", reason=f"TLS handshake: ALPN offers {', '.join(offered)} and not frelay/1"
        )
        await lives_on(site, relay)


async def test_our_protocol_among_others_is_chosen(site: Site) -> None:
    async with site.relay() as relay:
        party = await site.party(relay, alpn=("h2", "frelay/1", "http/1.1"))
        assert party.tls.selected_alpn_protocol() == "frelay/1"
        await party.join()
        await party.expect("WAITING")


GARBAGE: Final = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
    "HTTP POST": b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n0123456789",
    "HTTP CONNECT": b"CONNECT func2.demo:443 HTTP/1.1\r\n\r\n",
    "PROXY v1": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
    "PROXY v2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12),
    "SSH": b"SSH-2.0-OpenSSH_9.0\r\n",
    "a frelay frame": b"\x01\x00\x00\x02{}",
    "a frelay ticket": b"FRELAY/1 " + b"0" * 64 + b"\n",
    "zeros": bytes(600),
    "0xff": b"\xff" * 600,
    "SSLv2": bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0") + bytes(16),
    "a handshake record that is no ClientHello": b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
    "a handshake record of no length": b"\x16\x03\x01\x00\x00",
    "an absurd record length": b"\x16\x03\x01\xff\xff" + bytes(100),
    "application data first": b"\x17\x03\x03\x00\x05hello",
    "an alert first": b"\x15\x03\x03\x00\x02\x02\x28",
    "change_cipher_spec first": b"\x14\x03\x03\x00\x01\x01" * 3,
    "a truncated ClientHello, with a length that lies": b"\x16\x03\x01\x00\x08\x01\x00\x00\x04\x03\x03\x00\x00",
}


@pytest.mark.load
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_is_refused_at_once(site: Site, garbage: bytes) -> None:
    """The answer is an alert at most: without a certificate nobody hears a protocol of ours."""
    async with site.relay(sections=PATIENT) as relay:
        async with raw(relay) as stream:
            began = trio.current_time()
            await stream.send_all(garbage)
            # Some of these are only the beginning of something, so the relay waits for the rest until the end.
            await stream.send_eof()
            alerts(await read_to_end(stream))
            assert trio.current_time() - began < 30
        await lives_on(site, relay)


@pytest.mark.parametrize("kind", ["HTTP", "SSH", "zeros", "0xff", "application data first", "an absurd record length"])
async def test_garbage_is_refused_without_waiting_for_more_of_it(site: Site, kind: str) -> None:
    async with site.relay(sections=PATIENT) as relay:
        async with raw(relay) as stream:
            await stream.send_all(GARBAGE[kind])
            alerts(await read_to_end(stream))
            await relay.log("refused", code="protocol-error")
        await lives_on(site, relay)


async def send_for_ever(stream: trio.SocketStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)


async def test_endless_garbage_is_not_read_for_ever(site: Site) -> None:
    """The delayed close that saves the alert has bounds of its own: a second, and 256 KiB."""
    async with site.relay(sections=PATIENT) as relay:
        async with raw(relay) as stream:
            with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream, b"GET / HTTP/1.1\r\n" * 4096)
        await lives_on(site, relay)


@pytest.mark.load
@pytest.mark.parametrize("start", ["nothing", "a byte", "half a ClientHello"])
async def test_silence_is_closed_at_the_deadline(site: Site, start: str) -> None:
    """TESTPLAN 10 and 31."""
    async with site.relay(sections="[limits]\nhandshake_timeout = 0.4\n") as relay:
        began = trio.current_time()
        party = await site.connect(relay)
        with pytest.raises(ssl.SSLWantReadError):
            party.tls.do_handshake()
        hello = party.take_outgoing()
        await party.send_raw(
            {"nothing": b"", "a byte": hello[:1], "half a ClientHello": hello[: len(hello) // 2]}[start]
        )
        assert await read_to_end(party.stream) == b""
        assert 0.4 <= trio.current_time() - began < 20
        await relay.log("refused", code="protocol-error", reason="no TLS handshake within 0.4 s")
        await lives_on(site, relay)


async def test_a_client_hello_drop_by_drop_gains_no_time(site: Site) -> None:
    """TESTPLAN 31: the deadline is absolute, from accept."""
    async with site.relay(sections="[limits]\nhandshake_timeout = 0.5\n") as relay:
        party = await site.connect(relay)
        with pytest.raises(ssl.SSLWantReadError):
            party.tls.do_handshake()
        hello = party.take_outgoing()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                try:
                    for byte in hello:
                        await party.send_raw(bytes([byte]))
                        await trio.sleep(0.1)
                except trio.BrokenResourceError:
                    pass  # expected

            nursery.start_soon(drip)
            await relay.log("refused", code="protocol-error", reason="no TLS handshake within 0.5 s")
            nursery.cancel_scope.cancel()
        await lives_on(site, relay)


async def test_a_client_that_never_finishes_its_handshake_is_closed(site: Site) -> None:
    """The relay has answered, but the client never sends its certificate."""
    async with site.relay(sections="[limits]\nhandshake_timeout = 0.4\n") as relay:
        party = await site.connect(relay)
        with pytest.raises(ssl.SSLWantReadError):
            party.tls.do_handshake()
        await party.flush()
        answer = await read_to_end(party.stream)
        assert answer[0] == 22
        await relay.log("refused", code="protocol-error", reason="no TLS handshake within 0.4 s")
        await lives_on(site, relay)


# --- inside an established connection --------------------------------------------------------------------------------


class Forger:
    """Writes TLS 1.3 records of any type with a client's keys (RFC 8446, 5.2 and 7.3); `ssl` cannot do that."""

    def __init__(self, secret: bytes) -> None:
        self._key = AESGCM(self._expand(secret, "key", 32))
        self._iv = self._expand(secret, "iv", 12)
        self._sequence = 0

    @staticmethod
    def _expand(secret: bytes, label: str, length: int) -> bytes:
        name = f"tls13 {label}".encode()
        info = struct.pack(">HB", length, len(name)) + name + b"\x00"
        return HKDFExpand(hashes.SHA384(), length, info).derive(secret)

    def record(self, content_type: int, content: bytes) -> bytes:
        inner = content + bytes([content_type])
        header = struct.pack(">BHH", 23, 0x0303, len(inner) + 16)
        nonce = bytes(a ^ b for a, b in zip(self._iv, self._sequence.to_bytes(12, "big"), strict=True))
        self._sequence += 1
        return header + self._key.encrypt(nonce, inner, header)


async def forging_party(site: Site, relay: RelayInProcess) -> tuple[Party, Forger, bytes]:
    """A party after its handshake, the means to forge its records, and a ClientHello without its record header."""
    log = site.directory / "keys"
    context = site.context()
    context.keylog_filename = str(log)
    party = await site.connect(relay, context=context)
    with pytest.raises(ssl.SSLWantReadError):
        party.tls.do_handshake()
    hello = party.take_outgoing()
    await party.send_raw(hello)
    await party.handshake()
    cipher = party.tls.cipher()
    assert cipher is not None
    assert cipher[0] == "TLS_AES_256_GCM_SHA384"
    secrets = dict(line.split()[::2] for line in log.read_text().splitlines() if not line.startswith("#"))
    return party, Forger(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"])), hello[5:]


async def test_a_forged_record_is_read_like_any_other(site: Site) -> None:
    """The forger works: the relay reads a JOIN that it wrote."""
    async with site.relay(sections=PATIENT) as relay:
        party, forger, _ = await forging_party(site, relay)
        attempt = b'{"attempt":"00000000-0000-0000-0000-000000000000"}'
        await party.send_raw(forger.record(23, b"\x01\x00" + len(attempt).to_bytes(2, "big") + attempt))
        assert (await party.expect("WAITING"))["party"] == "func1"


@pytest.mark.parametrize("when", ["before JOIN", "while waiting"])
@pytest.mark.parametrize(
    "what", ["ClientHello", "HelloRequest", "NewSessionTicket", "Certificate", "change_cipher_spec", "unknown type"]
)
async def test_no_second_handshake_is_begun(site: Site, what: str, when: str) -> None:
    """TESTPLAN 10, renegotiation: TLS 1.3 has none, and a client that tries it gets an alert and the close."""
    async with site.relay(sections=PATIENT) as relay:
        party, forger, hello = await forging_party(site, relay)
        if when == "while waiting":
            attempt = b'{"attempt":"00000000-0000-0000-0000-000000000000"}'
            await party.send_raw(forger.record(23, b"\x01\x00" + len(attempt).to_bytes(2, "big") + attempt))
            await party.expect("WAITING")
        content_type, content = {
            "ClientHello": (22, hello),
            "HelloRequest": (22, b"\x00\x00\x00\x00"),
            "NewSessionTicket": (22, b"\x04\x00\x00\x0d" + bytes(13)),
            "Certificate": (22, b"\x0b\x00\x00\x04\x00\x00\x00\x00"),
            "change_cipher_spec": (20, b"\x01"),
            "unknown type": (99, b"?"),
        }[what]
        await party.send_raw(forger.record(content_type, content))
        with trio.fail_after(20):
            try:
                while (found := await party.next_frame()) is not None:
                    assert found[0] == "REFUSED"
            except ssl.SSLError as error:
                assert "alert" in str(error).lower()  # noqa: PT017  which of the two comes first is TLS's affair
        assert not relay.relay.pairings
        await lives_on(site, relay)
