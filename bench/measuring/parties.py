"""frelay as a subject: a ``frelay run`` process, and the parties that join it the way functions do.

The parties use ``frelay.protocol`` and plain ``ssl`` sockets, so that one thread can set up both sides of a pair, step
by step, and stop either of them at any step.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal

from bench.measuring.load import BenchError, SocketPair
from bench.measuring.subjects import START, STEP, Subject, checkout_root, dial
from frelay.pki.init import initialise
from frelay.protocol import messages
from frelay.protocol.messages import Message
from frelay.protocol.session import PartySession

__all__ = ["Frelay"]

_VERSION: Final = """\
import frelay, trio
from cryptography.hazmat.backends.openssl import backend
print(f"{frelay.__version__} with {' '.join(backend.openssl_version_text().split()[:2])}, Trio {trio.__version__}")
"""

# High limits, for thousands of pairs that one thread sets up one after the other and leaves idle.
_ROUTE_FILE: Final = """\
[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"

[limits]
max_pairings = 65536
max_waiting_per_party = 65536
wait_timeout = 3600
ping_interval = 3600
fd_budget = 1.0
"""

_ROUTE: Final = """
[[route]]
name = "bench-{number}"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
require_inner_tls = false       # the load is plain bytes
"""


class Frelay(Subject):
    """A ``frelay run`` process; its pairs have done TLS, JOIN and PAIRED.

    ``handoff`` gives the plain sockets after both close_notify, ``tunnel`` the TLS sockets themselves.
    ``checkout`` is the tree whose ``frelay`` package runs as the relay. The parties always run this one's protocol.
    The pairs are spread over its routes; with several ``workers`` there is at least one route for each.
    """

    legs = 2

    def __init__(
        self,
        directory: Path,
        mode: Literal["handoff", "tunnel"],
        *,
        checkout: Path | None = None,
        workers: int = 1,
        routes: int = 1,
        label: str = "",
    ) -> None:
        super().__init__(directory)
        self.mode: Final = mode
        self.in_tls = mode == "tunnel"
        self._checkout: Final = checkout or checkout_root()
        self._workers: Final = workers
        self._routes: Final = max(routes, workers)
        where = "" if checkout is None else f" in {checkout}"
        where += "" if workers == 1 else f" with {workers} workers"
        self.name = f"frelay{where}, {label or ('handed off' if mode == 'handoff' else 'tunnelled')}"

    def start(self) -> None:
        if not (self._checkout / "frelay" / "__main__.py").is_file():
            raise BenchError(f"{self._checkout} holds no frelay package to run")
        initialise(self.directory, host_name="localhost")
        route_file = self.directory / "relay.toml"
        relay = "" if self._workers == 1 else f"[relay]\nworkers = {self._workers}\n"
        routes = "".join(_ROUTE.format(number=number) for number in range(self._routes))
        route_file.write_text(relay + _ROUTE_FILE + routes)
        path = os.pathsep.join(filter(None, [str(self._checkout), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "frelay", "run", "-c", str(route_file), "--log-format", "json", "--no-watch"]
        self.launch(command, PYTHONPATH=path)
        self._addresses = itertools.cycle([("127.0.0.1", port) for port in self._await_ports()])
        self._contexts = {party: self._context(party) for party in ("func1", "func2")}

    def _await_ports(self) -> list[int]:
        deadline = time.monotonic() + START
        ports: dict[str, int] = {}
        while time.monotonic() < deadline:
            self.must_run()
            for line in self.log_path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # an incomplete line
                if entry.get("event") == "listening":
                    ports[entry["route"]] = int(entry["address"].rpartition(":")[2])
                if entry.get("event") == "ready" and len(ports) == self._routes:
                    return list(ports.values())
            time.sleep(0.02)
        raise BenchError(self._explained(f"it was not ready within {START:g} s"))

    def _context(self, party: str) -> ssl.SSLContext:
        certs = self.directory / "certs"
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["frelay/1"])
        context.load_cert_chain(certs / f"{party}.pem", certs / f"{party}.key")
        return context

    def connect(self) -> SocketPair:
        return self.arrive()()

    def arrive(self) -> Callable[[], SocketPair]:
        address = next(self._addresses)
        first = _Party(dial(address), self._contexts["func1"], self.mode)
        try:
            first.join()
            second = _Party(dial(address), self._contexts["func2"], self.mode)
        except BaseException:
            first.tls.close()
            raise
        return lambda: self._join(first, second)

    def _join(self, first: _Party, second: _Party) -> SocketPair:
        try:
            second.join()
            for party in (first, second):
                party.await_message(messages.Paired)
            client, server = (party.leave_tls() if self.mode == "handoff" else party.tls for party in (first, second))
        except BaseException:
            first.tls.close()
            second.tls.close()
            raise
        return SocketPair(client, server)

    @contextmanager
    def waiting(self, count: int) -> Iterator[None]:
        """``count`` legs of func1 in the lobby, without partners."""
        with ExitStack() as stack:
            for _ in range(count):
                party = _Party(dial(next(self._addresses)), self._contexts["func1"], self.mode)
                stack.callback(party.tls.close)
                party.join()
            yield

    @property
    def version(self) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _VERSION],
            env={**os.environ, "PYTHONPATH": str(self._checkout)},
            cwd=self.directory,
            capture_output=True,
            text=True,
        )
        return f"frelay {done.stdout.strip()}"


class _Party:
    """The steps of one function to its end of a pair."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, mode: str) -> None:
        try:
            self.tls = context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)
        except BaseException:
            sock.close()
            raise
        self._session = PartySession()
        self._received: list[Message] = []
        self._mode: Final = mode

    def join(self) -> None:
        """Send JOIN and be admitted."""
        self.tls.sendall(self._session.send(messages.Join(attempt=str(uuid.uuid4()), modes=(self._mode,))))
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
        """Read to the relay's close_notify, answer it, and return the plain socket."""
        if self.tls.recv(1):
            raise OSError("the relay sent application data after PAIRED")
        self.tls.unwrap()
        bare = socket.socket(fileno=self.tls.detach())
        # The descriptor is non-blocking; the new object learns that only by a time limit.
        bare.settimeout(STEP)
        return bare
