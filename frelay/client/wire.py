"""The inner TLS of a function, on the standard library's ``ssl``: its context, its socket, and who is at the other end.

Python's ``SSLSocket`` leaves things to its user that go wrong for nearly everyone, so :class:`Wire` does them:

* ``close()`` alone sends no close_notify, and the other side cannot tell the end from a cut. ``Wire.close`` sends it.
* ``unwrap()`` ends both directions: after its close_notify it goes on to read, and a byte of the other side that is
  already there is fatal to it ("application data after close notify"). ``Wire.send_eof`` ends only this direction;
  TLS 1.3 lets reading go on.
* After ``unwrap()`` and ``shutdown()`` the socket silently leaves TLS, so that whoever owns the network could make up
  what is read from then on. A ``Wire`` stays in TLS until it is closed.
* A missing close_notify is swallowed by default and looks like a clean end. Here it is an error (``SSLEOFError``).
* Closing a socket with unread bytes, or before bytes still to come, sends RST, which destroys what was written and
  is still under way. ``Wire.close`` takes what comes and waits a moment. For the same reason our TLS server sends no
  session tickets, which a client that only writes would never read; nobody resumes here.
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

# Seconds that close() waits for the other side's end, and for our own bytes to arrive; see Wire.close.
LINGER_QUIET: Final = 0.25
LINGER_LIMIT: Final = 2.0
# How often it looks for acknowledgements, of which nothing tells.
LINGER_POLL: Final = 0.01
# How long close() waits for room for its close_notify where the socket has no timeout of its own: a peer that has
# stopped reading must not hold a function that is done for longer than reaching the relay may take.
CLOSE_SEND_TIMEOUT: Final = 30.0
# What a function can know of a cut before it has heard a byte: a TLS client is up before its server has judged it.
CUT_BEFORE_FIRST_BYTE: Final = (
    "the connection broke before the other function said anything: "
    "it may have gone, or expect somebody else than this function (peer= there); its own error tells"
)


class _WireRefused(CertificateRefused, ssl.SSLError):
    """CertificateRefused for code that was written for sockets, and catches OSError."""

    def __str__(self) -> str:
        # SSLError's own wants a number before the text.
        return str(self.args[0])


class Wire(ssl.SSLSocket):
    """End-to-end mTLS with the other function: an :class:`ssl.SSLSocket` that ends in good order.

    Like any ``SSLSocket`` it is for one thread at a time. For both directions at once use the Trio or asyncio client,
    or a selector.
    """

    _kept: bytes = b""
    """Application data, at most one record of it, that was decrypted and not read when this direction ended."""
    _unsent_close_notify: bytes | None = None
    """What is still to be sent of our close_notify; None before it was made."""
    _has_heard: bool = False
    """Whether application data has come."""
    pump: threading.Thread | None = None
    """What carries the bytes of a wire in a tunnel; its end means that all of them are in the kernel's hands."""

    def send_eof(self) -> None:
        """End this direction with close_notify, and FIN; reading goes on.

        It waits for room as sending does: raises TimeoutError, or SSLWantWriteError where the socket does not block,
        and may then be called again. That the other side is gone is no error here: whoever reads next learns it.
        """
        tls = getattr(self, "_sslobj", None)
        if tls is None:
            return
        if self._unsent_close_notify is None:
            self._unsent_close_notify = self._make_close_notify(tls)
        try:
            while self._unsent_close_notify:
                # Not SSLSocket.send: the record is TLS already.
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
        """The record of our close_notify; ``b""`` if TLS can write nothing any more.

        The ssl module calls SSL_shutdown twice: the first call writes close_notify, the second reads, and is the one
        that breaks the other direction. So for this moment the descriptor is an empty socket pair: there is nothing
        to read, and always room for what is written.
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
                    raise  # not for want of room: an earlier send was given up in mid-record, and that is a cut
                except ssl.SSLError:
                    pass  # SSLWantReadError: it has written, and looked in vain for the other side's
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
        """As for any socket; ``SHUT_WR`` says so in TLS, too, and leaves reading possible."""
        if how != socket.SHUT_RD:
            self.send_eof()
        if how != socket.SHUT_WR:
            socket.socket.shutdown(self, how)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As ``SSLSocket.read``; the peer's close_notify is an end after ``send_eof``, too, not an exception."""
        if self._kept:
            return self._read_kept(len, buffer)
        try:
            data = super().read(len, buffer)
        except ssl.SSLZeroReturnError:
            # OpenSSL says the same thing in both cases; the ssl module only reads it as an end before ours is sent.
            return b"" if buffer is None else 0
        except (ssl.SSLEOFError, ConnectionResetError) as error:
            if not self._has_heard:
                error.strerror = CUT_BEFORE_FIRST_BYTE
            raise
        except ssl.SSLError as error:
            text = refusal_of_certificate(error, "server" if self.server_side else "client")
            if text is None:
                raise
            raise _WireRefused(text) from error
        self._has_heard = self._has_heard or bool(data)
        return data

    def send(self, data: Any, flags: int = 0) -> int:
        """As ``SSLSocket.send``; where it breaks because our certificate was refused, CertificateRefused says so."""
        try:
            return super().send(data, flags)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            if not self._has_heard and not self._kept:
                self._look_for_refusal()
            raise

    def _look_for_refusal(self) -> None:
        """Raise CertificateRefused if its alert has come, and nobody has read it."""
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
        self._has_heard = True
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
        """Let the alert arrive with which TLS has refused the other side's certificate; a quarter of a second at most.

        Closing while bytes come in sends RST, which overtakes it.
        """
        try:
            socket.socket.shutdown(self, socket.SHUT_WR)
            self.settimeout(LINGER_QUIET)
            end = time.monotonic() + LINGER_QUIET
            while socket.socket.recv(self, 65536) and time.monotonic() < end:
                pass
        except OSError:
            pass  # nothing comes, or it is gone

    def abandon(self) -> None:
        """Close without close_notify: the other side sees a cut, and can take it for nothing else."""
        self._sslobj: Any = None
        self.close()

    def close(self) -> None:
        """Send close_notify if it was not sent, let what was written arrive, and close.

        What still comes in is dropped. The wait is for the other side's end, or until all that was written has been
        acknowledged and a moment has passed; two seconds at most. A socket that does not block is closed at once.
        """
        super().close()

    def _real_close(self) -> None:
        # Not in close(): that only counts down where makefile() has made a second owner.
        if getattr(self, "_sslobj", None) is not None and self.fileno() != -1:
            try:
                if self._unsent_close_notify is None and self.gettimeout() is None:
                    self.settimeout(CLOSE_SEND_TIMEOUT)
                self.send_eof()
                self._linger()
            except OSError:
                pass  # the other side sees a cut, which is the truth
        super()._real_close()  # type: ignore[misc]  # not in typeshed
        if self.pump is not None:
            # A daemon: at the end of the process it would take with it what it has not sent yet.
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
