"""The wire of the blocking client: the inner TLS as an ``ssl.SSLSocket`` that ends in good order.

Python's ``SSLSocket`` leaves some things to its user that nearly every user gets wrong. :class:`Wire` does them:

* ``close()`` alone sends no close_notify, so the other side cannot tell the end from a cut. ``Wire.close`` sends it.
* ``unwrap()`` ends both directions: it sends close_notify and then reads. It fails if a byte of the other side is
  already there ("application data after close notify"). ``Wire.send_eof`` ends only this direction; TLS 1.3 allows
  reading to go on.
* After ``unwrap()`` and ``shutdown()`` the socket silently leaves TLS. From then on an attacker in the network could
  forge what we read. A ``Wire`` stays in TLS until it is closed.
* By default the ssl module ignores a missing close_notify, which then looks like a clean end. Here it is an error
  (``SSLEOFError``).
* Closing a socket with unread bytes, or before the last ones arrive, sends RST, and RST destroys what we wrote but has
  not arrived yet. ``Wire.close`` reads what arrives and waits a moment. For the same reason our TLS server sends no
  session tickets: a client that only writes would never read them, and we resume no session anyway.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from typing import Any, Final

from frelay.client.alerts import refusal_of_certificate
from frelay.errors import CertificateRefused
from frelay.net.tcp import is_dead, unacknowledged

__all__ = ["Wire"]

# All clients use these. To linger is to wait in close() until the other side has ended or has acknowledged everything.
# Seconds to wait for the other side's end when it has acknowledged everything.
LINGER_QUIET: Final = 0.25
# Seconds to wait at most.
LINGER_LIMIT: Final = 2.0
# Seconds between two looks for acknowledgements: the kernel does not report them.
LINGER_POLL: Final = 0.01
# How long close() waits for room for its close_notify if the socket has no timeout. A peer that has stopped reading
# must not hold a finished function any longer than reaching the relay may take.
CLOSE_SEND_TIMEOUT: Final = 30.0
# All that a function can say about a cut before the first byte: its TLS handshake as a client is done before the server
# has checked its certificate.
CUT_BEFORE_FIRST_BYTE: Final = (
    "the connection broke before the other function said anything: "
    "it may be gone, or its peer= may not be this function; the error of the other function says which"
)


class _WireRefused(CertificateRefused, ssl.SSLError):
    """CertificateRefused, also for code that was written for sockets and catches OSError."""

    def __str__(self) -> str:
        # SSLError.__str__ expects a number before the text.
        return str(self.args[0])


class Wire(ssl.SSLSocket):
    """End-to-end mTLS with the other function: an :class:`ssl.SSLSocket` that ends in good order.

    Like any ``SSLSocket`` it is for one thread at a time. For both directions at once use the Trio or asyncio client,
    or a selector.
    """

    _kept: bytes = b""
    """Application data, at most one record, that was decrypted but not read when this direction ended."""
    _unsent_close_notify: bytes | None = None
    """The part of our close_notify that is not sent yet; None before we have made it."""
    _has_received: bool = False
    """Whether application data has arrived."""
    pump: threading.Thread | None = None
    """In a tunnel, the thread that copies the bytes of the wire. When it ends, the kernel has all of them."""

    def send_eof(self) -> None:
        """End this direction with close_notify, and FIN; reading goes on.

        Like sending, it may have to wait for room. Then it raises TimeoutError, or SSLWantWriteError on a non-blocking
        socket, and may be called again. It is no error here that the other side is gone: the next read raises it.
        """
        tls = getattr(self, "_sslobj", None)
        if tls is None:
            return
        if self._unsent_close_notify is None:
            self._unsent_close_notify = self._make_close_notify(tls)
        try:
            while self._unsent_close_notify:
                # Not SSLSocket.send: this record is encrypted already.
                sent = socket.socket.send(self, self._unsent_close_notify)
                self._unsent_close_notify = self._unsent_close_notify[sent:]
            socket.socket.shutdown(self, socket.SHUT_WR)
        except BlockingIOError:
            raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "no room for close_notify yet") from None
        except TimeoutError:
            raise
        except OSError:
            pass  # the other side is gone

    def _make_close_notify(self, tls: Any) -> bytes:
        """The record of our close_notify; ``b""`` if TLS cannot write any more.

        The ssl module calls SSL_shutdown twice. The first call writes close_notify; the second one reads, and breaks
        the other direction. So for this moment we put an empty socket pair under the descriptor: there is nothing to
        read, and always room to write.
        """
        while size := super().pending():
            self._kept += super().read(size)
        timeout = self.gettimeout()
        descriptor, saved = self.fileno(), os.dup(self.fileno())
        try:
            near, far = socket.socketpair()
            with near, far:
                near.setblocking(False)
                far.setblocking(False)
                self.settimeout(0)
                os.dup2(near.fileno(), descriptor, inheritable=False)
                try:
                    tls.shutdown()
                except ssl.SSLWantWriteError:
                    raise  # there is room, so an earlier send stopped within a record, and the wire is cut
                except ssl.SSLError:
                    pass  # SSLWantReadError: it wrote our close_notify, and found none of the other side
                finally:
                    os.dup2(saved, descriptor, inheritable=False)
                    self.settimeout(timeout)
                try:
                    return far.recv(16384)
                except BlockingIOError:
                    return b""
        finally:
            os.close(saved)

    def shutdown(self, how: int) -> None:
        """As for any socket; ``SHUT_WR`` also sends close_notify, and reading goes on."""
        if how != socket.SHUT_RD:
            self.send_eof()
        if how != socket.SHUT_WR:
            socket.socket.shutdown(self, how)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As ``SSLSocket.read``, but the peer's close_notify reads as an end also after ``send_eof``."""
        if self._kept:
            return self._read_kept(len, buffer)
        try:
            data = super().read(len, buffer)
        except ssl.SSLZeroReturnError:
            # The peer's close_notify. The ssl module reports it as an end only until we have sent our own.
            return b"" if buffer is None else 0
        except (ssl.SSLEOFError, ConnectionResetError) as error:
            if not self._has_received:
                error.strerror = CUT_BEFORE_FIRST_BYTE
            raise
        except ssl.SSLError as error:
            text = refusal_of_certificate(error, "server" if self.server_side else "client")
            if text is None:
                raise
            raise _WireRefused(text) from error
        self._has_received = self._has_received or bool(data)
        return data

    def send(self, data: Any, flags: int = 0) -> int:
        """As ``SSLSocket.send``; raises CertificateRefused if it fails because the peer refused our certificate."""
        try:
            return super().send(data, flags)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            if not self._has_received and not self._kept:
                self._look_for_refusal()
            raise

    def _look_for_refusal(self) -> None:
        """Raise CertificateRefused if its alert has arrived and is not read yet."""
        timeout = self.gettimeout()
        self.settimeout(0)
        try:
            self._kept = super().read(16384)
        except ssl.SSLError as error:
            text = refusal_of_certificate(error, "server" if self.server_side else "client")
            if text is not None:
                raise _WireRefused(text) from error
        except OSError:
            pass
        finally:
            self.settimeout(timeout)

    def _read_kept(self, size: int, buffer: Any) -> Any:
        self._has_received = True
        if buffer is None:
            data, self._kept = self._kept[:size], self._kept[size:]
            return data
        with memoryview(buffer).cast("B") as view:
            size = min(size, len(view), len(self._kept))
            view[:size], self._kept = self._kept[:size], self._kept[size:]
        return size

    def pending(self) -> int:
        """Bytes that can be read without waiting for the network, as ``SSLSocket.pending``."""
        return len(self._kept) + super().pending()

    def see_alert_off(self) -> None:
        """Wait until our alert about the other side's certificate can arrive; a quarter of a second at most.

        Closing while bytes arrive sends RST, which can overtake the alert.
        """
        try:
            socket.socket.shutdown(self, socket.SHUT_WR)
            self.settimeout(LINGER_QUIET)
            end = time.monotonic() + LINGER_QUIET
            while socket.socket.recv(self, 65536) and time.monotonic() < end:
                pass
        except OSError:
            pass  # nothing arrives, or the other side is gone

    def abandon(self) -> None:
        """Close without close_notify, so that the other side sees a cut."""
        self._sslobj: Any = None
        self.close()

    def close(self) -> None:
        """Send close_notify if it was not sent, wait until what was written arrives, and close.

        It drops what still arrives. It waits for the other side's end, or until everything written is acknowledged and
        a moment has passed; two seconds at most. A non-blocking socket is closed at once.
        """
        super().close()

    def _real_close(self) -> None:
        # Not in close(): after makefile(), close() only counts down, and this method is the real end.
        if getattr(self, "_sslobj", None) is not None and self.fileno() != -1:
            try:
                if self._unsent_close_notify is None and self.gettimeout() is None:
                    self.settimeout(CLOSE_SEND_TIMEOUT)
                self.send_eof()
                self._linger()
            except OSError:
                pass  # no close_notify could be sent, so the other side sees a cut
        super()._real_close()  # type: ignore[misc]  # not in typeshed
        if self.pump is not None:
            # It is a daemon thread: if the process ended now, its unsent bytes would be lost.
            self.pump.join(LINGER_LIMIT)

    def _linger(self) -> None:
        may_wait = self.gettimeout() != 0
        began = time.monotonic()
        self.settimeout(LINGER_POLL if may_wait else 0)
        while True:
            limit = LINGER_LIMIT if unacknowledged(self) else LINGER_QUIET
            if time.monotonic() - began > limit:
                return
            try:
                if not socket.socket.recv(self, 65536):
                    break
            except BlockingIOError:
                return
            except TimeoutError:
                continue
        while may_wait and unacknowledged(self) and not is_dead(self) and time.monotonic() - began < LINGER_LIMIT:
            time.sleep(LINGER_POLL)
