"""Everything that comes to a relay in bad times, all at once: functions of every kind, strangers, and its own operator.

Each :class:`Actor` is one scene, played over and over by a task: open, do, close. A good scene must succeed each time,
with every byte compared; a hostile one must be turned away in the way that the protocol says. What happens otherwise
is a :class:`Trouble`. The scenes choose by a seeded generator, so a run can be had again, but for its timing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import ssl
import struct
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args

import trio

import frelay.client.trio
from frelay.client.core import Options
from frelay.pki.authority import Authority
from frelay.pki.files import crl_file, write_together
from frelay.pki.init import initialise
from frelay.protocol import messages
from frelay.protocol.messages import Message, Mode
from frelay.protocol.session import PartySession

__all__ = ["CONSTANT", "Actor", "Ground", "Trouble", "actors"]

# For a whole scene. On an idle machine the longest takes seconds; on a busy one a ping-pong has taken half a minute.
PATIENCE: Final = 120.0
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
TLS_HEADER: Final = b"\x16\x03\x01"
_BLOCK: Final = random.Random(1).randbytes(1 << 21)

CONSTANT: Final = 3
"""How many routes each of the three kinds of functions' meetings has to itself."""

_ROUTE_FILE: Final = """\
[relay]
routes_dir = "routes.d"

[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"
crl = "certs/crl.pem"

[limits]                # short, so that whoever is silent has gone again within the run
handshake_timeout = 2
join_timeout = 2
wait_timeout = 30
ping_interval = 0.5
pong_timeout = 20
half_close_timeout = 30
max_pre_auth_per_ip = 256       # all the world is one address here

[admin]
listen = "unix:a.sock"

[metrics]
listen = "127.0.0.1:0"
"""


class Trouble(Exception):
    """A scene went as it must not."""


@dataclass
class Ground:
    """Where it all happens: the relay's directory, its addresses, and who may come."""

    directory: Path
    service: str
    """``host:port`` of the service that the relay dials."""
    ports: dict[str, int] = field(default_factory=dict)
    """Of the routes, once they are known."""
    pid: int = 0
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    @property
    def route_file(self) -> Path:
        """The relay's configuration."""
        return self.directory / "relay.toml"

    def write(self) -> None:
        """Certificates good and bad, and the route file."""
        initialise(self.directory, host_name="localhost")
        certs = self.directory / "certs"
        (self.directory / "routes.d").mkdir()
        authority = Authority.load(certs / "ca.pem", certs / "ca.key")
        revoked = authority.issue(common_name="revoked", dns=["func1.demo"], usage="party")
        others = {
            "stranger": authority.issue(common_name="stranger", dns=["stranger.demo"], usage="party"),
            "revoked": revoked,
            "foreign": Authority.create("foreign CA").issue(common_name="foreign", dns=["func1.demo"], usage="party"),
        }
        for name, issued in others.items():
            issued.write(certs / f"{name}.pem", certs / f"{name}.key")
        entries = [(revoked.certificate.serial_number, datetime.now(UTC))]
        write_together([crl_file(certs / "crl.pem", authority.revocation_list(entries, number=2, days=30))], force=True)
        self.route_file.write_text(self.configuration())
        for name in ("func1", "func2", *others):
            self.contexts[name] = self._context(name)
        self.contexts["nobody"] = self._context(None)

    def configuration(self) -> str:
        """The route file's text."""
        parties = 'func1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'
        dialled = f'func1 = "dns:func1.demo"\nfunc2 = {{ dial = "{self.service}" }}\n'
        plain = 'outer = "none"\nallow_from = ["127.0.0.0/8"]\n'
        names = [f"{kind}-{number}" for kind in ("bulk", "talk", "half") for number in range(CONSTANT)]
        kinds = dict.fromkeys((*names, "reset", "slow", "bare", "cut", "ticket", "door", "lonely"), parties)
        kinds |= {"service": dialled, "plain": plain, "probe": plain}
        return _ROUTE_FILE + "".join(
            f'\n[[route]]\nname = "{name}"\nlisten = "127.0.0.1:0"\n{more}' for name, more in kinds.items()
        )

    def _context(self, name: str | None, *, alpn: bool = True) -> ssl.SSLContext:
        certs = self.directory / "certs"
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if alpn:
            context.set_alpn_protocols(["frelay/1"])
        if name is not None:
            context.load_cert_chain(certs / f"{name}.pem", certs / f"{name}.key")
        return context

    def bare_context(self, name: str) -> ssl.SSLContext:
        """Without frames."""
        return self._context(name, alpn=False)

    def options(self, me: str, mode: Mode) -> Options:
        """The arguments of ``connect``."""
        certs, other = self.directory / "certs", "func2" if me == "func1" else "func1"
        return Options(
            cert=certs / f"{me}.pem",
            key=certs / f"{me}.key",
            ca=certs / "ca.pem",
            peer=f"dns:{other}.demo",
            server_name="localhost",
            wait=PATIENCE,
            mode=mode,
        )

    def address(self, route: str) -> str:
        """Where ``route`` listens."""
        return f"127.0.0.1:{self.ports[route]}"

    async def dial(self, route: str) -> trio.SocketStream:
        """A TCP connection to ``route``."""
        return await trio.open_tcp_stream("127.0.0.1", self.ports[route])


@dataclass
class Actor:
    """One scene, and what came of it so far."""

    name: str
    play: Callable[[], Awaitable[None]]
    pause: float = 0.0
    """Between two performances, in seconds."""
    times: int = 0

    async def run(self, over: trio.Event, troubles: Counter[str]) -> None:
        """Play until ``over``, and to the end of the scene: one that is cut off would leave connections behind."""
        while not over.is_set():
            try:
                with trio.fail_after(PATIENCE):
                    await self.play()
            except Exception as error:
                troubles[f"{self.name}: {_told(error)}"] += 1
            self.times += 1
            with trio.move_on_after(self.pause):
                await over.wait()


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def actors(ground: Ground, seed: int) -> list[Actor]:
    """All of them."""
    random_ = random.Random(seed)
    good, bad, operator = _Functions(ground, random_), _Strangers(ground, random_), _Operator(ground, random_)
    found = []
    for number in range(CONSTANT):
        found += [
            Actor("bulk both ways", lambda n=number: good.bulk(f"bulk-{n}")),  # type: ignore[misc]
            Actor("ping-pong", lambda n=number: good.talk(f"talk-{n}")),  # type: ignore[misc]
            Actor("half-close", lambda n=number: good.half(f"half-{n}")),  # type: ignore[misc]
        ]
    return [
        *found,
        Actor("bare tunnels", good.bare, 0.05),
        Actor("plain legs", good.plain, 0.05),
        Actor("dialled service", good.service, 0.05),
        Actor("slow reader", good.slow),
        Actor("reset in mid-stream", good.reset, 0.05),
        Actor("cut in mid-hand-off", bad.cut, 0.05),
        Actor("ticket used twice", bad.ticket, 0.1),
        Actor("waits and goes", bad.lonely, 0.1),
        Actor("refused certificate", bad.refused, 0.1),
        Actor("garbage", bad.garbage, 0.1),
        Actor("garbage in frames", bad.frames, 0.1),
        Actor("silence", bad.silence),
        Actor("drip of a handshake", bad.drip),
        Actor("operator", operator.act, 0.3),
    ]


# --- functions --------------------------------------------------------------------------------------------------------


class _Functions:
    """Good ones; but for :meth:`reset`, where one of them crashes."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_

    async def _meet(self, route: str) -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        """Two functions, end-to-end mTLS between them, each in a mode of its own."""
        met: dict[str, trio.abc.HalfCloseableStream] = {}

        async def connect(me: str) -> None:
            mode = self._random.choice(MODES)
            options = self._ground.options(me, mode)
            met[me] = await frelay.client.trio.connect(self._ground.address(route), **options)

        async with trio.open_nursery() as nursery:
            for me in ("func1", "func2"):
                nursery.start_soon(connect, me)
        return met["func1"], met["func2"]

    async def bulk(self, route: str) -> None:
        """Some megabytes each way, at once."""
        one, two = await self._meet(route)
        async with one, two, trio.open_nursery() as nursery:
            for source, sink in ((one, two), (two, one)):
                nursery.start_soon(_carry, source, sink, self._random.randrange(1 << 16, 1 << 20))

    async def talk(self, route: str) -> None:
        """Small messages back and forth."""
        one, two = await self._meet(route)
        async with one, two:
            for number in range(self._random.randrange(20, 100)):
                message = _BLOCK[number : number + 64]
                await one.send_all(message)
                await _expect(two, message)
                await two.send_all(message)
                await _expect(one, message)

    async def half(self, route: str) -> None:
        """A question, its end, and only then the answer."""
        one, two = await self._meet(route)
        async with one, two:
            for source, sink in ((one, two), (two, one)):
                await _carry(source, sink, self._random.randrange(1, 1 << 17))

    async def slow(self) -> None:
        """A reader that takes its time."""
        one, two = await self._meet("slow")
        async with one, two, trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, _BLOCK)
            left = len(_BLOCK)
            while left:
                left -= len(await two.receive_some(min(left, 1 << 17)))
                await trio.sleep(0.05)

    async def reset(self) -> None:
        """One of the two goes without a word, while bytes are under way both ways."""
        ends = list(await self._meet("reset"))
        self._random.shuffle(ends)
        gone, other = ends
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_flood, other)
            nursery.start_soon(_flood, gone)
            await gone.receive_some()
            await trio.aclose_forcefully(gone)
            await _is_cut(other)
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(other)

    async def service(self) -> None:
        """A function that calls a service, which is an echo in TLS of its own."""
        options = self._ground.options("func1", self._random.choice(MODES))
        async with await frelay.client.trio.connect(self._ground.address("service"), **options) as wire:
            message = _BLOCK[: self._random.randrange(1, 1 << 16)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.send_all, message)
                await _expect(wire, message)

    async def bare(self) -> None:
        """Two TLS clients that know nothing of frelay."""
        ends = [
            trio.SSLStream(
                await self._ground.dial("bare"), self._ground.bare_context(name), server_hostname="localhost"
            )
            for name in ("func1", "func2")
        ]
        async with trio.open_nursery() as nursery:
            for source, sink in (ends, reversed(ends)):
                nursery.start_soon(source.send_all, _BLOCK[:100_000])
                nursery.start_soon(_expect, sink, _BLOCK[:100_000])
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.aclose)

    async def plain(self) -> None:
        """Two bare sockets; every other time one of them is reset at the end."""
        one, two = await self._ground.dial("plain"), await self._ground.dial("plain")
        async with one, two:
            await one.send_all(TLS_HEADER)
            await _expect(two, TLS_HEADER)
            await two.send_all(TLS_HEADER)
            await _expect(one, TLS_HEADER)
            if self._random.random() < 0.5:
                _reset(one)
                await _is_cut(two)
            else:
                await one.send_eof()
                await _expect_end(two)
                await two.send_eof()
                await _expect_end(one)


async def _carry(source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream, size: int) -> None:
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await source.send_all(_BLOCK[:size])
            await source.send_eof()

        nursery.start_soon(send)
        await _expect(sink, _BLOCK[:size])
        await _expect_end(sink)


async def _expect(stream: trio.abc.ReceiveStream, wanted: bytes) -> None:
    at = 0
    while at < len(wanted):
        data = await stream.receive_some(min(len(wanted) - at, 1 << 16))
        if not data:
            raise Trouble(f"the end came with {len(wanted) - at} bytes missing")
        if data != wanted[at : at + len(data)]:
            raise Trouble("other bytes arrived than were sent")
        at += len(data)


async def _expect_end(stream: trio.abc.ReceiveStream) -> None:
    if await stream.receive_some(1):
        raise Trouble("more bytes arrived than were sent")


async def _flood(stream: trio.abc.SendStream) -> None:
    try:
        while True:
            await stream.send_all(_BLOCK[: 1 << 17])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # that is the point


async def _is_cut(stream: trio.abc.ReceiveStream) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        return
    raise Trouble("a cut was passed on as an end")


def _reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# --- strangers --------------------------------------------------------------------------------------------------------


class _Party:
    """A function that speaks frelay/1 by hand, to stop in the middle of it."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream: Final = stream
        self._session: Final = PartySession()
        self._received: list[Message] = []

    @classmethod
    async def join(cls, ground: Ground, route: str, name: str, mode: Mode) -> _Party:
        """One that was told WAITING."""
        tls = trio.SSLStream(await ground.dial(route), ground.contexts[name], server_hostname="localhost")
        party = cls(tls)
        await tls.send_all(party._session.send(messages.Join(attempt=str(uuid.uuid4()), modes=(mode,))))
        await party.expect(messages.Waiting)
        return party

    async def expect(self, kind: type[Message]) -> Any:
        """The next message, which must be of this kind; PINGs before it are answered."""
        while True:
            while self._received:
                message = self._received.pop(0)
                if isinstance(message, messages.Ping) and kind is not messages.Ping:
                    await self.stream.send_all(self._session.send(messages.Pong(message.n)))
                elif isinstance(message, kind):
                    return message
                else:
                    raise Trouble(f"{kind.__name__} expected, got {message}")
            self._received += self._session.receive(bytes(await self.stream.receive_some()))

    async def say(self, message: Message) -> None:
        """Send a message."""
        await self.stream.send_all(self._session.send(message))

    def reset(self) -> None:
        """Go by RST."""
        _reset(self.stream.transport_stream)

    def close(self) -> None:
        """Go without a word."""
        self.stream.transport_stream.socket.close()


class _Strangers:
    """Whoever is up to no good, or has no luck."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_

    async def cut(self) -> None:
        """Both are paired, and one of them never answers the close_notify."""
        parties = [await _Party.join(self._ground, "cut", name, "handoff") for name in ("func1", "func2")]
        for party in parties:
            await party.expect(messages.Paired)
        self._random.shuffle(parties)
        parties[0].reset()
        try:
            while await parties[1].stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        parties[1].close()

    async def ticket(self) -> None:
        """A ticket is good once: the second connection with it gets no answer."""
        one = await _Party.join(self._ground, "ticket", "func1", "ticket")
        two = await _Party.join(self._ground, "ticket", "func2", "tunnel")
        paired = await one.expect(messages.Paired)
        await two.expect(messages.Paired)
        line = f"FRELAY/1 {paired.ticket}\n".encode()
        first = await self._ground.dial("ticket")
        await first.send_all(line + TLS_HEADER)
        await _expect(two.stream, TLS_HEADER)
        second = await self._ground.dial("ticket")
        await second.send_all(line)
        await _is_turned_away(second)
        _reset(first)
        await _is_cut(two.stream)
        one.close()
        two.close()

    async def lonely(self) -> None:
        """Nobody comes; it answers a PING, and then it goes, in one of three ways."""
        party = await _Party.join(self._ground, "lonely", "func1", "handoff")
        ping = await party.expect(messages.Ping)
        await party.say(messages.Pong(ping.n))
        how = self._random.randrange(3)
        if how == 0:
            await party.say(messages.Leave())
            with _broken_is_fine():
                await party.stream.receive_some()
        party.reset() if how == 1 else party.close()

    async def refused(self) -> None:
        """A certificate that does not let anybody in here."""
        name = self._random.choice(("stranger", "revoked", "foreign", "nobody"))
        try:
            await _Party.join(self._ground, "door", name, "handoff")
        except (trio.BrokenResourceError, ssl.SSLError):
            return
        except Trouble as error:
            if "not-authorised" in str(error):
                return
            raise
        raise Trouble(f"{name} was let in")

    async def garbage(self) -> None:
        """Bytes that are no TLS, or a page for a browser."""
        stream = await self._ground.dial("door")
        words = self._random.choice((os.urandom(200), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"FRELAY/1 " + b"0" * 65))
        await stream.send_all(words)
        await _is_turned_away(stream)

    async def frames(self) -> None:
        """A good certificate, and then nonsense."""
        tls = trio.SSLStream(
            await self._ground.dial("door"), self._ground.contexts["func1"], server_hostname="localhost"
        )
        await tls.send_all(
            self._random.choice((os.urandom(100), b"\x01\x00\x10\x00" + b"{" * 4096, b"\x55\x00\x00\x00"))
        )
        try:
            while await tls.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        tls.transport_stream.socket.close()

    async def silence(self) -> None:
        """It connects, and that is all."""
        await _is_turned_away(await self._ground.dial("door"))

    async def drip(self) -> None:
        """A ClientHello, byte by byte."""
        stream = await self._ground.dial("door")
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                with _broken_is_fine():
                    for byte in TLS_HEADER + b"\x01\x00\x01\x00\x00\xfc\x03\x03" + bytes(60):
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(0.1)

            nursery.start_soon(drip)
            await _is_turned_away(stream)
            nursery.cancel_scope.cancel()


@contextmanager
def _broken_is_fine() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def _is_turned_away(stream: trio.SocketStream) -> None:
    """The connection ends, with an alert at most before."""
    with _broken_is_fine():
        received = b""
        while data := await stream.receive_some():
            received += data
        if len(received) > 64:
            raise Trouble(f"{len(received)} bytes for a stranger")
    await trio.aclose_forcefully(stream)


# --- the operator -----------------------------------------------------------------------------------------------------


class _Operator:
    """Whoever runs the relay has a nervous hand."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_
        self._number = 0

    async def act(self) -> None:
        """One of the things that an operator does."""
        await self._random.choice(
            (self._hang_up, self._storm, self._add_and_delete, self._reload, self._look, self._slip)
        )()

    async def _hang_up(self) -> None:
        os.kill(self._ground.pid, signal.SIGHUP)

    async def _storm(self) -> None:
        for _ in range(50):
            os.kill(self._ground.pid, signal.SIGHUP)

    async def _add_and_delete(self) -> None:
        self._number += 1
        path = f"/v1/routes/extra-{self._number}"
        table = {"listen": "127.0.0.1:0", "func1": "dns:func1.demo", "func2": "dns:func2.demo"}
        status, view = await ask(self._ground, "PUT", path, table)
        if status != 201:
            raise Trouble(f"PUT was answered {status}: {view}")
        port = int(view["bound"][0].rpartition(":")[2])
        await trio.aclose_forcefully(await trio.open_tcp_stream("127.0.0.1", port))
        status, answer = await ask(self._ground, "DELETE", path)
        if status != 204:
            raise Trouble(f"DELETE was answered {status}: {answer}")

    async def _reload(self) -> None:
        status, answer = await ask(self._ground, "POST", "/v1/reload")
        if status != 200:
            raise Trouble(f"a reload was answered {status}: {answer}")

    async def _look(self) -> None:
        for path in ("/v1/status", "/v1/routes", "/v1/pairings"):
            status, _ = await ask(self._ground, "GET", path)
            if status != 200:
                raise Trouble(f"{path} was answered {status}")

    async def _slip(self) -> None:
        """A slip of the pen: the reload is refused, and nothing changes."""
        try:
            self._rewrite(self._ground.configuration() + "\n[[route")
            status, answer = await ask(self._ground, "POST", "/v1/reload")
            if status != 409:
                raise Trouble(f"a reload of half a file was answered {status}: {answer}")
        finally:
            self._rewrite(self._ground.configuration())
        await self._reload()

    def _rewrite(self, text: str) -> None:
        new = self._ground.route_file.with_suffix(".new")
        new.write_text(text)
        new.replace(self._ground.route_file)


async def ask(ground: Ground, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """The status and the JSON of an answer of the admin API."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    stream = await trio.open_unix_socket(ground.directory / "a.sock")
    async with stream:
        await stream.send_all(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = b""
        while data := await stream.receive_some():
            answer += data
    head_, _, text = answer.partition(b"\r\n\r\n")
    return int(head_.split(b" ")[1]), json.loads(text) if text else None
