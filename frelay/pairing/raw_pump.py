"""The pump between two raw legs: it copies small messages, and has the kernel move large amounts.

Theory of operation
===================

A small message is cheapest as a ``read`` and a ``write``. If the read returns less than it requested, the source is
empty. (For TCP this holds unless a FIN or an urgent byte has come, and epoll reports these separately.) So the pump
need not be told of this source again before more bytes arrive: its interest is ``Interest.ARRIVAL``, and
:func:`carry_arrivals` serves all pumps with an arrival together. How much a read requests follows what has come: after
some small messages in a row it requests room for only one, because Python allocates the room before it knows the size.

When a read of full size returns as much as it requested, the source has more. Then the pump turns to ``splice(2)``
through a pipe, where the bytes stay in the kernel. It turns back, and returns the pipe to the pool, after a few short
reads in a row, or when the watch finds that nothing has moved. So an idle or chatty pairing holds no pipe, and a bulk
transfer holds one for each direction.

Splice has a well-known trap: a pipe fills by slots rather than bytes, so EAGAIN can mean "pipe full" although the
source is readable. This pump cannot meet it: it reads nothing while bytes are undelivered, so its pipe is empty at each
read.

A cancelled pump leaves no descriptor open. A pipe with bytes in it is closed and never pooled, because its next user
would deliver the bytes of another pairing.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable
from os import read, write
from typing import Final

import trio

from frelay.net.streams import broken
from frelay.net.tcp import is_after_end, shutdown_failure, take_error
from frelay.pairing.pipes import Pipe, PipePool
from frelay.pairing.pump import Cut, TlsProbe
from frelay.pairing.stepping import Interest, PolledSocket, Stepper
from frelay.protocol.outcome import Outcome, Side

__all__ = ["RawPump", "carry_arrivals", "splice_is_available"]

# A smaller message is cheaper to copy than to splice twice through a pipe. A read that fills this means there is more.
_COPY_BUFFER: Final = 16 * 1024
# The largest message that counts as small: with the header of a bytes object it takes 512 bytes, which Python allocates
# from its own pool. A read of 16 KiB costs a malloc(3), a cut to the size that came, and a merge of the rest.
_SMALL: Final = 512 - sys.getsizeof(b"")
# After so many small messages since the last larger one, the next read requests the room of a small one.
_SMALL_MESSAGES_TO_READ_LESS: Final = 32
# Rounds in one step of a bulk transfer: enough to save wake-ups, few enough (1 ms) to be fair to 255 chatty pairings.
_BULK_ROUNDS: Final = 4
# A round that brought less than this has probably emptied the source, and another round would only get EAGAIN.
_SHORT_READ: Final = 64 * 1024
# After so many short rounds in a row the bulk transfer is over.
_SHORT_READS_TO_CALM: Final = 8

_SPLICE: Final[Callable[..., int] | None] = getattr(os, "splice", None)
_NONBLOCK: Final[int] = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)

# Used for every message: a name of this module is found faster than a member of an enumeration.
_READABLE: Final = Interest.SOURCE_READABLE
_WRITABLE: Final = Interest.SINK_WRITABLE
_ARRIVAL: Final = Interest.ARRIVAL


def splice_is_available() -> bool:
    """Whether this system has splice(2); without it raw legs are joined by copying."""
    return _SPLICE is not None


class RawPump:
    """Carries bytes between two raw legs, stepped by the readiness set."""

    __slots__ = (
        "_failure",
        "_finished",
        "_held",
        "_in_pipe",
        "_pipe",
        "_pipes",
        "_probe",
        "_read_size",
        "_readiness",
        "_short_is_empty",
        "_short_reads",
        "_sides",
        "_sink",
        "_sink_fd",
        "_small_messages",
        "_source_fd",
        "_splice",
        "interest",
        "moved",
        "source",
    )

    def __init__(
        self,
        source: PolledSocket,
        sink: PolledSocket,
        *,
        sides: tuple[Side, Side],
        readiness: Stepper,
        pipes: PipePool,
        probe: TlsProbe | None = None,
        splice: Callable[..., int] | None = _SPLICE,
    ) -> None:
        self.source = source
        self._sink = sink
        self._sides = sides
        self._readiness = readiness
        self._pipes = pipes
        self._probe = probe
        self._splice = splice
        # Whether a read that returns less than it requested has emptied the source, unless epoll reports a FIN or an
        # urgent byte. True for TCP. A read from a Unix socket also ends where descriptors were sent along.
        self._short_is_empty = source.socket.family in (socket.AF_INET, socket.AF_INET6)
        self._source_fd = source.fd
        self._sink_fd = sink.fd
        self._held: bytes | memoryview = b""
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._short_reads = 0
        self._read_size = _COPY_BUFFER
        """How many bytes a read requests when a message has arrived: ``_SMALL`` or ``_COPY_BUFFER``."""
        self._small_messages = 0
        self._finished = trio.Event()
        self._failure: Exception | None = None
        self.moved = 0
        self.interest: Interest = _READABLE

    @property
    def is_blocked(self) -> bool:
        """Whether it holds bytes that the sink has not accepted."""
        return self.interest is _WRITABLE

    @property
    def is_held_back(self) -> bool:
        """Never: a route with a budget has stream pumps."""
        return False

    @property
    def has_finished(self) -> bool:
        """Whether this direction has ended, cleanly or not."""
        return self._finished.is_set()

    async def run(self) -> None:
        """Take part in the readiness set until this direction ends; raises Cut."""
        self.source.reader = self
        self._sink.writer = self
        try:
            self._readiness.refresh(self.source)
            self._readiness.refresh(self._sink)
            await self._finished.wait()
        finally:
            self.interest = Interest.NOTHING
            self.source.reader = None
            self._sink.writer = None
            self._release_pipe()
            self._readiness.refresh(self.source)
            self._readiness.refresh(self._sink)
        if self._failure is not None:
            raise self._failure

    def on_idle(self) -> None:
        """Give the pipe back if it is empty, and have the kernel check the source once more.

        The next bulk transfer takes a pipe again. The check is for one arrival that epoll does not report: bytes that
        came before their urgent pointer, in a segment from a TCP that is not like Linux's.
        """
        if not self._in_pipe:
            self._release_pipe()
        if self.interest is _ARRIVAL:
            self._wait_for(_READABLE)

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move what can be moved now."""
        if self.interest is _WRITABLE and not self._deliver():
            return
        if self.interest is _ARRIVAL:
            # More than bytes has come. This changes the registration, and a short read changes it back: each time the
            # kernel checks the socket anew, and reports what the read has left.
            self._wait_for(_READABLE)
        if self._pipe is None:
            self._copy()
        else:
            self._move_bulk()

    def _copy(self) -> None:
        try:
            data = read(self._source_fd, _COPY_BUFFER)
        except BlockingIOError:
            return self._wait_for(_READABLE)
        except OSError as error:
            self.break_off(self.source, error)
            return None
        if not data:
            return self._pass_on_end()
        if self._probe is not None:
            return self._check_first(data)
        try:
            sent = write(self._sink_fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.break_off(self._sink, error)
            return None
        self.moved += sent
        return self._after_copy(data, sent, _COPY_BUFFER)

    def _after_copy(self, data: bytes, sent: int, requested: int) -> None:
        """Go on after a read that requested ``requested`` bytes and got ``data``, of which the sink took ``sent``."""
        if sent < len(data):
            self._held = memoryview(data)[sent:]
            return self._wait_for(_WRITABLE)
        if sent < requested:
            if sent <= _SMALL < requested:
                self._small_messages += 1
                if self._small_messages >= _SMALL_MESSAGES_TO_READ_LESS:
                    self._read_size = _SMALL
            return self._wait_for(_ARRIVAL if self._short_is_empty else _READABLE)
        if requested < _COPY_BUFFER:
            # The rest of the message has usually come too, and should not wait for the next round.
            self._read_size, self._small_messages = _COPY_BUFFER, 0
            return self._copy()
        if self._splice is not None:
            # The pipe is used in the next round: in this one other pumps may have a message to carry.
            self._pipe = self._pipes.take()
            self._short_reads = 0
        return self._wait_for(_READABLE)

    def _check_first(self, data: bytes) -> None:
        """Hold the leg's first bytes until it is certain that they are TLS."""
        assert self._probe is not None  # noqa: S101  for the type checker
        first = bytes(self._held) + data
        try:
            verdict = self._probe.check(first)
        except Cut as cut:
            return self._finish(cut)
        self._held = first
        if verdict is None:
            return self._wait_for(_READABLE)
        self._probe = None
        if self._deliver():
            self._wait_for(_READABLE)
        return None

    def _deliver(self) -> bool:
        """Send what is held, in the buffer or in the pipe, to the sink; True once nothing is held."""
        try:
            while self._in_pipe:
                assert self._pipe is not None  # noqa: S101  for the type checker
                assert self._splice is not None  # noqa: S101
                accepted = self._splice(self._pipe.read_end, self._sink.fd, self._in_pipe, flags=_NONBLOCK)
                self._in_pipe -= accepted
                self.moved += accepted
            while self._held:
                accepted = self._sink.socket.send(self._held)
                self._held = memoryview(self._held)[accepted:]
                self.moved += accepted
            # An empty view would keep the whole buffer alive, 16 KiB while the pairing is silent.
            self._held = b""
        except BlockingIOError:
            self._wait_for(_WRITABLE)
            return False
        except OSError as error:
            self.break_off(self._sink, error)
            return False
        return True

    def _move_bulk(self) -> None:
        pipe, splice = self._pipe, self._splice
        assert pipe is not None  # noqa: S101  for the type checker
        assert splice is not None  # noqa: S101
        for _ in range(_BULK_ROUNDS):
            try:
                count = splice(self.source.fd, pipe.write_end, pipe.size, flags=_NONBLOCK)
            except BlockingIOError:
                self._short_reads += 1
                break
            except OSError as error:
                self.break_off(self.source, error)
                return None
            if count == 0:
                # The end, or an urgent byte (MSG_OOB) with more behind it: splice stops before that, a read does not.
                self._release_pipe()
                return self._copy()
            self._in_pipe = count
            if not self._deliver():
                return None
            if count < _SHORT_READ:
                self._short_reads += 1
                break
            self._short_reads = 0
        if self._short_reads >= _SHORT_READS_TO_CALM:
            self._release_pipe()
        return self._wait_for(_READABLE)

    # --- changes -------------------------------------------------------------------------------------------------

    def _wait_for(self, interest: Interest) -> None:
        # A pump that finished earlier in this round waits for nothing more.
        if self.interest is not interest and (interest is Interest.NOTHING or not self.has_finished):
            self.interest = interest
            self._readiness.refresh(self.source)
            self._readiness.refresh(self._sink)

    def _release_pipe(self) -> None:
        if self._pipe is not None:
            self._pipes.give(self._pipe, is_empty=self._in_pipe == 0)
            self._pipe = None
            self._in_pipe = 0

    def _pass_on_end(self) -> None:
        if self.source.error is not None:
            # Linux reports a reset once, and the pump that writes to this socket got it. Here it looks like a FIN.
            self.break_off(self.source, self.source.error)
            return None
        if self._probe is not None:
            try:
                self._probe.check_end(len(self._held))
            except Cut as cut:
                return self._finish(cut)
        try:
            self._sink.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.break_off(self._sink, shutdown_failure(self._sink.socket, error))
            return None
        return self._finish(None)

    def break_off(self, polled: PolledSocket, error: OSError) -> bool:
        """End this direction because the connection of ``polled`` broke; False if it had ended already."""
        if self.has_finished:
            return False
        only_writing = polled is self._sink and polled.error is None and is_after_end(error)
        if not only_writing:
            # A copy: the traceback of the original would keep this pump alive for as long as the socket.
            polled.error = OSError(error.errno, error.strerror)
        side = self._sides[0] if polled is self.source else self._sides[1]
        self._finish(Cut(Outcome.RESET, side, str(broken(error)), only_writing=only_writing))
        return True

    def meet_trouble(self, polled: PolledSocket) -> None:
        """End the direction that has broken: epoll reports ERR or HUP for ``polled``, and no pump waits for it now.

        Only the pump that writes to it asks the kernel for the error. Once nothing is written to it any more, a reset
        before the end of what the party sends looks like one after that end, except to a read; and asking for the error
        would make that read return an end in either case.
        """
        if polled is not self._sink or self.has_finished or (error := take_error(polled.socket)) is None:
            return
        reader = polled.reader
        if reader is None or is_after_end(error) or not reader.break_off(polled, error):
            self.break_off(polled, error)

    def fail(self, error: Exception) -> None:
        """Have the pump's task raise ``error``: a step raised it, which is a bug of ours."""
        if not self.has_finished:
            self._failure = error
            self._readiness.wake(self._finished)
            # No refresh: epoll may be what failed. The task takes both sockets out of the set.
            self.interest = Interest.NOTHING

    def _finish(self, cut: Cut | None) -> None:
        self._failure = cut
        self._readiness.wake(self._finished)
        self._wait_for(Interest.NOTHING)


def carry_arrivals(pumps: Iterable[RawPump]) -> None:
    """Carry a message for each of these pumps, for which one round of epoll has reported an arrival.

    For each pump it does what :meth:`RawPump.step` does. But it reads from all sources before it writes to any sink, so
    that a receiver that sleeps is woken once and finds several messages. This code is the whole cost of a small
    message, so it calls no methods. Raises nothing: a bug ends the pairing that met it.
    """
    loads: list[tuple[RawPump, bytes]] = []
    for pump in pumps:
        try:
            if pump.interest is not _ARRIVAL:
                continue  # it has finished since epoll reported the arrival
            try:
                data = read(pump._source_fd, pump._read_size)
            except BlockingIOError:
                continue
            except OSError as error:
                pump.break_off(pump.source, error)
                continue
            if data:
                loads.append((pump, data))
            else:
                pump._pass_on_end()
        except Exception as error:
            pump.source.fail(error)
    for pump, data in loads:
        try:
            try:
                sent = write(pump._sink_fd, data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                pump.break_off(pump._sink, error)
                continue
            pump.moved += sent
            requested = pump._read_size
            if sent < len(data) or sent == requested or sent <= _SMALL < requested:
                pump._after_copy(data, sent, requested)
        except Exception as error:
            pump.source.fail(error)
