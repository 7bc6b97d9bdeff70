"""The border to the kernel's sockets: accepting, tuning, closing, and a raw leg as a Trio stream.

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

import errno
import socket
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import trio

from frelay.config.model import TcpSection
from frelay.errors import ConnectionBroken, RemoteProtocolError, Truncated
from frelay.net.tcp import is_after_end, shutdown_failure, unacknowledged

__all__ = [
    "BrokenStream",
    "OneAtATime",
    "RawStream",
    "SendBroken",
    "TlsFault",
    "TruncatedStream",
    "accept",
    "broken",
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


class BrokenStream(ConnectionBroken, trio.BrokenResourceError):
    """A stream's connection broke: frelay's own error, and the one that Trio's stream contract asks for."""


class SendBroken(BrokenStream):
    """The other side takes nothing more. What it sent before can be read, and how that ends says how it went."""


class TruncatedStream(Truncated, BrokenStream):
    """A TLS stream ended without close_notify."""


class TlsFault(RemoteProtocolError, trio.BrokenResourceError):
    """The other side broke TLS, or its certificate was not accepted."""


def broken(error: OSError, kind: type[BrokenStream] = BrokenStream) -> BrokenStream:
    """The one translation of an operating system's error on a connected socket."""
    name = errno.errorcode.get(error.errno or 0, "connection failed")
    return kind(f"{name}: {error.strerror or error}")


class OneAtATime:
    """A guard that turns two tasks in one half of a stream into an error instead of into mixed bytes."""

    __slots__ = ("_busy", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(f"another task is already {self._what}")
        self._busy = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._busy = False


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


# --- a raw leg as a stream ----------------------------------------------------------------------------------------


class RawStream(trio.abc.HalfCloseableStream):
    """A connected, non-blocking TCP socket as a Trio stream; it owns the socket."""

    __slots__ = ("_eof_was_sent", "_receiving", "_send_error", "_sending", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._sending = OneAtATime("sending on this stream")
        self._receiving = OneAtATime("receiving on this stream")
        self._eof_was_sent = False
        self._send_error: OSError | None = None

    def _check_open(self) -> None:
        if self.sock.fileno() == -1:
            raise trio.ClosedResourceError("this stream is closed")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``; raises BrokenStream."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._eof_was_sent:
                raise trio.ClosedResourceError("this direction was already ended")
            with memoryview(data).cast("B") as view:
                sent = 0
                while sent < len(view):
                    try:
                        sent += self.sock.send(view[sent:])
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self.sock)
                    except OSError as error:
                        raise self._send_failure(error) from error

    def send_now(self, data: memoryview) -> int:
        """Send what the kernel takes without waiting; how many bytes of ``data`` went. Raises BrokenStream."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._send_failure(error) from error

    def _send_failure(self, error: OSError) -> BrokenStream:
        if self._send_error is None and is_after_end(error):
            return broken(error, SendBroken)
        # A new one: the old one's traceback would hold on to this stream in a circle.
        self._send_error = OSError(error.errno, error.strerror)
        return broken(error)

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`send_now` has left; raises BrokenStream."""
        await self.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room for more; raises BrokenStream."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            try:
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as error:
                raise broken(error) from error

    async def send_eof(self) -> None:
        """Send FIN; reading goes on."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if not self._eof_was_sent:
                self._eof_was_sent = True
                try:
                    self.sock.shutdown(socket.SHUT_WR)
                except OSError as error:
                    raise self._send_failure(shutdown_failure(self.sock, error)) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` (default 64 KiB) bytes, ``b""`` after FIN; raises BrokenStream."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                self._check_open()
                try:
                    data = self.sock.recv(max_bytes or 65536)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self.sock)
                except OSError as error:
                    raise broken(error) from error
                else:
                    if not data and self._send_error is not None:
                        # Linux tells of a reset once, and told the sender; to the receiver it looks like FIN.
                        raise broken(self._send_error)
                    return data

    @property
    def has_met_more(self) -> bool:
        """Never: of an end the kernel tells until :meth:`receive_some` has seen it."""
        return False

    def receive_now(self, room: memoryview) -> int:
        """Receive what is there into ``room``; how many bytes that was. Raises BrokenStream.

        0 if there are none and the socket must become readable first; -1 if there are none and :meth:`receive_some` has
        more to say.
        """
        try:
            return self.sock.recv_into(room) or -1
        except BlockingIOError:
            return 0
        except OSError as error:
            raise broken(error) from error

    def close(self) -> None:
        """Close now, in order; :meth:`aclose` without its checkpoint."""
        close(self.sock)

    async def aclose(self) -> None:
        """Close in order."""
        self.close()
        await trio.lowlevel.checkpoint()
