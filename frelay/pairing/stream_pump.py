"""The pump between two streams, whose bytes pass through the process: receive, send, repeat.

At least one of the two is in TLS, or the route has a budget of bytes a second (:mod:`frelay.pairing.bandwidth`): bytes
that stay in the kernel cannot be held to a budget.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError, Truncated
from frelay.net.streams import SendBroken, broken
from frelay.net.tcp import has_sent_end, is_after_end, take_error
from frelay.pairing.bandwidth import Share
from frelay.pairing.pump import Cut, TlsProbe
from frelay.pairing.stepping import Interest, PolledSocket, Stepper
from frelay.protocol.outcome import Outcome, Side

__all__ = ["Budget", "Stream", "StreamPump"]

# How many bytes one receive requests, at most, where the pump's task receives.
_STREAM_CHUNK: Final = 64 * 1024
# How many bytes a step receives at most: eight whole TLS records, or two segments of 64 KiB. With less, a wake-up costs
# more than its bytes.
_ROOM: Final = 128 * 1024

_room: Final = memoryview(bytearray(_ROOM))


class Stream(Protocol):
    """What a :class:`StreamPump` needs from its source and its sink."""

    @property
    def sock(self) -> socket.socket:
        """The socket under it."""

    @property
    def has_met_more(self) -> bool:
        """Whether :meth:`receive_now` has met more than bytes. :meth:`receive_some` tells what; the socket does not."""

    def receive_now(self, room: memoryview) -> int:
        """How many bytes came into ``room``; 0: wait until the socket is readable; -1: :meth:`receive_some` is next."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` bytes; ``b""`` at the end."""

    def send_now(self, data: memoryview) -> int:
        """How many bytes of ``data`` the kernel took without waiting."""

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`send_now` did not."""

    async def send_eof(self) -> None:
        """End this direction."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a pump needs to keep to its route's budget: the share of its pairing, and both sockets.

    Both pumps of a pairing have the same two sockets. They tell a pump of a reset while it waits for its turn.
    """

    share: Share
    source: PolledSocket
    sink: PolledSocket


class StreamPump:
    """Carries bytes from one stream to another through the process.

    As long as only bytes come, the readiness set steps it. A step carries the bytes through one buffer that all such
    pumps share; no other code runs between its receiving and its sending. (So only one thread of a process may run such
    pumps.) The pump's task does all else, and a step wakes it for that: a sink without room, the end, TLS that must
    write before it reads, first bytes that must be TLS, a budget.
    """

    __slots__ = (
        "_budget",
        "_failure",
        "_held",
        "_portion_scope",
        "_probe",
        "_readiness",
        "_sides",
        "_sink",
        "_source",
        "_source_has_ended",
        "_stopped",
        "interest",
        "is_blocked",
        "is_held_back",
        "moved",
    )

    def __init__(
        self,
        source: Stream,
        sink: Stream,
        *,
        sides: tuple[Side, Side],
        readiness: Stepper,
        probe: TlsProbe | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._sides = sides
        self._readiness = readiness
        self._probe = probe
        self._budget = budget
        self._portion_scope: trio.CancelScope | None = None
        """With a budget, the scope in which a portion waits for its turn and for room at the sink."""
        self._source_has_ended = False
        """Whether the kernel has the source's FIN: a reset after it loses nothing."""
        self._held = b""
        self._stopped = trio.Event()
        self._failure: Exception | None = None
        self.moved = 0
        self.is_blocked = False
        self.is_held_back = False
        self.interest: Interest = Interest.NOTHING

    async def run(self) -> None:
        """Receive and send until the source ends; raises Cut."""
        budget = self._budget
        try:
            if budget is not None:
                budget.source.reader = budget.sink.writer = self
            while True:
                if self._probe is None and budget is None:
                    await self._flow()
                    if self._held:
                        await self._deliver()
                        continue
                if await self._pass_on_some():
                    return
        finally:
            # The pairing may go on in the other direction.
            self.is_blocked = self.is_held_back = False
            if budget is not None:
                budget.source.reader = budget.sink.writer = None
                self._refresh(budget)

    def _refresh(self, budget: Budget) -> None:
        self._readiness.refresh(budget.source)
        self._readiness.refresh(budget.sink)

    # --- stepped -------------------------------------------------------------------------------------------------

    async def _flow(self) -> None:
        """Have steps carry what comes, until one holds bytes, or the source has more to tell than bytes."""
        polled = PolledSocket(self._source.sock)
        polled.reader = self
        self._stopped = trio.Event()
        self.interest = Interest.SOURCE_READABLE
        try:
            # TLS may have read from the kernel already, and epoll does not report what TLS holds.
            self.step()
            if not self._stopped.is_set():
                self._readiness.refresh(polled)
                await self._stopped.wait()
        finally:
            self.interest = Interest.NOTHING
            polled.reader = None
            self._readiness.refresh(polled)
        if self._failure is not None:
            raise self._failure

    def step(self) -> None:
        """Carry what has come: at most one buffer, which costs a fifth of a millisecond or more for the ciphers."""
        try:
            count = self._source.receive_now(_room)
        except (ConnectionBroken, RemoteProtocolError) as error:
            return self.fail(_cut(error, self._sides[0]))
        if count < 0:
            return self._stop()
        if count == 0:
            return None
        try:
            sent = self._sink.send_now(_room[:count])
        except (ConnectionBroken, RemoteProtocolError) as error:
            return self.fail(_cut_of_sink(error, self._sides[1]))
        self.moved += sent
        if sent < count:
            self._held = bytes(_room[sent:count])
            self.is_blocked = True
            self._stop()
        elif self._source.has_met_more:
            self._stop()
        return None

    def _stop(self) -> None:
        """Wake the task. It takes the source out of the set first, so there is no refresh here."""
        self.interest = Interest.NOTHING
        self._readiness.wake(self._stopped)

    def fail(self, error: Exception) -> None:
        """Have the task raise ``error``, unless it is awake already."""
        if self._portion_scope is not None:
            self._failure = error
            self._readiness.cancel(self._portion_scope)
        elif not self._stopped.is_set():
            self._failure = error
            self._stop()

    # --- by its task ---------------------------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Send what a step could not."""
        rest, self._held = self._held, b""
        # Without this checkpoint, a sink that has room again each time would keep all other tasks waiting.
        await trio.lowlevel.checkpoint()
        try:
            await self._sink.send_rest(rest)
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise _cut_of_sink(error, self._sides[1]) from None
        self.is_blocked = False
        self.moved += len(rest)

    async def _pass_on_some(self) -> bool:
        """Carry one portion, or the end; True if the direction has ended."""
        held, budget = b"", self._budget
        while True:
            try:
                data = await self._source.receive_some(_STREAM_CHUNK if budget is None else budget.share.portion)
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[0]) from None
            if self._probe is None:
                break
            if not data:
                self._probe.check_end(len(held))
            held += data
            if not data or self._probe.check(held) is not None:
                data, held, self._probe = held, b"", None
                break
        try:
            if not data:
                await self._sink.send_eof()
                return True
            if budget is None:
                await self._send(data)
            else:
                await self._send_in_turn(data, budget)
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise _cut_of_sink(error, self._sides[1]) from None
        return False

    async def _send(self, data: bytes) -> None:
        self.is_blocked = True
        sent = self._sink.send_now(memoryview(data))
        if sent < len(data):
            await self._sink.send_rest(data[sent:])
        self.is_blocked = False
        self.moved += len(data)

    # --- with a budget -------------------------------------------------------------------------------------------

    async def _send_in_turn(self, data: bytes, budget: Budget) -> None:
        """Send ``data`` when the budget allows it; raises Cut as soon as one of the connections breaks meanwhile."""
        self._source_has_ended = self._source_has_ended or has_sent_end(self._source.sock)
        with trio.CancelScope() as self._portion_scope:
            try:
                # No interest is set, but epoll reports ERR and HUP anyway.
                self._refresh(budget)
                self.is_held_back = True
                await budget.share.spend(len(data))
                self.is_held_back = False
                await self._send(data)
            finally:
                self._portion_scope = None
        if self._failure is not None:
            raise self._failure

    def meet_trouble(self, polled: PolledSocket) -> None:
        """End this direction if the connection of ``polled`` has broken while bytes wait for the budget.

        Without this the pump would learn of a reset only after it has read all that came before, which takes minutes at
        a low rate. The other party should know at once.
        """
        if self._portion_scope is None or self._failure is not None:
            return  # the pump is reading or sending, and finds out by itself
        if self._source.sock is polled.socket:
            # If the source has ended, nothing that it sent is lost, whatever happens to the connection.
            error = None if self._source_has_ended else take_error(polled.socket)
            if error is not None and not is_after_end(error):
                self.break_off(polled, error)
        elif polled.reader is None and (error := take_error(polled.socket)) is not None:
            # If a pump still reads from it, leave the error to that pump: the kernel reports it only once.
            self.break_off(polled, error)

    def break_off(self, polled: PolledSocket, error: OSError) -> bool:
        """End this direction because the connection of ``polled`` broke; False if it had ended already."""
        if self._failure is not None:
            return False
        is_source = self._source.sock is polled.socket
        side, only_writing = self._sides[0 if is_source else 1], not is_source and is_after_end(error)
        self.fail(Cut(Outcome.RESET, side, str(broken(error)), only_writing=only_writing))
        return True

    def on_idle(self) -> None:
        """Do nothing: there is nothing to free, and epoll reports everything again."""


def _cut(error: ConnectionBroken | RemoteProtocolError, side: Side) -> Cut:
    if isinstance(error, Truncated):
        return Cut(Outcome.TRUNCATED, side, str(error))
    if isinstance(error, RemoteProtocolError):
        return Cut(Outcome.PROTOCOL_ERROR, side, str(error))
    return Cut(Outcome.RESET, side, str(error))


def _cut_of_sink(error: ConnectionBroken | RemoteProtocolError, side: Side) -> Cut:
    cut = _cut(error, side)
    cut.only_writing = isinstance(error, SendBroken)
    return cut
