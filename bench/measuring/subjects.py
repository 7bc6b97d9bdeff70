"""The subjects: each starts a program, returns pairs of sockets connected through it, and knows its processes.

A measurement needs no more of a relay. So the same load runs against frelay, against any forwarder of TCP connections,
against other relays that both ends dial, and without a relay. To add a forwarder, derive from :class:`Forwarder`: its
method gets a listening socket, the port to connect to, and a directory, and returns a command. ``parties.py``,
``forwarders.py`` and ``comparison/meetings.py`` have the subjects.

A subject's files are in its directory, and its processes in a process group of their own. Both end with the ``with``
block that started them.
"""

from __future__ import annotations

import abc
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.measuring.cpu import read_memory
from bench.measuring.interrupt import deferred
from bench.measuring.load import BenchError, SocketPair
from frelay.errors import FrelayError
from frelay.pki.init import initialise

__all__ = ["START", "STEP", "Direct", "Forwarder", "Subject", "await_listener", "checkout_root", "dial", "listener"]

# To start Python and make certificates takes a second; on a busy machine several.
START: Final = 30.0
# For each step of setting up one pair.
STEP: Final = 20.0
_LOG_TAIL: Final = 5


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # all of it has ended


def checkout_root() -> Path:
    """The checkout that this file belongs to."""
    return Path(__file__).resolve().parents[2]


class Subject(abc.ABC):
    """A program between the two ends of a connection. A context manager: it runs inside the block."""

    name: str
    """Its name in the tables."""
    in_tls: bool = False
    """Whether its pairs are TLS sockets, so that the load must be made in Python."""
    legs: int = 1
    """How many connections it accepts for a pair: one if it dials the other end itself."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        # A fork of ours that sets up pairs is not the parent of these processes, so it cannot ask for them.
        self._parent: Final = os.getpid()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abc.abstractmethod
    def start(self) -> None:
        """Start it, and wait until it accepts connections. Raises BenchError."""

    @abc.abstractmethod
    def connect(self) -> SocketPair:
        """One more pair through it; raises BenchError or OSError."""

    def arrive(self) -> Callable[[], SocketPair]:
        """Prepare a pair up to its last step: the last party's message, or the one dial. The result does that step.

        The call raises BenchError or OSError, as :meth:`connect` does.
        """
        return self.connect

    def admit(self) -> None:
        """Set up a pair, send a byte through it, and close it; raises BenchError or OSError.

        If several processes do this with one forwarder, each may accept another's connection. The byte makes sure that
        nobody closes before the others have their connections.
        """
        pair = self.connect()
        try:
            pair.server.sendall(b"x")
            if not pair.client.recv(1):
                raise OSError("a pair was closed before its first byte")
        finally:
            pair.close()

    def stop(self) -> None:
        """End its processes. Idempotent."""
        while self._processes:
            process = self._processes.pop()
            # The whole group: some have a process for each connection, which would stay.
            _signal_group(process.pid, signal.SIGTERM)
            try:
                # A drain is not needed.
                process.wait(1)
            except subprocess.TimeoutExpired:
                pass
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def pids(self) -> list[int]:
        """The processes whose CPU time is its own, without their children."""
        return [process.pid for process in self._processes]

    @property
    def version(self) -> str | None:
        """Its name and version, as it says."""
        return None

    @property
    def memory(self) -> int:
        """Bytes of resident memory of its processes, what children share with their parent counted once."""
        return sum(read_memory(pid) for pid in self.pids)

    @contextmanager
    def pairs(self, count: int) -> Iterator[list[SocketPair]]:
        """``count`` new pairs, closed at the end; raises BenchError with the subject's own output."""
        opened: list[SocketPair] = []
        try:
            try:
                while len(opened) < count:
                    opened.append(self.connect())
            except (OSError, FrelayError) as error:
                text = f"pair {len(opened) + 1} of {count} could not be set up: {error}"
                raise BenchError(self._explained(text)) from error
            for pair in opened:
                for sock in pair:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.settimeout(None)
            try:
                yield opened
            except BenchError as error:
                raise BenchError(self._explained(str(error))) from error
        finally:
            for pair in opened:
                pair.close()

    # --- for those that are processes ----------------------------------------------------------------------------

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self.directory / "log"

    def launch(self, command: Sequence[str], *, descriptors: Sequence[int] = (), **variables: str) -> None:
        """Start a process of this subject."""
        with open(self.log_path, "ab") as log, deferred():
            self._processes.append(
                subprocess.Popen(
                    command,
                    cwd=self.directory,
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors,
                    # In a process group of its own: Ctrl-C must reach only us, and we end it.
                    process_group=0,
                )
            )

    def _explained(self, text: str) -> str:
        parts = [f"{self.name}: {text}"]
        for process in self._processes if os.getpid() == self._parent else []:
            try:
                # Its sockets close a little before the process ends.
                parts.append(f"it has ended with exit code {process.wait(0.2)}")
            except subprocess.TimeoutExpired:
                continue
        if self.log_path.exists():
            lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
            parts += ["its last words:", *(f"  {line}" for line in lines)] if lines else []
        return "\n".join(parts)

    def must_run(self) -> None:
        """Raise BenchError if one of its processes has ended."""
        if os.getpid() == self._parent and any(process.poll() is not None for process in self._processes):
            raise BenchError(self._explained("it did not start"))


# --- nothing in between -------------------------------------------------------------------------------------------


def listener() -> socket.socket:
    """A listener on a free port of loopback."""
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def dial(address: tuple[str, int]) -> socket.socket:
    """Connect to it, with TCP_NODELAY."""
    sock = socket.create_connection(address, timeout=STEP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Direct(Subject):
    """The two ends connected to each other on loopback: what the machine and the load generator can do at most."""

    def __init__(self, directory: Path, *, in_tls: bool = False) -> None:
        super().__init__(directory)
        self.in_tls = in_tls
        self.name = "no relay, TLS" if in_tls else "no relay"

    def start(self) -> None:
        self._listener = listener()
        if self.in_tls:
            initialise(self.directory, host_name="localhost")

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_listener"):
            self._listener.close()

    def connect(self) -> SocketPair:
        client = dial(self._listener.getsockname())
        server = self._listener.accept()[0]
        server.settimeout(STEP)
        return self._in_tls(client, server) if self.in_tls else SocketPair(client, server)

    def _in_tls(self, client: socket.socket, server: socket.socket) -> SocketPair:
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.num_tickets = 0
        serving.load_cert_chain(self.directory / "certs/relay.pem", self.directory / "certs/relay.key")
        wrapped = serving.wrap_socket(server, server_side=True, do_handshake_on_connect=False)
        # Only this must be done by both sides at the same time.
        answering = threading.Thread(target=wrapped.do_handshake, daemon=True)
        answering.start()
        dialling = ssl.create_default_context(cafile=str(self.directory / "certs/ca.pem"))
        tls = dialling.wrap_socket(client, server_hostname="localhost")
        answering.join(STEP)
        return SocketPair(tls, wrapped)


def await_listener(subject: Subject, address: tuple[str, int]) -> None:
    """Wait until a process that binds by itself listens there; raises BenchError."""
    deadline = time.monotonic() + START
    while True:
        subject.must_run()
        try:
            dial(address).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise BenchError(f"{subject.name} did not listen within {START:g} s") from None
            time.sleep(0.02)
        else:
            return


# --- forwarders of TCP connections --------------------------------------------------------------------------------


class Forwarder(Subject):
    """A process that accepts connections and, for each, connects to a listener of ours."""

    @abc.abstractmethod
    def command(self, listening: int, target: int) -> list[str]:
        """The command that accepts on the inherited, listening descriptor and connects to 127.0.0.1:``target``."""

    def start(self) -> None:
        self._target = listener()
        self._target.settimeout(STEP)
        # We bind it and the process inherits it. So no port is guessed, and a connection can wait for the start.
        with listener() as front:
            self._address = front.getsockname()
            command = self.command(front.fileno(), self._target.getsockname()[1])
            try:
                self.launch(command, descriptors=[front.fileno()])
            except FileNotFoundError:
                raise BenchError(f"{self.name}: {command[0]} is not installed") from None
        self.check()

    def check(self) -> None:
        """Check that it runs and forwards; raises BenchError."""
        try:
            self.connect().close()
        except OSError as error:
            raise BenchError(self._explained(f"no connection came through: {error}")) from error

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_target"):
            self._target.close()

    def connect(self) -> SocketPair:
        # One at a time, so that we know which connection belongs to which.
        client = dial(self._address)
        try:
            server = self._accept()
        except BaseException:
            client.close()
            raise
        return SocketPair(client, server)

    def _accept(self) -> socket.socket:
        deadline = time.monotonic() + STEP
        self._target.settimeout(0.2)
        while True:
            try:
                return self._target.accept()[0]
            except TimeoutError:
                self.must_run()
                if time.monotonic() > deadline:
                    raise
