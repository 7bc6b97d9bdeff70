"""A function that serves many, in Trio code: :func:`listen` gives a :class:`trio.abc.Listener`.

This is a shell of :mod:`frelay.client.standing`. A leg must answer the relay's PINGs while nobody is in ``accept``, so
the legs are tasks of a nursery, and ``listen`` is a context manager. Each wire has one owner: the task of its leg, then
the listener, and then the caller of ``accept``. It changes hands in one synchronous step, so a cancellation can neither
lose a wire nor leave one open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Unpack

import trio

from frelay.client.options import JoinPlan, Options
from frelay.client.signature import shows_its_options
from frelay.client.standing import End, GiveUp, Leg, Standing, Start, Tell, Wait
from frelay.client.trio.connecting import join
from frelay.client.trio.wire import TrioWire
from frelay.errors import FrelayError
from frelay.protocol.messages import Message

__all__ = ["Join", "TrioListener", "listen", "running"]

OnStatus = Callable[[Message], None]
Join = Callable[[JoinPlan, OnStatus], Awaitable[TrioWire]]
"""One try to join, as :func:`frelay.client.trio.join`."""


@shows_its_options
@asynccontextmanager
async def listen(
    address: str,
    *,
    standing: int = 2,
    on_error: Callable[[FrelayError], None] | None = None,
    **options: Unpack[Options],
) -> AsyncIterator[TrioListener]:
    """Join a route again and again, and give out a stream for each caller: end-to-end mTLS, ready for use.

    The arguments and errors are those of :func:`frelay.listen`. It works with Trio's own server::

        async with frelay.client.trio.listen(address, **options) as listener:
            await trio.serve_listeners(handler, [listener])

    At the end of the block the listener is closed. Streams that it has given out stay open.
    """

    def tell(action: Tell) -> None:
        if on_error is not None:
            on_error(action.error)

    decisions = Standing.make(address, standing, trio.current_time, options)
    listener = TrioListener(decisions, tell, options.get("on_status"))
    async with running(listener):
        yield listener


@asynccontextmanager
async def running(listener: TrioListener) -> AsyncIterator[None]:
    """Run the tasks of ``listener`` within the block, and close it at the end."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.run)
            try:
                yield
            except BaseException as error:
                failure = error  # the nursery would put it into a group
            finally:
                listener.close()
    finally:
        if failure is not None:
            raise failure


class TrioListener(trio.abc.Listener[TrioWire]):
    """Gives out streams, each with its inner TLS up and its peer checked. :func:`listen` makes it and runs it."""

    def __init__(
        self, standing: Standing, tell: Callable[[Tell], None], on_status: OnStatus | None = None, joins: Join = join
    ) -> None:
        self._standing: Final = standing
        self._tell: Final = tell
        self._on_status: Final = on_status
        self._join: Final = joins
        self._ready: Final[deque[tuple[Leg, TrioWire]]] = deque()
        self._scopes: Final[dict[Leg, trio.CancelScope]] = {}
        self._all: Final = trio.CancelScope()
        self._accepting: Final = trio.lowlevel.ParkingLot()
        self._changed = trio.Event()
        self._error: BaseException | None = None
        """Why the listener has ended."""
        self._is_closed = False
        self._is_over: Final = trio.Event()

    # --- for the program -------------------------------------------------------------------------------------------

    async def accept(self) -> TrioWire:
        """The stream to the next caller; the program closes it.

        Raises :class:`trio.ClosedResourceError` once the listener is closed, and the error that has ended it once all
        streams are given out. A cancelled ``accept`` takes no stream.
        """
        leg, wire = await self.accept_leg()
        self.release(leg)
        return wire

    async def accept_leg(self) -> tuple[Leg, TrioWire]:
        """As :meth:`accept`, but the leg keeps its slot until :meth:`release`."""
        await trio.lowlevel.checkpoint()
        while not self._ready:
            if self._is_closed:
                raise trio.ClosedResourceError("this listener is closed")
            if self._error is not None and not self._standing.in_handshake:
                raise self._error
            await self._accepting.park()
        # No checkpoint from here on: a cancellation would lose the wire.
        leg, wire = self._ready.popleft()
        self._standing.accepted(leg)
        self._changed.set()
        return leg, wire

    def release(self, leg: Leg) -> None:
        """The wire of ``leg`` does not count any more."""
        self._standing.released(leg)
        self._changed.set()

    def stumble(self, error: FrelayError) -> None:
        """Report an error of an accepted wire that concerns all legs."""
        self._standing.stumbled(error)
        self._changed.set()

    def close(self) -> None:
        """Give up all legs, and cut the streams that nobody has accepted."""
        self._is_closed = True
        while self._ready:
            _, wire = self._ready.popleft()
            wire.close_forcefully()
        self._all.cancel(reason="the listener is closed")
        self._accepting.unpark_all()

    async def aclose(self) -> None:
        """As :meth:`close`, and wait until all legs have left the relay."""
        self.close()
        await self._is_over.wait()

    # --- the tasks -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep legs waiting until the listener is closed, or has ended. Raises nothing; :meth:`accept` does."""
        try:
            with self._all:
                async with trio.open_nursery() as legs:
                    await self._keep_legs_waiting(legs)
        finally:
            self._is_over.set()

    async def _keep_legs_waiting(self, legs: trio.Nursery) -> None:
        while self._error is None:
            self._changed = trio.Event()
            match self._standing.next():
                case Start(leg):
                    scope = self._scopes[leg] = trio.CancelScope()
                    legs.start_soon(self._run, leg, scope)
                case GiveUp(leg):
                    self._scopes[leg].cancel(reason="no caller needs it now")
                case Tell() as told:
                    try:
                        self._tell(told)
                    except Exception as error:
                        self._end(error)
                case Wait(seconds):
                    with trio.move_on_after(float("inf") if seconds is None else seconds):
                        await self._changed.wait()
                case End(error):
                    self._end(error)

    def _end(self, error: BaseException) -> None:
        """No further join helps, or the program's own function has raised ``error``."""
        self._error = self._error or error
        for leg in self._standing.unpaired:
            self._scopes[leg].cancel(reason="the listener has ended")
        self._note_change()

    def _note_change(self) -> None:
        """Wake the keeper, and those who wait in :meth:`accept`."""
        self._changed.set()
        self._accepting.unpark_all()

    async def _run(self, leg: Leg, scope: trio.CancelScope) -> None:
        """One leg, from JOIN until its wire is ready. Raises nothing."""
        wire: TrioWire | None = None
        failure: Exception | None = None
        try:
            with scope:
                wire = await self._join(leg.plan, lambda message: self._status(leg, message))
        except Exception as error:
            failure = error
        finally:
            del self._scopes[leg]
            if wire is None and not isinstance(failure, FrelayError):
                self._standing.gone(leg)
        if isinstance(failure, FrelayError):
            self._standing.failed(leg, failure)
        elif failure is not None:
            self._end(failure)
        elif wire is not None and self._is_closed:
            self._standing.gone(leg)
            wire.close_forcefully()
        elif wire is not None:
            self._standing.joined(leg)
            self._ready.append((leg, wire))
        self._note_change()

    def _status(self, leg: Leg, message: Message) -> None:
        self._standing.status(leg, message)
        self._changed.set()
        if self._on_status is not None:
            self._on_status(message)
