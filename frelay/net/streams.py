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
    """The connection of a stream broke. It is both frelay's own error and the one that Trio's streams must raise."""


class SendBroken(BrokenStream):
    """The other side receives nothing more. What it sent before can still be read, and its end tells the outcome."""


class TruncatedStream(Truncated, BrokenStream):
    """A TLS stream ended without close_notify."""


class TlsFault(RemoteProtocolError, trio.BrokenResourceError):
    """The other side violated TLS, or its certificate was not accepted."""


def broken(error: OSError, kind: type[BrokenStream] = BrokenStream) -> BrokenStream:
    """Translates an error of the operating system on a connected socket; the only place that does."""
    name = errno.errorcode.get(error.errno or 0, "connection failed")
    return kind(f"{name}: {error.strerror or error}")


class OneAtATime:
    """A guard that raises an error if two tasks use the same direction of a stream; their bytes would be mixed."""

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
    """A connected, non-blocking socket as a Trio stream, which owns the socket."""

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
        """Send what the kernel takes without waiting; returns how many bytes that was. Raises BrokenStream."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._send_failure(error) from error

    def _send_failure(self, error: OSError) -> BrokenStream:
        if self._send_error is None and is_after_end(error):
            return broken(error, SendBroken)
        # A new error: the traceback of the old one refers to this stream, which would be a reference cycle.
        self._send_error = OSError(error.errno, error.strerror)
        return broken(error)

    async def send_rest(self, data: bytes) -> None:
        """Send the bytes that :meth:`send_now` did not send; raises BrokenStream."""
        await self.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room for more bytes; raises BrokenStream."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            try:
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as error:
                raise broken(error) from error

    async def send_eof(self) -> None:
        """Send FIN; reading stays possible. Raises BrokenStream."""
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
        """Receive up to ``max_bytes`` bytes (default 64 KiB), or ``b""`` after FIN; raises BrokenStream."""
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
                        # Linux reports a reset only once, and our sender got it. Here it looks like FIN.
                        raise broken(self._send_error)
                    return data

    @property
    def has_met_more(self) -> bool:
        """Always False: the kernel reports an end again and again until :meth:`receive_some` has returned it."""
        return False

    def receive_now(self, room: memoryview) -> int:
        """Receive into ``room`` without waiting; returns how many bytes that was. Raises BrokenStream.

        Returns 0 if the socket must become readable first, and -1 at the end, which :meth:`receive_some` then returns.
        """
        try:
            return self.sock.recv_into(room) or -1
        except BlockingIOError:
            return 0
        except OSError as error:
            raise broken(error) from error

    def close(self) -> None:
        """Close now with FIN; :meth:`aclose` without its checkpoint."""
        close(self.sock)

    async def aclose(self) -> None:
        """Close with FIN."""
        self.close()
        await trio.lowlevel.checkpoint()
