"""Listening sockets: which IP addresses the host of an address stands for, and how they are bound.

``localhost`` is 127.0.0.1 and ::1 (RFC 6761, 6.3), whatever a hosts file says, so that a function finds the relay there
whichever of the two it tries. A machine may lack one of them: what ``localhost`` needs is one.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from typing import Final

import structlog
import trio

from frelay.config.address import LOOPBACK
from frelay.config.model import Address

__all__ = ["addresses_of", "bind", "bind_failure", "resolve"]

# Linux caps it at net.core.somaxconn anyway; a burst of 5,000 connects must find room in the kernel, not in us.
_BACKLOG: Final = 4096
_TO_BIND: Final = socket.AI_PASSIVE | socket.AI_NUMERICSERV
# The machine has no such protocol, or no such address.
_ABSENT: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})
# Port 0 of an address with two IP addresses shall be the same port of both; it may be taken on the second.
_ATTEMPTS: Final = 16


async def resolve(address: Address) -> tuple[Address, ...]:
    """What ``address`` stands for, with IP addresses as hosts; raises OSError. Waits only where its host is a name."""
    if address.host == "localhost":
        return addresses_of(address)
    found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=_TO_BIND)
    hosts = [f"{host}%{scope[1]}" if any(scope[1:]) else str(host) for *_, (host, _, *scope) in found]
    return tuple(Address(host, address.port) for host in dict.fromkeys(hosts))


def addresses_of(address: Address) -> tuple[Address, ...]:
    """As :func:`resolve`, but a name other than ``localhost`` stays a name."""
    return tuple(Address(host, address.port) for host in LOOPBACK) if address.host == "localhost" else (address,)


def bind(address: Address, places: Sequence[Address] = ()) -> list[socket.socket]:
    """Bind and listen on ``address``; raises OSError with nothing left bound.

    ``places`` are what :func:`resolve` gave for it. Without them this looks up a name, which blocks. Of ``localhost``
    the addresses that this machine does not have are left out, and logged, as long as there is one.
    """
    is_local = address.host == "localhost"
    places = places or addresses_of(address)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _bind_all(address, places, is_local=is_local)
        except OSError as error:
            if address.port != 0 or error.errno != errno.EADDRINUSE:
                raise
    return _bind_all(address, places, is_local=is_local)


def _bind_all(address: Address, places: Iterable[Address], *, is_local: bool) -> list[socket.socket]:
    bound: list[socket.socket] = []
    absent: list[tuple[str, OSError]] = []
    try:
        for place in places:
            port = bound[0].getsockname()[1] if bound else place.port
            try:
                for found in _information(place.host, port):
                    bound.append(_bind_one(*found))
            except OSError as error:
                if not is_local or error.errno not in _ABSENT:
                    raise
                absent.append((place.host, error))
        if absent and not bound:
            raise absent[0][1]
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    for missing, why in absent:
        structlog.get_logger("frelay.listener").warning(
            "not all of localhost is there", listen=str(address), missing=missing, reason=why.strerror
        )
    return bound


def _information(host: str, port: int) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, tuple[object, ...]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=_TO_BIND)
    return [(family, kind, protocol, place) for family, kind, protocol, _, place in dict.fromkeys(found)]


def _bind_one(
    family: socket.AddressFamily, kind: socket.SocketKind, protocol: int, place: tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        # Without it a restart would wait for the TIME_WAIT of the connections before it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # [::] must not take 0.0.0.0 with it: a route file says what it means.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_failure(address: Address, error: OSError | ValueError) -> str:
    """Why ``address`` cannot be bound, for a person, with the remedy where it is known."""
    text = str(getattr(error, "strerror", None) or error)
    if isinstance(error, OSError) and error.errno in _ABSENT and ":" in address.host:
        if address.host == "::" or error.errno != errno.EADDRNOTAVAIL:
            return f"{text}: this machine has no IPv6; leave this address out, or turn IPv6 on"
        return f"{text}: this machine does not have this IPv6 address"
    return text
