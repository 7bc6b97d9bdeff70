"""What the tests drive: a relay in this process or in one of its own, and parties that hold every byte in their hand.

:class:`Party` is a function written from docs/protocol.md on the standard library's ``ssl`` with memory BIOs, so a test
decides which TLS record goes out when, and in one segment with what. It shares no code with frelay::

    async def test_something(site: Site) -> None:              # fixtures: tests/conftest.py
        async with site.relay(ROUTE) as relay:                   # in this process; relay.port("demo")
            one = await site.party(relay, "func1")
            two = await site.party(relay, "func2")
            paired1, paired2 = await pair(one, two)              # JOIN, WAITING, PAIRED on both
            await one.hand_off(); await two.hand_off()           # both raw now
            await one.send_raw(TLS_HEADER + b"...")
            assert await two.receive_exactly(...) == ...

``site.process(...)`` is the same relay as a real ``frelay run`` process, for signals and exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import structlog
import trio
from certs import Credential, TestAuthority
from faults import FaultyNetwork, Weather, a_network, descriptors_of_networks

from frelay.config.load import load
from frelay.pairing.pipes import PipePool
from frelay.relay.relay import Relay

__all__ = [
    "DEMO",
    "FRELAY_RUN",
    "THROUGH_FAULTS",
    "TLS_HEADER",
    "Party",
    "RelayInProcess",
    "RelayProcess",
    "Site",
    "address_seen",
    "at_any_pace",
    "direct",
    "eventually",
    "open_descriptors",
    "opened_since",
    "pair",
    "reserved_port",
    "while_it_lasts",
]

T = TypeVar("T")

TLS_HEADER: Final = b"\x16\x03\x01"
"""How the first bytes of a raw leg must begin where require_inner_tls holds."""

DEMO: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
"""

THROUGH_FAULTS: Final = os.environ.get("FRELAY_THROUGH_FAULTS", "")
"""A seed: then all parties of all tests reach their relay through a network that splits and merges segments by it.

Or a range of seeds, such as ``1-200``: then each test gets one of them, always the same, by its name.
"""

direct: Final = pytest.mark.skipif(THROUGH_FAULTS != "", reason="about the one connection between party and relay")
"""Marks a test that is about what waits in the kernel between the two, or that has a network of its own."""

TIMEOUT: Final = 20.0
"""Seconds after which a wait for an event is a failure; on an idle machine all of them take milliseconds."""

FRELAY_RUN: Final = (sys.executable, "-m", "frelay", "run")

TYPES: Final = {
    "JOIN": 0x01,
    "PONG": 0x02,
    "LEAVE": 0x03,
    "WAITING": 0x11,
    "PING": 0x12,
    "PAIRED": 0x13,
    "REFUSED": 0x14,
    "DRAINING": 0x15,
}
_NAMES: Final = {code: name for name, code in TYPES.items()}


def frame(name: str | int, payload: Mapping[str, Any] | bytes = b"") -> bytes:
    """A frame on the wire; ``name`` may be any type code and ``payload`` any bytes, right or wrong."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    code = name if isinstance(name, int) else TYPES[name]
    return struct.pack(">BBH", code, 0, len(body)) + body


class Party:
    """One party's connection, byte by byte. Not safe for two tasks in the same direction."""

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self.stream = stream
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_hostname)
        self.attempt = str(uuid.uuid4())
        self.leftover = b""
        """Raw bytes that came before anyone asked for them; the relay must never send any before our close_notify."""
        self._frames = b""

    @property
    def socket(self) -> trio.socket.SocketType:
        return self.stream.socket

    # --- TLS ---------------------------------------------------------------------------------------------------

    def take_outgoing(self) -> bytes:
        """The TLS bytes that wait to be sent, taken away from the BIO."""
        return self.outgoing.read()

    async def flush(self) -> None:
        data = self.take_outgoing()
        if data:
            await self.stream.send_all(data)

    async def pull(self) -> bool:
        """Feed what the network has into TLS; False at EOF."""
        data = await self.stream.receive_some(65536)
        if not data:
            self.incoming.write_eof()
            return False
        self.incoming.write(data)
        return True

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                await self.pull()
            else:
                await self.flush()
                return

    def send_now(self, data: bytes) -> None:
        """Put raw bytes into the kernel before any other task runs; they must be few enough to fit."""
        assert self.socket._sock.send(data) == len(data)  # type: ignore[attr-defined]

    async def send(self, data: bytes) -> None:
        """Send application data inside the outer TLS."""
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view[:16384]) :]
            await self.flush()

    async def receive(self, size: int = 16384) -> bytes:
        """Application data of the outer TLS, ``b""`` after close_notify; truncation is SSLEOFError."""
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                await self.flush()
                await self.pull()
            except ssl.SSLZeroReturnError:
                return b""

    def take_in(self) -> None:
        """Feed what is in the kernel now into TLS, so that a close sends FIN; with unread bytes it would send RST."""
        try:
            while data := self.socket._sock.recv(65536):  # type: ignore[attr-defined]
                self.incoming.write(data)
        except BlockingIOError:
            pass

    def close_notify(self) -> bytes:
        """The record of our close_notify, not sent yet."""
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        return self.take_outgoing()

    # --- frames ------------------------------------------------------------------------------------------------

    async def send_frame(self, name: str | int, payload: Mapping[str, Any] | bytes = b"") -> None:
        await self.send(frame(name, payload))

    async def next_frame(self) -> tuple[str, dict[str, Any]] | None:
        """The next frame as (name, payload); None when the relay ended its TLS stream."""
        while True:
            if len(self._frames) >= 4:
                code, _, length = struct.unpack(">BBH", self._frames[:4])
                if len(self._frames) >= 4 + length:
                    body, self._frames = self._frames[4 : 4 + length], self._frames[4 + length :]
                    return _NAMES[code], json.loads(body)
            data = await self.receive()
            if not data:
                assert not self._frames, "the stream ended inside a frame"
                return None
            self._frames += data

    async def expect(self, name: str, *, pong: bool = True) -> dict[str, Any]:
        """The payload of the next frame, which must be ``name``; PINGs before it are answered."""
        with trio.fail_after(TIMEOUT):
            while True:
                found = await self.next_frame()
                assert found is not None, f"{name} expected, the relay ended the stream"
                if found[0] == "PING" and name != "PING" and pong:
                    await self.send_frame("PONG", found[1])
                    continue
                assert found[0] == name, f"{name} expected, got {found}"
                return found[1]

    async def join(self, **fields: Any) -> None:
        await self.send_frame("JOIN", {"attempt": self.attempt, **fields})

    async def refusal(self) -> dict[str, Any]:
        """The payload of REFUSED, which must be the relay's last word before an orderly end of its TLS stream."""
        payload = await self.expect("REFUSED")
        with trio.fail_after(TIMEOUT):
            assert await self.next_frame() is None
        return payload

    async def alert(self) -> str:
        """OpenSSL's name of the fatal alert that the relay sends, e.g. ``TLSV1_ALERT_UNKNOWN_CA``; it must send one.

        A TLS 1.3 client may see it in its handshake or, where its certificate was judged, only after that.
        """
        with trio.fail_after(TIMEOUT):
            try:
                await self.handshake()
                found: object = await self.receive()
            except ssl.SSLError as error:
                # Python has no name for a few of them, and then only OpenSSL's sentence.
                name = str(error.reason or error).upper().replace(" ", "_")
                if "ALERT" in name:
                    return name
                found = error
        raise AssertionError(f"an alert expected, got {found!r}")

    async def read_to_close_notify(self) -> None:
        """Read the outer TLS to the relay's close_notify; keeps raw bytes behind it in ``leftover``."""
        with trio.fail_after(TIMEOUT):
            assert await self.receive() == b""
        assert self._frames == b""
        self.leftover = self.incoming.read()

    async def hand_off(self, raw: bytes = b"") -> None:
        """Read to the relay's close_notify and answer it; ``raw`` goes out in the same segment."""
        await self.read_to_close_notify()
        assert self.leftover == b"", "raw bytes before our close_notify"
        await self.stream.send_all(self.close_notify() + raw)

    # --- raw ---------------------------------------------------------------------------------------------------

    async def send_raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive_raw(self, size: int = 65536) -> bytes:
        if self.leftover:
            data, self.leftover = self.leftover[:size], self.leftover[size:]
            return data
        return await self.stream.receive_some(size)

    async def receive_exactly(self, count: int, *, raw: bool = True) -> bytes:
        parts, left = [], count
        while left:
            data = await (self.receive_raw(min(left, 65536)) if raw else self.receive(left))
            assert data, f"EOF with {left} of {count} bytes missing"
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    async def send_eof(self) -> None:
        """FIN."""
        await self.stream.send_eof()

    def reset(self) -> None:
        """Close by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    async def ended(self) -> str:
        """How the connection ended: "eof" or "reset"; bytes before are dropped."""
        with trio.fail_after(TIMEOUT):
            try:
                while await self.receive_raw():
                    pass
            except trio.BrokenResourceError:
                return "reset"
            return "eof"


async def pair(one: Party, two: Party, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """JOIN on both, in this order; gives both PAIRED payloads."""
    await one.join(**fields)
    await one.expect("WAITING")
    await two.join(**fields)
    await two.expect("WAITING")
    return await one.expect("PAIRED"), await two.expect("PAIRED")


# --- waiting and counting ------------------------------------------------------------------------------------------


async def eventually(condition: Callable[[], bool], what: str = "the condition", patience: float = TIMEOUT) -> None:
    """Wait until ``condition`` holds, looking often; a failure after ``patience`` seconds."""
    deadline = trio.current_time() + patience
    while not condition():
        assert trio.current_time() < deadline, f"{what} did not come true within {patience} s"
        await trio.sleep(0.005)


async def while_it_lasts(make: Callable[[float], datetime], use: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """Use what soon ends, a certificate say, and have done before it does; on a slow machine one that lasts longer.

    ``make`` is given its life in seconds, and gives the end of it, as certificates write it: in whole seconds, so up to
    one earlier. ``use`` may be called several times. Gives what that gave, and the end as a Unix time.
    """
    for seconds in (2, 4, 8, 16, 32):
        ends = make(seconds).timestamp()
        try:
            found = await use()
        except Exception:
            if time.time() < ends:
                raise
        else:
            if time.time() < ends:
                return found, ends
    raise AssertionError("half a minute is not enough to use it")


async def at_any_pace(test: Callable[[float], Awaitable[None]], limit: float) -> None:
    """Run a test of what a time limit of ``limit`` seconds must not end; with a longer one where this machine stalls.

    Relay and parties share this process, so a pause of it looks like silence to a limit. What failed is tried again,
    with four times the limit, if and only if the process was seen to stand still for a third of the limit.
    """
    for attempt in range(3):
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await trio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await test(limit)
                nursery.cancel_scope.cancel()
        except Exception:
            if longest < limit / 3 or attempt == 2:
                raise
        else:
            return
        limit *= 4


def address_seen(relay: RelayInProcess | RelayProcess, party: Party) -> str:
    """The address of ``party`` as ``relay`` sees it."""
    host, port = party.socket.getsockname()[:2]
    return f"{host}:{port if relay.network is None else relay.network.port_beyond[port]}"


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given meanwhile: for routes that share an address, which 0 never is."""
    with socket.socket() as sock:
        # Bound but not listening: with SO_REUSEADDR on both the relay may bind it too, and port 0 never gives it out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """The descriptors of a process and what they are, without those of the network between parties and relay."""
    found = {}
    others = descriptors_of_networks() if pid == "self" else set()
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        if int(name) in others:
            continue
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # the descriptor of listdir itself
    return found


def opened_since(before: Mapping[int, str], pid: int | str = "self", pipes: PipePool | None = None) -> dict[int, str]:
    """The descriptors of a process that were not there at ``before``, which :func:`open_descriptors` gave.

    A bare count would also change when the collector closes what an earlier test of this process has left. The free
    pipes of ``pipes`` are left out: a pool keeps them, bounded, for the next transfer.
    """
    pooled = {end for pipe in (pipes._free if pipes else ()) for end in (pipe.read_end, pipe.write_end)}
    now = open_descriptors(pid)
    return {number: what for number, what in now.items() if number not in pooled and before.get(number) != what}


def _way(address: str, network: FaultyNetwork | None) -> int:
    """The port on which parties find who listens on ``address``."""
    host, _, port = address.rpartition(":")
    if network is None:
        return int(port)
    return network.way_to(int(port), "::1" if host == "[::1]" else "127.0.0.1")


# --- relays ---------------------------------------------------------------------------------------------------------


class RelayInProcess:
    """A running relay in this process, and all that it logged."""

    def __init__(
        self, relay: Relay, events: list[MutableMapping[str, Any]], task: trio.lowlevel.Task | None = None
    ) -> None:
        self.relay = relay
        self.events = events
        self.task = task
        """What runs it, with all tasks of the relay below."""
        self.network: FaultyNetwork | None = None
        """What lies between the parties and the relay; None: nothing."""

    def port(self, route: str = "demo") -> int:
        """Where parties find ``route``."""
        return _way(self.relay.bound(route)[0], self.network)

    def own_port(self, route: str = "demo") -> int:
        """Where the relay itself listens, whatever lies between."""
        return _way(self.relay.bound(route)[0], None)

    def logged(self, event: str, **fields: Any) -> list[MutableMapping[str, Any]]:
        """The log entries of this name with these fields, so far."""
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]

    async def log(self, event: str, **fields: Any) -> MutableMapping[str, Any]:
        """The first log entry of this name with these fields, now or to come."""
        await eventually(lambda: bool(self.logged(event, **fields)), f"log entry {event!r} {fields}")
        return self.logged(event, **fields)[0]

    @property
    def legs(self) -> int:
        """How many connections of parties the relay holds now, in whatever state."""
        return self.relay._admission.legs

    def waiting(self, route: str = "demo") -> tuple[int, int]:
        """How many legs wait on a route as (func1, func2)."""
        lobby = self.relay.routes[route].lobby
        return lobby.count("func1"), lobby.count("func2")

    async def outcome(self) -> MutableMapping[str, Any]:
        """The record of the first pairing that ended."""
        return await self.log("pairing ended")


class RelayProcess:
    """A real ``frelay run`` process. Its log is read as JSON lines."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.network: FaultyNetwork | None = None
        self.events: list[dict[str, Any]] = []
        self.stderr = ""
        self._more = trio.Condition()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        rest = b""
        async for chunk in self.process.stderr:
            self.stderr += chunk.decode("utf-8", "replace")
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    continue
            async with self._more:
                self._more.notify_all()

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]

    async def log(self, event: str, *, count: int = 1, **fields: Any) -> dict[str, Any]:
        """The ``count``-th log entry of this name with these fields, now or to come."""
        with trio.move_on_after(TIMEOUT):
            while len(self.logged(event, **fields)) < count:
                if self.process.returncode is not None:
                    break
                async with self._more:
                    with trio.move_on_after(0.1):
                        await self._more.wait()
        found = self.logged(event, **fields)
        assert len(found) >= count, f"no log entry {event!r} {fields}; stderr:\n{self.stderr}"
        return found[count - 1]

    def port(self, route: str = "demo") -> int:
        """Where parties find ``route``."""
        return _way(self.logged("listening", route=route)[-1]["address"], self.network)

    def own_port(self, route: str = "demo") -> int:
        """Where the relay itself listens, whatever lies between."""
        return _way(self.logged("listening", route=route)[-1]["address"], None)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def worker(self, number: int) -> int:
        """The process number of a worker."""
        return int(self.logged("worker started", worker=number)[-1]["pid"])

    async def exit_code(self) -> int:
        with trio.fail_after(TIMEOUT * 3):
            return await self.process.wait()


@asynccontextmanager
async def _weather_of_the_day(relay: RelayInProcess | RelayProcess) -> AsyncIterator[None]:
    if not THROUGH_FAULTS:
        yield
        return
    async with a_network(Weather(_seed_of_the_day(), delays=False)) as relay.network:
        yield


def _seed_of_the_day() -> int:
    first, _, last = THROUGH_FAULTS.partition("-")
    seed = int(first)
    if last:
        # "tests/e2e/test_x.py::test_y[z] (call)"
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        seed += zlib.crc32(test.encode()) % (int(last) - seed + 1)
    return seed


class Site:
    """A directory with a CA, a relay's certificate, and two functions': what most tests need."""

    def __init__(self, directory: Path, ca: TestAuthority | None = None) -> None:
        self.directory = directory
        self.ca = ca or TestAuthority()
        self.ca_path = self.ca.write(directory)
        self.client_ca = self.ca_path
        """What the relay verifies functions by; they verify the relay by ``ca_path``."""
        self.relay_paths = self.ca.relay().write(directory, "relay")
        self.credentials: dict[str, Credential] = {
            name: self.ca.party(dns=[f"{name}.demo"]) for name in ("func1", "func2")
        }
        self.paths: dict[str, tuple[Path, Path]] = {
            name: credential.write(directory, name) for name, credential in self.credentials.items()
        }
        self.config = directory / "relay.toml"
        self.workers: int | None = None
        """What :meth:`write` says of ``workers``; None for nothing."""
        self.parties: list[Party] = []

    def add(self, name: str, credential: Credential) -> Credential:
        """Make another party known to :meth:`party` and :attr:`paths`."""
        self.credentials[name] = credential
        self.paths[name] = credential.write(self.directory, name)
        return credential

    def write(self, routes: str = DEMO, *, sections: str = "", crl: bool = False) -> Path:
        """Write the route file; ``sections`` is TOML before the routes, e.g. ``[limits]``."""
        tls = f"""
[tls]
certificate = "{self.relay_paths[0].name}"
private_key = "{self.relay_paths[1].name}"
client_ca = "{self.client_ca.name}"
"""
        if crl:
            tls += 'crl = "crl.pem"\n'
        if self.workers is not None:
            before, heading, after = sections.partition("[relay]\n")
            sections = f"{before}[relay]\nworkers = {self.workers}\n{after}"
            sections = sections if heading else f"[relay]\nworkers = {self.workers}\n{before}"
        self.config.write_text(tls + sections + routes)
        return self.config

    @asynccontextmanager
    async def relay(
        self, routes: str = DEMO, *, sections: str = "", crl: bool = False, watch: bool = False
    ) -> AsyncIterator[RelayInProcess]:
        """A relay in this process; leaves nothing behind, and says so if it does."""
        relay = Relay(load(self.write(routes, sections=sections, crl=crl)), watch_files=watch)
        with structlog.testing.capture_logs() as events:
            async with trio.open_nursery() as nursery:
                await nursery.start(relay.run)
                (task,) = nursery.child_tasks
                found = RelayInProcess(relay, events, task)
                try:
                    async with _weather_of_the_day(found):
                        yield found
                finally:
                    relay.drain(reason="the test is over")
                    relay.stop_now()
                    self.hang_up()
        bugs = [e for e in events if "a bug in frelay" in e["event"]]
        assert not bugs, bugs

    @asynccontextmanager
    async def process(
        self,
        routes: str = DEMO,
        *,
        sections: str = "",
        crl: bool = False,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        workers: int | None = None,
    ) -> AsyncIterator[RelayProcess]:
        """A ``frelay run`` process, ready; killed at the end if it still runs. ``launcher`` goes before its command.

        With ``workers``, or FRELAY_WORKERS in the environment of the tests, the route file says so from here on.
        """
        self.workers = workers or int(os.environ.get("FRELAY_WORKERS", "0")) or None
        config = self.write(routes, sections=sections, crl=crl)
        command = [*launcher, *FRELAY_RUN, "-c", str(config), "--log-format", "json", *options]
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    command,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                    env={**os.environ, **(env or {})},
                    pass_fds=pass_fds,
                )
            )
            relay = RelayProcess(process)
            nursery.start_soon(relay._read)
            try:
                await relay.log("ready")
                async with _weather_of_the_day(relay):
                    yield relay
            finally:
                self.hang_up()
                if process.returncode is None:
                    process.kill()

    def context(self, name: str | None = "func1", *, alpn: Sequence[str] = ("frelay/1",)) -> ssl.SSLContext:
        """A client context with the certificate of ``name`` (None: none at all)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca_path)
        if name is not None:
            context.load_cert_chain(*self.paths[name])
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    async def dial(self, relay: RelayInProcess | RelayProcess | int, name: str | None, route: str) -> trio.SocketStream:
        """The TCP connection of the party ``name`` to a relay, or to a port of 127.0.0.1; raises OSError."""
        return await trio.open_tcp_stream("127.0.0.1", relay if isinstance(relay, int) else relay.port(route))

    async def connect(
        self,
        relay: RelayInProcess | RelayProcess | int,
        name: str | None = "func1",
        *,
        route: str = "demo",
        alpn: Sequence[str] = ("frelay/1",),
        server_hostname: str | None = "localhost",
        context: ssl.SSLContext | None = None,
    ) -> Party:
        """A party with its TCP connection, before the handshake."""
        stream = await self.dial(relay, name, route)
        party = Party(stream, context or self.context(name, alpn=alpn), server_hostname)
        self.parties.append(party)
        return party

    def hang_up(self) -> None:
        """Close every party that is still connected."""
        for party in self.parties:
            party.close()
        self.parties.clear()

    async def party(
        self,
        relay: RelayInProcess | RelayProcess | int,
        name: str | None = "func1",
        *,
        route: str = "demo",
        alpn: Sequence[str] = ("frelay/1",),
        server_hostname: str | None = "localhost",
    ) -> Party:
        """A party whose outer handshake is done (on its side; the relay may yet refuse it)."""
        party = await self.connect(relay, name, route=route, alpn=alpn, server_hostname=server_hostname)
        with trio.fail_after(TIMEOUT):
            await party.handshake()
        return party
