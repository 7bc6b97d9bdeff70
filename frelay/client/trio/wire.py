"""The wire of the Trio client: the inner TLS as a stream.

The inner TLS is an :class:`~frelay.client.tls_engine.Engine`, in mode ``tunnel`` on top of another one, so one stream
class serves all modes.
"""

from __future__ import annotations

import ssl
from contextlib import contextmanager
from typing import Any, Final

import trio

from frelay.client.alerts import refusal_of_certificate
from frelay.client.tls_engine import Engine
from frelay.client.wire import CUT_BEFORE_FIRST_BYTE, LINGER_LIMIT, LINGER_POLL, LINGER_QUIET
from frelay.errors import CertificateRefused, ConnectionBroken, Truncated
from frelay.net.tcp import is_dead, unacknowledged
from frelay.protocol.messages import Paired

__all__ = ["TrioWire"]

_READ: Final = 65536
# send_all encrypts and sends this much at a time, so the ciphertext of a large send is never in memory as a whole.
_WRITE: Final = 262144


class _StreamRefused(CertificateRefused, trio.BrokenResourceError):
    """CertificateRefused, also for code that catches Trio's own error."""


class _StreamCut(ConnectionBroken, trio.BrokenResourceError):
    """ConnectionBroken, also for code that catches Trio's own error."""


class TrioWire(trio.abc.HalfCloseableStream):
    """End-to-end mTLS with the other function, as a Trio stream.

    One task may send while another receives. If the connection breaks or ends without close_notify, sending and
    receiving raise :class:`trio.BrokenResourceError`. ``b""`` always means that the other function ended its direction.
    """

    def __init__(self, transport: trio.SocketStream, engine: Engine, paired: Paired) -> None:
        self._transport: Final = transport
        self._engine: Final = engine
        self._is_closed = False
        self._is_broken = False
        self._has_received = False
        self._is_sending = self._is_receiving = False
        self.paired: Final = paired
        """The relay's PAIRED message."""

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """The inner TLS, for its certificate, cipher and ALPN."""
        return self._engine.tls

    @contextmanager
    def _sending(self) -> Any:
        if self._is_sending:
            raise trio.BusyResourceError("another task is sending")
        self._is_sending = True
        try:
            yield
        finally:
            self._is_sending = False

    def _check_open(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this wire is closed")

    async def _flush(self) -> None:
        try:
            data = self._engine.take()
        except ssl.SSLError as error:
            raise self._broken(error) from error
        if data:
            try:
                await self._transport.send_all(data)
            except BaseException as error:
                # Some records may be sent and others not, so no further record can follow.
                self._is_broken = True
                if isinstance(error, trio.BrokenResourceError):
                    await self._look_for_refusal()
                raise

    async def _look_for_refusal(self) -> None:
        """Raise CertificateRefused if an alert that we have not read yet says that this is why sending failed."""
        if self._has_received or self._is_receiving:
            return
        self._is_receiving = True
        try:
            with trio.move_on_after(LINGER_QUIET):
                while self._engine.look_ahead() is None:
                    self._engine.feed(await self._transport.receive_some(_READ))
        except (trio.BrokenResourceError, trio.ClosedResourceError, Truncated):
            pass
        except ssl.SSLError as error:
            broken = self._broken(error)
            if isinstance(broken, _StreamRefused):
                raise broken from error
        finally:
            self._is_receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`trio.abc.SendStream.send_all`."""
        with self._sending():
            self._check_open()
            if self._engine.eof_was_sent:
                raise trio.ClosedResourceError("this direction has ended")
            if self._is_broken:
                raise trio.BrokenResourceError("an earlier send was cancelled or failed")
            if not data:
                await trio.lowlevel.checkpoint()
                return
            with memoryview(data).cast("B") as view:
                for at in range(0, len(view), _WRITE):
                    self._encrypt(view[at : at + _WRITE])
                    await self._flush()
                    self._check_open()

    async def wait_send_all_might_not_block(self) -> None:
        """See :meth:`trio.abc.SendStream.wait_send_all_might_not_block`."""
        with self._sending():
            self._check_open()
            await self._transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """End this direction: close_notify, and FIN where the connection is raw. Reading goes on."""
        with self._sending():
            self._check_open()
            if self._engine.eof_was_sent:
                await trio.lowlevel.checkpoint()
                return
            if self._is_broken:
                raise trio.BrokenResourceError("an earlier send was cancelled or failed")
            self._engine.send_eof()
            await self._flush()
            if self._engine.ends_with_fin:
                await self._transport.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See :meth:`trio.abc.ReceiveStream.receive_some`."""
        if max_bytes is not None and max_bytes < 1:
            await trio.lowlevel.checkpoint()
            raise ValueError("max_bytes must be at least 1")
        if self._is_receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._is_receiving = True
        try:
            self._check_open()
            await trio.lowlevel.checkpoint_if_cancelled()
            while (data := self._read(max_bytes or _READ)) is None:
                self._engine.feed(await self._receive_encrypted())
                self._check_open()
            self._has_received = self._has_received or bool(data)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return data
        finally:
            self._is_receiving = False

    async def _receive_encrypted(self) -> bytes:
        try:
            return await self._transport.receive_some(_READ)
        except trio.BrokenResourceError as error:
            if self._has_received or not isinstance(error.__cause__, ConnectionResetError):
                raise
            raise _StreamCut(CUT_BEFORE_FIRST_BYTE) from error.__cause__

    def _encrypt(self, data: memoryview) -> None:
        try:
            self._engine.write(data)
        except ssl.SSLError as error:
            raise self._broken(error) from error

    def _read(self, size: int) -> bytes | None:
        try:
            return self._engine.read(size)
        except (Truncated, ssl.SSLError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Truncated | ssl.SSLError) -> trio.BrokenResourceError:
        """What this stream raises for an error of TLS."""
        refusal = refusal_of_certificate(error, "server" if self._engine.tls.server_side else "client")
        if refusal is not None:
            return _StreamRefused(refusal)
        if isinstance(error, Truncated) and not self._has_received:
            return _StreamCut(CUT_BEFORE_FIRST_BYTE)
        return trio.BrokenResourceError(str(error))

    def close_forcefully(self) -> None:
        """Close without close_notify, so that the other side sees a cut."""
        self._is_closed = True
        self._transport.socket.close()

    async def aclose(self) -> None:
        """Send close_notify if it was not sent, let what was written arrive, and close; two seconds at most.

        What still comes in is dropped. While another task sends, or after a broken send, the connection is cut.
        """
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        self._is_closed = True
        try:
            if not self._is_sending and not self._is_broken:
                with trio.move_on_after(LINGER_LIMIT):
                    await self._linger()
            await trio.lowlevel.checkpoint_if_cancelled()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side is gone already
        finally:
            # Not the stream's aclose: there is nothing left to wait for.
            self._transport.socket.close()
        await trio.lowlevel.checkpoint()

    async def _linger(self) -> None:
        engine, transport = self._engine, self._transport
        if not engine.eof_was_sent:
            engine.send_eof()
            await self._flush()
            if engine.ends_with_fin:
                await transport.send_eof()
        if self._is_receiving:
            return  # the receiving task reads what arrives, and will notice that this wire is closed
        # Closing with unread bytes, or before the last ones arrive, sends RST, and RST destroys what we wrote.
        quiet = 0.0
        while quiet < LINGER_QUIET or unacknowledged(transport.socket):  # type: ignore[arg-type]  # it has a fileno
            with trio.move_on_after(LINGER_POLL) as pause:
                if not await transport.receive_some(_READ):
                    break
            quiet += LINGER_POLL if pause.cancelled_caught else 0.0
        sock: Any = transport.socket  # it has fileno() and getsockopt()
        while unacknowledged(sock) and not is_dead(sock):  # noqa: ASYNC110  the kernel reports no acknowledgement
            await trio.sleep(LINGER_POLL)
