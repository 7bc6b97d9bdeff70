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

import errno
import fcntl
import random
import select
import socket
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import trio

__all__ = ["Fault", "FaultyNetwork", "Weather", "a_network", "descriptors_of_networks"]

Fault = Literal["cut", "reset", "silence"]

# Sizes of what is passed on at once: what cuts a TLS record header or a frame, a segment, and what fills a buffer.
_FINE: Final = (1, 2, 3, 5, 7, 24, 100, 500, 1460)
_COARSE: Final = (1460, 4096, 16 * 1024, 64 * 1024)
# Where everything that is not bulk happens: handshake, JOIN, the hand-off and the functions' first bytes.
_INTRICATE: Final = 8 * 1024
_LONGEST_DELAY: Final = 0.005
_TCP_CLOSE: Final = 7  # include/net/tcp_states.h
# How often is looked for what the kernel tells nobody, in seconds.
_LOOKS: Final = 0.005
# Who has taken nothing for so many looks is not waited for.
_STANDS_STILL: Final = 40


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
    broken: dict[trio.SocketStream, int] = field(default_factory=dict)
    """The sides that were found to be gone, and with which error."""

    def note(self, side: trio.SocketStream, error: trio.BrokenResourceError) -> None:
        """``side`` broke with ``error``. Linux tells of a reset once, and whoever comes later finds another error."""
        cause = error.__cause__
        self.broken.setdefault(side, (cause.errno or 0) if isinstance(cause, OSError) else 0)

    def was_reset(self, side: trio.SocketStream) -> bool:
        """Whether ``side``, which reads as ended, is gone by an RST alone. It is EPIPE where FIN had come before."""
        if side in self.ended or not _is_dead(side):
            return False
        if side not in self.broken and side.socket.fileno() != -1:
            self.broken[side] = side.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self.broken.get(side) != errno.EPIPE


class FaultyNetwork:
    """Ways through this network; see :meth:`way_to`."""

    def __init__(self, weather: Weather, nursery: trio.Nursery) -> None:
        self.weather: Final = weather
        self.has_struck = False
        """Whether the fault has come."""
        self._nursery = nursery
        self._ways: dict[tuple[str, int], int] = {}
        self._count = 0
        self._open: set[trio.SocketStream] = set()
        self._listeners: set[socket.socket] = set()
        self._watches: set[select.epoll] = set()
        self.port_beyond: Final[dict[int, int]] = {}
        """Under which port the other side sees a connection, by the port that it really comes from."""
        chance = random.Random(f"fault {weather.seed}")
        self._victim = (chance.randrange(weather.connections), chance.choice(("forth", "back")))
        self._at = chance.randrange(weather.fault_within)

    def way_to(self, port: int, host: str = "127.0.0.1") -> int:
        """A port of ``host`` that leads to ``port`` of it through this network."""
        way = (host, port)
        if way not in self._ways:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, 0), family=family, backlog=4096)
            self._ways[way] = sock.getsockname()[1]
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            sock.setblocking(False)
            self._listeners.add(sock)
            self._nursery.start_soon(self._serve, listener, host, port)
        return self._ways[way]

    async def _serve(self, listener: trio.SocketListener, host: str, port: int) -> None:
        async def carry(near: trio.SocketStream) -> None:
            number, self._count = self._count, self._count + 1
            try:
                # Whoever comes from 127.0.0.2 is seen to do so beyond, too; only the port is another.
                far = await trio.open_tcp_stream(host, port, local_address=near.socket.getpeername()[0])
            except OSError:
                _reset(near)  # nobody listens there any more
                return
            await self._connect(number, near, far)

        async with listener:
            await trio.serve_listeners(carry, [listener], handler_nursery=self._nursery)

    def descriptors(self) -> set[int]:
        """What is open here: none of it is the relay's, though it may be of the same process."""
        found = {stream.socket.fileno() for stream in self._open}
        found |= {listener.fileno() for listener in self._listeners}
        return found | {watch.fileno() for watch in self._watches}

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
            # A side that is gone was not sent all of the other's. To close with that unread is RST, as from a host that
            # is gone, but it must not destroy what was said before.
            await _delivered(near)
            await _delivered(far)
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

        async def receive() -> bytes:
            try:
                data = bytes(await source.receive_some(_size(chance, passed)))
            except trio.BrokenResourceError as error:
                connection.note(source, error)
                # An RST overtakes nothing that was acknowledged, and that it was, by us.
                await _delivered(sink)
                raise
            if data and chance.random() < 0.2:
                # Merge: what comes next may yet travel with this.
                await self._pause(chance)
                data += _what_is_there(source)
            return data

        while data := await receive():
            while data:
                size = _size(chance, passed)
                piece, data = data[:size], data[size:]
                if left is not None and len(piece) > left:
                    await sink.send_all(piece[:left])
                    raise _LetDownError
                try:
                    await sink.send_all(piece)
                except trio.BrokenResourceError as error:
                    # What the sink said before it broke is still under way; whoever reads it finds the break.
                    connection.note(sink, error)
                    return
                passed += len(piece)
                left = None if left is None else left - len(piece)
                await self._pause(chance)
        if connection.was_reset(source):
            await _delivered(sink)
            raise trio.BrokenResourceError
        connection.ended.add(sink)
        try:
            await sink.send_eof()
        except trio.BrokenResourceError:
            return
        # An RST may follow the FIN, from a host that takes no answer any more. No read finds it.
        await self._hung_up(source)
        if source not in connection.ended:
            await _delivered(sink)
            raise trio.BrokenResourceError

    async def _hung_up(self, stream: trio.SocketStream) -> None:
        """Wait until both directions of ``stream`` are over."""
        if stream.socket.fileno() == -1:
            return  # see go_down
        with select.epoll() as watch:
            watch.register(stream.socket.fileno(), 0)  # EPOLLHUP comes unasked
            self._watches.add(watch)
            try:
                await trio.lowlevel.wait_readable(watch.fileno())
            finally:
                self._watches.discard(watch)

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


async def _delivered(stream: trio.SocketStream) -> None:
    """Wait until all that was sent is acknowledged; not for who takes nothing, nor for who is gone."""
    left, stands_still = -1, 0
    while not _is_dead(stream) and stands_still < _STANDS_STILL:
        before = left
        (left,) = struct.unpack("i", fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, bytes(4)))
        if left == 0:
            return
        stands_still = stands_still + 1 if left == before else 0
        await trio.sleep(_LOOKS)


def _what_is_there(stream: trio.SocketStream) -> bytes:
    count = bytearray(4)
    if stream.socket.fileno() != -1:  # see FaultyNetwork.go_down
        fcntl.ioctl(stream.socket.fileno(), termios.FIONREAD, count)
    if not any(count):
        return b""  # and an error that is pending, which is told once, is left to the next read
    return stream.socket._sock.recv(65536)  # type: ignore[attr-defined, no-any-return]


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


_networks: Final[set[FaultyNetwork]] = set()


def descriptors_of_networks() -> set[int]:
    """The descriptors of this process that are networks'."""
    return {descriptor for network in _networks for descriptor in network.descriptors()}


@asynccontextmanager
async def a_network(weather: Weather) -> AsyncIterator[FaultyNetwork]:
    """A network that is there for as long as the context."""
    async with trio.open_nursery() as nursery:
        network = FaultyNetwork(weather, nursery)
        _networks.add(network)
        try:
            yield network
        finally:
            _networks.discard(network)
            nursery.cancel_scope.cancel()
