"""The subjects under test: each starts something, gives pairs of sockets connected through it, and names its processes.

That is all that a measurement needs to know of a relay, so the same load runs against frelay, against any forwarder of
TCP connections, and against nothing at all. To add another forwarder, derive from :class:`Forwarder`: it is given a
listening socket, the port of ours that it shall connect to, and a directory of its own, and answers with a command.

What belongs to a subject lives in its directory and in processes of their own process group, which end with the
``with`` block that started them.
"""

from __future__ import annotations

import abc
import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from bench.interrupt import deferred
from bench.load import BenchError, SocketPair
from frelay.errors import FrelayError
from frelay.pki.init import initialise
from frelay.protocol import messages
from frelay.protocol.messages import Message
from frelay.protocol.session import PartySession

__all__ = ["Direct", "Forwarder", "Frelay", "HAProxy", "Subject", "checkout_root"]

# Starting Python and making certificates takes a second; on a machine that is busy with others, several.
_START: Final = 30.0
# For each step of bringing one pair up.
_STEP: Final = 20.0
_LOG_TAIL: Final = 5

_ROUTE_FILE: Final = """\
[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"

[limits]
max_pairings = 65536
"""

_ROUTE: Final = """
[[route]]
name = "bench-{number}"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
require_inner_tls = false       # the load is bare bytes
"""


def checkout_root() -> Path:
    """The checkout that this file belongs to."""
    return Path(__file__).resolve().parent.parent


class Subject(abc.ABC):
    """Something between the two ends of a connection. A context manager: inside, it runs."""

    name: str
    """How the tables call it."""
    in_tls: bool = False
    """Whether its pairs are TLS sockets, so that the load must be made in Python."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self._processes: list[subprocess.Popen[bytes]] = []

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
        """Start it; returns once it can be connected to. Raises BenchError."""

    @abc.abstractmethod
    def connect(self) -> SocketPair:
        """One more pair through it; raises BenchError or OSError."""

    def stop(self) -> None:
        """End its processes. Idempotent."""
        while self._processes:
            process = self._processes.pop()
            process.terminate()
            try:
                # Nothing of it is worth a drain.
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def pids(self) -> list[int]:
        """The processes whose CPU time is its own, without their children."""
        return [process.pid for process in self._processes]

    @property
    def version(self) -> str | None:
        """What it says of itself."""
        return None

    @contextmanager
    def pairs(self, count: int) -> Iterator[list[SocketPair]]:
        """``count`` new pairs, closed at the end; raises BenchError with what the subject had to say."""
        opened: list[SocketPair] = []
        try:
            try:
                while len(opened) < count:
                    opened.append(self.connect())
            except (OSError, FrelayError) as error:
                text = f"pair {len(opened) + 1} of {count} did not come up: {error}"
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
                    # Out of the terminal's reach: Ctrl-C is for us, and we end it.
                    process_group=0,
                )
            )

    def _explained(self, text: str) -> str:
        parts = [f"{self.name}: {text}"]
        for process in self._processes:
            try:
                # Its sockets close a little before the process is over.
                parts.append(f"it has ended with exit code {process.wait(0.2)}")
            except subprocess.TimeoutExpired:
                continue
        if self.log_path.exists():
            lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
            parts += ["its last words:", *(f"  {line}" for line in lines)] if lines else []
        return "\n".join(parts)

    def must_run(self) -> None:
        """Raise BenchError if one of its processes has ended."""
        if any(process.poll() is not None for process in self._processes):
            raise BenchError(self._explained("it did not start"))


# --- nothing in between -------------------------------------------------------------------------------------------


def _listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def _dial(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=_STEP)


class Direct(Subject):
    """The two ends connected to each other on loopback: what the machine and the load generator can do at most."""

    def __init__(self, directory: Path, *, in_tls: bool = False) -> None:
        super().__init__(directory)
        self.in_tls = in_tls
        self.name = "no relay, TLS" if in_tls else "no relay"

    def start(self) -> None:
        self._listener = _listener()
        if self.in_tls:
            initialise(self.directory, host_name="localhost")

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_listener"):
            self._listener.close()

    def connect(self) -> SocketPair:
        client = _dial(self._listener.getsockname())
        server = self._listener.accept()[0]
        server.settimeout(_STEP)
        return self._in_tls(client, server) if self.in_tls else SocketPair(client, server)

    def _in_tls(self, client: socket.socket, server: socket.socket) -> SocketPair:
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.num_tickets = 0
        serving.load_cert_chain(self.directory / "certs/relay.pem", self.directory / "certs/relay.key")
        wrapped = serving.wrap_socket(server, server_side=True, do_handshake_on_connect=False)
        # The one thing here that two sides must do at once.
        answering = threading.Thread(target=wrapped.do_handshake, daemon=True)
        answering.start()
        dialling = ssl.create_default_context(cafile=str(self.directory / "certs/ca.pem"))
        tls = dialling.wrap_socket(client, server_hostname="localhost")
        answering.join(_STEP)
        return SocketPair(tls, wrapped)


# --- frelay -------------------------------------------------------------------------------------------------------


class Frelay(Subject):
    """A ``frelay run`` process with one route; its pairs have come through TLS, JOIN and PAIRED.

    ``handoff`` gives the bare sockets that are left after both close_notify, ``tunnel`` the TLS sockets themselves.
    ``checkout`` is the tree whose ``frelay`` package runs as the relay. The parties always run this one's protocol.
    With ``workers`` there are as many routes, and the pairs are dealt out to them.
    """

    def __init__(
        self,
        directory: Path,
        mode: Literal["handoff", "tunnel"],
        *,
        checkout: Path | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(directory)
        self.mode: Final = mode
        self.in_tls = mode == "tunnel"
        self._checkout: Final = checkout or checkout_root()
        self._workers: Final = workers
        where = "" if checkout is None else f" in {checkout}"
        where += "" if workers == 1 else f" with {workers} workers"
        self.name = f"frelay{where}, {'handed off' if mode == 'handoff' else 'tunnelled'}"

    def start(self) -> None:
        if not (self._checkout / "frelay" / "__main__.py").is_file():
            raise BenchError(f"{self._checkout} holds no frelay package to run")
        initialise(self.directory, host_name="localhost")
        route_file = self.directory / "relay.toml"
        relay = "" if self._workers == 1 else f"[relay]\nworkers = {self._workers}\n"
        routes = "".join(_ROUTE.format(number=number) for number in range(self._workers))
        route_file.write_text(relay + _ROUTE_FILE + routes)
        path = os.pathsep.join(filter(None, [str(self._checkout), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "frelay", "run", "-c", str(route_file), "--log-format", "json", "--no-watch"]
        self.launch(command, PYTHONPATH=path)
        self._addresses = itertools.cycle([("127.0.0.1", port) for port in self._await_ports()])
        self._contexts = {party: self._context(party) for party in ("func1", "func2")}

    def _await_ports(self) -> list[int]:
        deadline = time.monotonic() + _START
        ports: dict[str, int] = {}
        while time.monotonic() < deadline:
            self.must_run()
            for line in self.log_path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a line that is being written
                if entry.get("event") == "listening":
                    ports[entry["route"]] = int(entry["address"].rpartition(":")[2])
                if entry.get("event") == "ready" and len(ports) == self._workers:
                    return list(ports.values())
            time.sleep(0.02)
        raise BenchError(self._explained(f"it was not ready within {_START:g} s"))

    def _context(self, party: str) -> ssl.SSLContext:
        certs = self.directory / "certs"
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["frelay/1"])
        context.load_cert_chain(certs / f"{party}.pem", certs / f"{party}.key")
        return context

    def connect(self) -> SocketPair:
        joined: list[_Party] = []
        address = next(self._addresses)
        try:
            for context in self._contexts.values():
                joined.append(_Party(_dial(address), context, self.mode))
            for party in joined:
                party.await_message(messages.Paired)
            client, server = (party.leave_tls() if self.mode == "handoff" else party.tls for party in joined)
        except BaseException:
            for party in joined:
                party.tls.close()
            raise
        return SocketPair(client, server)

    @property
    def version(self) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "import frelay; print(frelay.__version__)"],
            env={**os.environ, "PYTHONPATH": str(self._checkout)},
            cwd=self.directory,
            capture_output=True,
            text=True,
        )
        return f"frelay {done.stdout.strip()}"


class _Party:
    """One function's way to its end of a pair."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, mode: str) -> None:
        try:
            self.tls = context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)
        except BaseException:
            sock.close()
            raise
        self._session = PartySession()
        self._received: list[Message] = []
        self.tls.sendall(self._session.send(messages.Join(attempt=str(uuid.uuid4()), modes=(mode,))))
        self.await_message(messages.Waiting)

    def await_message(self, kind: type[Message]) -> None:
        """Read on until a message of this kind has come."""
        while True:
            while self._received:
                message = self._received.pop(0)
                if isinstance(message, messages.Refused):
                    raise OSError(f"refused: {message.code}: {message.reason}")
                if isinstance(message, messages.Ping):
                    self.tls.sendall(self._session.send(messages.Pong(message.n)))
                if isinstance(message, kind):
                    return
            data = self.tls.recv(16384)
            if not data:
                raise OSError(f"the relay ended the connection before {kind.__name__.upper()}")
            self._received += self._session.receive(data)

    def leave_tls(self) -> socket.socket:
        """Read to the relay's close_notify, answer it, and give the bare socket."""
        if self.tls.recv(1):
            raise OSError("the relay sent application data after PAIRED")
        self.tls.unwrap()
        return socket.socket(fileno=self.tls.detach())


# --- forwarders of TCP connections --------------------------------------------------------------------------------


class Forwarder(Subject):
    """A process that accepts connections and makes one of its own, to a listener of ours, for each."""

    @abc.abstractmethod
    def command(self, listening: int, target: int) -> list[str]:
        """The command that accepts on the inherited, listening descriptor and connects to 127.0.0.1:``target``."""

    def start(self) -> None:
        self._target = _listener()
        self._target.settimeout(_STEP)
        # Bound by us and inherited, so that no port has to be guessed and a connection can wait for its start.
        with _listener() as front:
            self._address = front.getsockname()
            command = self.command(front.fileno(), self._target.getsockname()[1])
            try:
                self.launch(command, descriptors=[front.fileno()])
            except FileNotFoundError:
                raise BenchError(f"{self.name}: {command[0]} is not installed") from None
        with self.pairs(1):
            pass  # it runs, and it forwards

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_target"):
            self._target.close()

    def connect(self) -> SocketPair:
        # One at a time: that is how we know which connection came of which.
        client = _dial(self._address)
        try:
            server = self._accept()
        except BaseException:
            client.close()
            raise
        return SocketPair(client, server)

    def _accept(self) -> socket.socket:
        deadline = time.monotonic() + _STEP
        self._target.settimeout(0.2)
        while True:
            try:
                return self._target.accept()[0]
            except TimeoutError:
                self.must_run()
                if time.monotonic() > deadline:
                    raise


class HAProxy(Forwarder):
    """HAProxy in TCP mode with one thread, as frelay has one; ``splices`` turns its splice-auto on."""

    def __init__(self, directory: Path, *, splices: bool = False) -> None:
        super().__init__(directory)
        self._splices: Final = splices
        self.name = "HAProxy, splice-auto" if splices else "HAProxy"

    def command(self, listening: int, target: int) -> list[str]:
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(
            f"""\
global
    nbthread 1
defaults
    mode tcp
    {"option splice-auto" if self._splices else "# no splice"}
    timeout connect 10s
    timeout client 1h
    timeout server 1h
frontend in
    bind fd@{listening}
    default_backend out
backend out
    server ours 127.0.0.1:{target}
"""
        )
        return ["haproxy", "-db", "-f", str(configuration)]

    @property
    def version(self) -> str:
        done = subprocess.run(["haproxy", "-v"], capture_output=True, text=True)
        return " ".join(done.stdout.split()[:3])
