"""Binds listening sockets: resolves a listen address to its IP addresses, and listens on each.

``localhost`` always means 127.0.0.1 and ::1 (RFC 6761, 6.3), whatever the hosts file says, so that a function finds the
relay at either of the two. A machine may lack one of them; one is enough.
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

# A burst of 5,000 connects must fit into the kernel's queue. Linux limits this to net.core.somaxconn.
_BACKLOG: Final = 4096
_TO_BIND: Final = socket.AI_PASSIVE | socket.AI_NUMERICSERV
# The machine does not have this protocol, or this address.
_ABSENT: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})
# With port 0 the kernel chooses a free port on the first IP address, and the second must use the same. If it is in use
# there, try again with another port.
_ATTEMPTS: Final = 16


async def resolve(address: Address) -> tuple[Address, ...]:
    """The addresses that ``address`` means, with IP addresses as hosts. Waits only if its host is a name.

    Raises OSError.
    """
    if address.host == "localhost":
        return addresses_of(address)
    found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=_TO_BIND)
    hosts = [f"{host}%{scope[1]}" if any(scope[1:]) else str(host) for *_, (host, _, *scope) in found]
    return tuple(Address(host, address.port) for host in dict.fromkeys(hosts))


def addresses_of(address: Address) -> tuple[Address, ...]:
    """The addresses that ``address`` means; as :func:`resolve`, but only ``localhost`` is resolved."""
    return tuple(Address(host, address.port) for host in LOOPBACK) if address.host == "localhost" else (address,)


def bind(address: Address, resolved: Sequence[Address] = ()) -> list[socket.socket]:
    """Bind and listen on ``address``; raises OSError with nothing left bound.

    ``resolved`` is what :func:`resolve` returned for it. Without it, this function resolves a name itself, which
    blocks. If the machine has only one address of ``localhost``, the other is left out, and a warning is logged.
    """
    is_local = address.host == "localhost"
    resolved = resolved or addresses_of(address)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _bind_all(address, resolved, is_local=is_local)
        except OSError as error:
            if address.port != 0 or error.errno != errno.EADDRINUSE:
                raise
    return _bind_all(address, resolved, is_local=is_local)


def _bind_all(address: Address, resolved: Iterable[Address], *, is_local: bool) -> list[socket.socket]:
    bound: list[socket.socket] = []
    absent: list[tuple[str, OSError]] = []
    try:
        for one in resolved:
            port = bound[0].getsockname()[1] if bound else one.port
            try:
                for found in _information(one.host, port):
                    bound.append(_bind_one(*found))
            except OSError as error:
                if not is_local or error.errno not in _ABSENT:
                    raise
                absent.append((one.host, error))
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
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in dict.fromkeys(found)]


def _bind_one(
    family: socket.AddressFamily, kind: socket.SocketKind, protocol: int, address: tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        # Without this option a restart would fail while connections of the relay before it are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # [::] must not include 0.0.0.0: a route listens on the addresses that its file names, and on no others.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_failure(address: Address, error: OSError | ValueError) -> str:
    """Why ``address`` cannot be bound, in words for a person, with the remedy if it is known."""
    text = str(getattr(error, "strerror", None) or error)
    if isinstance(error, OSError) and error.errno in _ABSENT and ":" in address.host:
        if address.host == "::" or error.errno != errno.EADDRNOTAVAIL:
            return f"{text}: this machine has no IPv6; leave this address out, or turn IPv6 on"
        return f"{text}: this machine does not have this IPv6 address"
    return text
