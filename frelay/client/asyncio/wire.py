"""The wire of the asyncio client: the inner TLS as a transport that can half-close. Standard library only.

asyncio's own TLS transport cannot end one direction alone (its ``can_write_eof()`` is False). So the writer uses a
transport of ours, :class:`WireTransport`, between an :class:`~frelay.client.tls_engine.Engine` and asyncio's plain
socket transport. Back-pressure comes from the plain transport, in both directions: its ``pause_writing`` makes
``drain()`` wait, and a full reader pauses the socket.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any, Final

from frelay.client.alerts import refusal_of_certificate
from frelay.client.tls_engine import Engine
from frelay.client.wire import CLOSE_SEND_TIMEOUT, CUT_BEFORE_FIRST_BYTE, LINGER_LIMIT, LINGER_POLL, LINGER_QUIET
from frelay.errors import CertificateRefused, Truncated
from frelay.net.tcp import is_dead, unacknowledged

__all__ = ["WireTransport"]

_READ: Final = 65536
_WRITE: Final = 262144


class _PlainProtocol(asyncio.Protocol):
    """The protocol of the plain transport: it passes everything on to the wire."""

    def __init__(self, wire: WireTransport) -> None:
        self._wire = wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the type checker
        self._wire.start(transport)

    def data_received(self, data: bytes) -> None:
        self._wire.take_in(data)

    def eof_received(self) -> bool:
        self._wire.take_in(b"")
        return True  # keep the connection open: our own direction may go on

    def pause_writing(self) -> None:
        self._wire.protocol.pause_writing()

    def resume_writing(self) -> None:
        self._wire.protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._wire.lost(error)


class _ReaderRefused(CertificateRefused, ConnectionResetError):
    """CertificateRefused, also for code that catches ConnectionResetError."""


class WireTransport(asyncio.Transport):
    """The inner TLS as an asyncio transport, with half-close."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self._loop = loop
        self._engine = engine
        self._below: asyncio.Transport
        self._sock: socket.socket
        self._is_closing = False
        self._is_over = False
        self._is_paused = False
        self._peer_ended = False
        self._has_received = False
        self._linger_began = 0.0
        self._last_received_at = 0.0
        self._held = 0
        self._held_changed_at = 0.0
        self._error: Exception | None = None

    def plain_protocol(self) -> asyncio.Protocol:
        """The protocol for the plain transport that is to carry this wire; it calls :meth:`start`."""
        return _PlainProtocol(self)

    def start(self, below: asyncio.Transport) -> None:
        """The plain transport is connected."""
        self._below = below
        self._sock = below.get_extra_info("socket")
        self.protocol.connection_made(self)
        # Application data may have arrived together with the end of the handshake.
        self._loop.call_soon(self._deliver)

    # --- from the network --------------------------------------------------------------------------------------

    def take_in(self, data: bytes) -> None:
        """Take bytes from the network; ``b""`` is its end."""
        self._last_received_at = self._loop.time()
        if self._is_over:
            return
        self._engine.feed(data)
        self._deliver()

    def _deliver(self) -> None:
        while not self._is_over and not self._peer_ended and not (self._is_paused and not self._is_closing):
            try:
                data = self._engine.read(_READ)
            except (Truncated, ssl.SSLError) as error:
                self._cut(self._broken(error))
                return
            if data is None:
                break
            self._has_received = self._has_received or bool(data)
            if not data:
                self._peer_ended = True
                if not self._is_closing:
                    self.protocol.eof_received()
            elif not self._is_closing:
                self.protocol.data_received(data)

    def lost(self, error: Exception | None) -> None:
        """The plain transport is closed."""
        self._is_over = self._is_closing = True
        if isinstance(error, ConnectionResetError) and not self._has_received:
            error.strerror = CUT_BEFORE_FIRST_BYTE
        self._loop.call_soon(self.protocol.connection_lost, self._error or error)

    def _broken(self, error: Truncated | ssl.SSLError) -> ConnectionResetError:
        """What the reader raises for an error of TLS."""
        refusal = refusal_of_certificate(error, "server" if self._engine.tls.server_side else "client")
        if refusal is not None:
            return _ReaderRefused(refusal)
        was_cut = isinstance(error, Truncated) and not self._has_received
        return ConnectionResetError(CUT_BEFORE_FIRST_BYTE if was_cut else str(error))

    def _cut(self, error: Exception | None) -> None:
        if not self._is_over:
            self._error = error
            self._is_over = True
            self._below.abort()

    # --- asyncio.ReadTransport -----------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """See asyncio.ReadTransport."""
        return not self._is_paused and not self._is_closing

    def pause_reading(self) -> None:
        """See asyncio.ReadTransport."""
        if not self._is_closing and not self._is_paused:
            self._is_paused = True
            self._below.pause_reading()

    def resume_reading(self) -> None:
        """See asyncio.ReadTransport."""
        if self._is_paused:
            self._is_paused = False
            self._below.resume_reading()
            self._loop.call_soon(self._deliver)

    # --- asyncio.WriteTransport ----------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio.WriteTransport."""
        if self._engine.eof_was_sent and not self._is_closing:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._is_over or self._is_closing:
            return  # as asyncio's own transports do: the reader and drain() raise the error
        with memoryview(data).cast("B") as view:
            for at in range(0, len(view), _WRITE):
                try:
                    self._engine.write(view[at : at + _WRITE])
                except ssl.SSLError as error:
                    self._cut(self._broken(error))
                    return
                self._flush()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """See asyncio.WriteTransport."""
        self.write(b"".join(list_of_data))

    def _flush(self) -> None:
        try:
            data = self._engine.take()
        except ssl.SSLError as error:
            self._cut(self._broken(error))
            return
        if data:
            self._below.write(data)

    def can_write_eof(self) -> bool:
        """True: TLS 1.3 can end one direction alone."""
        return True

    def write_eof(self) -> None:
        """End this direction: close_notify, and FIN where the connection is raw. Reading goes on."""
        if self._engine.eof_was_sent or self._is_over:
            return
        self._engine.send_eof()
        self._flush()
        if self._engine.ends_with_fin:
            self._below.write_eof()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See asyncio.WriteTransport."""
        self._below.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """See asyncio.WriteTransport; this counts encrypted bytes."""
        return self._below.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """See asyncio.WriteTransport."""
        return self._below.get_write_buffer_limits()

    # --- asyncio.BaseTransport -----------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``ssl_object``, ``peercert``, ``cipher`` of the inner TLS; the plain transport answers for other names."""
        # Give no sslcontext: StreamReaderProtocol believes that a transport with one cannot half-close.
        tls = self._engine.tls
        own: dict[str, Callable[[], Any]] = {
            "ssl_object": lambda: tls,
            "peercert": tls.getpeercert,
            "cipher": tls.cipher,
            "sslcontext": lambda: default,
        }
        return own[name]() if name in own else self._below.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """See asyncio.BaseTransport."""
        return self._is_closing or self._is_over

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See asyncio.BaseTransport."""
        assert isinstance(protocol, asyncio.Protocol)  # noqa: S101  for the type checker
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """See asyncio.BaseTransport."""
        return self.protocol

    def abort(self) -> None:
        """Close without close_notify, so that the other side sees a cut."""
        self._is_closing = True
        self._cut(None)

    def close(self) -> None:
        """End in good order: send what was written, then close_notify, and drop what still arrives.

        ``wait_closed()`` returns when the other side has ended too, or when everything written is acknowledged and a
        moment has passed.
        """
        if self._is_closing or self._is_over:
            return
        self.write_eof()
        self._is_closing = True
        if self._is_paused:
            self._is_paused = False
            self._below.resume_reading()
        self._last_received_at = self._loop.time()
        self._deliver()
        self._linger()

    def _linger(self) -> None:
        # Closing with unread bytes, or before the last ones arrive, sends RST, and RST destroys what we wrote.
        if self._is_over:
            return
        now = self._loop.time()
        held = self._below.get_write_buffer_size()
        if held:
            # The time to linger begins when the kernel has all bytes. But a peer that has stopped reading must not hold
            # a finished function for ever.
            if held != self._held:
                self._held, self._held_changed_at = held, now
            elif now - self._held_changed_at > CLOSE_SEND_TIMEOUT:
                self._cut(ConnectionResetError(f"the other side took nothing for {CLOSE_SEND_TIMEOUT:g} s"))
                return
        elif not self._linger_began:
            self._linger_began = now
        waits = (unacknowledged(self._sock) and not is_dead(self._sock)) or not (
            self._peer_ended or now - self._last_received_at > LINGER_QUIET
        )
        if not self._linger_began or (waits and now - self._linger_began < LINGER_LIMIT):
            self._loop.call_later(LINGER_POLL, self._linger)
            return
        self._is_over = True
        self._below.close()
