"""One leg's outer TLS as a Trio stream that can be ended without losing a byte of what follows it.

Theory of operation
===================

The stream runs pyOpenSSL in *socket* mode: OpenSSL gets the descriptor and calls read(2) and write(2) itself. That is
less fashionable than a memory BIO, and it is the whole point. Without read-ahead, which is off and stays off, OpenSSL
reads the five bytes of a record header and then exactly that record's body. So when the record that says
``close_notify`` has been read, the next byte on the wire is still in the kernel, whoever it belongs to, even if it
came in the same segment. A memory BIO would have to be fed whole segments, and would swallow it.

How OpenSSL's answers map to Trio:

* ``WantRead`` / ``WantWrite``: nothing happened that cannot be repeated; wait for the descriptor, call again. A
  cancellation can only arrive while waiting, so a cancelled ``receive_some`` has lost nothing: a record that was read
  in part stays inside OpenSSL. A cancelled ``send_all`` may have left half a record on the wire, after which nothing
  sensible can be sent any more: the sending half is marked as broken.
* ``ZeroReturn``: close_notify came. A clean end; ``receive_some`` gives ``b""``, now and ever after.
* ``SysCallError(-1, "Unexpected EOF")``: FIN without close_notify. A truncation, a different error.
* ``SysCallError(errno)``: the connection broke.
* any other ``SSL.Error``: the other side broke TLS; OpenSSL has already written its alert.

Two of OpenSSL's habits are switched off, through the binding under pyOpenSSL, which has no public name for either:

* ``SSL_MODE_AUTO_RETRY`` makes one read go on for as long as records come that carry no data. A party that had
  prepared a few hundred thousand KeyUpdates would have the relay to itself for seconds. Without it each such record is
  a ``WantRead``, and everybody else gets a turn.
* Errors stay in a queue that belongs to the thread, not to the connection. Before OpenSSL 4, what a failed verification
  left there was taken for the fault of whoever was read next; so the queue is emptied first, as OpenSSL 3 asks for.

Ending a direction: ``send_eof`` writes close_notify (``SSL_shutdown`` once, never twice: a second call with input
pending ends the *reading* side). In TLS 1.3 the other direction goes on.

Giving the socket back: after both close_notify have crossed, :meth:`TlsStream.detach` frees the TLS state and returns
the bare socket; its first byte is the first one after the peer's close_notify. One thing can spoil that from our side:
OpenSSL answers a request for a KeyUpdate when it reads the next one, even after it has sent close_notify, and to a peer
that has left TLS the answer would be raw bytes. It cannot be prevented, but it is noticed (:func:`_event_callback`),
and such a socket is not given back.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeVar

import trio
from OpenSSL import SSL
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _openssl

from frelay.errors import ConnectionBroken, LocalProtocolError, RemoteProtocolError
from frelay.net.sockets import close
from frelay.net.streams import BrokenStream, OneAtATime, TlsFault, TruncatedStream, broken

__all__ = ["TlsStream"]

T = TypeVar("T")

# One TLS record's plaintext at most; asking for more gains nothing without read-ahead.
_RECORD = 16384
# Twice what fills the buffer of a pump if they are full.
_RECORDS_AT_ONCE: Final = 16
_SPOKE_AFTER_END: Final = object()
# While OpenSSL has a part of a KeyUpdate it writes nothing before it has read the rest. That message has five bytes:
# who spreads it over two records does so to have us wait for reading in both directions, which only one task may.
_IN_PIECES: Final = "a handshake message in pieces"


@cache
def _event_callback() -> Any:
    """OpenSSL's info callback; one for all, and made when the first connection needs it."""

    def note(ssl: Any, where: int, _: int) -> None:
        # Whatever it writes as the accepting side, once our close_notify has gone: there is nothing else it could be.
        if where == SSL.SSL_CB_ACCEPT_LOOP and _openssl.SSL_get_shutdown(ssl) & SSL.SENT_SHUTDOWN:
            connection = SSL.Connection._reverse_mapping[ssl]
            if b"write" in connection.get_state_string():
                connection.set_app_data(_SPOKE_AFTER_END)

    return _ffi.callback("void (*)(const SSL *, int, int)", note)


def _send_some(connection: SSL.Connection, data: memoryview) -> int:
    try:
        return connection.send(data)
    except SSL.WantReadError:
        raise TlsFault(_IN_PIECES) from None


class TlsStream(trio.abc.HalfCloseableStream):
    """The server's side of a TLS 1.3 connection; it owns the socket until :meth:`detach`.

    Besides Trio's own errors its methods raise :class:`~frelay.net.streams.TruncatedStream`,
    :class:`~frelay.net.streams.BrokenStream` and :class:`~frelay.net.streams.TlsFault`.
    """

    def __init__(self, sock: socket.socket, context: SSL.Context) -> None:
        self._sock: socket.socket | None = sock
        self._connection: SSL.Connection | None = SSL.Connection(context, sock)
        self._connection.set_accept_state()
        _openssl.SSL_clear_mode(self._connection._ssl, _openssl.SSL_MODE_AUTO_RETRY)
        self._sending = OneAtATime("sending on this TLS stream")
        self._receiving = OneAtATime("receiving on this TLS stream")
        self._send_is_broken = False
        self._eof_was_sent = False
        self._eof_was_received = False
        self._breakage: str | None = None
        """How the connection broke, once either half was told of it."""
        self._room_is_awaited: trio.Event | None = None
        self._receive_failure: tuple[type[ConnectionBroken | RemoteProtocolError], str] | None = None
        self._must_write_first = False
        """Whether :meth:`receive_now` came upon something that OpenSSL wants to answer before it reads on."""

    # --- the parts, for those who are allowed to look ------------------------------------------------------

    @property
    def sock(self) -> socket.socket:
        """The socket under it; raises ClosedResourceError after close or detach."""
        if self._sock is None:
            raise trio.ClosedResourceError("this TLS stream is closed")
        return self._sock

    @property
    def connection(self) -> SSL.Connection:
        """OpenSSL's connection; raises ClosedResourceError after close or detach."""
        if self._connection is None:
            raise trio.ClosedResourceError("this TLS stream is closed")
        return self._connection

    @property
    def ended_by_peer(self) -> bool:
        """Whether the peer's close_notify was read."""
        return self._eof_was_received

    # --- the one loop ----------------------------------------------------------------------------------------

    async def _retry(self, operation: Callable[[SSL.Connection], T]) -> T:
        """Call ``operation`` until OpenSSL no longer wants to wait, translating what it raises."""
        while True:
            connection, sock = self.connection, self.sock
            _openssl.ERR_clear_error()
            try:
                return operation(connection)
            except SSL.WantReadError:
                await trio.lowlevel.wait_readable(sock)
            except SSL.WantWriteError:
                await self._wait_for_room(sock)
            except SSL.ZeroReturnError:
                raise
            except SSL.Error as error:
                raise self._translated(error) from None

    def _translated(self, error: SSL.Error) -> ConnectionBroken | RemoteProtocolError:
        """What we call ``error``, which is neither a wish to wait nor a clean end."""
        if isinstance(error, SSL.SysCallError):
            code = error.args[0]
            if code == -1 and self._breakage is None:
                return TruncatedStream("the connection ended without close_notify")
            if self._breakage is None:
                self._breakage = str(broken(OSError(code, os.strerror(code))))
            # Linux tells of a reset once, and told the other half of this stream; to this one it looks like FIN.
            return BrokenStream(self._breakage)
        if error.args == ([],):
            # Nothing new: the other half has met it before this one, and knows what it was.
            if self._receive_failure is not None:
                kind, text = self._receive_failure
                return kind(text)
            return BrokenStream(self._breakage or "the connection has failed before")
        return TlsFault(_reason(error))

    async def _wait_for_room(self, sock: socket.socket) -> None:
        """Wait until the kernel takes more; for both halves, since reading may have a KeyUpdate to answer.

        Trio lets only one task wait for a descriptor's room. The other waits for that one, and then looks for itself.
        """
        if self._room_is_awaited is not None:
            await self._room_is_awaited.wait()
            return
        self._room_is_awaited = trio.Event()
        try:
            await trio.lowlevel.wait_writable(sock)
        finally:
            self._room_is_awaited.set()
            self._room_is_awaited = None

    # --- handshake -------------------------------------------------------------------------------------------

    async def do_handshake(self) -> None:
        """Run the handshake; raises TlsFault, with the alert already written, if it was not to be."""
        with self._sending, self._receiving:
            await trio.lowlevel.checkpoint()
            try:
                await self._retry(SSL.Connection.do_handshake)
            except SSL.ZeroReturnError:
                raise TlsFault("close_notify in the middle of the handshake") from None
            # Not in the context: a handshake has twenty events, and none of them is of interest.
            _openssl.SSL_set_info_callback(self.connection._ssl, _event_callback())

    # --- sending ---------------------------------------------------------------------------------------------

    def _check_sendable(self) -> None:
        self.connection  # noqa: B018  raises when closed
        if self._send_is_broken:
            raise BrokenStream("an earlier send was cut off in the middle of a record")
        if self._eof_was_sent:
            raise trio.ClosedResourceError("close_notify was already sent")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``, in records of at most 16 KiB."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._send(data)

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`send_now` has left."""
        with self._sending:
            self._send_is_broken = False
            self._check_sendable()
            await self._send(data)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data).cast("B") as view:
            sent = 0
            # OpenSSL must be offered the same bytes again after WantWrite, which the view guarantees, and
            # an empty write raises, which the condition prevents.
            while sent < len(view):
                rest = view[sent:]
                self._send_is_broken = True
                try:
                    sent += await self._retry(lambda connection, rest=rest: _send_some(connection, rest))  # type: ignore[misc]
                except SSL.ZeroReturnError:
                    raise BrokenStream("the TLS connection is over") from None
                self._send_is_broken = False

    def send_now(self, data: memoryview) -> int:
        """Send what the kernel takes without waiting; how many bytes of ``data`` went.

        The rest is :meth:`send_rest`'s to send, and nobody else's: a record of it may be under way.
        """
        self._check_sendable()
        connection, size = self.connection, len(data)
        corks = size > _RECORD and self.sock.family != socket.AF_UNIX
        if corks:
            # Each record is a write of its own; the kernel shall make large segments of them all the same.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sent = 0
        try:
            with _ffi.from_buffer(data) as start:
                while sent < size:
                    _openssl.ERR_clear_error()
                    result = _openssl.SSL_write(connection._ssl, start + sent, size - sent)
                    if result <= 0:
                        # As in a send that was cancelled, until the rest has gone.
                        self._send_is_broken = True
                        self._note_send_failure(connection, result)
                        break
                    sent += result
        finally:
            if corks and self._sock is not None:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        return sent

    def _note_send_failure(self, connection: SSL.Connection, result: int) -> None:
        try:
            connection._raise_ssl_error(connection._ssl, result)
        except SSL.WantWriteError:
            return
        except SSL.WantReadError:
            raise TlsFault(_IN_PIECES) from None
        except SSL.ZeroReturnError:
            raise BrokenStream("the TLS connection is over") from None
        except SSL.Error as error:
            raise self._translated(error) from None

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room for more."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._wait_for_room(self.sock)

    async def send_last(self, data: bytes) -> None:
        """Send ``data`` and close_notify, in one segment."""
        sock, corks = self.sock, self.sock.family != socket.AF_UNIX
        if corks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        try:
            await self.send_all(data)
            await self.send_eof()
        finally:
            if corks and self._sock is sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    async def send_eof(self) -> None:
        """Send close_notify; the peer's direction goes on."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self.connection  # noqa: B018  raises when closed
            if self._eof_was_sent and not self._send_is_broken:
                return
            self._check_sendable()
            self._eof_was_sent = self._send_is_broken = True
            try:
                await self._retry(SSL.Connection.shutdown)
            except SSL.ZeroReturnError:
                raise BrokenStream("the TLS connection is over") from None
            self._send_is_broken = False

    # --- receiving -------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` (default: one record) bytes; ``b""`` after the peer's close_notify."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self.connection  # noqa: B018  raises when closed
            if self._eof_was_received:
                return b""
            if self._receive_failure is not None:
                # Asked again, OpenSSL would call a truncation something else.
                kind, text = self._receive_failure
                raise kind(text)
            self._must_write_first = False
            size = min(max_bytes or _RECORD, _RECORD)
            try:
                return await self._retry(lambda connection: connection.recv(size))
            except SSL.ZeroReturnError:
                self._eof_was_received = True
                return b""
            except (ConnectionBroken, RemoteProtocolError) as failure:
                # Not the exception itself: its traceback would keep the TLS state alive after the close.
                self._receive_failure = type(failure), str(failure)
                raise

    @property
    def has_met_more(self) -> bool:
        """Whether :meth:`receive_now` has met more than bytes, which the socket may never tell again.

        An end, a fault, or a wish to write first. What it is, :meth:`receive_some` knows.
        """
        return self._must_write_first or self._eof_was_received or self._receive_failure is not None

    def receive_now(self, room: memoryview) -> int:
        """Receive what is there, record after record, into ``room``, as long as it has room for a whole one.

        How many bytes that was. 0 if there are none and the socket must become readable first; -1 if there are none
        and :meth:`receive_some` has more to say. It takes a few records at most: who sends a byte in each must not keep
        everybody else waiting for 100,000 of them.
        """
        connection = self.connection
        if self.has_met_more:
            return -1
        received, last = 0, len(room) - _RECORD
        with _ffi.from_buffer(room, require_writable=True) as start:
            for _ in range(_RECORDS_AT_ONCE):
                if received > last:
                    break
                _openssl.ERR_clear_error()
                result = _openssl.SSL_read(connection._ssl, start + received, _RECORD)
                if result <= 0:
                    if _openssl.SSL_get_error(connection._ssl, result) == _openssl.SSL_ERROR_WANT_READ:
                        return received
                    self._note_receive_failure(connection, result)
                    return received or -1
                received += result
        return received

    def _note_receive_failure(self, connection: SSL.Connection, result: int) -> None:
        """Keep for :meth:`receive_some` what is not to be asked for twice."""
        try:
            connection._raise_ssl_error(connection._ssl, result)
        except SSL.WantWriteError:
            self._must_write_first = True
        except SSL.ZeroReturnError:
            self._eof_was_received = True
        except SSL.Error as error:
            failure = self._translated(error)
            self._receive_failure = type(failure), str(failure)

    def has_ended(self) -> bool:
        """Whether the other side's close_notify, FIN or fault is the next thing to come, with no data before it.

        A look that waits for nothing and takes no data: of a record that holds some, at most that one record is moved
        into OpenSSL, where the next :meth:`receive_some` finds it.
        """
        _openssl.ERR_clear_error()
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except (SSL.WantReadError, SSL.WantWriteError):
            return False
        except SSL.ZeroReturnError:
            self._eof_was_received = True
            return True
        except SSL.Error:
            return True
        return False

    # --- the end ---------------------------------------------------------------------------------------------

    def detach(self) -> socket.socket:
        """Free the TLS state and give the bare socket back.

        Only after both close_notify have crossed: before that, the next byte on the wire could still be TLS's. Raises
        LocalProtocolError then, and TlsFault if the peer made TLS speak on after our close_notify.
        """
        if not (self._eof_was_sent and self._eof_was_received) or self._send_is_broken:
            raise LocalProtocolError("the socket is only free once close_notify has crossed both ways")
        if self.connection.get_app_data() is _SPOKE_AFTER_END:
            raise TlsFault("a KeyUpdate was asked for after close_notify, and was answered")
        sock = self.sock
        self._sock = self._connection = None
        return sock

    def leave_without_close_notify(self) -> socket.socket:
        """Free the TLS state in mid-stream and give the bare socket back, for the hello hand-off alone.

        What was received so far ends with a whole record, since records are read one at a time; whether the other side
        sees the border in the same place, TLS does not say.
        """
        sock = self.sock
        self._sock = self._connection = None
        return sock

    def close(self) -> None:
        """Close the connection now, without close_notify unless it was sent before. Idempotent."""
        if self._sock is not None:
            close(self._sock)
        self._sock = self._connection = None

    async def aclose(self) -> None:
        """Send close_notify if nothing stands in its way, and close.

        It does not wait for the peer's close_notify: who needs that reads to the end first.
        """
        if self._sock is None:
            await trio.lowlevel.checkpoint()
            return
        try:
            if not self._eof_was_sent and not self._send_is_broken:
                await self.send_eof()
        except (trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError):
            pass  # whoever is in the way learns of the close from the close, or was quicker
        finally:
            self.close()
        await trio.lowlevel.checkpoint()


def _reason(error: SSL.Error) -> str:
    """OpenSSL's own words for the last thing it put on its error queue."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1] or "TLS error")
    return str(error) or "TLS error"
