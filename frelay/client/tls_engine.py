"""One TLS 1.3 layer without I/O, that can end one direction and go on with the other, and stand on another such layer.

Theory of operation. ``ssl.SSLObject`` works on two memory BIOs, so whoever owns the network decides when bytes move.
What it does not offer is the half-close of TLS 1.3: ``unwrap()`` writes close_notify and at once goes on to *read* the
other side's, and a record of application data that it meets there breaks the connection for good. But it looks only at
what is in its BIO. So :meth:`Engine.send_eof` first decrypts all that is there and keeps it, and ``unwrap()`` finds
nothing to stumble over.

A second layer (the functions' TLS inside the TLS to the relay, mode ``tunnel``) is the same thing once more:
``below=`` is the layer that its records travel in. The lowest layer gets the bytes of the network, and what
:meth:`Engine.take` gives is for the network, whatever the number of layers.

Memory is bounded by the caller: feed only after :meth:`Engine.read` gave None, and at most one network read is inside.
"""

from __future__ import annotations

import ssl
from typing import Final

from frelay.errors import Truncated

__all__ = ["Engine"]

_RECORD: Final = 16384


class Engine:
    """One end of a TLS connection. Errors of TLS are ssl.SSLError; an end without close_notify is Truncated."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        below: Engine | None = None,
    ) -> None:
        self._incoming: Final = ssl.MemoryBIO()
        self._outgoing: Final = ssl.MemoryBIO()
        self._below: Final = below
        self.tls: Final = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._kept = b""
        self._eof_was_sent = False

    @property
    def eof_was_sent(self) -> bool:
        """Whether our direction has ended."""
        return self._eof_was_sent

    @property
    def ends_with_fin(self) -> bool:
        """Whether FIN should follow our close_notify; in a tunnel the relay's TLS goes on in the other direction."""
        return self._below is None

    @property
    def unread(self) -> int:
        """Bytes of the network that were fed and that TLS has not touched."""
        return self._incoming.pending if self._below is None else self._below.unread

    # --- the network's side ------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take in what the network gave; ``b""`` is its FIN."""
        if self._below is not None:
            self._below.feed(data)
        elif data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def take(self) -> bytes:
        """What is to be sent to the network now, taken away from here; maybe nothing. Raises ssl.SSLError."""
        data = self._outgoing.read()
        if self._below is None:
            return data
        self._below.write(data)
        return self._below.take()

    def _refill(self) -> bool:
        """Move what the layer below has decrypted into this one; False if there was nothing."""
        if self._below is None:
            return False
        data = self._below.read(_RECORD)
        if data is None:
            return False
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    # --- the user's side ---------------------------------------------------------------------------------------

    def handshake(self) -> bool:
        """Go on with the handshake; whether it is done. If not: send what :meth:`take` gives, and feed."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if self._refill():
                    continue
                return False
            except ssl.SSLEOFError as error:
                raise Truncated("the connection ended within the TLS handshake") from error
            return True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt all of ``data``."""
        with memoryview(data).cast("B") as view:
            at = 0
            while at < len(view):
                at += self.tls.write(view[at : at + _RECORD])

    def read(self, size: int) -> bytes | None:
        """Up to ``size`` bytes, ``b""`` once the other side has ended its direction; None: feed first."""
        if self._kept:
            data, self._kept = self._kept[:size], self._kept[size:]
            return data
        return self._read_new(size)

    def look_ahead(self) -> bytes | None:
        """As :meth:`read`, of what has not been looked at yet; :meth:`read` still gives it."""
        data = self._read_new(_RECORD)
        self._kept += data or b""
        return data

    def _read_new(self, size: int) -> bytes | None:
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                if not self._refill():
                    return None
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError as error:
                raise Truncated("the connection ended without close_notify: it may have been cut short") from error

    def send_eof(self) -> None:
        """End our direction with close_notify; reading goes on. Idempotent."""
        if self._eof_was_sent:
            return
        self._eof_was_sent = True
        try:
            while data := self.tls.read(_RECORD):
                self._kept += data
        except ssl.SSLError:
            pass  # nothing more is there; or it is an end or a fault, which the next read finds again
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError: close_notify is written, and the other side's has not come
        if self._below is not None:
            try:
                self._below.write(self._outgoing.read())
            except ssl.SSLError:
                pass  # that layer is broken, and reading tells how
            self._below.send_eof()
