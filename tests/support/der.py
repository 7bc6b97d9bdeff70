"""DER by hand, for certificates that ``cryptography`` would not write."""

from __future__ import annotations

import base64
from collections.abc import Iterable

__all__ = ["content", "der", "elements", "pem", "san_der"]


def der(tag: int, content: bytes) -> bytes:
    """One DER element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def pem(octets: bytes, label: str = "CERTIFICATE") -> bytes:
    """DER as PEM."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(octets).decode()}-----END {label}-----\n".encode()


def elements(octets: bytes) -> list[bytes]:
    """The DER elements of which ``octets`` consist."""
    found = []
    while octets:
        end = len(octets) - len(_behind(octets))
        found.append(octets[:end])
        octets = octets[end:]
    return found


def content(element: bytes) -> bytes:
    """What stands in one DER element."""
    return element[_header(element)[0] :]


def _header(element: bytes) -> tuple[int, int]:
    """The length of the header, and of what follows it."""
    if element[1] < 0x80:
        return 2, element[1]
    octets = element[1] - 0x80
    return 2 + octets, int.from_bytes(element[2 : 2 + octets], "big")


def _behind(octets: bytes) -> bytes:
    return octets[sum(_header(octets)) :]


def san_der(
    *, dns: Iterable[bytes] = (), uris: Iterable[bytes] = (), emails: Iterable[bytes] = (), raw: bytes = b""
) -> bytes:
    """A subjectAltName of any octets at all; ``raw`` goes in at the end as it is."""
    names = [der(0x82, one) for one in dns] + [der(0x86, one) for one in uris] + [der(0x81, one) for one in emails]
    return der(0x30, b"".join(names) + raw)
