"""Two parties write, pause, end, cut or reset, in any order: the two pumps between them must behave like two queues.

The state machine holds the parties' ends of both legs; the pumps run in a Trio of their own. The model of a direction
is what its sender's kernel took (:class:`Queue`). At every moment, what came out must be the first part of that, and
the end may come out only after all of it, and only if the sender ended it. At last nothing may be left: no descriptor,
no pipe, no registration. Settling is a check too: it waits for a moment in which nothing is ready, which never comes if
a pump spins.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from OpenSSL import SSL

from frelay.net.sockets import close_with_reset
from frelay.net.streams import RawStream
from frelay.pairing import pipes as pipes_module
from frelay.pairing import raw_pump as raw_pump_module
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Cut, Pump
from frelay.pairing.raw_pump import RawPump, splice_is_available
from frelay.pairing.stepping import PolledSocket
from frelay.pairing.stream_pump import StreamPump
from frelay.protocol.outcome import Outcome, Side
from frelay.tls.stream import TlsStream
from support.descriptors import open_descriptors, opened_since
from support.rounds import CountedRounds, nothing_is_ready
from support.site import Site
from support.streams import SocketMaker, client_context, server_context, tcp_pair, tls_over, unix_pair

T = TypeVar("T")

TIMEOUT: Final = 20.0
CONTENT: Final = random.Random(0).randbytes(1 << 20)
"""What is sent, again and again. The directions begin at different places, so their bytes cannot be confused."""
OTHER_START: Final = 333_333

Kind = Literal["raw", "tls"]
Way = Literal["splice", "tiny pipes", "few bytes", "copy"]
SIDES: Final[tuple[Side, Side]] = ("func1", "func2")


def content(start: int, count: int) -> bytes:
    """``count`` bytes of the endless repetition of CONTENT, from ``start`` on."""
    start %= len(CONTENT)
    found = CONTENT[start : start + count]
    while len(found) < count:
        found += CONTENT[: count - len(found)]
    return found


@cache
def contexts() -> tuple[SSL.Context, SSL.Context]:
    """The TLS contexts of the relay and of a party."""
    with tempfile.TemporaryDirectory() as directory:
        site = Site(Path(directory))
        return server_context(site), client_context(site)


class Trio:
    """A Trio run in a thread, for a state machine whose rules are plain functions."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        assert self._ready.wait(TIMEOUT)

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._done = trio.Event()
            self._ready.set()
            await self._done.wait()

    def __call__(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        async def call() -> T:
            with trio.fail_after(TIMEOUT):
                return await function(*args)

        return trio.from_thread.run(call, trio_token=self._token)

    def end(self) -> None:
        trio.from_thread.run_sync(self._done.set, trio_token=self._token)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


class End:
    """A party's end of its leg, in TLS or not; nothing here waits."""

    def __init__(self, sock: socket.socket, tls: SSL.Connection | None) -> None:
        self.sock = sock
        self.tls = tls
        self.is_lost = False
        """Whether the connection was reset, by this end or the other."""
        self.stuck = 0
        """Bytes that OpenSSL has sent in part, and must get again before any others."""
        self._is_ending = False

    def write(self, data: Callable[[int], bytes], count: int) -> int:
        """Send the first bytes of what ``data`` returns for a size; returns how many were taken."""
        count = max(count, self.stuck)
        try:
            sent = self.sock.send(data(count)) if self.tls is None else self.tls.send(data(count))
        except (BlockingIOError, SSL.WantWriteError):
            if self.tls is not None:
                self.stuck = count
            return 0
        except (OSError, SSL.Error) as error:
            self._lose(error)
            return 0
        self.stuck = 0
        return sent

    def read(self, count: int) -> bytes | None:
        """Up to ``count`` bytes; ``b""`` for a clean end; None if there is nothing now, or never will be."""
        try:
            return self.sock.recv(count) if self.tls is None else self.tls.recv(min(count, 16384))
        except (BlockingIOError, SSL.WantReadError):
            return None
        except SSL.ZeroReturnError:
            return b""
        except (OSError, SSL.Error) as error:
            self._lose(error)
            return None

    def end(self) -> bool:
        """Send FIN or close_notify; False if an earlier write is stuck, so that it cannot be sent yet."""
        if self.stuck:
            return False
        self._is_ending = True
        self.push()
        return True

    def push(self) -> None:
        """Try once more to send a close_notify."""
        if not self._is_ending:
            return
        try:
            if self.tls is None:
                self.sock.shutdown(socket.SHUT_WR)
            else:
                self.tls.shutdown()
        except SSL.WantWriteError:
            return
        except (OSError, SSL.Error) as error:
            self._lose(error)
        self._is_ending = False

    def cut(self) -> None:
        """Send FIN without close_notify."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """RST."""
        self.is_lost = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.tls = None
        self.sock.close()

    def _lose(self, error: Exception) -> None:
        note(f"lost: {error!r}")
        self.is_lost = True


class Queue:
    """The model of one direction, with the parties' actions at both ends of it."""

    def __init__(self, sender: End, receiver: End, start: int) -> None:
        self.sender = sender
        self.receiver = receiver
        self.start = start
        self.sent = 0
        """How many bytes the sender's kernel has certainly taken."""
        self.received = 0
        self.is_ended = False
        """Whether the sender has ended the direction."""
        self.end_was_seen = False

    @property
    def in_flight(self) -> int:
        return self.sent - self.received

    def write(self, count: int) -> int:
        if self.is_ended or self.sender.is_lost:
            return 0
        taken = self.sender.write(lambda size: content(self.start + self.sent, size), count)
        self.sent += taken
        return taken

    def read(self, count: int) -> int:
        """Take up to ``count`` bytes and compare them; returns how many came."""
        if self.end_was_seen or self.receiver.is_lost:
            return 0
        data = self.receiver.read(count)
        if data == b"":
            assert self.is_ended, "an end that its sender did not send"
            assert self.in_flight == 0, "an end before all bytes"
            self.end_was_seen = True
        if not data:
            return 0
        assert data == content(self.start + self.received, len(data)), "other bytes than were sent"
        self.received += len(data)
        assert self.received <= self.sent + self.sender.stuck, "more bytes than were sent"
        return len(data)

    def end(self) -> None:
        if not self.is_ended and not self.sender.is_lost:
            self.is_ended = self.sender.end()

    def finish(self) -> None:
        """Bring this direction nearer to its end, as far as that is possible without waiting."""
        if not self.is_ended:
            self.write(1)  # what is stuck goes first
            self.end()
        self.sender.push()
        while self.read(1 << 20):
            pass


class Middle:
    """What is tested: the relay's ends of both legs and the two pumps between them, as in a pairing."""

    def __init__(self, legs: list[RawStream | TlsStream], way: Way) -> None:
        self.legs = legs
        self.readiness = CountedRounds()
        self.pipes = PipePool()
        self.pumps = self._make_pumps(way)
        self.cuts: list[Cut] = []
        self.is_over = trio.Event()
        self._scope = trio.CancelScope()

    def _make_pumps(self, way: Way) -> list[Pump]:
        one, two = self.legs
        if not (isinstance(one, RawStream) and isinstance(two, RawStream)):
            flow = partial(StreamPump, readiness=self.readiness)
            return [flow(one, two, sides=SIDES), flow(two, one, sides=(SIDES[1], SIDES[0]))]
        polled = PolledSocket(one.sock), PolledSocket(two.sock)
        splice = None
        if way != "copy":
            splice = few_bytes if way == "few bytes" else os.splice
        make = partial(RawPump, readiness=self.readiness, pipes=self.pipes, splice=splice)
        return [make(polled[0], polled[1], sides=SIDES), make(polled[1], polled[0], sides=(SIDES[1], SIDES[0]))]

    async def run(self) -> None:
        async with trio.open_nursery() as root:
            root.start_soon(self.readiness.run)
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for pump in self.pumps:
                        nursery.start_soon(self._carry, pump, nursery.cancel_scope)
            for leg in self.legs:
                if self.cuts or self._scope.cancelled_caught:
                    close_with_reset(leg.sock)
                leg.close()
            assert len(self.readiness) == 0, "a registration is left"
            assert self.pipes.in_use == 0, "a pipe is left"
            for pipe in self.pipes._free:
                assert select.select([pipe.read_end], [], [], 0)[0] == [], "a pipe with bytes was pooled"
            self.pipes.close()
            root.cancel_scope.cancel()
        self.is_over.set()

    async def _carry(self, pump: Pump, both: trio.CancelScope) -> None:
        try:
            await pump.run()
        except Cut as cut:
            self.cuts.append(cut)
            if not cut.only_writing or len(self.cuts) == len(self.pumps):
                both.cancel()

    async def cancel(self) -> None:
        self._scope.cancel()
        await self.is_over.wait()

    async def settle(self) -> None:
        """Wait for a moment in which nothing is ready; it comes unless something spins."""
        await nothing_is_ready(self.readiness, 0.001)

    async def rest(self) -> None:
        for pump in self.pumps:
            pump.on_idle()


def few_bytes(source: int, sink: int, count: int, *, flags: int) -> int:
    """A splice that never moves as much as was requested."""
    return os.splice(source, sink, min(count, 1000), flags=flags)


SMALL: Final = 4096
sizes = st.sampled_from([1, 2, 3, 7, 478, 479, 480, 997, 4096, 16383, 16384, 16385, 65537, 250_007])
directions = st.integers(0, 1)


class HalfClose(RuleBasedStateMachine):
    """The state machine; see the docstring of this module."""

    trio: Trio | None = None

    @initialize(
        kinds=st.tuples(st.sampled_from(["raw", "raw", "tls"]), st.sampled_from(["raw", "raw", "tls"])),
        way=st.sampled_from(["splice", "tiny pipes", "few bytes", "copy"] if splice_is_available() else ["copy"]),
        makers=st.tuples(*[st.sampled_from([tcp_pair, unix_pair])] * 2),
        buffers=st.tuples(*[st.sampled_from([None, SMALL, 65536])] * 2),
        fate=st.sampled_from(["end", "end", "end", "cut", "reset", "cancel"]),
    )
    def open(
        self,
        kinds: tuple[Kind, Kind],
        way: Way,
        makers: tuple[SocketMaker, SocketMaker],
        buffers: tuple[int | None, int | None],
        fate: str,
    ) -> None:
        contexts()  # what other tests leave open is not counted
        self.before = open_descriptors()
        self.fate = fate
        self.is_spoiled = False
        """Whether a cut, a reset or a cancellation has already hit this pairing."""
        # So small a pipe is full with one page, and few small messages change how much a read requests.
        self.constants = ExitStack()
        pipe_size = 4096 if way == "tiny pipes" else 1 << 20
        self.constants.enter_context(mock.patch.object(pipes_module, "_PIPE_SIZE", pipe_size))
        self.constants.enter_context(mock.patch.object(raw_pump_module, "_SMALL_MESSAGES_TO_READ_LESS", 1))
        self.trio = Trio()
        self.bound = 16 * sum(buffers) + 131072 if all(buffers) else None  # type: ignore[arg-type]
        legs: list[RawStream | TlsStream] = []
        ends: list[End] = []
        for kind, maker, buffer in zip(kinds, makers, buffers, strict=True):
            # A socketpair has no RST: a cut would correctly look like an end.
            inner, outer = maker(buffer) if fate == "end" else tcp_pair(buffer)
            if kind == "raw":
                legs.append(RawStream(inner))
                ends.append(End(outer, None))
            else:
                server, client = self.trio(tls_over, (inner, outer), *contexts())
                legs.append(server)
                ends.append(End(outer, client.connection))
        self.ends = ends
        self.queues = [Queue(ends[0], ends[1], 0), Queue(ends[1], ends[0], OTHER_START)]
        self.trio(self._start, legs, way)

    async def _start(self, legs: list[RawStream | TlsStream], way: Way) -> None:
        assert self.trio is not None
        self.middle = Middle(legs, way)
        self.trio.nursery.start_soon(self.middle.run)

    # --- what parties do -----------------------------------------------------------------------------------------

    @rule(direction=directions, count=sizes)
    def write(self, direction: int, count: int) -> None:
        self.queues[direction].write(count)

    @rule(direction=directions, count=sizes)
    def read(self, direction: int, count: int) -> None:
        self.queues[direction].read(count)

    @rule(direction=directions)
    def end(self, direction: int) -> None:
        self.queues[direction].end()

    @rule(direction=directions)
    def write_to_a_reader_that_pauses(self, direction: int) -> None:
        """Back-pressure: however much a party writes, only a limited amount is taken."""
        queue = self.queues[direction]
        for _ in range(64):
            taken = queue.write(65536)
            self.settle()
            if not taken and not queue.write(65536):
                break
        if self.bound is not None:
            assert queue.in_flight <= self.bound

    # --- what happens --------------------------------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        assert self.trio is not None
        self.trio(self.middle.settle)

    @rule()
    def rest(self) -> None:
        assert self.trio is not None
        self.trio(self.middle.rest)

    @precondition(lambda self: self.fate == "cut" and not self.is_spoiled)
    @rule(direction=directions)
    def cut(self, direction: int) -> None:
        queue = self.queues[direction]
        if queue.sender.tls is not None and not queue.is_ended and not queue.sender.is_lost:
            self.is_spoiled = True
            queue.sender.cut()
            queue.sender.is_lost = True

    @precondition(lambda self: self.fate == "reset" and not self.is_spoiled)
    @rule(side=directions)
    def reset(self, side: int) -> None:
        self.is_spoiled = True
        self.ends[side].reset()

    @precondition(lambda self: self.fate == "cancel" and not self.is_spoiled)
    @rule()
    def cancel(self) -> None:
        assert self.trio is not None
        self.is_spoiled = True
        self.trio(self.middle.cancel)

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def no_leg_is_cut_without_a_reason(self) -> None:
        if self.trio is not None and not self.is_spoiled:
            assert not self.middle.cuts
            assert not any(end.is_lost for end in self.ends)

    def teardown(self) -> None:
        if self.trio is None:
            return
        try:
            self._bring_to_an_end()
        finally:
            for end in self.ends:
                end.close()
            self.trio.end()
            self.constants.close()
        assert not opened_since(self.before)

    def _bring_to_an_end(self) -> None:
        assert self.trio is not None
        deadline = time.monotonic() + TIMEOUT
        while not self.middle.is_over.is_set() or not all(
            queue.end_was_seen or queue.receiver.is_lost for queue in self.queues
        ):
            assert time.monotonic() < deadline, "it does not come to an end"
            for queue in self.queues:
                queue.finish()
            self.trio(self.middle.settle)
        if not self.is_spoiled:
            assert not self.middle.cuts
            assert [queue.in_flight for queue in self.queues] == [0, 0]
            assert [pump.moved for pump in self.middle.pumps] == [queue.sent for queue in self.queues]
        for cut in self.middle.cuts:
            assert cut.outcome in (Outcome.RESET, Outcome.TRUNCATED), cut


TestHalfClose = pytest.mark.load(HalfClose.TestCase)
TestHalfClose.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)
