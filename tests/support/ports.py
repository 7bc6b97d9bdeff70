"""Ports of 127.0.0.1 that a test must know before a program listens there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["free_port", "reserved_port"]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given meanwhile: for routes that share an address, which 0 never is."""
    with socket.socket() as sock:
        # Bound but not listening: with SO_REUSEADDR on both the relay may bind it too, and port 0 never gives it out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot be asked which one they have taken."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
