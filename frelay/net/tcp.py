"""What Linux knows about a TCP connection, asked of the socket. Standard library only, for both ends of a leg.

Sources: tcp(7), for the numbers ``include/uapi/linux/sockios.h`` and ``include/net/tcp_states.h``, and for what a reset
is told as ``tcp_reset`` in ``net/ipv4/tcp_input.c``.
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
# TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: the states after the other side's FIN.
_AFTER_FIN: Final = frozenset({6, 8, 9, 11})


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes (a FIN counts as one) were written to ``sock`` and not acknowledged by the other side yet.

    Closing a socket with unread input, or by RST, throws these away. 0 where the system cannot tell, and for a Unix
    socket: what was written to one is the other side's already.
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
    """Whether the connection is over for the kernel (reset, timed out, or closed both ways and acknowledged)."""
    if sock.family == socket.AF_UNIX:
        poll = select.poll()
        poll.register(sock, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:
        return True


def has_sent_end(sock: socket.socket) -> bool:
    """Whether the other side's FIN is in this kernel already, behind bytes that may still be unread.

    False for a connection that is over: then nobody can tell.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _AFTER_FIN
    except OSError:
        return False


def is_open(sock: socket.socket) -> bool:
    """Whether the connection is as it was accepted: neither side has ended it in any way."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED
    except OSError:
        return False


def take_error(sock: socket.socket) -> OSError | None:
    """How the connection broke, if nobody was told yet. Asked once, it is gone: to who reads then, it is an end."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None


def is_after_end(error: OSError) -> bool:
    """Whether a connection that can't be written to was reset after the other side's FIN: nothing it sent is lost.

    ``error`` must be the first that the connection tells. That is EPIPE after a FIN and ECONNRESET else; whoever writes
    after that is told EPIPE in either case.
    """
    return error.errno == errno.EPIPE


def shutdown_failure(sock: socket.socket, error: OSError) -> OSError:
    """What ``shutdown`` has met that failed with ``error``: it says ENOTCONN of whatever has happened."""
    return take_error(sock) or error
