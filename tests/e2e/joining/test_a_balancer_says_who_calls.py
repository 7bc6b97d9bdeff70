"""With ``proxy_protocol`` the address that counts is the one in the PROXY header: in limits, allow_from, log and API.

From the networks that it names a header is required; from other addresses a header is refused like any garbage.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.lowlevel

from support.party import TLS_HEADER, Party
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT, eventually

BALANCED: Final = DEMO + 'proxy_protocol = ["127.0.0.1/32"]\n'
PLAIN: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["203.0.113.0/24", "127.0.0.0/8"]
proxy_protocol = ["127.0.0.1/32"]
"""
V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"


def header(version: int, host: str, port: int = 40000) -> bytes:
    if version == 1:
        return f"PROXY TCP4 {host} 198.51.100.1 {port} 9001\r\n".encode()
    address = bytes(int(part) for part in host.split("."))
    tlv = b"\x04\x00\x03\x00\x00\x00"  # PP2_TYPE_NOOP
    body = address + bytes([198, 51, 100, 1]) + struct.pack("!HH", port, 9001) + tlv
    return V2 + struct.pack("!BBH", 0x21, 0x11, len(body)) + body


LOCAL: Final = V2 + b"\x20\x00\x00\x00"
UNKNOWN: Final = b"PROXY UNKNOWN\r\n"


async def comes(site: Site, relay: RelayInProcess, name: str, before: bytes, *, source: str = "127.0.0.1") -> Party:
    """A function behind ``before``; its handshake is done."""
    stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port(), local_address=source)
    await stream.send_all(before)
    party = Party(stream, site.context(name), "localhost")
    site.parties.append(party)
    await party.handshake()
    return party


async def ends(stream: trio.SocketStream) -> bytes:
    found = b""
    with trio.fail_after(TIMEOUT):
        try:
            while data := await stream.receive_some(4096):
                found += data
        except trio.BrokenResourceError:
            pass
    return found


def addresses(relay: RelayInProcess) -> list[str]:
    return [place.leg.address for place in relay.relay.routes["demo"].lobby.waiting("func1")]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("pieces", [False, True], ids=["in one", "byte by byte"])
async def test_the_header_names_the_caller(site: Site, version: int, pieces: bool) -> None:
    async with site.relay(BALANCED) as relay:
        start = header(version, "203.0.113.7")
        stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
        for piece in [start[at : at + 1] for at in range(len(start))] if pieces else [start]:
            await stream.send_all(piece)
            if pieces:
                await trio.lowlevel.checkpoint()
        one = Party(stream, site.context("func1"), "localhost")
        site.parties.append(one)
        await one.handshake()
        await one.join()
        await one.expect("WAITING")
        await eventually(lambda: addresses(relay) == ["203.0.113.7:40000"], "its own address")
        assert relay.logged("waiting", address="203.0.113.7:40000")


@pytest.mark.parametrize("unnamed", [LOCAL, UNKNOWN], ids=["LOCAL", "UNKNOWN"])
async def test_who_is_not_named_has_the_balancers_address(site: Site, unnamed: bytes) -> None:
    async with site.relay(BALANCED) as relay:
        one = await comes(site, relay, "func1", unnamed)
        await one.join()
        await one.expect("WAITING")
        await eventually(lambda: bool(addresses(relay)), "it waits")
        assert addresses(relay)[0].startswith("127.0.0.1:")


@pytest.mark.parametrize("start", [b"\x16\x03\x01\x00\x05hello", b"FRELAY/1 ", b"PROXY TCP4 nonsense\r\n"])
async def test_from_a_balancer_it_is_required(site: Site, start: bytes) -> None:
    async with site.relay(BALANCED) as relay:
        stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
        await stream.send_all(start)
        assert await ends(stream) == b""
        refused = await relay.log("refused", code="protocol-error")
        assert "PROXY header" in refused["reason"]


async def test_it_is_inside_the_handshakes_deadline(site: Site) -> None:
    async with site.relay(BALANCED, sections="[limits]\nhandshake_timeout = 0.3\n") as relay:
        stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
        await stream.send_all(b"PROXY TCP4 ")
        assert await ends(stream) == b""
        await relay.log("refused", reason="no PROXY header within 0.3 s")


@pytest.mark.parametrize("version", [1, 2])
async def test_from_elsewhere_it_is_garbage(site: Site, version: int) -> None:
    """Otherwise any caller could claim any address. Without a header, functions from there join as usual."""
    async with site.relay(BALANCED) as relay:
        stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port(), local_address="127.0.0.2")
        await stream.send_all(header(version, "203.0.113.7"))
        await ends(stream)
        refused = await relay.log("refused", code="protocol-error")
        assert refused["reason"].endswith("if they are a PROXY header, its sender is not in the route's proxy_protocol")
        assert refused["address"].startswith("127.0.0.2:")
        one = await comes(site, relay, "func1", b"", source="127.0.0.2")
        await one.join()
        await one.expect("WAITING")


async def test_a_ticket_comes_behind_a_header_too(site: Site) -> None:
    """No byte that follows is lost."""
    async with site.relay(BALANCED) as relay:
        one = await comes(site, relay, "func1", header(2, "203.0.113.7"))
        await one.join(modes=["ticket"])
        await one.expect("WAITING")
        two = await comes(site, relay, "func2", header(1, "203.0.113.8"))
        await two.join()
        await two.expect("WAITING")
        ticket = (await one.expect("PAIRED"))["ticket"]
        await two.expect("PAIRED")
        await two.hand_off()
        raw = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
        await raw.send_all(header(2, "203.0.113.7") + f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER + b"first")
        assert await two.receive_exactly(8) == TLS_HEADER + b"first"
        await raw.aclose()


async def test_allow_from_goes_by_the_header(site: Site) -> None:
    """The first bytes of a plain leg stay unread, and the balancer's own address lets nobody in."""
    async with site.relay(PLAIN) as relay:
        streams = []
        for number in (1, 2):
            stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
            await stream.send_all(header(number, f"203.0.113.{number}") + TLS_HEADER)
            streams.append(stream)
        for stream in streams:
            assert await stream.receive_some(3) == TLS_HEADER
        for start in (header(1, "198.51.100.9"), LOCAL, UNKNOWN):
            stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
            await stream.send_all(start)
            assert await ends(stream) == b""
        assert [event["reason"] for event in relay.logged("refused", code="not-authorised")] == [
            "address not in allow_from",
            *["the PROXY header names no address, so allow_from cannot admit it"] * 2,
        ]
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def test_limits_go_by_the_header(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one balancer a flooder uses up the turns of its own address only, and no function waits for it."""
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    limits = "[limits]\nmax_pre_auth_per_ip = 1\nhandshake_timeout = 600\n"
    async with site.relay(BALANCED, sections=limits) as relay:
        strangers = relay.relay.admission.strangers
        for _ in range(3):
            stream = await trio.open_tcp_stream("127.0.0.1", relay.own_port())
            flooder = Party(stream, site.context("func1"), "localhost")
            site.parties.append(flooder)
            with pytest.raises(Exception, match="did not complete"):
                flooder.tls.do_handshake()
            await stream.send_all(header(2, "203.0.113.66") + flooder.take_outgoing())
        await eventually(lambda: (strangers.running, strangers.held) == (1, 2), "one has its turn")
        one = await comes(site, relay, "func1", header(2, "203.0.113.7"))
        await one.join()
        await one.expect("WAITING")


@asynccontextmanager
async def haproxy(directory: Path, relay_port: int, how: str) -> AsyncIterator[int]:
    """HAProxy before the relay; gives its port."""
    with reserved_port() as port:
        config = directory / "haproxy.cfg"
        config.write_text(
            "defaults\n mode tcp\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n"
            f"listen balancer\n bind 127.0.0.1:{port}\n server relay 127.0.0.1:{relay_port} {how}\n"
        )
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(trio.run_process, [tool("haproxy"), "-db", "-q", "-f", str(config)], check=False)
            )
            try:
                yield port
            finally:
                process.kill()


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy(site: Site, how: str) -> None:
    async with site.relay(BALANCED) as relay, haproxy(site.directory, relay.own_port(), how) as port:
        parties = []
        for name, source in (("func1", "127.0.0.5"), ("func2", "127.0.0.6")):
            with trio.fail_after(TIMEOUT):
                while True:
                    try:
                        stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=source)
                        break
                    except OSError:
                        await trio.sleep(0.02)  # HAProxy has no way to say that it listens
            party = Party(stream, site.context(name), "localhost")
            site.parties.append(party)
            await party.handshake()
            await party.join()
            await party.expect("WAITING")
            parties.append(party)
        one, two = parties
        waiting = await relay.log("waiting", party="func1")
        assert waiting["address"] == "{}:{}".format(*one.socket.getsockname())
        for party in parties:
            await party.expect("PAIRED")
            await party.hand_off()
        await one.send_raw(TLS_HEADER + b"through both")
        assert await two.receive_exactly(15) == TLS_HEADER + b"through both"
