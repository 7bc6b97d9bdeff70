"""Connections by Unix sockets, to services on the relay's own machine.

What is different from TCP, for who reads the rest of the relay (unix(7), ``net/unix/af_unix.c``):

* A full queue of the listener is EAGAIN at once, where TCP would wait.
* There is no RST. A close tells the other side ECONNRESET only if input was left unread here; otherwise its next read
  gives the end, and its next write EPIPE. So a service cannot always tell a cut from an end by the socket alone.
* What was written is in the other side's queue at once, and stays there when this side closes.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

__all__ = ["connect_unix"]

# How soon a listener with a full queue is asked again, in seconds: the kernel tells nobody when there is room.
_PAUSE: Final = 0.02


async def connect_unix(path: str) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError; waits, as long as the listener's queue is full."""
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
