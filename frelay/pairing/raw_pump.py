"""The pump between two raw legs: it copies what is small, and has the kernel move what is big.

Theory of operation
===================

A small message is cheapest as a ``read`` and a ``write``; and since the read brings less than was asked for, the source
is empty then (of TCP it is, but for a FIN or an urgent byte, which epoll tells apart), so that the pump need not be
told of it again before more comes (``Want.ARRIVAL``; :func:`carry_arrivals` serves all that have it in one go). What
is asked for follows what comes: after a while of small messages no more than one of those, since the room for the
answer is allocated before it is known. But once a read of full size brings as much as was asked for, the source has
more than that, and the pump turns to ``splice(2)`` through a pipe, where the bytes stay in the kernel. A few short
reads in a row turn it back, or a look of the watch that finds nothing moved, and the pipe goes back to the pool. So an
idle or chatty pairing holds no pipe, and a bulk one holds one a direction.

That nothing is read while anything is undelivered also makes the famous trap of splice harmless: a pipe fills by slots
rather than bytes, so EAGAIN can mean "pipe full" although the source is readable; a pump whose pipe is empty whenever
it reads cannot meet it.

A pump that is cancelled leaves no descriptor: a pipe with bytes in it is closed, never pooled, for its next user would
deliver somebody else's bytes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterable
from os import read, write
from typing import TYPE_CHECKING, Final

import trio

from frelay.net.streams import broken
from frelay.net.tcp import is_after_end, shutdown_failure
from frelay.pairing.pump import Cut, TlsProbe, Want
from frelay.protocol.outcome import Outcome, Side

if TYPE_CHECKING:
    from frelay.pairing.readiness import ReadinessSet, Wire

__all__ = ["PipePool", "RawPump", "carry_arrivals", "splice_is_available"]

# Below this a copy is cheaper than two splices and a pipe; a read that fills it announces more.
_COPY_BUFFER: Final = 16 * 1024
# The largest message that is small: with the header of a bytes object it is 512 bytes, which Python allocates from a
# pool of its own. For 16 KiB it asks malloc(3), cuts them down to what came, and has the rest put together again.
_SMALL: Final = 512 - sys.getsizeof(b"")
# So many small messages since the last that was not: the next will be small, too.
_SMALL_ONES_TO_ASK_FOR_LESS: Final = 32
# Twice a typical socket buffer's worth, and the most that an unprivileged process may ask for by default
# (fs.pipe-max-size). Splice moves whole pages, so a pipe of this size never limits a step.
_PIPE_SIZE: Final = 1024 * 1024
# How many pipes wait for their next use: two descriptors each, and bulk pairings come and go in bursts.
_POOLED_PIPES: Final = 32
# Rounds of one step in bulk: enough to save wake-ups, few enough to be fair to 255 chatty neighbours (about 1 ms).
_BULK_ROUNDS: Final = 4
# A round that brought less than this has probably emptied the source, so that another would only meet EAGAIN.
_SHORT_READ: Final = 64 * 1024
# That many short rounds in a row say that the bulk is over.
_SHORT_READS_TO_CALM: Final = 8

_SPLICE: Final[Callable[..., int] | None] = getattr(os, "splice", None)
_NONBLOCK: Final[int] = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)
_F_SETPIPE_SZ: Final = 1031

# Looked up with every message, and a member of an enumeration is not found as quickly as a name of this module.
_READABLE: Final = Want.SOURCE_READABLE
_WRITABLE: Final = Want.SINK_WRITABLE
_ARRIVAL: Final = Want.ARRIVAL


def splice_is_available() -> bool:
    """Whether this system has splice(2); without it raw legs are joined by copying."""
    return _SPLICE is not None


# --- pipes --------------------------------------------------------------------------------------------------------


class Pipe:
    """A kernel pipe: two descriptors and the size it was granted."""

    __slots__ = ("read_end", "size", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.write_end, _F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            # Over the user's soft limit (fs.pipe-user-pages-soft) the pipe keeps its default size, and still works.
            self.size = 65536

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class PipePool:
    """Empty pipes for the next bulk transfer. Only :class:`RawPump` takes and gives."""

    def __init__(self, *, capacity: int = 4096) -> None:
        self._free: list[Pipe] = []
        self.in_use = 0
        self._capacity = capacity

    @property
    def descriptors(self) -> int:
        """How many descriptors all pipes, used and free, hold."""
        return 2 * (self.in_use + len(self._free))

    def limit(self, capacity: int) -> None:
        """From now on there are at most ``capacity`` pipes; those in use beyond it are closed when they come back."""
        self._capacity = capacity
        while self._free and self.in_use + len(self._free) > capacity:
            self._free.pop().close()

    def take(self) -> Pipe | None:
        """An empty pipe, or None when there is no descriptor left for one."""
        if self._free:
            pipe = self._free.pop()
        elif self.in_use >= self._capacity:
            return None
        else:
            try:
                pipe = Pipe()
            except OSError:
                return None
        self.in_use += 1
        return pipe

    def give(self, pipe: Pipe, *, is_empty: bool) -> None:
        """Take a pipe back; one that is not empty is destroyed."""
        self.in_use -= 1
        has_room = len(self._free) < _POOLED_PIPES and self.in_use + len(self._free) < self._capacity
        if is_empty and has_room:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the free pipes."""
        while self._free:
            self._free.pop().close()


# --- raw to raw ---------------------------------------------------------------------------------------------------


class RawPump:
    """Carries bytes between two raw legs, stepped by the readiness set."""

    __slots__ = (
        "_asked",
        "_failure",
        "_finished",
        "_held",
        "_in_pipe",
        "_pipe",
        "_pipes",
        "_probe",
        "_readiness",
        "_short_is_empty",
        "_short_reads",
        "_sides",
        "_sink",
        "_sink_fd",
        "_small_ones",
        "_source_fd",
        "_splice",
        "moved",
        "source",
        "wants",
    )

    def __init__(
        self,
        source: Wire,
        sink: Wire,
        *,
        sides: tuple[Side, Side],
        readiness: ReadinessSet,
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
        # Whether a read that brings less than was asked for has emptied the source, unless epoll says that more than
        # bytes has come (FIN, an urgent byte). TCP's does. A Unix socket's also ends where descriptors were sent along.
        self._short_is_empty = source.socket.family in (socket.AF_INET, socket.AF_INET6)
        self._source_fd = source.fd
        self._sink_fd = sink.fd
        self._held: bytes | memoryview = b""
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._short_reads = 0
        self._asked = _COPY_BUFFER
        """How many bytes a read asks for when a message has arrived: ``_SMALL`` or ``_COPY_BUFFER``."""
        self._small_ones = 0
        self._finished = trio.Event()
        self._failure: Exception | None = None
        self.moved = 0
        self.wants = _READABLE

    @property
    def is_blocked(self) -> bool:
        """Whether bytes are held that the sink has not accepted."""
        return self.wants is _WRITABLE

    @property
    def is_held_back(self) -> bool:
        """Never: a route with a budget has no such pumps."""
        return False

    @property
    def has_finished(self) -> bool:
        """Whether this direction has ended, in whatever way."""
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
            self.wants = Want.NOTHING
            self.source.reader = None
            self._sink.writer = None
            self._release_pipe()
            self._readiness.refresh(self.source)
            self._readiness.refresh(self._sink)
        if self._failure is not None:
            raise self._failure

    def rest(self) -> None:
        """Give the pipe back if it is empty; the next bulk takes one again.

        And have the kernel look at the source once more, however it was registered. There is one arrival that it tells
        nobody of: bytes that came before their urgent pointer did, in a segment of a sender whose TCP is not like ours.
        """
        if not self._in_pipe:
            self._release_pipe()
        if self.wants is _ARRIVAL:
            self._want(_READABLE)

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move what can be moved now."""
        if self.wants is _WRITABLE and not self._deliver():
            return
        if self.wants is _ARRIVAL:
            # More has come than bytes. To change the registration, and change it back after a short read, has the
            # kernel look again, and tell again what the read has left.
            self._want(_READABLE)
        if self._pipe is None:
            self._copy()
        else:
            self._move_bulk()

    def _copy(self) -> None:
        try:
            data = read(self._source_fd, _COPY_BUFFER)
        except BlockingIOError:
            return self._want(_READABLE)
        except OSError as error:
            return self.break_off(self.source, error)
        if not data:
            return self._pass_on_end()
        if self._probe is not None:
            return self._judge_first(data)
        try:
            sent = write(self._sink_fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            return self.break_off(self._sink, error)
        self.moved += sent
        return self._go_on(data, sent, _COPY_BUFFER)

    def _go_on(self, data: bytes, sent: int, asked: int) -> None:
        """What comes after ``data``, of which the sink took ``sent`` bytes, and for which ``asked`` were asked."""
        if sent < len(data):
            self._held = memoryview(data)[sent:]
            return self._want(_WRITABLE)
        if sent < asked:
            if sent <= _SMALL < asked:
                self._small_ones += 1
                if self._small_ones >= _SMALL_ONES_TO_ASK_FOR_LESS:
                    self._asked = _SMALL
            return self._want(_ARRIVAL if self._short_is_empty else _READABLE)
        if asked < _COPY_BUFFER:
            # The rest of it is there already, as a rule, and shall not wait for the next round.
            self._asked, self._small_ones = _COPY_BUFFER, 0
            return self._copy()
        if self._splice is not None:
            # It is used in the next round. In this one others may have a message to be sent.
            self._pipe = self._pipes.take()
            self._short_reads = 0
        return self._want(_READABLE)

    def _judge_first(self, data: bytes) -> None:
        """Hold the leg's first bytes back until they are known to be TLS."""
        assert self._probe is not None  # noqa: S101  for the type checker
        first = bytes(self._held) + data
        try:
            verdict = self._probe.check(first)
        except Cut as cut:
            return self._finish(cut)
        self._held = first
        if verdict is None:
            return self._want(_READABLE)
        self._probe = None
        if self._deliver():
            self._want(_READABLE)
        return None

    def _deliver(self) -> bool:
        """Offer what is held, in the buffer or in the pipe, to the sink; True once nothing is held."""
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
            # Even an empty view of them keeps the bytes, 16 KiB for as long as the pairing is silent.
            self._held = b""
        except BlockingIOError:
            self._want(_WRITABLE)
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
                return self.break_off(self.source, error)
            if count == 0:
                # The end, or an urgent byte (MSG_OOB) with more behind it: splice cannot get past one, recv can.
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
        return self._want(_READABLE)

    # --- changes -------------------------------------------------------------------------------------------------

    def _want(self, want: Want) -> None:
        # It may have finished earlier in this round: then it wants nothing more.
        if self.wants is not want and (want is Want.NOTHING or not self.has_finished):
            self.wants = want
            self._readiness.refresh(self.source)
            self._readiness.refresh(self._sink)

    def _release_pipe(self) -> None:
        if self._pipe is not None:
            self._pipes.give(self._pipe, is_empty=self._in_pipe == 0)
            self._pipe = None
            self._in_pipe = 0

    def _pass_on_end(self) -> None:
        if self.source.error is not None:
            # Linux tells of a reset once, and told the pump that writes to this wire; to us it looks like FIN.
            return self.break_off(self.source, self.source.error)
        if self._probe is not None:
            try:
                self._probe.check_end(len(self._held))
            except Cut as cut:
                return self._finish(cut)
        try:
            self._sink.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            return self.break_off(self._sink, shutdown_failure(self._sink.socket, error))
        return self._finish(None)

    def break_off(self, wire: Wire, error: OSError) -> None:
        """End this direction because the connection of ``wire`` broke, unless it has ended already."""
        if self.has_finished:
            return
        only_writing = wire is self._sink and wire.error is None and is_after_end(error)
        if not only_writing:
            # A new one: the traceback of the old one would keep this pump alive through the wire.
            wire.error = OSError(error.errno, error.strerror)
        side = self._sides[0] if wire is self.source else self._sides[1]
        self._finish(Cut(Outcome.RESET, side, str(broken(error)), only_writing=only_writing))

    def fail(self, error: Exception) -> None:
        """A step came to grief through a bug of ours: have the task of this pump raise ``error``."""
        if not self.has_finished:
            self._failure = error
            self._readiness.wake(self._finished)
            # Not by way of epoll, which may be what failed; the task takes both wires out of it.
            self.wants = Want.NOTHING

    def _finish(self, cut: Cut | None) -> None:
        self._failure = cut
        self._readiness.wake(self._finished)
        self._want(Want.NOTHING)


def carry_arrivals(pumps: Iterable[RawPump]) -> None:
    """Carry a message for each of these pumps, which were told of an arrival in one round.

    It does what :meth:`RawPump.step` does, but for all of them: first everything is read and then everything is sent,
    so that a receiver that sleeps is woken once and finds more than one message. A small message costs what is written
    here, so it is written out. Raises nothing: a bug ends the pairing that met it.
    """
    loads: list[tuple[RawPump, bytes]] = []
    for pump in pumps:
        try:
            if pump.wants is not _ARRIVAL:
                continue  # it has finished since it was told
            try:
                data = read(pump._source_fd, pump._asked)
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
            asked = pump._asked
            if sent < len(data) or sent == asked or sent <= _SMALL < asked:
                pump._go_on(data, sent, asked)
        except Exception as error:
            pump.source.fail(error)
