"""A tunnel for a client that needs a real socket: a thread between one end of a socket pair and the outer TLS.

``ssl.SSLSocket`` works on a descriptor only, so in mode ``tunnel`` the blocking client's inner TLS runs on one end of a
socket pair, and this thread carries its bytes in the outer TLS to the relay and back. It is small and has no queue: it
reads from a side only when the other side has taken all of what came before, so back-pressure goes through.

Each direction ends alone: FIN from the pair becomes close_notify, and close_notify becomes FIN. A cut (FIN without
close_notify, a reset) becomes the end of everything, which the inner TLS tells from an orderly one by its own
close_notify. The thread is a daemon: a process that ends without closing its wire is not held up, and the other side
sees a cut.
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
# How long the other function may take to end its direction once the wire is closed; as Wire.close.
_LINGER_LIMIT: Final = 2.0
_LINGER_POLL: Final = 100  # milliseconds


class TunnelPump(threading.Thread):
    """Carries bytes between ``pair`` (plain) and ``outer`` (in ``tunnel``) until both directions have ended."""

    def __init__(self, pair: socket.socket, outer: socket.socket, tunnel: Engine) -> None:
        super().__init__(name="frelay tunnel", daemon=True)
        self._pair: Final = pair
        self._outer: Final = outer
        self._tunnel: Final = tunnel
        pair.setblocking(False)
        outer.setblocking(False)

    def run(self) -> None:
        """Thread.run; closes both sockets at the end."""
        try:
            with self._pair, self._outer:
                self._carry()
        except (OSError, Truncated):
            pass  # both are closed now, and the inner TLS sees a cut

    def _carry(self) -> None:
        tunnel = self._tunnel
        to_outer, to_pair = memoryview(tunnel.take()), memoryview(b"")
        pair_ended = outer_ended = False
        linger_until: float | None = None
        while to_outer or to_pair or not (pair_ended and outer_ended):
            if linger_until is not None:
                # The wire is closed: what still comes for it is dropped, not refused, which would be a reset.
                to_pair = memoryview(b"")
                if time.monotonic() > linger_until:
                    return
            if not to_pair and not outer_ended:
                # What has been read already comes first: poll() knows nothing of it.
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
                # Once it has ended without any event, too: POLLHUP says that the wire is closed. Not before: what is
                # under way to the line then has no limit but the line's, and POLLHUP would make this loop spin.
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
            return len(data)  # the wire was closed: dropped
        raise


def _receive(sock: socket.socket) -> bytes | None:
    """What is there, ``b""`` at the end, None if there is nothing now."""
    try:
        return sock.recv(_READ)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        # On a socket pair: closed with bytes unread. An end like any other, as those bytes were dropped on purpose.
        if sock.family == socket.AF_UNIX:
            return b""
        raise
