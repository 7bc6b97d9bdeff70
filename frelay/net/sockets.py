"""The border to the kernel's sockets: accepting, tuning and closing.

All functions take a non-blocking :class:`socket.socket` and wait with Trio's public readiness calls. They do not use
``trio.socket``, because OpenSSL and ``splice(2)`` need the descriptor itself, and a descriptor should have one owner.
Two rules follow:

* Tell Trio before a descriptor is closed, as :func:`close` does. Otherwise a task that waits for it would sleep for
  ever, or wake up for the next connection with the same descriptor number.
* The way of closing tells the other side something: FIN means that the data is complete, RST that it was cut short.
  :func:`close` sends FIN, and :func:`close_with_reset` sends RST. Closing with unread input also sends RST, which could
  destroy bytes still under way, such as a refusal or an alert; :func:`close_after_linger` avoids that.
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

# How many connections may linger at a time. A refused peer decides how long its linger takes, up to the limit, and can
# be refused again meanwhile. Connections beyond this number are closed at once.
_MOST_LINGER: Final = 256
# How many bytes one linger reads and drops. A peer that sends more after a refusal gets an RST.
_LINGER_BYTES: Final = 256 * 1024
# Seconds between two checks of close_after_delivery, and how many reads it drops at each (4 MiB in all).
_DELIVERY_POLL: Final = 0.02
_DROPS_PER_POLL: Final = 64
_AVAILABLE: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_ALLOWED: Final = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


# --- accepting -------------------------------------------------------------------------------------------------


def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
    """The next connection, non-blocking, and the address of its peer; raises OSError as accept(2) does."""
    sock, address = listener.accept()
    sock.setblocking(False)
    return sock, (address[0], address[1])


def format_address(address: tuple[str, int]) -> str:
    """``host:port``, with brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tune(sock: socket.socket, tcp: TcpSection) -> None:
    """Set keepalive, user timeout, nodelay and congestion control on a TCP socket.

    Keepalive sends probes to an idle peer. TCP_USER_TIMEOUT limits how long sent bytes, or a probe, may go
    unacknowledged. Both are needed. With both set, Linux ignores keepalive's count (tcp(7)): it ends the connection to
    a peer that has vanished after the user timeout.
    """
    idle, interval, count = tcp.keepalive
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(idle)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(interval)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, round(count))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(tcp.user_timeout * 1000))
    # Without this option an urgent byte would be missing from the stream (RFC 6093).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if tcp.nodelay:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tcp.congestion_control is not None:
        # What the kernel allows may have changed since the configuration was loaded. Do not lose the connection for it.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, tcp.congestion_control.encode())


def objection_to_congestion_control(name: str) -> str | None:
    """Why a process of any user cannot use the congestion control ``name`` here, and the remedy; None if it can.

    Of any user, because the relay may drop root's privileges later. Raises OSError if the kernel does not tell.
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
    """Close; the kernel sends FIN after all written bytes. Idempotent."""
    if sock.fileno() != -1:
        trio.lowlevel.notify_closing(sock)
        sock.close()


def close_with_reset(sock: socket.socket) -> None:
    """Close by RST, so that the other side knows that the data was cut short. Idempotent."""
    if sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        close(sock)


async def close_after_linger(sock: socket.socket, seconds: float) -> None:
    """Send FIN, read and drop all input until the other side's FIN or for ``seconds``, and close.

    Closing at once with unread input would send RST, and many kernels then drop the bytes that we wrote last.
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
        pass  # The connection is reset already: nothing that is under way can be saved.
    finally:
        _lingering.discard(sock)
        close(sock)


async def close_after_delivery(sock: socket.socket, timeout: float) -> None:
    """Close after FIN was sent, once the other side has acknowledged all written bytes; drop its input until then.

    Closes by RST after ``timeout`` seconds without an acknowledgement, and when cancelled.
    """
    has_input, left = True, 1
    try:
        left, since = unacknowledged(sock), trio.current_time()
        # The kernel does not report acknowledgements, so poll for them. Read the input, too: a peer that reads only
        # after it has written everything would never acknowledge.
        while left > 0 and trio.current_time() - since < timeout:
            has_input = has_input and _drop_input(sock)
            await trio.sleep(_DELIVERY_POLL)
            before, left = left, unacknowledged(sock)
            if left != before:
                since = trio.current_time()
    except OSError:
        pass  # The connection broke: nothing more can be delivered.
    finally:
        close_with_reset(sock) if left else close(sock)


def _drop_input(sock: socket.socket) -> bool:
    """Read and drop the input that has arrived, up to a limit; False once the other side has sent FIN."""
    for _ in range(_DROPS_PER_POLL):
        try:
            if not sock.recv(65536):
                return False
        except BlockingIOError:
            break
    return True
