"""A worker process as its supervisor sees it: the process, the channel to it, and the last that it reported."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from frelay.admin.control import Counts
from frelay.errors import ConfigError, FrelayError
from frelay.journal import Entry
from frelay.net.channel import Channel, ChannelEnded
from frelay.relay.workers.codec import counts_from_json, entry_from_json, problem_from_json

__all__ = ["WorkerLost", "WorkerProcess"]

# A worker whose channel has ended ends by itself. If it has not after this many seconds, it is killed.
_EXIT_TIMEOUT: Final = 5.0
# systemd sets these for the process that it has started, and for no other.
_NOT_FOR_WORKERS: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
)


class WorkerLost(FrelayError):
    """The worker has ended, or does not answer."""


@dataclass(eq=False, slots=True)
class _Question:
    """A message on its way to a worker, and the answer on its way back."""

    message: dict[str, Any]
    sockets: Sequence[socket.socket]
    is_over: trio.Event = field(default_factory=trio.Event)
    answer: dict[str, Any] | None = None


class WorkerProcess:
    """One worker process. Give :meth:`run` a task; it ends with the process.

    ``note`` is called with each entry of its journal that it tells the supervisor.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, note: Callable[[Entry], None]) -> None:
        self._process: Final = process
        self._channel: Final = Channel(sock)
        self._note: Final = note
        self._numbers: Final = itertools.count(1)
        self._outbox: Final[deque[_Question]] = deque()
        self._news = trio.Event()
        self._open: Final[dict[int, _Question]] = {}
        self.ended: Final = trio.Event()
        """Set once it cannot be asked any more."""
        self._log: Final[Any] = structlog.get_logger("frelay.workers")
        self.counts: Counts | None = None
        """The last counts that it has sent; None before the first."""
        self.messages_heard = 0

    @classmethod
    def spawn(cls, number: int, note: Callable[[Entry], None], *, log_format: str, log_level: str) -> WorkerProcess:
        """Start a worker process; raises OSError. It blocks for the few milliseconds that the kernel takes for that."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, _signals_held_back():
                process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                    # -P: do not import frelay from the current directory.
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "frelay.relay.workers",
                        str(number),
                        str(theirs.fileno()),
                        log_format,
                        log_level,
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={
                        **{name: value for name, value in os.environ.items() if name not in _NOT_FOR_WORKERS},
                        # So that the worker finds frelay and its libraries where this process has found them.
                        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    },
                )
            ours.setblocking(False)
            return cls(process, ours, note)
        except BaseException:
            ours.close()
            raise

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()

    async def run(self) -> int:
        """Talk to it until it has ended; gives its exit code, negative for a signal. Cancelled, it ends it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel(reason="the channel of this worker has ended")
        finally:
            self.ended.set()
            self._channel.close()
            for question in self._open.values():
                question.is_over.set()
            with trio.CancelScope(shield=True):
                code = await self._ended()
        return code

    async def _ended(self) -> int:
        # Each in a thread of its own: workers that end together must not wait for each other.
        wait, limiter = self._process.wait, trio.CapacityLimiter(1)
        with trio.move_on_after(_EXIT_TIMEOUT):
            return await trio.to_thread.run_sync(wait, abandon_on_cancel=True, limiter=limiter)
        self._process.kill()
        return await trio.to_thread.run_sync(wait, limiter=trio.CapacityLimiter(1))

    # --- asking ------------------------------------------------------------------------------------------------

    async def ask(self, what: str, *, timeout: float, sockets: Sequence[socket.socket] = (), **details: Any) -> Any:
        """Ask it to do something; gives its answer.

        Raises WorkerLost if there is none within ``timeout`` seconds, ConfigError if it refuses.
        """
        if self.ended.is_set():
            raise WorkerLost("it has ended")
        number = next(self._numbers)
        question = self._open[number] = _Question({"ask": what, "number": number, **details}, sockets)
        self._outbox.append(question)
        self._news.set()
        try:
            with trio.move_on_after(timeout):
                await question.is_over.wait()
        finally:
            del self._open[number]
            # The caller may close the sockets now, so they must not be sent later.
            if question in self._outbox:
                self._outbox.remove(question)
        if question.answer is None:
            raise WorkerLost(self._why_silent(timeout))
        if "problems" in question.answer:
            raise ConfigError([problem_from_json(problem) for problem in question.answer["problems"]])
        return question.answer["value"]

    def _why_silent(self, timeout: float) -> str:
        return "it has ended" if self.ended.is_set() else f"it did not answer within {timeout:g} s"

    async def _write(self) -> None:
        try:
            while True:
                while self._outbox:
                    question = self._outbox.popleft()
                    await self._channel.send(question.message, question.sockets)
                self._news = trio.Event()
                await self._news.wait()
        except ChannelEnded:
            pass  # the task that reads learns it as well

    # --- hearing -----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            try:
                received = await self._channel.receive()
            except ChannelEnded:
                return
            received.close()  # a worker sends no sockets
            self.messages_heard += 1
            try:
                self._hear(received.message)
            except Exception:
                # It must not end the other workers.
                self._log.exception("a bug in frelay: a worker said what nobody understands", pid=self.pid)
                self.kill()
                return

    def _hear(self, message: dict[str, Any]) -> None:
        for table in message.get("entries", ()):
            self._note(entry_from_json(table))
        if message.get("dropped"):
            self._log.warning("events of a worker were dropped: it was not listened to", count=message["dropped"])
        if "counts" in message:
            self.counts = counts_from_json(message["counts"])
        question = self._open.get(message.get("answer", 0))
        if question is not None:
            question.answer = message
            question.is_over.set()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started in this scope begins with these signals blocked, until it has set its handlers.

    A Ctrl-C goes to all processes of a terminal, and systemd's SIGTERM to all of a service. In its first moments a
    worker would die of either, and would not be drained.
    """
    signals = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
