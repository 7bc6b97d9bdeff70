"""A function that serves many, in asyncio code: :func:`start_server`. Standard library only.

This is a shell of :mod:`frelay.client.standing`. Each leg is a task until its wire is ready. Then the program's
callback gets the wire at once, in one synchronous step: no wire waits to be accepted, and a cancellation can lose none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Unpack

from frelay.client.asyncio.connecting import join
from frelay.client.options import Options
from frelay.client.signature import shows_its_options
from frelay.client.standing import End, GiveUp, Leg, Standing, Start, Tell, Wait
from frelay.errors import FrelayError
from frelay.protocol.messages import Message

__all__ = ["Server", "start_server"]

Callback = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


@shows_its_options
async def start_server(
    client_connected_cb: Callback,
    address: str,
    *,
    limit: int = 65536,
    standing: int = 2,
    on_error: Callable[[FrelayError], None] | None = None,
    **options: Unpack[Options],
) -> Server:
    """Join a route again and again, and call ``client_connected_cb`` with (reader, writer) for each caller.

    The callback is a coroutine function or an ordinary one, as for ``asyncio.start_server``, and so is ``limit``. All
    other arguments and errors are those of :func:`frelay.listen`. The server serves from now on; an error that ends it
    is raised by :meth:`Server.serve_forever`.
    """
    loop = asyncio.get_running_loop()
    decisions = Standing.make(address, standing, loop.time, options)
    return Server(decisions, client_connected_cb, limit, options.get("on_status"), on_error)


class _CallerProtocol(asyncio.StreamReaderProtocol):
    """The protocol of one caller's wire. The server knows the wire from the callback until it is closed."""

    def __init__(self, server: Server, leg: Leg, callback: Callback, limit: int) -> None:
        loop = server.get_loop()
        super().__init__(asyncio.StreamReader(limit=limit, loop=loop), callback, loop=loop)
        self._server: Final = server
        self._leg: Final = leg
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the type checker
        self._wire = transport
        if self._server._take(self._leg, transport):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        super().connection_lost(exc)
        if self._wire is not None:
            self._server._forget(self._wire)


class Server(asyncio.AbstractServer):
    """A server as ``asyncio.start_server`` returns it, except that no socket of this machine listens."""

    def __init__(
        self,
        standing: Standing,
        callback: Callback,
        limit: int,
        on_status: Callable[[Message], None] | None,
        on_error: Callable[[FrelayError], None] | None,
    ) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._standing: Final = standing
        self._callback: Final = callback
        self._limit: Final = limit
        self._on_status: Final = on_status
        self._on_error: Final = on_error
        self._legs: Final[dict[Leg, asyncio.Task[None]]] = {}
        """The legs whose wire is not taken yet."""
        self._tasks: Final[set[asyncio.Task[None]]] = set()
        """All tasks of this server, those of ``_legs`` among them."""
        self._wires: Final[set[asyncio.Transport]] = set()
        """The wires that the callback has got, until they are closed."""
        self._changed: Final = asyncio.Event()
        self._nothing_is_open: Final = asyncio.Event()
        self._error: BaseException | None = None
        """Why the server has ended by itself."""
        self._is_closed = False
        self._is_awaited = False
        """Whether the program is in serve_forever, which raises the error."""
        self._keeper: Final = self._spawn(self._keep_legs_waiting(), "frelay listener")

    # --- as asyncio.Server -----------------------------------------------------------------------------------------

    @property
    def sockets(self) -> tuple[()]:
        """None: no socket listens, and the legs are connections to the relay."""
        return ()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """See asyncio.Server."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether legs wait at the relay, or will again."""
        return not self._is_closed and self._error is None

    async def start_serving(self) -> None:
        """Nothing is left to do: the server serves since it was made."""

    async def serve_forever(self) -> None:
        """Wait until an error ends the server, which is raised here. A cancellation closes the server."""
        if self._is_closed:
            raise RuntimeError("this server is closed")
        if self._is_awaited:
            raise RuntimeError("another task is in serve_forever")
        self._is_awaited = True
        try:
            await asyncio.wait([self._keeper])
            if self._error is not None:
                raise self._error
            raise asyncio.CancelledError  # as asyncio.Server does if close() is called meanwhile
        finally:
            self._is_awaited = False
            self.close()

    def close(self) -> None:
        """Give up all legs. The wires that the callback has got stay open."""
        self._is_closed = True
        self._keeper.cancel()
        for task in self._legs.values():
            task.cancel()
        self._look_whether_all_is_closed()

    def close_clients(self) -> None:
        """Close all wires in good order."""
        for wire in tuple(self._wires):
            wire.close()

    def abort_clients(self) -> None:
        """Cut all wires."""
        for wire in tuple(self._wires):
            wire.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed, all its legs have left the relay, and all its wires are closed."""
        await self._nothing_is_open.wait()

    # --- the tasks -------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._look_whether_all_is_closed()

    def _look_whether_all_is_closed(self) -> None:
        if self._is_closed and not self._tasks and not self._wires:
            self._nothing_is_open.set()

    async def _keep_legs_waiting(self) -> None:
        try:
            while self._error is None:
                self._changed.clear()
                match self._standing.next():
                    case Start(leg):
                        self._legs[leg] = self._spawn(self._run(leg), "frelay leg")
                    case GiveUp(leg):
                        self._legs[leg].cancel()
                    case Tell(error):
                        if self._on_error is not None:
                            self._on_error(error)
                    case Wait(seconds):
                        await self._wait_for_change(seconds)
                    case End(error):
                        self._end(error)
        except Exception as error:
            self._end(error)

    async def _wait_for_change(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _end(self, error: BaseException) -> None:
        """No further join helps, or the program's own function has raised ``error``."""
        if self._error is not None:
            return
        self._error = error
        for leg in self._standing.unpaired:
            self._legs[leg].cancel()
        self._changed.set()
        if not self._is_awaited:
            self._loop.call_exception_handler({"message": "a frelay server has ended", "exception": error})

    async def _run(self, leg: Leg) -> None:
        """One leg, from JOIN until the callback has its wire."""
        protocol = _CallerProtocol(self, leg, self._callback, self._limit)
        try:
            await join(leg.plan, protocol, lambda message: self._status(leg, message))
        except FrelayError as error:
            self._standing.failed(leg, error)
        except Exception as error:
            self._end(error)
        finally:
            # Nothing of this leg is left, unless the callback has its wire.
            if self._legs.pop(leg, None) is not None:
                self._standing.gone(leg)
            self._changed.set()

    def _take(self, leg: Leg, wire: asyncio.Transport) -> bool:
        """The wire of ``leg`` is ready: the callback gets it, unless the server is closed."""
        if self._is_closed:
            return False
        # From here on close() does not cancel the task of the leg, which would close the wire.
        del self._legs[leg]
        self._wires.add(wire)
        self._standing.joined(leg)
        self._standing.accepted(leg)
        self._standing.released(leg)
        self._changed.set()
        return True

    def _forget(self, wire: asyncio.Transport) -> None:
        self._wires.discard(wire)
        self._look_whether_all_is_closed()

    def _status(self, leg: Leg, message: Message) -> None:
        self._standing.status(leg, message)
        self._changed.set()
        if self._on_status is not None:
            self._on_status(message)
