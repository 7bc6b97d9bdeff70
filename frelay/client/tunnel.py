"""Mode ``tunnel`` for the blocking client: a thread between one end of a socket pair and the outer TLS.

``ssl.SSLSocket`` needs a descriptor. So in mode ``tunnel`` the blocking client's inner TLS runs on one end of a socket
pair, and this thread copies its bytes into the outer TLS and back. The thread has no queue: it reads from one side only
when the other side has taken everything before, so back-pressure passes through.

Each direction ends alone: FIN from the pair becomes close_notify, and close_notify becomes FIN. After a cut (FIN
without close_notify, or a reset) the thread closes both sides. The inner TLS then misses the peer's close_notify, so it
sees a cut and no clean end. The thread is a daemon: it does not delay a process that ends without closing its wire, and
the other side then sees a cut.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Final

from frelay.client.tls_engine import Engine
from frelay.errors import Truncated

__all__ = ["TunnelPump"]

_READ: Final = 65536
# How long the other function may take to end its direction once the wire is closed; the same as in Wire.close.
_LINGER_LIMIT: Final = 2.0
_LINGER_POLL: Final = 100  # milliseconds


class TunnelPump(threading.Thread):
    """Copies bytes between ``pair`` (plain) and ``outer`` (in ``tunnel``) until both directions have ended."""

    def __init__(self, pair: socket.socket, outer: socket.socket, tunnel: Engine) -> None:
        super().__init__(name="frelay tunnel", daemon=True)
        self._pair: Final = pair
        self._outer: Final = outer
        self._tunnel: Final = tunnel
        pair.setblocking(False)
        outer.setblocking(False)

    def run(self) -> None:
        """Run the thread; it closes both sockets at the end."""
        try:
            with self._pair, self._outer:
                self._copy()
        except (OSError, Truncated):
            pass  # both sockets are closed now, so the inner TLS sees a cut

    def _copy(self) -> None:
        tunnel = self._tunnel
        to_outer, to_pair = memoryview(tunnel.take()), memoryview(b"")
        pair_ended = outer_ended = False
        linger_until: float | None = None
        while to_outer or to_pair or not (pair_ended and outer_ended):
            if linger_until is not None:
                # The wire is closed. Drop what still arrives for it: to refuse it would be a reset.
                to_pair = memoryview(b"")
                if time.monotonic() > linger_until:
                    return
            if not to_pair and not outer_ended:
                # First take what TLS has already: poll() does not see those bytes.
                data = tunnel.read(_READ)
                if data:
                    to_pair = memoryview(data)
                    continue
                if data is not None:
                    outer_ended = True
                    self._pair.shutdown(socket.SHUT_WR)
                    continue
            poll = select.poll()
            reads = not pair_ended and not to_outer
            if linger_until is None and (reads or to_pair or pair_ended):
                # After the pair has ended, POLLHUP alone is worth waiting for: it says that the wire is closed. Before
                # that we need another event to wait for. While ``outer`` takes nothing, POLLHUP would make us spin.
                poll.register(self._pair, (select.POLLIN if reads else 0) | (select.POLLOUT if to_pair else 0))
            reads_outer = not outer_ended and not to_pair
            if reads_outer or to_outer:
                poll.register(self._outer, (select.POLLIN if reads_outer else 0) | (select.POLLOUT if to_outer else 0))
            ready = dict(poll.poll(None if linger_until is None else _LINGER_POLL))
            at_pair, at_outer = ready.get(self._pair.fileno(), 0), ready.get(self._outer.fileno(), 0)
            if at_pair & select.POLLOUT:
                to_pair = to_pair[_send(self._pair, to_pair) :]
            if at_pair and not pair_ended and not to_outer:
                data = _receive(self._pair)
                if data:
                    tunnel.write(data)
                elif data is not None:
                    pair_ended = True
                    tunnel.send_eof()
            elif at_pair & select.POLLHUP and pair_ended:
                linger_until = time.monotonic() + _LINGER_LIMIT
            if at_outer and to_outer:
                to_outer = to_outer[_send(self._outer, to_outer) :]
            if at_outer and reads_outer:
                data = _receive(self._outer)
                if data is not None:
                    tunnel.feed(data)
            if not to_outer:
                to_outer = memoryview(tunnel.take())


def _send(sock: socket.socket, data: memoryview) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        if sock.family == socket.AF_UNIX:
            return len(data)  # the wire is closed, so the bytes are dropped
        raise


def _receive(sock: socket.socket) -> bytes | None:
    """The bytes that are there; ``b""`` at the end, None if there are none now."""
    try:
        return sock.recv(_READ)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        # On the socket pair: the wire was closed and dropped unread bytes on purpose, so this is a normal end.
        if sock.family == socket.AF_UNIX:
            return b""
        raise
