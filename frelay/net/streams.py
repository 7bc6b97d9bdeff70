"""A raw leg as a Trio stream, and the errors with which this stream and the outer TLS stream break."""

from __future__ import annotations

import errno
import socket
from types import TracebackType

import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError, Truncated
from frelay.net.sockets import close
from frelay.net.tcp import is_after_end, shutdown_failure

__all__ = ["BrokenStream", "OneAtATime", "RawStream", "SendBroken", "TlsFault", "TruncatedStream", "broken"]


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
