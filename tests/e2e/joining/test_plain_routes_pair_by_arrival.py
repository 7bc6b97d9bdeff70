"""`outer = "none"`: only allow_from decides who gets in, and a function that is in is paired with the next."""

from __future__ import annotations

import socket
import struct

import pytest
import trio

from support.party import TLS_HEADER
from support.relay import RelayInProcess
from support.site import Site
from support.streams import read_to_end
from support.waiting import eventually


def plain(*networks: str, more: str = "", listen: str = "127.0.0.1:0") -> str:
    listed = ", ".join(f'"{network}"' for network in networks)
    return f"""
[[route]]
name = "demo"
listen = "{listen}"
outer = "none"
allow_from = [{listed}]
{more}
"""


async def dial(relay: RelayInProcess, host: str = "127.0.0.1", source: str | None = None) -> trio.SocketStream:
    return await trio.open_tcp_stream(host, relay.port(), local_address=source)


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    found = b""
    with trio.fail_after(20):
        while len(found) < count:
            data = await stream.receive_some(count - len(found))
            assert data, f"EOF after {found!r}"
            found += data
    return found


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@pytest.mark.parametrize(
    "networks",
    [["127.0.0.0/8"], ["127.0.0.1/32"], ["10.0.0.0/8", "127.0.0.1/32"], ["0.0.0.0/0"]],
    ids=lambda networks: "+".join(networks),
)
async def test_an_address_inside_is_let_in(site: Site, networks: list[str]) -> None:
    async with site.relay(plain(*networks)) as relay:
        one, two = await dial(relay), await dial(relay)
        await one.send_all(TLS_HEADER + b"to two")
        await two.send_all(TLS_HEADER + b"to one!")
        assert await exactly(two, 9) == TLS_HEADER + b"to two"
        assert await exactly(one, 10) == TLS_HEADER + b"to one!"
        await one.send_eof()
        assert await two.receive_some(1) == b""
        await two.aclose()
        await one.aclose()
        ended = await relay.outcome()
        assert ended["outcome"] == "closed"
        assert ended["func1"].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    "networks",
    [["10.0.0.0/8"], ["127.0.0.2/32"], ["128.0.0.0/8"], ["::1/128"], ["::/0"]],
    ids=lambda networks: "+".join(networks),
)
async def test_an_address_outside_is_closed_without_a_byte(site: Site, networks: list[str]) -> None:
    async with site.relay(plain(*networks)) as relay:
        for _ in range(3):
            stream = await dial(relay)
            assert await read_to_end(stream) == b""
            await stream.aclose()
        await eventually(lambda: relay.legs == 0, "their slots free")
        assert relay.waiting() == (0, 0)
        assert len(relay.logged("refused", route="demo", code="not-authorised")) == 3


async def test_one_inside_is_not_paired_with_one_outside(site: Site) -> None:
    async with site.relay(plain("127.0.0.1/32")) as relay:
        inside = await dial(relay)
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        outside = await dial(relay, source="127.0.0.2")
        await outside.send_all(TLS_HEADER + b"let me in")
        assert await read_to_end(outside) == b""
        assert relay.waiting() == (1, 0)
        assert not relay.relay.pairings
        await inside.aclose()
        await outside.aclose()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
async def test_ipv6_is_judged_by_its_own_networks(site: Site) -> None:
    async with site.relay(plain("::1/128", listen="[::1]:0")) as relay:
        one, two = await dial(relay, "::1"), await dial(relay, "::1")
        await one.send_all(TLS_HEADER)
        assert await exactly(two, 3) == TLS_HEADER
        await one.aclose()
        await two.aclose()
    async with site.relay(plain("127.0.0.0/8", listen="[::1]:0")) as relay:
        stream = await dial(relay, "::1")
        assert await read_to_end(stream) == b""
        await stream.aclose()


async def test_they_are_paired_two_by_two_in_their_order(site: Site) -> None:
    async with site.relay(plain("127.0.0.1/32")) as relay:
        streams = []
        for number in range(6):
            streams.append(await dial(relay))
            half = (number + 1) % 2
            await eventually(lambda half=half: relay.waiting() == (half, 0), "its place or its pairing")  # type: ignore[misc]
        for number in (0, 2, 4):
            await streams[number].send_all(TLS_HEADER + bytes([number]))
            assert await exactly(streams[number + 1], 4) == TLS_HEADER + bytes([number])
        assert len(relay.relay.pairings) == 3
        for stream in streams:
            await stream.aclose()


@pytest.mark.parametrize("goodbye", ["FIN", "RST", "early data and RST"])
async def test_a_waiter_that_goes_frees_its_place(site: Site, goodbye: str) -> None:
    limits = "[limits]\nping_interval = 0.1\nmax_waiting_per_party = 1\n"
    async with site.relay(plain("127.0.0.1/32"), sections=limits) as relay:
        for _ in range(3):
            stream = await dial(relay)
            await eventually(lambda: relay.waiting() == (1, 0), "its place")
            if goodbye == "FIN":
                await stream.aclose()
            else:
                if goodbye != "RST":
                    await stream.send_all(TLS_HEADER + bytes(1000))
                reset(stream)
            await eventually(lambda: relay.waiting() == (0, 0) and relay.legs == 0, "its place free")
        one, two = await dial(relay), await dial(relay)
        await one.send_all(TLS_HEADER)
        assert await exactly(two, 3) == TLS_HEADER
        await one.aclose()
        await two.aclose()


async def test_early_data_waits_for_the_partner(site: Site) -> None:
    """TESTPLAN 30."""
    async with site.relay(plain("127.0.0.1/32")) as relay:
        one = await dial(relay)
        await one.send_all(TLS_HEADER + b"early" * 2000)
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        two = await dial(relay)
        assert await exactly(two, 10003) == TLS_HEADER + b"early" * 2000
        await one.aclose()
        await two.aclose()


async def test_plaintext_does_not_cross(site: Site) -> None:
    """PROTOCOL 8: require_inner_tls holds here too."""
    async with site.relay(plain("127.0.0.1/32")) as relay:
        one, two = await dial(relay), await dial(relay)
        await one.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert await read_to_end(two) == b""
        ended = await relay.outcome()
        assert (ended["outcome"], ended["bytes_func1_to_func2"]) == ("not-tls", 0)
        await one.aclose()
        await two.aclose()


async def test_plaintext_crosses_where_the_route_says_so(site: Site) -> None:
    async with site.relay(plain("127.0.0.1/32", more="require_inner_tls = false")) as relay:
        one, two = await dial(relay), await dial(relay)
        await one.send_all(b"GET /")
        assert await exactly(two, 5) == b"GET /"
        await one.aclose()
        await two.aclose()


@pytest.mark.load
async def test_a_wait_without_a_partner_ends_in_time(site: Site) -> None:
    """TESTPLAN 32."""
    async with site.relay(plain("127.0.0.1/32", more="wait_timeout = 0.3")) as relay:
        began = trio.current_time()
        stream = await dial(relay)
        assert await read_to_end(stream) == b""
        assert trio.current_time() - began >= 0.3
        await relay.log("refused", code="wait-timeout")
        await stream.aclose()
        await eventually(lambda: relay.legs == 0, "its slot free")


async def test_a_drain_and_a_removal_send_the_waiter_away(site: Site) -> None:
    async with site.relay(plain("127.0.0.1/32")) as relay:
        stream = await dial(relay)
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        site.write(plain("127.0.0.1/32", "10.0.0.0/8"))
        await relay.relay.reload()
        assert await read_to_end(stream) == b""
        await relay.log("refused", code="route-removed")
        await stream.aclose()
        stream = await dial(relay)
        await eventually(lambda: relay.waiting() == (1, 0), "its place on the new route")
        relay.relay.drain(reason="maintenance")
        assert await read_to_end(stream) == b""
        await relay.log("refused", code="draining")
        await stream.aclose()
