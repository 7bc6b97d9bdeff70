"""Ports of 127.0.0.1 that a test must know before a program listens there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["free_port", "reserved_port"]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else gets: for routes that share an address, where port 0 will not do."""
    with socket.socket() as sock:
        # Bound, not listening: with SO_REUSEADDR on both, the relay can bind it too. The kernel gives it to nobody
        # else.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot tell which port they have bound."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
