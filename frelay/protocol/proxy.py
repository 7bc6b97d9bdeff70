"""The PROXY protocol, versions 1 and 2, as a relay behind a load balancer reads it. Sans-I/O.

The header is the first thing on a connection, and says for which client the balancer opened it. Source:
https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from frelay.errors import RemoteProtocolError

__all__ = ["LONGEST_HEADER", "PROXY_SIGNATURES", "ProxyHeader", "parse_proxy_header"]

LONGEST_HEADER: Final = 536
"""Bytes of the longest header that we accept: the limit that version 2 of the specification sets for senders."""
_V1: Final = b"PROXY "
# With its line end; from the specification.
_LONGEST_V1: Final = 107
_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_START: Final = len(_V2) + 4
PROXY_SIGNATURES: Final = (_V1, _V2)

_PORT: Final = r"(0|[1-9][0-9]{0,4})"
_V1_LINE: Final = re.compile(rf"PROXY (TCP4|TCP6) ([0-9a-fA-F.:]+) ([0-9a-fA-F.:]+) {_PORT} {_PORT}")
_V1_UNKNOWN: Final = re.compile(r"PROXY UNKNOWN( [\x20-\x7e]*)?")

_LOCAL: Final = 0
_PROXY: Final = 1
_UNSPECIFIED: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX_STREAM: Final = 0x31


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A whole header of ``length`` bytes.

    ``source`` is the client's IP address and port. It is None if the balancer names no client: for its own health check
    (LOCAL), or for a connection without an IP address (UNKNOWN, a Unix socket).
    """

    length: int
    source: tuple[str, int] | None


def parse_proxy_header(data: bytes) -> ProxyHeader | int:
    """The header at the beginning of ``data``; or, if more data is needed, how many bytes at least in all.

    Raises RemoteProtocolError as soon as ``data`` cannot be the beginning of a header.
    """
    if data.startswith(_V2[: len(data)]):
        return _parse_v2(data)
    if data.startswith(_V1[: len(data)]):
        return _parse_v1(data)
    raise RemoteProtocolError("PROXY header expected: the balancer must send one on each connection")


def _parse_v1(data: bytes) -> ProxyHeader | int:
    end = data.find(b"\r\n", 0, _LONGEST_V1)
    if end == -1:
        if len(data) >= _LONGEST_V1:
            raise RemoteProtocolError(f"PROXY header: no end of the line within {_LONGEST_V1} bytes")
        return len(data) + 1
    length = end + 2
    try:
        line = data[:end].decode("ascii")
    except UnicodeDecodeError:
        raise RemoteProtocolError("PROXY header: the line is not ASCII") from None
    if _V1_UNKNOWN.fullmatch(line):
        return ProxyHeader(length, None)
    found = _V1_LINE.fullmatch(line)
    if found is None:
        raise RemoteProtocolError("PROXY header: the line is not in the form of version 1")
    family, source, destination, port, other_port = found.groups()
    kind = ipaddress.IPv4Address if family == "TCP4" else ipaddress.IPv6Address
    try:
        host = str(kind(source))
        kind(destination)
    except ValueError:
        raise RemoteProtocolError(f"PROXY header: an address does not belong to {family}") from None
    if max(int(port), int(other_port)) > 65535:
        raise RemoteProtocolError("PROXY header: a port beyond 65535")
    return ProxyHeader(length, (host, int(port)))


def _parse_v2(data: bytes) -> ProxyHeader | int:
    if len(data) < _V2_START:
        return _V2_START
    kind, family = data[len(_V2)], data[len(_V2) + 1]
    rest = int.from_bytes(data[len(_V2) + 2 : _V2_START], "big")
    version, command = kind >> 4, kind & 0x0F
    if version != 2 or command not in (_LOCAL, _PROXY):
        raise RemoteProtocolError(f"PROXY header: version and command 0x{kind:02x} are unknown")
    length = _V2_START + rest
    if length > LONGEST_HEADER:
        raise RemoteProtocolError(f"PROXY header: {length} bytes, more than {LONGEST_HEADER}")
    size = {_TCP4: 12, _TCP6: 36}.get(family, 0)
    if command == _PROXY:
        if family not in (_UNSPECIFIED, _TCP4, _TCP6, _UNIX_STREAM):
            raise RemoteProtocolError(f"PROXY header: family and transport 0x{family:02x} are not those of a stream")
        if rest < size:
            raise RemoteProtocolError("PROXY header: too short for its addresses")
    if len(data) < length:
        return length
    if command == _LOCAL or not size:
        return ProxyHeader(length, None)
    # After the addresses come TLVs; we use none of them.
    where = data[_V2_START : _V2_START + size]
    # Both versions write an address by the same library, so it looks the same in the log.
    if family == _TCP4:
        return ProxyHeader(length, (str(ipaddress.IPv4Address(where[:4])), int.from_bytes(where[8:10], "big")))
    return ProxyHeader(length, (str(ipaddress.IPv6Address(where[:16])), int.from_bytes(where[32:34], "big")))
