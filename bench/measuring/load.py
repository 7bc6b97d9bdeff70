"""The load generators: they send, receive and measure time, over sockets that are connected already.

:class:`CompiledGenerator` runs ``load.c`` on plain sockets. :class:`PythonGenerator` does the same in two Python
processes, where there is no C compiler or the load itself must be in TLS. It costs much more CPU than the relay for the
same bytes. So with it the relay's throughput is a lower bound, and only the relay's CPU time is meaningful.

A generator gets pairs of sockets and does not know what is between them. It calls ``on_edge`` when its window of
measurement begins and when it ends; then the caller reads the CPU time of the subject.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

from bench.measuring.interrupt import deferred

__all__ = [
    "BenchError",
    "CompiledGenerator",
    "Generator",
    "Load",
    "NoCompiler",
    "PythonGenerator",
    "SocketPair",
    "Tally",
    "UsageError",
]

Load = Literal["bulk", "pingpong", "mixed", "greedy"]

_SOURCE: Final = Path(__file__).with_name("load.c")
# Time beyond the window: for the start, and for a busy machine.
_PATIENCE: Final = 30.0
_BULK_CHUNK: Final = 256 * 1024
_TLS_RECORD: Final = 16 * 1024
# How many records one socket may take in a row before the others get their turn.
_RECORDS_IN_A_ROW: Final = 16
_GLANCE: Final = 0.05
_AFTERWARDS: Final = 200_000_000


class BenchError(Exception):
    """A measurement could not be made; the message is for the person who ran it."""


class UsageError(BenchError):
    """A script cannot use what it was given, so nothing was measured; the message says why, and what to do."""


class NoCompiler(BenchError):
    """``load.c`` could not be compiled here."""


class SocketPair(NamedTuple):
    """The two ends of one connection through the subject, blocking; both plain or both in TLS."""

    client: socket.socket
    server: socket.socket

    def close(self) -> None:
        """Close both."""
        self.client.close()
        self.server.close()


@dataclass(frozen=True, slots=True)
class Tally:
    """What a generator counted in its window."""

    seconds: float
    count: int
    """Bytes that arrived (bulk), or round trips (ping-pong)."""
    cpu: float
    """The generator's own user and system seconds."""
    p50: float = 0.0
    """Of the round trips, in microseconds; 0 for bulk, as are the next two."""
    p99: float = 0.0
    max: float = 0.0
    bytes: int = 0
    """Arrived bytes, from the compiled generator only; for greedy, those of the greedy pair."""


class Generator(Protocol):
    """A source of load."""

    @property
    def title(self) -> str:
        """Its name in the report."""

    def run(
        self,
        load: Load,
        pairs: Sequence[SocketPair],
        *,
        seconds: float,
        warmup: float,
        size: int,
        on_edge: Callable[[], None],
    ) -> Tally:
        """Load ``pairs`` for ``warmup`` + ``seconds``, with messages of ``size`` bytes; raises BenchError."""


# --- in C ---------------------------------------------------------------------------------------------------------


class CompiledGenerator:
    """``load.c``, compiled into ``directory``; raises NoCompiler."""

    title = "load.c"

    def __init__(self, directory: Path) -> None:
        self._binary: Final = directory / "load"
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
        if shutil.which(command[0]) is None:
            raise NoCompiler(f"there is no C compiler ({command[0]})")
        done = subprocess.run(
            [*command, "-O2", "-pthread", "-o", str(self._binary), str(_SOURCE)], capture_output=True, text=True
        )
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
            raise NoCompiler(f"{shlex.join(command)} did not compile {_SOURCE.name}: {first}")

    def run(
        self,
        load: Load,
        pairs: Sequence[SocketPair],
        *,
        seconds: float,
        warmup: float,
        size: int,
        on_edge: Callable[[], None],
    ) -> Tally:
        descriptors = [sock.fileno() for pair in pairs for sock in pair]
        process: subprocess.Popen[bytes] | None = None
        try:
            with deferred():
                process = subprocess.Popen(
                    [str(self._binary), load, str(seconds), str(warmup), str(size), *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    # In a process group of its own: on Ctrl-C only this process ends it.
                    process_group=0,
                )
            deadline = time.monotonic() + warmup + seconds + _PATIENCE
            lines = _Lines(process, deadline)
            for word in ("begin", "end"):
                if lines.next() != word:
                    raise self._failure(process)
                on_edge()
            answer = lines.next()
            if not answer:
                raise self._failure(process)
            return Tally(**json.loads(answer))
        finally:
            if process is not None:
                process.kill()
                process.communicate()

    @staticmethod
    def _failure(process: subprocess.Popen[bytes]) -> BenchError:
        if process.poll() is None:
            time.sleep(0.1)  # its stdout has ended, so it ends soon
            process.kill()
        words = (process.communicate()[1] or b"").decode(errors="replace").strip()
        return BenchError(words or f"the load generator ended with {process.returncode} and without a message")


class _Lines:
    """The lines of a process' stdout as they come, with a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        assert process.stdout is not None
        self._descriptor = process.stdout.fileno()
        self._poller = select.poll()
        self._poller.register(self._descriptor, select.POLLIN)
        self._deadline = deadline
        self._rest = b""

    def next(self) -> str:
        """The next line without its end, or what there is before EOF; raises BenchError after the deadline."""
        while b"\n" not in self._rest:
            left = self._deadline - time.monotonic()
            # Not select(): with thousands of idle pairings the descriptor's number is too high for it.
            if left <= 0 or not self._poller.poll(left * 1e3):
                raise BenchError("the load generator did not finish in time")
            data = os.read(self._descriptor, 4096)
            if not data:
                break
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


# --- in Python ----------------------------------------------------------------------------------------------------


class _Window:
    """When one worker counts, and the CPU time that it used then. Times in monotonic ns."""

    def __init__(self, begins: int, ends: int) -> None:
        self.begins = begins
        self.ends = ends
        self.stops = ends + _AFTERWARDS
        """The end of the load; later than that of the window, so that the parent reads its clocks under load."""
        self.cpu = 0.0
        self._cpu_before: float | None = None

    def open(self, now: int) -> bool:
        """Whether ``now`` is inside."""
        if now < self.begins:
            return False
        if self._cpu_before is None:
            self._cpu_before = time.process_time()
        if now >= self.ends:
            self.cpu = self.cpu or time.process_time() - self._cpu_before
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Counted:
    count: int
    cpu: float
    latencies: array[int]


class PythonGenerator:
    """The load in two forked Python processes, one for all clients and one for all servers; plain or TLS sockets."""

    title = "Python"

    def run(
        self,
        load: Load,
        pairs: Sequence[SocketPair],
        *,
        seconds: float,
        warmup: float,
        size: int,
        on_edge: Callable[[], None],
    ) -> Tally:
        context = multiprocessing.get_context("fork")
        begins = time.monotonic_ns() + int(warmup * 1e9)
        window = _Window(begins, begins + int(seconds * 1e9))
        if load not in ("bulk", "pingpong"):
            raise BenchError(f"the load {load!r} is made in C alone")
        sides = {"server": [pair.server for pair in pairs], "client": [pair.client for pair in pairs]}
        answers: dict[str, Connection] = {}
        workers = []
        try:
            for side, sockets in sides.items():
                answers[side], theirs = context.Pipe(duplex=False)
                worker = context.Process(
                    target=_work, args=(load, side, sockets, window, size, theirs), daemon=True, name=f"load {side}"
                )
                with deferred():
                    worker.start()
                    workers.append(worker)
                theirs.close()
            for edge in (window.begins, window.ends):
                # A message before the end is an error; do not wait for the rest.
                if wait(list(answers.values()), max(0.0, edge / 1e9 - time.monotonic())):
                    break
                on_edge()
            counted = {side: _answer(side, answers[side]) for side in answers}
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            for connection in answers.values():
                connection.close()
        cpu = sum(one.cpu for one in counted.values())
        result = counted["server" if load == "bulk" else "client"]
        if load == "bulk":
            return Tally(seconds, result.count, cpu)
        ordered = sorted(result.latencies)
        if not ordered:
            return Tally(seconds, 0, cpu)
        p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e3 for share in (0.5, 0.99))
        return Tally(seconds, len(ordered), cpu, p50, p99, ordered[-1] / 1e3)


def _answer(side: str, connection: Connection) -> _Counted:
    try:
        if not connection.poll(_PATIENCE):
            raise BenchError(f"the {side} side of the load did not finish in time")
        answer = connection.recv()
    except EOFError:
        raise BenchError(f"the {side} side of the load ended without a message") from None
    if isinstance(answer, str):
        raise BenchError(answer)
    assert isinstance(answer, _Counted)
    return answer


def _work(load: Load, side: str, sockets: list[socket.socket], window: _Window, size: int, answer: Connection) -> None:
    # The parent decides when to stop; our traceback on Ctrl-C would help nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work = {
        ("bulk", "client"): _send_bulk,
        ("bulk", "server"): _sink_bulk,
        ("pingpong", "client"): _play_client,
        ("pingpong", "server"): _play_server,
    }[load, side]
    try:
        answer.send(work(sockets, window, size))
    except OSError as error:
        answer.send(f"the {side} side of the load: {error}")


def _watch(sockets: Sequence[socket.socket], events: int) -> tuple[select.epoll, dict[int, socket.socket]]:
    poller = select.epoll()
    for sock in sockets:
        poller.register(sock.fileno(), events)
    return poller, {sock.fileno(): sock for sock in sockets}


def _send_bulk(sockets: Sequence[socket.socket], window: _Window, size: int) -> _Counted:
    poller, by_descriptor = _watch(sockets, select.EPOLLOUT)
    for sock in sockets:
        sock.setblocking(False)
    buffer = bytes(_BULK_CHUNK)
    while (now := time.monotonic_ns()) < window.stops:
        window.open(now)
        for descriptor, _ in poller.poll(_GLANCE):
            try:
                by_descriptor[descriptor].send(buffer)
            except (BlockingIOError, ssl.SSLWantWriteError):
                continue
    return _Counted(0, window.cpu, array("Q"))


def _sink_bulk(sockets: Sequence[socket.socket], window: _Window, size: int) -> _Counted:
    poller, _ = _watch(sockets, select.EPOLLIN)
    buffer = bytearray(1024 * 1024)
    receivers: dict[int, Callable[[], int]] = {}
    for sock in sockets:
        sock.setblocking(False)
        # Discard in the kernel if possible; TLS must be decrypted first.
        in_tls = isinstance(sock, ssl.SSLSocket)
        receivers[sock.fileno()] = (
            (lambda sock=sock: sock.recv_into(buffer, _TLS_RECORD))  # type: ignore[misc]
            if in_tls
            else (lambda sock=sock: sock.recv_into(buffer, len(buffer), socket.MSG_TRUNC))  # type: ignore[misc]
        )
    count = 0
    while (now := time.monotonic_ns()) < window.stops:
        is_open = window.open(now)
        for descriptor, _ in poller.poll(_GLANCE):
            receive = receivers[descriptor]
            try:
                for _ in range(_RECORDS_IN_A_ROW):
                    arrived = receive()
                    if not arrived:
                        raise OSError("the receiving end was closed")
                    if is_open:
                        count += arrived
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
    return _Counted(count, window.cpu, array("Q"))


def _receive_message(sock: socket.socket, size: int) -> None:
    # Only one message is under way, so the rest of it arrives; a socket in the middle of one may block.
    while size:
        data = sock.recv(size)
        if not data:
            raise OSError("the connection was closed")
        size -= len(data)


def _play_client(sockets: Sequence[socket.socket], window: _Window, size: int) -> _Counted:
    poller, by_descriptor = _watch(sockets, select.EPOLLIN)
    message, latencies = bytes(size), array("Q")
    sent_at: dict[int, int] = {}
    for descriptor, sock in by_descriptor.items():
        sent_at[descriptor] = time.monotonic_ns()
        sock.sendall(message)
    while time.monotonic_ns() < window.stops:
        for descriptor, _ in poller.poll(_GLANCE):
            sock = by_descriptor[descriptor]
            _receive_message(sock, size)
            now = time.monotonic_ns()
            if window.open(now):
                latencies.append(now - sent_at[descriptor])
            sent_at[descriptor] = now
            sock.sendall(message)
    return _Counted(len(latencies), window.cpu, latencies)


def _play_server(sockets: Sequence[socket.socket], window: _Window, size: int) -> _Counted:
    poller, by_descriptor = _watch(sockets, select.EPOLLIN)
    message = bytes(size)
    while (now := time.monotonic_ns()) < window.stops:
        window.open(now)
        for descriptor, _ in poller.poll(_GLANCE):
            sock = by_descriptor[descriptor]
            _receive_message(sock, size)
            sock.sendall(message)
    return _Counted(0, window.cpu, array("Q"))
