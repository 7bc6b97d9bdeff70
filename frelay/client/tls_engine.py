"""One TLS 1.3 layer without I/O. It can end one direction alone, and can run inside another such layer.

Theory of operation. ``ssl.SSLObject`` works on two memory BIOs, so its owner decides when bytes move to and from the
network. It does not offer the half-close of TLS 1.3: ``unwrap()`` writes close_notify and at once *reads* the other
side's. If it finds a record of application data there, the connection is broken for good. But ``unwrap()`` reads only
what is in its BIO. So :meth:`Engine.send_eof` first decrypts everything there and keeps it; then ``unwrap()`` finds no
such record.

In mode ``tunnel`` the functions' TLS runs inside the TLS to the relay. That is a second Engine, whose ``below=`` is the
Engine that carries its records. The lowest one takes the bytes of the network. Whatever the number of layers, the
bytes from :meth:`Engine.take` go to the network.

The caller bounds the memory: if it feeds only after :meth:`Engine.read` returned None, at most one network read is
inside.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from frelay.errors import Truncated

__all__ = ["Engine"]

_RECORD: Final = 16384
_CUT: Final = "the connection ended without close_notify: it may have been cut short"


class Engine:
    """One end of a TLS connection. It raises ssl.SSLError for TLS faults, Truncated for an end without close_notify."""

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
        """Whether FIN must follow our close_notify. Not in a tunnel: there the outer TLS needs the connection."""
        return self._below is None

    @property
    def unread(self) -> int:
        """How many bytes of the network were fed and not processed by TLS yet."""
        return self._incoming.pending if self._below is None else self._below.unread

    @property
    def has_input(self) -> bool:
        """Whether a read may find something without another :meth:`feed`: data, an end, or a part of a record."""
        if self._kept or self._incoming.pending or self._incoming.eof or self.tls.pending():
            return True
        return self._below is not None and self._below.has_input

    # --- the network's side ------------------------------------------------------------------------------------

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes from the network; ``b""`` is its FIN."""
        if self._below is not None:
            self._below.feed(data)
        elif data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def take(self) -> bytes:
        """Remove and return the bytes to send to the network now, maybe none. Raises ssl.SSLError."""
        data = self._outgoing.read()
        if self._below is None:
            return data
        self._below.write(data)
        return self._below.take()

    def _refill(self) -> bool:
        """Move what the layer below has decrypted into this layer; False if there was nothing."""
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
        """Continue the handshake; True when it is done. If not: send what :meth:`take` returns, then feed."""
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
        """Up to ``size`` bytes; ``b""`` once the other side has ended its direction; None if you must feed first."""
        if self._kept:
            data, self._kept = self._kept[:size], self._kept[size:]
            return data
        return self._read_new(size)

    def look_ahead(self) -> bytes | None:
        """Read further, like :meth:`read`, but keep the bytes: :meth:`read` still returns them."""
        data = self._read_new(_RECORD)
        self._kept += data or b""
        return data

    def put_back(self, data: bytes) -> None:
        """Let the next read return ``data`` once more, which a read has just returned."""
        self._kept = data + self._kept

    def read_into(self, view: memoryview) -> int | None:
        """As :meth:`read`, into ``view``, which has room for at least one byte; returns the number of bytes."""
        if self._kept:
            data = self.read(len(view)) or b""
            view[: len(data)] = data
            return len(data)
        while True:
            try:
                count: Any = self.tls.read(len(view), view)  # typeshed knows only the form without a buffer
                return int(count)
            except ssl.SSLWantReadError:
                if not self._refill():
                    return None
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLEOFError as error:
                raise Truncated(_CUT) from error

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
                raise Truncated(_CUT) from error

    def send_eof(self) -> None:
        """End our direction with close_notify; reading goes on. Idempotent."""
        if self._eof_was_sent:
            return
        self._eof_was_sent = True
        try:
            while data := self.tls.read(_RECORD):
                self._kept += data
        except ssl.SSLError:
            pass  # nothing more is there, or an end or a fault, which the next read raises again
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError: our close_notify is written, and the other side's is not there yet
        if self._below is not None:
            try:
                self._below.write(self._outgoing.read())
            except ssl.SSLError:
                pass  # the layer below is broken, and the next read raises how
            self._below.send_eof()
