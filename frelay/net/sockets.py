"""The border to the kernel's sockets: accepting, tuning and closing.

Everything here works on non-blocking :class:`socket.socket` objects and Trio's public readiness calls rather than on
``trio.socket``, because OpenSSL and ``splice(2)`` need the descriptor itself, and one descriptor should have one
owner. Two rules follow from that:

* whoever closes a descriptor tells Trio first (:func:`close`), or a task waiting on it would sleep for ever, or wake
  for the next connection that gets the same number;
* how a connection is closed is part of what the other side is told: FIN says "all was said", RST says "cut". So
  there is :func:`close` for the first and :func:`close_with_reset` for the second, and :func:`close_after_linger`
  where bytes still under way (a refusal, an alert) must not be destroyed by the RST that closing with unread input
  would send.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from frelay.config.model import TcpSection
from frelay.net.tcp import unacknowledged

__all__ = [
    "accept",
    "close",
    "close_after_delivery",
    "close_after_linger",
    "close_with_reset",
    "format_address",
    "objection_to_congestion_control",
    "tune",
]

# How many connections may linger at a time. Who is refused decides how long that takes, up to its limit, and can be
# refused again meanwhile; beyond this many they are closed without.
_MOST_LINGER: Final = 256
# What one linger may read and throw away; a peer that sends more than this after a refusal gets its RST.
_LINGER_BYTES: Final = 256 * 1024
# How often close_after_delivery asks the kernel, in seconds, and how much it drops each time (4 MiB).
_DELIVERY_LOOK: Final = 0.02
_DROPS_PER_LOOK: Final = 64
_AVAILABLE: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_ALLOWED: Final = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


# --- accepting -------------------------------------------------------------------------------------------------


def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
    """The next connection, non-blocking, and where it comes from; raises OSError as accept(2) does."""
    sock, place = listener.accept()
    sock.setblocking(False)
    return sock, (place[0], place[1])


def format_address(place: tuple[str, int]) -> str:
    """``host:port``, with brackets around an IPv6 host."""
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tune(sock: socket.socket, tcp: TcpSection) -> None:
    """Set keepalive, user timeout, nodelay and congestion control on a TCP socket.

    Keepalive asks an idle peer whether it is there, TCP_USER_TIMEOUT limits the wait for an answer, be it to bytes in
    flight or to such a question; neither covers the other's case. With both, Linux does not go by keepalive's count
    (tcp(7)): who has vanished is given up after the user timeout.
    """
    idle, interval, count = tcp.keepalive
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(idle)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(interval)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, round(count))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(tcp.user_timeout * 1000))
    # RFC 6093: an urgent byte is a byte of the stream like any other, and would be missing from it otherwise.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if tcp.nodelay:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tcp.congestion_control is not None:
        # What is allowed may have changed since the configuration was loaded, and is no reason to lose a connection.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, tcp.congestion_control.encode())


def objection_to_congestion_control(name: str) -> str | None:
    """What keeps a process of any user from sending by ``name`` here, and the remedy; None: nothing does.

    Of any user, because a relay gives up what it may do more than others. Raises OSError where the kernel does not say.
    """
    available, allowed = _AVAILABLE.read_text().split(), _ALLOWED.read_text().split()
    if name in allowed:
        return None
    if name in available:
        both = " ".join([*allowed, name])
        return f'may not be used by everybody; sysctl -w net.ipv4.tcp_allowed_congestion_control="{both}" changes that'
    return f"is not known to this kernel, which has {', '.join(available)}; modprobe tcp_{name} may help"


# --- closing ---------------------------------------------------------------------------------------------------


_lingering: Final[set[socket.socket]] = set()


def close(sock: socket.socket) -> None:
    """Close in order: FIN, once everything written has left. Idempotent."""
    if sock.fileno() != -1:
        trio.lowlevel.notify_closing(sock)
        sock.close()


def close_with_reset(sock: socket.socket) -> None:
    """Close by RST, so that the other side cannot mistake a cut for an end. Idempotent."""
    if sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        close(sock)


async def close_after_linger(sock: socket.socket, seconds: float) -> None:
    """Send FIN, read and drop what still comes until the other side's FIN or ``seconds`` have passed, and close.

    Closing at once with unread input would send RST, and an RST makes many kernels throw away what we wrote last.
    """
    if len(_lingering) >= _MOST_LINGER:
        close(sock)
        return
    _lingering.add(sock)
    try:
        with trio.move_on_after(seconds):
            sock.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0:
                await trio.lowlevel.wait_readable(sock)
                try:
                    dropped = len(sock.recv(16384))
                except BlockingIOError:
                    continue
                if dropped == 0:
                    break
                left -= dropped
    except OSError:
        pass  # already reset or disconnected: nothing is under way that could be saved
    finally:
        _lingering.discard(sock)
        close(sock)


async def close_after_delivery(sock: socket.socket, patience: float) -> None:
    """For a direction that was ended: drop what still comes in until all that was written is acknowledged, and close.

    It closes all the same after ``patience`` seconds in which nothing was acknowledged, or on cancellation.
    """
    has_input, left = True, 1
    try:
        left, since = unacknowledged(sock), trio.current_time()
        # Nothing tells when an acknowledgement arrives, so this looks. And input must be taken, or a peer that only
        # reads once it has written would never acknowledge.
        while left > 0 and trio.current_time() - since < patience:
            has_input = has_input and _drop_input(sock)
            await trio.sleep(_DELIVERY_LOOK)
            before, left = left, unacknowledged(sock)
            if left != before:
                since = trio.current_time()
    except OSError:
        pass  # it broke; there is nothing left to deliver to
    finally:
        close_with_reset(sock) if left else close(sock)


def _drop_input(sock: socket.socket) -> bool:
    """Read and drop what is there, within reason; False once the other side has sent FIN."""
    for _ in range(_DROPS_PER_LOOK):
        try:
            if not sock.recv(65536):
                return False
        except BlockingIOError:
            break
    return True
