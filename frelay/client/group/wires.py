"""The wire to one rank: a socket that does not block, and the messages on it. Standard library only."""

from __future__ import annotations

import socket
from typing import Final

from frelay.client.group.link import Link
from frelay.client.group.poll import HUNG_UP, READABLE, WRITABLE, Poll
from frelay.client.tls_engine import Engine

__all__ = ["AT_ONCE", "PeerWire"]

AT_ONCE: Final = socket.MSG_DONTWAIT
"""Nothing here waits for the kernel, also where the socket is in blocking mode for :mod:`frelay.client.group.short`."""


class PeerWire:
    """Moves bytes between a socket and a :class:`~frelay.client.group.link.Link`, as far as the kernel lets it."""

    def __init__(self, sock: socket.socket, engine: Engine, link: Link, poll: Poll) -> None:
        self.sock: Final = sock
        self.engine: Final = engine
        self._poll: Final = poll
        self.link: Final = link
        self.is_up = False
        """Whether the hello of the other rank was checked."""
        self.instance = b""
        """The other rank's instance, from its hello."""
        self._is_readable = self._is_writable = True
        self._has_hung_up = False
        self._is_cutting = False
        self._must_end = False
        self._in_is_over = False
        """Whether nothing more comes: the other side's FIN was read, or the connection is dead."""
        self._out_is_over = False
        """Whether nothing more goes out: our end was sent, or the connection is dead."""
        sock.setblocking(False)
        poll.add(sock, self)

    def ready(self, events: int) -> None:
        """See Owner."""
        if events & READABLE:
            self._is_readable = True
        if events & WRITABLE:
            self._is_writable = True
        if events & HUNG_UP:
            self._has_hung_up = True
            if self.link.is_held:
                # All that comes before the end is in the kernel already. Only behind it TLS tells an end from a cut.
                self.link.keep_all()

    @property
    def is_busy(self) -> bool:
        """Whether :meth:`move` has something to do without waiting for the kernel."""
        return self._may_read or self._may_write

    @property
    def _may_read(self) -> bool:
        return self._is_readable and not self._in_is_over and not self.link.is_held

    @property
    def _may_write(self) -> bool:
        return self._is_writable and not self._out_is_over and self.link.has_output

    @property
    def is_finished(self) -> bool:
        """Whether both directions have ended, or the wire is of no more use."""
        has_received_end = self._in_is_over or (self.link.has_ended and not self._is_cutting)
        return has_received_end and (self._out_is_over or not self._must_end)

    def move(self, scratch: memoryview) -> None:
        """Write and read once, if the kernel may let us."""
        if self._may_write:
            self._write()
        if self._may_read:
            self._read(scratch)
            if self._may_write:
                self._write()  # an answer to a PING
        # The other side's FIN may be here long before: then our own end is all that its process waits for.
        if self._must_end and not self._out_is_over and not self.link.has_output:
            self._send_end()

    def _write(self) -> None:
        data = self.link.take()
        if not data:
            return
        try:
            count = self.sock.send(data, AT_ONCE)
        except BlockingIOError:
            self._is_writable = False
        except OSError:
            # Reading tells why: an ABORT may have come before the cut.
            self._out_is_over = True
            self._has_hung_up = self._is_readable = True
        else:
            self.link.sent(count)
            self._is_writable = count == len(data)

    def _read(self, scratch: memoryview) -> None:
        try:
            count = self.sock.recv_into(scratch, 0, AT_ONCE)
        except BlockingIOError:
            self._is_readable = False
            return
        except OSError as error:
            self._in_is_over = self._out_is_over = True
            self.link.cut(error.strerror or type(error).__name__)
            return
        # A short read has emptied the socket, and the kernel reports what comes next. But a FIN that it has reported
        # already is not reported again.
        self._is_readable = count == len(scratch) or self._has_hung_up
        if count == 0:
            self._in_is_over = True
        if not self._is_cutting:
            self.link.feed(scratch[:count] if count else b"")

    def end(self) -> None:
        """End our direction in good order when all messages are sent."""
        self.link.end()
        self._must_end = True

    def cut(self) -> None:
        """End our direction without close_notify when all messages are sent, and drop what still comes.

        Closing while bytes come in would send RST, which destroys our last words on their way.
        """
        self.link.drop_all()
        self._must_end = self._is_cutting = True

    def _send_end(self) -> None:
        self._out_is_over = True
        if self._is_cutting or self.engine.ends_with_fin:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._in_is_over = True  # the other side is gone

    def close(self) -> None:
        """Close the socket."""
        self._poll.remove(self.sock)
        self.sock.close()
