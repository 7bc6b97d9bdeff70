"""What Linux knows about a TCP connection, asked of the socket. Standard library only, for both ends of a leg.

Sources: tcp(7), and for the numbers ``include/uapi/linux/sockios.h`` and ``include/net/tcp_states.h``.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

__all__ = ["is_dead", "unacknowledged"]

_SIOCOUTQ: Final = 0x5411
_TCP_CLOSE: Final = 7


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes (a FIN counts as one) were written to ``sock`` and not acknowledged by the other side yet.

    Closing a socket with unread input, or by RST, throws these away. 0 where the system cannot tell.
    """
    answer = struct.pack("i", 0)
    try:
        answer = fcntl.ioctl(sock.fileno(), _SIOCOUTQ, answer)
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])


def is_dead(sock: socket.socket) -> bool:
    """Whether the connection is over for the kernel (reset, timed out, or closed both ways and acknowledged)."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:
        return True
