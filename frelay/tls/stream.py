"""One leg's outer TLS as a Trio stream that can be ended without losing a byte of what follows it.

Theory of operation
===================

The stream runs pyOpenSSL in *socket* mode: OpenSSL gets the descriptor and calls read(2) and write(2) itself. A memory
BIO is more usual, but here socket mode is essential. Without read-ahead, which is off and stays off, OpenSSL reads the
five bytes of a record header and then exactly the body of that record. So after it has read the record with
``close_notify``, the next byte of the wire is still in the kernel, even if it came in the same segment. A memory BIO is
fed whole segments, so it would keep that byte.

How OpenSSL's answers map to Trio:

* ``WantRead`` / ``WantWrite``: wait for the descriptor, then call again. A cancellation can only arrive during this
  wait. So a cancelled ``receive_some`` loses nothing: a record that was read in part stays inside OpenSSL. A cancelled
  ``send_all`` may leave half a record on the wire, and nothing valid can be sent after that: the sending half is then
  marked as broken.
* ``ZeroReturn``: close_notify was received. This is a clean end: ``receive_some`` returns ``b""``, now and later.
* ``SysCallError(-1, "Unexpected EOF")``: FIN without close_notify. This is a truncation, which is another error.
* ``SysCallError(errno)``: the connection broke.
* any other ``SSL.Error``: the other side broke TLS; OpenSSL has already written its alert.

Two of OpenSSL's habits are switched off, through the binding under pyOpenSSL, which has no public name for either:

* ``SSL_MODE_AUTO_RETRY`` makes one read continue as long as records without data come. A party that sends a few hundred
  thousand KeyUpdates would block the whole relay for seconds. Without it each such record is a ``WantRead``, and the
  other tasks run.
* Errors stay in a queue of the thread, not of the connection. Before OpenSSL 4, an error that a failed verification
  left there was taken for a fault of the next connection that was read. So the queue is emptied before each call, as
  OpenSSL 3 demands.

Ending a direction: ``send_eof`` writes close_notify (``SSL_shutdown`` once, never twice: a second call with input
pending ends the *reading* side). In TLS 1.3 the other direction goes on.

Giving the socket back: after both close_notify have crossed, :meth:`TlsStream.detach` frees the TLS state and returns
the bare socket; its first byte is the first one after the peer's close_notify. One thing can spoil that on our side:
OpenSSL answers a request for a KeyUpdate even after it has sent close_notify, and a peer that has left TLS would read
that answer as raw bytes. We cannot prevent it, but :func:`_event_callback` notices it, and then the socket is not given
back.
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
# Full records of this number are twice the buffer of a pump.
_RECORDS_AT_ONCE: Final = 16
_SPOKE_AFTER_END: Final = object()
# While OpenSSL has read a part of a KeyUpdate, it writes nothing before it has read the rest. The message has five
# bytes. If the peer splits it into two records, our sender has to wait for the rest of it to arrive. Our receiver waits
# for the same, and Trio lets only one of them wait.
_IN_PIECES: Final = "a handshake message in pieces"


@cache
def _event_callback() -> Any:
    """OpenSSL's info callback; one for all, and made when the first connection needs it."""

    def note(ssl: Any, where: int, _: int) -> None:
        # After our close_notify, the accepting side writes only to answer a request for a KeyUpdate.
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
        """How the connection broke, once either half has seen it."""
        self._room_is_awaited: trio.Event | None = None
        self._receive_failure: tuple[type[ConnectionBroken | RemoteProtocolError], str] | None = None
        self._must_write_first = False
        """Whether :meth:`receive_now` has read something that OpenSSL must answer before it reads on."""

    # --- its parts -----------------------------------------------------------------------------------------

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
        """Call ``operation`` until OpenSSL no longer asks to wait; translates its errors."""
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
        """Our exception for ``error``, which is neither a request to wait nor a clean end."""
        if isinstance(error, SSL.SysCallError):
            code = error.args[0]
            if code == -1 and self._breakage is None:
                return TruncatedStream("the connection ended without close_notify")
            if self._breakage is None:
                self._breakage = str(broken(OSError(code, os.strerror(code))))
            # Linux reports a reset only once, here to the other half of this stream; this half sees a FIN.
            return BrokenStream(self._breakage)
        if error.args == ([],):
            # OpenSSL has no new error: the other half has seen it before, and has recorded it.
            if self._receive_failure is not None:
                kind, text = self._receive_failure
                return kind(text)
            return BrokenStream(self._breakage or "the connection has failed before")
        return TlsFault(_reason(error))

    async def _wait_for_room(self, sock: socket.socket) -> None:
        """Wait until the kernel has room for more. Both halves may need it: reading may have to answer a KeyUpdate.

        Trio lets only one task wait until a descriptor is writable. The other one waits for that task, then tries
        again.
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
        """Run the handshake; raises TlsFault if it fails, after its alert was sent."""
        with self._sending, self._receiving:
            await trio.lowlevel.checkpoint()
            try:
                await self._retry(SSL.Connection.do_handshake)
            except SSL.ZeroReturnError:
                raise TlsFault("close_notify in the middle of the handshake") from None
            # Set only now and not in the context, since the twenty events of a handshake do not matter.
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
        """Send what :meth:`send_now` has not sent."""
        with self._sending:
            self._send_is_broken = False
            self._check_sendable()
            await self._send(data)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data).cast("B") as view:
            sent = 0
            # After WantWrite OpenSSL must get the same bytes again: the view guarantees that. An empty write would
            # raise: the condition prevents it.
            while sent < len(view):
                rest = view[sent:]
                self._send_is_broken = True
                try:
                    sent += await self._retry(lambda connection, rest=rest: _send_some(connection, rest))  # type: ignore[misc]
                except SSL.ZeroReturnError:
                    raise BrokenStream("the TLS connection is over") from None
                self._send_is_broken = False

    def send_now(self, data: memoryview) -> int:
        """Send as much as the kernel takes without waiting; returns how many bytes of ``data`` were sent.

        Only :meth:`send_rest` may send the rest, since a part of its next record may be on the wire already.
        """
        self._check_sendable()
        connection, size = self.connection, len(data)
        corks = size > _RECORD and self.sock.family != socket.AF_UNIX
        if corks:
            # OpenSSL writes each record apart; with TCP_CORK the kernel still makes large segments.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sent = 0
        try:
            with _ffi.from_buffer(data) as start:
                while sent < size:
                    _openssl.ERR_clear_error()
                    result = _openssl.SSL_write(connection._ssl, start + sent, size - sent)
                    if result <= 0:
                        # Until the rest is sent, the stream is in the state of a cancelled send.
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
                # On a second call OpenSSL would report another error than the truncation.
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
                # Do not keep the exception itself: its traceback would keep the TLS state alive after the close.
                self._receive_failure = type(failure), str(failure)
                raise

    @property
    def has_met_more(self) -> bool:
        """Whether :meth:`receive_now` has read more than data: an end, a fault, or something to answer first.

        The socket may never become readable for it again. :meth:`receive_some` returns or raises it.
        """
        return self._must_write_first or self._eof_was_received or self._receive_failure is not None

    def receive_now(self, room: memoryview) -> int:
        """Receive the records that have arrived into ``room``, as long as it has room for a whole one.

        Returns the number of bytes; 0 if there are none, and the socket must become readable first; -1 if there are
        none, but :meth:`receive_some` has an end or a fault. It reads a few records at most: a peer that sends 100,000
        records of one byte must not keep all others waiting.
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
        """Keep the failure for :meth:`receive_some`, since OpenSSL reports it only once."""
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
        """Whether the next thing to read is the other side's close_notify, FIN or fault, with no data before it.

        It does not wait and takes no data. If there is data, at most one record moves into OpenSSL, where the next
        :meth:`receive_some` finds it.
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

        This is only possible after both close_notify: before that, the next byte on the wire could belong to TLS, and
        it raises LocalProtocolError. It raises TlsFault if the peer made TLS write after our close_notify.
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

        What was received ends with a whole record, since records are read one at a time. But without close_notify TLS
        cannot say whether the other side ends TLS at the same byte.
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
        """Send close_notify if that is possible, and close.

        It does not wait for the peer's close_notify. If you need that, read to the end first.
        """
        if self._sock is None:
            await trio.lowlevel.checkpoint()
            return
        try:
            if not self._eof_was_sent and not self._send_is_broken:
                await self.send_eof()
        except (trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError):
            pass  # another task is sending and will see the close, or the connection has ended already
        finally:
            self.close()
        await trio.lowlevel.checkpoint()


def _reason(error: SSL.Error) -> str:
    """OpenSSL's text for the last entry of its error queue."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1] or "TLS error")
    return str(error) or "TLS error"
