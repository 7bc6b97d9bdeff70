"""A listener: one address, its accept loop, and a task for each connection that comes in.

The loop survives whatever a connection does, and never waits for one: a silent connection does not keep the next one in
the kernel's queue. :mod:`frelay.net.strangers` limits how many strangers there may be. A fault of a connection ends
that connection's task and nothing else. When descriptors run out, the loop pauses and tries again, so that it does not
spin.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import structlog
import trio

from frelay.config.model import Address
from frelay.joining.accept_context import AcceptContext, AcceptSettings, SharedParts
from frelay.joining.connection import IncomingConnection
from frelay.net.binding import bind
from frelay.net.slots import Admission, Slot
from frelay.net.sockets import accept, close, format_address

__all__ = ["Listener"]

_PAUSE: Final = 0.1
# EAGAIN: another process has accepted it. The others, as accept(2) says: the connection died while it queued, or a
# firewall forbids it; the next one may be good.
_NOT_THIS_ONE: Final = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
        errno.ETIMEDOUT,
    }
)
# How long, in seconds, a stopped listener waits for the refusals of its waiting legs to be sent.
_GOODBYE: Final = 3.5


class Listener:
    """One bound address. Bind with :meth:`open`; then give :meth:`serve` a task, which ends by :meth:`stop`.

    If an address goes and its routes stay at other addresses, call :meth:`leave`: the legs that wait here wait on.
    """

    def __init__(self, address: Address, sockets: Sequence[socket.socket]) -> None:
        self.address: Final = address
        self._sockets: Final = tuple(sockets)
        self._accepting: Final = trio.CancelScope()
        self._connections: trio.Nursery | None = None
        self._is_stopped = False
        self._has_ended = False
        self._log: Any = structlog.get_logger("frelay.listener").bind(listen=str(address))

    @classmethod
    def open(cls, address: Address, places: Sequence[Address]) -> Listener:
        """Bind and listen at ``places``, the IP addresses of ``address``; raises OSError, and then nothing is bound."""
        return cls(address, bind(address, places))

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """What it listens on, or would."""
        return self._sockets

    @property
    def bound(self) -> list[str]:
        """The addresses that the sockets really have, ``host:port``; the port matters where 0 was asked for."""
        return [format_address(sock.getsockname()[:2]) for sock in self._sockets]

    def close(self) -> None:
        """Give the address back. Idempotent."""
        for sock in self._sockets:
            close(sock)

    def leave(self) -> None:
        """Accept nothing more and give the address back at once; the legs that wait here wait on. Idempotent."""
        self._accepting.cancel(reason="this listener was stopped")
        self.close()

    def stop(self) -> None:
        """As :meth:`leave`; and the legs that wait here are refused, within some seconds. Idempotent."""
        self.leave()
        if not self._is_stopped:
            self._is_stopped = True
            self._set_deadline()

    @property
    def has_ended(self) -> bool:
        """Whether :meth:`serve` is over."""
        return self._has_ended

    def _set_deadline(self) -> None:
        if self._connections is not None and self._is_stopped:
            self._connections.cancel_scope.deadline = trio.current_time() + _GOODBYE

    async def serve(self, key: Hashable, settings: Callable[[], AcceptSettings], shared: SharedParts) -> None:
        """Accept until :meth:`stop`; returns once the last unpaired leg has gone.

        ``key`` tells this listener from others. ``settings`` is called for each connection, so that a reload counts
        from the next one on.
        """

        def context() -> AcceptContext:
            return AcceptContext(key, settings(), shared)

        try:
            async with trio.open_nursery() as connections:
                self._connections = connections
                with self._accepting:
                    async with trio.open_nursery() as loops:
                        for sock in self._sockets:
                            loops.start_soon(self._accept, sock, connections, context, shared.admission)
                self._set_deadline()
        finally:
            self._has_ended = True
            self.close()

    async def _accept(
        self, sock: socket.socket, connections: trio.Nursery, context: Callable[[], AcceptContext], admission: Admission
    ) -> None:
        pausing = False
        # Not `while True`: a drain just after a reload may stop a listener before this task runs for the first time.
        while sock.fileno() != -1:
            try:
                await trio.lowlevel.wait_readable(sock)
            except trio.ClosedResourceError:
                return
            try:
                for _ in range(admission.accepts_at_once):
                    connection, source = accept(sock)
                    pausing = False
                    connections.start_soon(self._receive, connection, source, context(), Slot(admission))
            except OSError as error:
                if sock.fileno() == -1:
                    return  # it was stopped before this task ran again
                if error.errno in _NOT_THIS_ONE:
                    continue
                # Usually EMFILE, ENFILE, ENOBUFS or ENOMEM. No error is raised here, as it would end the whole relay.
                if not pausing:
                    self._log.error("cannot accept", reason=str(error), remedy="raise the descriptor limit")
                pausing = True
                await trio.sleep(_PAUSE)

    async def _receive(self, sock: socket.socket, source: tuple[str, int], context: AcceptContext, slot: Slot) -> None:
        try:
            await IncomingConnection(sock, source, context, slot).run()
        except Exception:
            # A fault of one connection, or a bug of ours, must not end the others.
            self._log.exception("a bug in frelay ended this connection", address=format_address(source))
