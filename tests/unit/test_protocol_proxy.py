"""PROXY headers are read exactly, to the byte where they end; anything else is refused."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.errors import RemoteProtocolError
from frelay.protocol.proxy import LONGEST_HEADER, ProxyHeader, parse_proxy_header

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
ports = st.integers(0, 65535)
hosts = st.ip_addresses(v=4) | st.ip_addresses(v=6)


def v1(source: object, destination: object, port: int, to: int, family: str) -> bytes:
    return f"PROXY {family} {source} {destination} {port} {to}\r\n".encode()


def v2(kind: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", kind, family, len(body)) + body


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, tuple[str, int] | None]:
    """A header in the form of the specification, and the client that it names."""
    source = draw(hosts)
    destination = draw(st.ip_addresses(v=source.version))
    port, to = draw(ports), draw(ports)
    family = "TCP4" if source.version == 4 else "TCP6"
    named = (str(source), port)
    more = draw(st.binary(max_size=200))
    match draw(st.sampled_from(["v1", "v1 unknown", "v2", "v2 local", "v2 unspecified", "v2 unix"])):
        case "v1":
            return v1(source, destination, port, to, family), named
        case "v1 unknown":
            return draw(st.sampled_from([b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ::1 ::1 1 2\r\n"])), None
        case "v2":
            body = source.packed + destination.packed + struct.pack("!HH", port, to) + more
            return v2(0x21, 0x11 if source.version == 4 else 0x21, body), named
        case "v2 local":
            return v2(0x20, draw(st.integers(0, 255)), more), None
        case "v2 unspecified":
            return v2(0x21, 0x00, more), None
        case _:
            return v2(0x21, 0x31, bytes(216) + more), None


def test_an_address_is_written_the_same_in_both_versions() -> None:
    mapped = ipaddress.IPv6Address("::ffff:192.0.2.1")
    for header in (
        v1("::ffff:c000:201", mapped, 1, 2, "TCP6"),
        v2(0x21, 0x21, mapped.packed + mapped.packed + struct.pack("!HH", 1, 2)),
    ):
        found = parse_proxy_header(header)
        assert isinstance(found, ProxyHeader)
        assert found.source == (str(mapped), 1)


@given(headers(), st.binary(max_size=50))
def test_a_header_ends_where_it_ends(header: tuple[bytes, tuple[str, int] | None], behind: bytes) -> None:
    data, source = header
    found = parse_proxy_header(data + behind)
    assert isinstance(found, ProxyHeader)
    assert (found.length, found.source) == (len(data), source)


@given(headers())
def test_it_asks_for_no_more_than_the_header_has(header: tuple[bytes, tuple[str, int] | None]) -> None:
    """Otherwise the relay would wait for bytes that the caller sends only after an answer."""
    data, _ = header
    for length in range(1, len(data)):
        needed = parse_proxy_header(data[:length])
        assert isinstance(needed, int)
        assert length < needed <= len(data)


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]), st.binary(max_size=600))
def test_whatever_comes_it_says_so_or_raises_the_one_error(start: bytes, data: bytes) -> None:
    try:
        found = parse_proxy_header(start + data)
    except RemoteProtocolError:
        return
    if isinstance(found, ProxyHeader):
        assert found.length <= LONGEST_HEADER
        if found.source is not None:
            ipaddress.ip_address(found.source[0])
    else:
        assert len(start + data) < found <= LONGEST_HEADER


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 \xff\r\n",
        b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
        SIGNATURE + b"\x21\x21\x00\x23" + bytes(35),
        SIGNATURE + struct.pack("!BBH", 0x21, 0x11, LONGEST_HEADER - 15),
    ],
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="PROXY header"):
        parse_proxy_header(data)


def test_the_longest_lines() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(longest) == 107
    assert parse_proxy_header(longest) == ProxyHeader(107, None)
