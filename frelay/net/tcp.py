"""Asks Linux about the state of a TCP connection. Standard library only, because relay and client use it.

Sources: tcp(7); the numbers are from ``include/uapi/linux/sockios.h`` and ``include/net/tcp_states.h``; ``tcp_reset``
in ``net/ipv4/tcp_input.c`` says how a reset is reported.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from typing import Final

__all__ = ["has_sent_end", "is_after_end", "is_dead", "is_open", "shutdown_failure", "take_error", "unacknowledged"]

_SIOCOUTQ: Final = 0x5411
_TCP_ESTABLISHED: Final = 1
_TCP_CLOSE: Final = 7
# The states after the other side's FIN: TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING.
_AFTER_FIN: Final = frozenset({6, 8, 9, 11})


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes written to ``sock`` the other side has not acknowledged yet; a FIN counts as one.

    Closing with unread input, or by RST, discards them. 0 if the system cannot tell, and for a Unix socket, where
    written bytes are already in the other side's queue.
    """
    if sock.family == socket.AF_UNIX:
        return 0
    answer = struct.pack("i", 0)
    try:
        answer = fcntl.ioctl(sock.fileno(), _SIOCOUTQ, answer)
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])


def is_dead(sock: socket.socket) -> bool:
    """Whether the connection has ended for the kernel: reset, timed out, or closed by both sides and acknowledged."""
    if sock.family == socket.AF_UNIX:
        poll = select.poll()
        poll.register(sock, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:
        return True


def has_sent_end(sock: socket.socket) -> bool:
    """Whether the other side's FIN has arrived here, perhaps behind unread bytes.

    False for a connection that has ended: then the kernel cannot tell any more.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _AFTER_FIN
    except OSError:
        return False


def is_open(sock: socket.socket) -> bool:
    """Whether neither side has ended the connection in any way since it was accepted."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED
    except OSError:
        return False


def take_error(sock: socket.socket) -> OSError | None:
    """How the connection broke, if not reported yet. Reads and clears SO_ERROR; a later recv() returns EOF."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None


def is_after_end(error: OSError) -> bool:
    """Whether a write failed with ``error`` because of a reset that came after the other side's FIN.

    If so, no byte that the other side sent is lost.

    ``error`` must be the first error of the connection: EPIPE after a FIN, and ECONNRESET otherwise. Later writes fail
    with EPIPE in both cases.
    """
    return error.errno == errno.EPIPE


def shutdown_failure(sock: socket.socket, error: OSError) -> OSError:
    """The real error behind the ``error`` of a failed ``shutdown()``, which is ENOTCONN whatever happened before."""
    return take_error(sock) or error
