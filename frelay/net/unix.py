"""Connects to Unix sockets: services on the relay's own machine.

They differ from TCP (unix(7), ``net/unix/af_unix.c``):

* If the listener's queue is full, connect() fails with EAGAIN at once, where TCP would wait.
* There is no RST. A close reports ECONNRESET to the other side only if input was left unread here. Otherwise the other
  side's next read returns EOF, and its next write fails with EPIPE. So a service cannot always know from the socket
  whether the data is complete.
* Written bytes are in the other side's queue at once, and stay there when this side closes.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

__all__ = ["connect_unix"]

# Seconds between two tries while the listener's queue is full: the kernel does not report when there is room.
_PAUSE: Final = 0.02


async def connect_unix(path: str) -> socket.socket:
    """A connected, non-blocking socket. Waits while the listener's queue is full. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        while True:
            await trio.lowlevel.checkpoint()
            try:
                sock.connect(path)
            except BlockingIOError:
                await trio.sleep(_PAUSE)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
