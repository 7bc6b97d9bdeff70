"""Pumps: each carries one direction of a pairing, from its source's bytes to its sink's, and then the end of them.

Theory of operation
===================

There are two kinds, with one face (:class:`Pump`).

:class:`RawPump` joins two raw legs. Its unit is the *step*: a function call that moves what can be moved now and says
what it waits for (:class:`~frelay.readiness.Want`). It never waits itself; the readiness set calls it. A small message
is cheapest as a ``read`` and a ``write``, and the two are steps of their own, so that a round can read for all of its
pumps first. But once a read brings as much as was asked for, the source has more than that, and the pump turns to
``splice(2)`` through a pipe, where the bytes stay in the kernel. A few short reads in a row turn it back, or a look of
the watch that finds nothing moved, and the pipe goes back to the pool. So an idle or chatty pairing holds no pipe, and
a bulk one holds one a direction.

Nothing is read while anything read before is undelivered. That is all of back-pressure: the source's kernel buffer
fills, its window closes, its sender waits. It also makes the famous trap of splice harmless: a pipe fills by slots
rather than bytes, so EAGAIN can mean "pipe full" although the source is readable; a pump whose pipe is empty whenever
it reads cannot meet it.

:class:`StreamPump` joins two Trio streams, where the bytes must pass through the process anyway: receive, send, repeat.
At least one of the two is in TLS, or the route has a budget of bytes a second (:mod:`frelay.bandwidth`), which what
goes through the kernel alone could not be held to.

Both end a direction the same way: the source's end is passed on as the sink's end (FIN or close_notify), after all
bytes. Both check a leg's first bytes where ``require_inner_tls`` holds. Both keep ``moved`` and ``is_blocked`` readable
at any time for the watch, the metrics and the log.

A pump that fails raises :class:`Cut`, which says with what outcome and by whose fault. A pump that is cancelled leaves
no descriptor: a pipe with bytes in it is closed, never pooled, for its next user would deliver somebody else's bytes.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from os import read, write
from typing import Final, Protocol

import trio

from frelay.bandwidth import Share
from frelay.errors import ConnectionBroken, RemoteProtocolError, Truncated
from frelay.outcome import Outcome, Side
from frelay.readiness import ReadinessSet, Want, Wire
from frelay.sockets import broken

__all__ = ["Cut", "PipePool", "Pump", "RawPump", "StreamPump", "TlsProbe", "splice_is_available"]

# Below this a copy is cheaper than two splices and a pipe; a read that fills it announces more.
_COPY_BUFFER: Final = 16 * 1024
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
# What one receive of a stream pump asks for.
_STREAM_CHUNK: Final = 64 * 1024
# Eight whole TLS records, at two segments of 64 KiB each way: with less, a wake-up costs more than its bytes do.
_ROOM: Final = 128 * 1024
# After so many rounds everybody else gets a turn; about 1 ms, most of it in the ciphers.
_STREAM_ROUNDS: Final = 4

_SPLICE: Final[Callable[..., int] | None] = getattr(os, "splice", None)
_NONBLOCK: Final[int] = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)
_F_SETPIPE_SZ: Final = 1031

# Looked up with every message, and a member of an enumeration is not found as quickly as a name of this module.
_READABLE: Final = Want.SOURCE_READABLE
_WRITABLE: Final = Want.SINK_WRITABLE

_room: Final = memoryview(bytearray(_ROOM))


def splice_is_available() -> bool:
    """Whether this system has splice(2); without it raw legs are joined by copying."""
    return _SPLICE is not None


class Cut(Exception):
    """A pump's end other than the clean one."""

    def __init__(self, outcome: Outcome, side: Side, detail: str) -> None:
        super().__init__(f"{outcome.value} by {side}: {detail}")
        self.outcome = outcome
        self.side: Side = side
        self.detail = detail


class Pump(Protocol):
    """One direction of a pairing."""

    moved: int
    """Bytes accepted by the sink so far."""

    @property
    def is_blocked(self) -> bool:
        """Whether bytes are held that the sink has not accepted."""

    @property
    def is_held_back(self) -> bool:
        """Whether bytes are held until the route's budget allows them: that is the relay's doing, and no silence."""

    async def run(self) -> None:
        """Carry the direction to its end; raises Cut."""

    def rest(self) -> None:
        """Nothing has moved for a while: give up what only a flow needs."""


class TlsProbe:
    """Looks at the first bytes of a leg: they must open a TLS record (content type 22, major version 3).

    ``check`` is given what has come so far and answers True (TLS), None (too short to tell), or raises Cut.
    """

    __slots__ = ("_side",)

    NEEDED: Final = 3

    def __init__(self, side: Side) -> None:
        self._side: Side = side

    def check(self, first: bytes | bytearray | memoryview) -> bool | None:
        """Judge the first bytes of the leg."""
        expected = (0x16, 0x03)
        if any(byte != wanted for byte, wanted in zip(first, expected, strict=False)) or (
            len(first) >= self.NEEDED and first[2] > 0x0F
        ):
            raise Cut(Outcome.NOT_TLS, self._side, "the leg's first bytes are not a TLS record; set up mTLS inside")
        return True if len(first) >= self.NEEDED else None

    def check_end(self, held: int) -> None:
        """The leg ended after ``held`` undecided bytes."""
        if held:
            raise Cut(Outcome.NOT_TLS, self._side, f"the leg ended after {held} bytes, before any TLS record")


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
        if is_empty and len(self._free) < _POOLED_PIPES:
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
        "_failure",
        "_finished",
        "_held",
        "_in_pipe",
        "_pipe",
        "_pipes",
        "_probe",
        "_readiness",
        "_short_reads",
        "_sides",
        "_sink",
        "_sink_fd",
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
        self._source_fd = source.fd
        self._sink_fd = sink.fd
        self._held: bytes | memoryview = b""
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._short_reads = 0
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
        """Give the pipe back if it is empty; the next bulk takes one again."""
        if not self._in_pipe:
            self._release_pipe()

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move what can be moved now."""
        if self.wants is _WRITABLE and not self._deliver():
            return
        if self.take():
            self.give()

    def take(self) -> bool:
        """Read what a copying pump can read; whether it is now to :meth:`give` that.

        In two parts, because what a round has read is best sent in one go: a receiver that sleeps is woken once, and
        finds more than one message.
        """
        if self._pipe is not None:
            self._move_bulk()
            return False
        try:
            data = read(self._source_fd, _COPY_BUFFER)
        except BlockingIOError:
            self._want(_READABLE)
            return False
        except OSError as error:
            self.break_off(self.source, error)
            return False
        if data and self._probe is None:
            self._held = data
            return True
        if data:
            self._judge_first(data)
        else:
            self._pass_on_end()
        return False

    def give(self) -> None:
        """Send what :meth:`take` has read."""
        data = self._held
        try:
            sent = write(self._sink_fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            return self.break_off(self._sink, error)
        self.moved += sent
        if sent < len(data):
            self._held = memoryview(data)[sent:]
            return self._want(_WRITABLE)
        self._held = b""
        if sent == _COPY_BUFFER and self._splice is not None:
            self._pipe = self._pipes.take()
            self._short_reads = 0
            if self._pipe is not None:
                return self._move_bulk()
        if self.wants is not _READABLE:
            self._want(_READABLE)
        return None

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
                if self.take():
                    self.give()
                return None
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
        # Between its two parts a step may see the end: what happens at the sink is served in the same round.
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
            return self.break_off(self._sink, error)
        return self._finish(None)

    def break_off(self, wire: Wire, error: OSError) -> None:
        """End this direction because the connection of ``wire`` broke, unless it has ended already."""
        if self.has_finished:
            return
        # A new one: the traceback of the old one would keep this pump alive through the wire.
        wire.error = OSError(error.errno, error.strerror)
        side = self._sides[0] if wire is self.source else self._sides[1]
        self._finish(Cut(Outcome.RESET, side, str(broken(error))))

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


# --- through the process --------------------------------------------------------------------------------------------


class Stream(Protocol):
    """What a :class:`StreamPump` needs of either end."""

    @property
    def sock(self) -> socket.socket:
        """The socket under it."""

    def receive_now(self, room: memoryview) -> int:
        """Bytes received into ``room``; 0 if the socket must become readable first; -1: ask :meth:`receive_some`."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` bytes; ``b""`` at the end."""

    def send_now(self, data: memoryview) -> int:
        """How many bytes of ``data`` the kernel took without waiting."""

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`send_now` has left."""

    async def send_eof(self) -> None:
        """End this direction."""


class StreamPump:
    """Carries bytes from one stream to another through the process.

    It waits only when there is nothing to receive, or no room to send: what is there goes through one buffer that all
    such pumps share, and between the receiving and the sending no other gets a turn. (So one thread a process may run
    such pumps, as in a relay.)
    """

    __slots__ = ("_probe", "_share", "_sides", "_sink", "_source", "is_blocked", "is_held_back", "moved")

    def __init__(
        self,
        source: Stream,
        sink: Stream,
        *,
        sides: tuple[Side, Side],
        probe: TlsProbe | None = None,
        share: Share | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._sides = sides
        self._probe = probe
        self._share = share
        self.moved = 0
        self.is_blocked = False
        self.is_held_back = False

    async def run(self) -> None:
        """Receive and send until the source ends; raises Cut."""
        is_over = False
        while not is_over:
            if self._probe is None and self._share is None:
                is_over = await self._flow()
            else:
                is_over = await self._pass_on_some()

    async def _flow(self) -> bool:
        """Carry what comes, as long as nothing but bytes does; whether the direction has ended."""
        source, sink, rounds = self._source, self._sink, 0
        while True:
            try:
                count = source.receive_now(_room)
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[0]) from None
            if count < 0:
                return await self._pass_on_some()
            if not count:
                await trio.lowlevel.wait_readable(source.sock)
                rounds = 0
                continue
            try:
                sent = sink.send_now(_room[:count])
                self.moved += sent
                if sent < count:
                    rest = bytes(_room[sent:count])
                    self.is_blocked = True
                    await sink.send_rest(rest)
                    self.is_blocked = False
                    self.moved += len(rest)
                    rest, rounds = b"", 0
            except (ConnectionBroken, RemoteProtocolError) as error:
                raise _cut(error, self._sides[1]) from None
            rounds += 1
            if rounds == _STREAM_ROUNDS:
                await trio.lowlevel.checkpoint()
                rounds = 0

    async def _pass_on_some(self) -> bool:
        """Carry one portion, or the end; whether the direction has ended."""
        held, share = b"", self._share
        while True:
            try:
                data = await self._source.receive_some(_STREAM_CHUNK if share is None else share.portion)
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
        if data and share is not None:
            self.is_held_back = True
            await share.spend(len(data))
            self.is_held_back = False
            self._check_source()
        try:
            if not data:
                await self._sink.send_eof()
                return True
            self.is_blocked = True
            sent = self._sink.send_now(memoryview(data))
            if sent < len(data):
                await self._sink.send_rest(data[sent:])
            self.is_blocked = False
        except (ConnectionBroken, RemoteProtocolError) as error:
            raise _cut(error, self._sides[1]) from None
        self.moved += len(data)
        return False

    def _check_source(self) -> None:
        # The kernel gives what came before a reset first, and at the rate of a budget that may last for minutes. As
        # with back-pressure, the other party is to know at once.
        number = self._source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise Cut(Outcome.RESET, self._sides[0], str(broken(OSError(number, os.strerror(number)))))

    def rest(self) -> None:
        """There is nothing to give up."""


def _cut(error: ConnectionBroken | RemoteProtocolError, side: Side) -> Cut:
    if isinstance(error, Truncated):
        return Cut(Outcome.TRUNCATED, side, str(error))
    if isinstance(error, RemoteProtocolError):
        return Cut(Outcome.PROTOCOL_ERROR, side, str(error))
    return Cut(Outcome.RESET, side, str(error))
