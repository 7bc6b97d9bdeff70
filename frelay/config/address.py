"""Addresses and networks: parsed strictly from text, so that one text means one thing.

The system's own parsers accept too much for a route file. ``getaddrinfo`` reads ``127.1`` and ``010.0.0.1`` as
addresses that a person would not expect, and an empty host as every address; ``ip_network`` reads
``10.0.0.0/0.0.0.255`` as a network with a mask. The parsers here refuse each of these, and the error says how to write
what was meant. Every address gets one canonical text, so that equal addresses compare equal.

A route listens on several addresses (:class:`Addresses`), and a service may have a Unix socket (:class:`UnixAddress`).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

__all__ = [
    "LOOPBACK",
    "MAX_UNIX_PATH",
    "Address",
    "Addresses",
    "Network",
    "UnixAddress",
    "ip_of",
    "parse_address",
    "parse_listen",
    "parse_network",
]

LOOPBACK: Final = ("127.0.0.1", "::1")
"""The addresses of ``localhost`` (RFC 6761, 6.3). We do not look into the hosts file."""

MAX_UNIX_PATH: Final = 107
"""The most bytes that the path of a Unix socket may have: ``sun_path`` of unix(7), less its NUL."""

Network = IPv4Network | IPv6Network

_HOST_AND_PORT: Final = re.compile(r"(?:\[(?P<inner>[^\[\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})\Z")
_HOST_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
# getaddrinfo() reads "127.1", "0x7f.1" and "010.0.0.1" as IPv4 addresses, but as others than a person expects.
_NUMERIC_LABEL: Final = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_MAX_HOST: Final = 253
_SCOPE: Final = re.compile(r"[A-Za-z0-9._-]{1,15}\Z")  # an interface's name: IFNAMSIZ less its NUL


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host and a port; ``str()`` gives ``127.0.0.1:9001`` or ``[::1]:9001``.

    ``host`` is an IP address in its canonical text, without brackets, or a host name in lower case. Port 0 means
    any free port. :func:`parse_address` makes one from text and enforces these rules; the class checks nothing.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wide(self) -> bool:
        """Whether it may overlap addresses other than itself. If two different addresses overlap, one is wide."""
        ip = ip_of(self.host)
        return self.host == "localhost" if ip is None else ip.is_unspecified

    def overlaps(self, other: Address) -> bool:
        """Whether the kernel could not bind both: they are equal, or one is a wildcard that covers the other.

        ``0.0.0.0`` and ``[::]`` do not overlap, since frelay binds IPv6 sockets with IPV6_V6ONLY. No name is resolved
        here: only the addresses of ``localhost`` are known, and a wildcard is taken to cover every other name.
        """
        if self.port != other.port or self.port == 0:
            return False
        if self.host == other.host:
            return True
        mine, theirs = ip_of(self.host), ip_of(other.host)
        if mine is not None and theirs is not None:
            return mine.version == theirs.version and (mine.is_unspecified or theirs.is_unspecified)
        return _reaches(mine, other.host) or _reaches(theirs, self.host)


def _reaches(address: IPv4Address | IPv6Address | None, name: str) -> bool:
    """Whether ``address`` covers an address of the host ``name``, which is no IP address."""
    if address is None:
        return False
    return address.is_unspecified or (name == "localhost" and str(address) in LOOPBACK)


class Addresses(tuple[Address, ...]):
    """Where a route listens: one address or several, in the order of the file; ``str()`` gives all of them."""

    __slots__ = ()

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def as_toml(self) -> str | list[str]:
        """How a route file writes it: text for one, a list for several."""
        return str(self[0]) if len(self) == 1 else [str(address) for address in self]


@dataclass(frozen=True, slots=True, order=True)
class UnixAddress:
    """A Unix socket's path; ``str()`` gives ``unix:/run/postgresql/.s.PGSQL.5432``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def ip_of(host: str) -> IPv4Address | IPv6Address | None:
    """``host`` as an IP address, or None if it is a host name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def parse_address(text: str) -> Address:
    """Read ``HOST:PORT``: an IPv4 address, an IPv6 address in brackets, or a host name; port 0 to 65535.

    A dot at the end of a host name is kept: it tells a resolver to append no search domain. Only ``localhost.`` becomes
    ``localhost``, since that name is not resolved.

    Raises:
        ValueError: says what is wrong with ``text`` and how to write it.
    """
    found = _HOST_AND_PORT.match(text)
    if found is None:
        if text.count(":") > 1 and "[" not in text:
            raise ValueError(f"{text!r}: write an IPv6 address in brackets, as in [::1]:9001")
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, as in 127.0.0.1:9001 or [::1]:9001")
    port = int(found["port"])
    if port > 65535:
        raise ValueError(f"{text!r}: a port is at most 65535")
    if found["inner"] is not None:
        return Address(_ipv6_text(text, found["inner"]), port)
    host = found["host"].lower()
    if host in ("", "*"):
        raise ValueError(
            f"{text!r} names no host: write 0.0.0.0:{port} for every IPv4 address, [::]:{port} for every IPv6 one"
        )
    labels = host.removesuffix(".").split(".")
    if _NUMERIC_LABEL.match(labels[-1]):
        try:
            return Address(str(IPv4Address(host)), port)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an IPv4 address") from None
    if len(host) > _MAX_HOST or not all(_HOST_LABEL.match(label) for label in labels):
        raise ValueError(f"{text!r}: {host!r} is neither an IP address nor a host name")
    return Address("localhost" if host == "localhost." else host, port)


def parse_listen(text: str) -> Address:
    """As :func:`parse_address`, for an address to listen on: ``relay.acme.`` becomes ``relay.acme``, its equal."""
    address = parse_address(text)
    return Address(address.host.removesuffix("."), address.port)


def _ipv6_text(text: str, inner: str) -> str:
    try:
        address = IPv6Address(inner)
    except ValueError:
        raise ValueError(f"{text!r}: {inner!r} is not an IPv6 address") from None
    if address.scope_id is not None and not _SCOPE.match(address.scope_id):
        raise ValueError(f"{text!r}: {address.scope_id!r} is not the name of a network interface")
    return str(address)


def parse_network(text: str) -> Network:
    """Read ``ADDRESS/BITS`` or a single address, as for ``allow_from``.

    Raises:
        ValueError: says what is wrong with ``text`` and how to write it.
    """
    base, slash, bits = text.partition("/")
    # ip_network() would also read 10.0.0.0/0.0.0.255: with a mask, a typing error may admit far more than it seems.
    if "%" in base or (slash and not (bits.isascii() and bits.isdigit())):
        raise ValueError(f"{text!r} is not a network: write ADDRESS/BITS, as in 10.0.0.0/8")
    try:
        network = ipaddress.ip_network(text, strict=False)
        address = ipaddress.ip_address(base)
    except ValueError:
        raise ValueError(f"{text!r} is not a network: write ADDRESS/BITS, as in 10.0.0.0/8") from None
    if address != network.network_address:
        raise ValueError(f"{text!r} has bits set after its prefix: write {network} if you mean the whole network")
    return network
