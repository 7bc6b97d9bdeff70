"""A network with a character: it stands between parties and relay, and does to their bytes what networks do.

It splits segments and merges them, delays them, and, where it is told to, lets a connection down at one byte of its
choice. All of it follows from a seed, so whatever a seed has found can be found again (with the scheduler's share of
luck; the bytes and where they are cut are always the same)::

    async with a_network(Weather(seed=7)) as network, site.relay() as relay:
        relay.network = network                     # relay.port() now leads through it, whoever asks

How a network lets a connection down, in :attr:`Weather.fault`:

* ``cut``: both sides get FIN in the middle of everything, as from a proxy that is restarted.
* ``reset``: both sides get RST.
* ``silence``: nothing passes any more, and nobody is told.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import trio

__all__ = ["Fault", "FaultyNetwork", "Weather", "a_network"]

Fault = Literal["cut", "reset", "silence"]

# Sizes of what is passed on at once: what cuts a TLS record header or a frame, a segment, and what fills a buffer.
_FINE: Final = (1, 2, 3, 5, 7, 24, 100, 500, 1460)
_COARSE: Final = (1460, 4096, 16 * 1024, 64 * 1024)
# Where everything that is not bulk happens: handshake, JOIN, the hand-off and the functions' first bytes.
_INTRICATE: Final = 8 * 1024
_LONGEST_DELAY: Final = 0.005
_TCP_CLOSE: Final = 7  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Weather:
    """What a network is like."""

    seed: int
    delays: bool = True
    """Whether it takes time. Without, it only splits and merges, and has passed on all it can whenever nothing runs."""
    fault: Fault | None = None
    fault_within: int = 12_000
    """The fault comes at one of the first so many bytes of one direction of one connection."""
    connections: int = 2
    """Among how many connections, in the order in which they come, the one with the fault is chosen."""


class _LetDownError(Exception):
    """The moment of the fault has come."""


@dataclass
class _Connection:
    """One connection that goes through."""

    number: int
    ended: set[trio.SocketStream] = field(default_factory=set)
    """The sides that were sent FIN."""


class FaultyNetwork:
    """Ways through this network; see :meth:`way_to`."""

    def __init__(self, weather: Weather, nursery: trio.Nursery) -> None:
        self.weather: Final = weather
        self.has_struck = False
        """Whether the fault has come."""
        self._nursery = nursery
        self._ways: dict[int, int] = {}
        self._count = 0
        self._open: set[trio.SocketStream] = set()
        self.port_beyond: Final[dict[int, int]] = {}
        """Under which port the other side sees a connection, by the port that it really comes from."""
        chance = random.Random(f"fault {weather.seed}")
        self._victim = (chance.randrange(weather.connections), chance.choice(("forth", "back")))
        self._at = chance.randrange(weather.fault_within)

    def way_to(self, port: int) -> int:
        """A port of 127.0.0.1 that leads to ``port`` through this network."""
        if port not in self._ways:
            sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
            self._ways[port] = sock.getsockname()[1]
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            sock.setblocking(False)
            self._nursery.start_soon(self._serve, listener, port)
        return self._ways[port]

    async def _serve(self, listener: trio.SocketListener, port: int) -> None:
        async def carry(near: trio.SocketStream) -> None:
            number, self._count = self._count, self._count + 1
            try:
                far = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                _reset(near)  # nobody listens there any more
                return
            await self._connect(number, near, far)

        async with listener:
            await trio.serve_listeners(carry, [listener], handler_nursery=self._nursery)

    async def _connect(self, number: int, near: trio.SocketStream, far: trio.SocketStream) -> None:
        connection = _Connection(number)
        try:
            self.port_beyond[near.socket.getpeername()[1]] = far.socket.getsockname()[1]
        except OSError:
            pass  # it has gone before it was here
        self._open |= {near, far}
        try:
            async with trio.open_nursery() as both:
                both.start_soon(self._carry, connection, "forth", near, far)
                both.start_soon(self._carry, connection, "back", far, near)
        except* trio.BrokenResourceError:
            # Either side was reset: then so is the other.
            _reset(near)
            _reset(far)
        except* _LetDownError:
            await self._let_down(near, far)
        except* trio.ClosedResourceError:
            pass  # see go_down
        finally:
            self._open -= {near, far}
            near.socket.close()
            far.socket.close()

    def go_down(self) -> None:
        """Reset all that goes through now."""
        for stream in self._open:
            _reset(stream)

    async def _carry(
        self, connection: _Connection, name: str, source: trio.SocketStream, sink: trio.SocketStream
    ) -> None:
        weather, number = self.weather, connection.number
        chance = random.Random(f"{weather.seed} {number} {name}")
        left = self._at if weather.fault is not None and (number, name) == self._victim else None
        passed = 0
        while data := await source.receive_some(_size(chance, passed)):
            if chance.random() < 0.2:
                # Merge: what comes next may yet travel with this.
                await self._pause(chance)
                data += _what_is_there(source)
            while data:
                size = _size(chance, passed)
                piece, data = data[:size], data[size:]
                if left is not None and len(piece) > left:
                    await sink.send_all(piece[:left])
                    raise _LetDownError
                try:
                    await sink.send_all(piece)
                except trio.BrokenResourceError:
                    # What the sink said before it broke is still under way; whoever reads it finds the break.
                    return
                passed += len(piece)
                left = None if left is None else left - len(piece)
                await self._pause(chance)
        if source not in connection.ended and _is_dead(source):
            # Linux tells of a reset once, and told the one who sent; to us it looks like FIN.
            raise trio.BrokenResourceError
        connection.ended.add(sink)
        try:
            await sink.send_eof()
        except trio.BrokenResourceError:
            return

    async def _pause(self, chance: random.Random) -> None:
        if self.weather.delays and chance.random() < 0.1:
            await trio.sleep(chance.uniform(0, _LONGEST_DELAY))
        elif chance.random() < 0.3:
            await trio.lowlevel.checkpoint()

    async def _let_down(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.has_struck = True
        match self.weather.fault:
            case "reset":
                _reset(near)
                _reset(far)
            case "cut":
                async with trio.open_nursery() as both:
                    both.start_soon(_end, near)
                    both.start_soon(_end, far)
            case "silence":
                # As if the cable were out; but when a side gives up, it must be able to close.
                await trio.sleep_forever()


def _size(chance: random.Random, passed: int) -> int:
    is_fine = passed < _INTRICATE or chance.random() < 0.02
    return chance.choice(_FINE) if is_fine else chance.choice(_COARSE)


def _is_dead(stream: trio.SocketStream) -> bool:
    if stream.socket.fileno() == -1:
        return True  # see FaultyNetwork.go_down
    return stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE


def _what_is_there(stream: trio.SocketStream) -> bytes:
    try:
        return stream.socket._sock.recv(65536)  # type: ignore[attr-defined, no-any-return]
    except BlockingIOError:
        return b""
    except OSError as error:
        # It is told once; the next read would find what looks like FIN.
        raise trio.BrokenResourceError from error


async def _end(stream: trio.SocketStream) -> None:
    """FIN; what still comes is dropped, since to close with unread bytes would be RST."""
    try:
        await stream.send_eof()
        while await stream.receive_some(65536):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # reset, or see FaultyNetwork.go_down


def _reset(stream: trio.SocketStream) -> None:
    if stream.socket.fileno() != -1:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()


@asynccontextmanager
async def a_network(weather: Weather) -> AsyncIterator[FaultyNetwork]:
    """A network that is there for as long as the context."""
    async with trio.open_nursery() as nursery:
        network = FaultyNetwork(weather, nursery)
        try:
            yield network
        finally:
            nursery.cancel_scope.cancel()
