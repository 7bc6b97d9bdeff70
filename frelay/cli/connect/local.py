"""The local sides of ``frelay connect`` as streams: standard input and output, the pipes of a command, and a socket.

The owner of a side closes it, in order with ``await aclose()`` or abruptly with ``cut()``. A second call of either does
nothing.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import sys
from abc import abstractmethod
from typing import Any, Final

import trio

from frelay.net.tcp import unacknowledged

__all__ = ["LocalSide", "LocalSocket", "Pipes", "Stdio", "fill_standard_descriptors", "standard_output_is_closed"]

# The default capacity of a pipe.
_PIPE_CHUNK: Final = 65536
# As long as the wire lingers when it closes. Meanwhile we read what the program still sends, so that it can read too.
_LINGER_LIMIT: Final = 2.0
_LINGER_POLL: Final = 0.01
_CUT_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_FLUSH_ON_CLOSE: Final = struct.pack("ii", 0, 0)
# Idle, interval, count, as the relay's [tcp] keepalive: the connection of a caller whose machine died must end.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class LocalSide(trio.abc.HalfCloseableStream):
    """The stream that the bridge joins to the wire."""

    @abstractmethod
    def cut(self) -> None:
        """Close it so that its other end sees a cut and no clean end, if this kind of stream can show that."""

    async def linger(self) -> None:
        """Wait until what was written has arrived, before a cut."""
        await trio.lowlevel.checkpoint()


class LocalSocket(LocalSide):
    """A TCP or Unix connection on this machine.

    Before :meth:`aclose` every close is an RST, also the kernel's own close if this process is killed. A Unix socket
    has no RST: its other end gets ECONNRESET only if we leave bytes unread, and otherwise an end.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._stream: Final = trio.SocketStream(sock)
        self._is_closed = False
        self.socket: Final = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CUT_ON_CLOSE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See :meth:`trio.abc.ReceiveStream.receive_some`."""
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`trio.abc.SendStream.send_all`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See :meth:`trio.abc.SendStream.wait_send_all_might_not_block`."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See :meth:`trio.abc.HalfCloseableStream.send_eof`."""
        await self._stream.send_eof()

    async def linger(self) -> None:
        """Read what still comes until everything we sent has arrived; two seconds at most."""
        with trio.move_on_after(_LINGER_LIMIT):
            try:
                while await self._stream.receive_some(_PIPE_CHUNK):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the other end is gone
            sock: Any = self.socket  # it has fileno()
            while unacknowledged(sock):  # noqa: ASYNC110  the kernel reports no acknowledgement
                await trio.sleep(_LINGER_POLL)

    async def aclose(self) -> None:
        """Close it in order."""
        if not self._is_closed:
            self._is_closed = True
            if self.socket.family != socket.AF_UNIX:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FLUSH_ON_CLOSE)
            self.socket.close()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """Close it by RST."""
        if not self._is_closed:
            self._is_closed = True
            self.socket.close()


class Stdio(LocalSide):
    """Standard input and output, whatever they are, by blocking calls in threads.

    We do not set the descriptors to non-blocking: every process with the same terminal or pipe shares that flag, and a
    regular file has no readiness. If another process has set the flag, we wait by poll(2).
    """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See :meth:`trio.abc.ReceiveStream.receive_some`."""
        if sys.__stdin__ is None:
            await trio.lowlevel.checkpoint()
            return b""  # a closed standard input counts as empty
        return await trio.to_thread.run_sync(_read, max_bytes or _PIPE_CHUNK, abandon_on_cancel=True)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`trio.abc.SendStream.send_all`."""
        try:
            await trio.to_thread.run_sync(_write, memoryview(data), abandon_on_cancel=True)
        except OSError as error:
            raise trio.BrokenResourceError(f"standard output: {error.strerror}") from None

    async def wait_send_all_might_not_block(self) -> None:
        """See :meth:`trio.abc.SendStream.wait_send_all_might_not_block`."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See :meth:`trio.abc.HalfCloseableStream.send_eof`."""
        await trio.lowlevel.checkpoint()
        if stat.S_ISSOCK(os.fstat(1).st_mode):
            # Under inetd, descriptors 0 and 1 are one socket: closing 1 alone would end nothing for the other side.
            with socket.socket(fileno=os.dup(1)) as sock:
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # the other end is gone
        # Put /dev/null there. After a close the next opened file would become standard output.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)

    async def aclose(self) -> None:
        """Do nothing: the descriptors stay open until the process ends."""
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """Do nothing: only the exit code can tell of a cut."""


def _read(size: int) -> bytes:
    while True:
        try:
            return os.read(0, size)
        except BlockingIOError:
            _wait_for(0, select.POLLIN)


def _write(view: memoryview) -> None:
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            _wait_for(1, select.POLLOUT)


def _wait_for(descriptor: int, event: int) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    poll.poll()


def standard_output_is_closed() -> bool:
    """Whether this process was started without a standard output."""
    return sys.__stdout__ is None


def fill_standard_descriptors() -> None:
    """Open /dev/null in place of a closed descriptor 0, 1 or 2. Otherwise the next socket would get that number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)


class Pipes(LocalSide):
    """The input and output of a command."""

    def __init__(self, stdio: trio.StapledStream[Any, Any]) -> None:
        self._stdio = stdio

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See :meth:`trio.abc.ReceiveStream.receive_some`."""
        data: bytes = await self._stdio.receive_stream.receive_some(max_bytes)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`trio.abc.SendStream.send_all`."""
        await self._stdio.send_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See :meth:`trio.abc.SendStream.wait_send_all_might_not_block`."""
        await self._stdio.send_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See :meth:`trio.abc.HalfCloseableStream.send_eof`."""
        await self._stdio.send_stream.aclose()

    async def aclose(self) -> None:
        """Close both pipes."""
        await self._stdio.aclose()

    def cut(self) -> None:
        """Do nothing: a signal ends the command."""
