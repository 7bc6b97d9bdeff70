"""A network with faults between parties and relay: it does to their bytes what real networks do.

It splits, merges and delays segments and, if asked, breaks one connection at one byte. A seed decides all of it, so a
failure can be repeated: the bytes and where they are cut are always the same, only the scheduling may differ::

    async with faulty_network(Conditions(seed=7)) as network, site.relay() as relay:
        relay.network = network                     # relay.port() now leads through it, for all parties

How a network breaks a connection (:attr:`Conditions.fault`):

* ``cut``: both sides get FIN in the middle of everything, as from a proxy that is restarted.
* ``reset``: both sides get RST.
* ``silence``: nothing passes any more, without FIN or RST.
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

__all__ = ["Conditions", "Fault", "FaultyNetwork", "descriptors_of_networks", "faulty_network"]

Fault = Literal["cut", "reset", "silence"]

# How many bytes are passed on at once: the fine sizes cut TLS record headers and frames, the coarse ones fill buffers.
_FINE: Final = (1, 2, 3, 5, 7, 24, 100, 500, 1460)
_COARSE: Final = (1460, 4096, 16 * 1024, 64 * 1024)
# The first bytes of a direction get fine sizes: handshake, JOIN, the hand-off and the functions' first bytes.
_INTRICATE: Final = 8 * 1024
_LONGEST_DELAY: Final = 0.005
_TCP_CLOSE: Final = 7  # include/net/tcp_states.h
# How often to poll the kernel's send queue, in seconds: no event tells when it is empty.
_POLL: Final = 0.005
# After so many polls without progress we do not wait any longer.
_STANDS_STILL: Final = 40


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a network does to the bytes."""

    seed: int
    delays: bool = True
    """Whether it delays bytes. If not, it only splits and merges, and when no task runs it has passed on all it can."""
    fault: Fault | None = None
    fault_within: int = 12_000
    """The fault comes within so many bytes of one direction of one connection."""
    connections: int = 2
    """The fault hits one of the first so many connections."""


class _FaultHits(Exception):
    """It is time for the fault."""


@dataclass
class _Connection:
    """One connection that goes through."""

    number: int
    ended: set[trio.SocketStream] = field(default_factory=set)
    """The sides that were sent FIN."""
    broken: dict[trio.SocketStream, int] = field(default_factory=dict)
    """The sides whose connection broke, and with which error."""

    def note(self, side: trio.SocketStream, error: trio.BrokenResourceError) -> None:
        """``side`` broke with ``error``. Linux reports a reset once; later calls get another error."""
        cause = error.__cause__
        self.broken.setdefault(side, (cause.errno or 0) if isinstance(cause, OSError) else 0)

    def was_reset(self, side: trio.SocketStream) -> bool:
        """Whether ``side``, which reads as ended, got an RST and no FIN before it. After a FIN the error is EPIPE."""
        if side in self.ended or not _is_dead(side):
            return False
        if side not in self.broken and side.socket.fileno() != -1:
            self.broken[side] = side.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self.broken.get(side) != errno.EPIPE


class FaultyNetwork:
    """Carries connections; :meth:`way_to` gives the port that leads through it."""

    def __init__(self, conditions: Conditions, nursery: trio.Nursery) -> None:
        self.conditions: Final = conditions
        self.has_struck = False
        """Whether the fault has come."""
        self._nursery = nursery
        self._ways: dict[tuple[str, int], int] = {}
        self._count = 0
        self._open: set[trio.SocketStream] = set()
        self._listeners: set[socket.socket] = set()
        self._watches: set[select.epoll] = set()
        self.port_beyond: Final[dict[int, int]] = {}
        """The port under which the relay sees a connection, by the party's own port."""
        chance = random.Random(f"fault {conditions.seed}")
        self._victim = (chance.randrange(conditions.connections), chance.choice(("forth", "back")))
        self._at = chance.randrange(conditions.fault_within)

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
                # The far side sees the same address as we do, 127.0.0.2 say; only the port differs.
                far = await trio.open_tcp_stream(host, port, local_address=near.socket.getpeername()[0])
            except OSError:
                _reset(near)  # nobody listens there any more
                return
            await self._connect(number, near, far)

        async with listener:
            await trio.serve_listeners(carry, [listener], handler_nursery=self._nursery)

    def descriptors(self) -> set[int]:
        """The descriptors of this network. None is the relay's, even where relay and network share a process."""
        found = {stream.socket.fileno() for stream in self._open}
        found |= {listener.fileno() for listener in self._listeners}
        return found | {watch.fileno() for watch in self._watches}

    async def _connect(self, number: int, near: trio.SocketStream, far: trio.SocketStream) -> None:
        connection = _Connection(number)
        try:
            self.port_beyond[near.socket.getpeername()[1]] = far.socket.getsockname()[1]
        except OSError:
            pass  # the caller has closed already
        self._open |= {near, far}
        try:
            async with trio.open_nursery() as both:
                both.start_soon(self._carry, connection, "forth", near, far)
                both.start_soon(self._carry, connection, "back", far, near)
            # A side that broke was not sent all bytes of the other. We close with these unread, so the kernel sends
            # RST, as a dead host would. First wait, so that the RST does not destroy what was sent before.
            await _delivered(near)
            await _delivered(far)
        except* trio.BrokenResourceError:
            # One side was reset, so reset the other too.
            _reset(near)
            _reset(far)
        except* _FaultHits:
            await self._break(near, far)
        except* trio.ClosedResourceError:
            pass  # see go_down
        finally:
            self._open -= {near, far}
            near.socket.close()
            far.socket.close()

    def go_down(self) -> None:
        """Reset all connections."""
        for stream in self._open:
            _reset(stream)

    async def _carry(
        self, connection: _Connection, name: str, source: trio.SocketStream, sink: trio.SocketStream
    ) -> None:
        conditions, number = self.conditions, connection.number
        chance = random.Random(f"{conditions.seed} {number} {name}")
        left = self._at if conditions.fault is not None and (number, name) == self._victim else None
        passed = 0

        async def receive() -> bytes:
            try:
                data = bytes(await source.receive_some(_size(chance, passed)))
            except trio.BrokenResourceError as error:
                connection.note(source, error)
                # A real RST does not overtake acknowledged bytes, and we have acknowledged these.
                await _delivered(sink)
                raise
            if data and chance.random() < 0.2:
                # Merge: send the next bytes together with these, if there are any.
                await self._pause(chance)
                data += _what_is_there(source)
            return data

        while data := await receive():
            while data:
                size = _size(chance, passed)
                piece, data = data[:size], data[size:]
                if left is not None and len(piece) > left:
                    await sink.send_all(piece[:left])
                    raise _FaultHits
                try:
                    await sink.send_all(piece)
                except trio.BrokenResourceError as error:
                    # The other direction still carries what the sink sent before it broke, and will find the break.
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
        # After the FIN a host may send RST, if it takes no answer. No read shows that, so watch for EPOLLHUP.
        await self._hung_up(source)
        if source not in connection.ended:
            await _delivered(sink)
            raise trio.BrokenResourceError

    async def _hung_up(self, stream: trio.SocketStream) -> None:
        """Wait until both directions of ``stream`` are over."""
        if stream.socket.fileno() == -1:
            return  # see go_down
        with select.epoll() as watch:
            watch.register(stream.socket.fileno(), 0)  # EPOLLHUP is always reported
            self._watches.add(watch)
            try:
                await trio.lowlevel.wait_readable(watch.fileno())
            finally:
                self._watches.discard(watch)

    async def _pause(self, chance: random.Random) -> None:
        if self.conditions.delays and chance.random() < 0.1:
            await trio.sleep(chance.uniform(0, _LONGEST_DELAY))
        elif chance.random() < 0.3:
            await trio.lowlevel.checkpoint()

    async def _break(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.has_struck = True
        match self.conditions.fault:
            case "reset":
                _reset(near)
                _reset(far)
            case "cut":
                async with trio.open_nursery() as both:
                    both.start_soon(_end, near)
                    both.start_soon(_end, far)
            case "silence":
                # As with a cut cable. But when a side gives up, it must be able to close.
                await trio.sleep_forever()


def _size(chance: random.Random, passed: int) -> int:
    is_fine = passed < _INTRICATE or chance.random() < 0.02
    return chance.choice(_FINE) if is_fine else chance.choice(_COARSE)


def _is_dead(stream: trio.SocketStream) -> bool:
    if stream.socket.fileno() == -1:
        return True  # see FaultyNetwork.go_down
    return stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE


async def _delivered(stream: trio.SocketStream) -> None:
    """Wait until all that was sent is acknowledged, unless the peer takes nothing or is gone."""
    left, stands_still = -1, 0
    while not _is_dead(stream) and stands_still < _STANDS_STILL:
        before = left
        (left,) = struct.unpack("i", fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, bytes(4)))
        if left == 0:
            return
        stands_still = stands_still + 1 if left == before else 0
        await trio.sleep(_POLL)


def _what_is_there(stream: trio.SocketStream) -> bytes:
    count = bytearray(4)
    if stream.socket.fileno() != -1:  # see FaultyNetwork.go_down
        fcntl.ioctl(stream.socket.fileno(), termios.FIONREAD, count)
    if not any(count):
        return b""  # a pending error is reported once; leave it to the next read
    return stream.socket._sock.recv(65536)  # type: ignore[attr-defined, no-any-return]


async def _end(stream: trio.SocketStream) -> None:
    """Send FIN, and drop what still arrives: closing with unread bytes would send RST."""
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
    """The descriptors of all networks of this process."""
    return {descriptor for network in _networks for descriptor in network.descriptors()}


@asynccontextmanager
async def faulty_network(conditions: Conditions) -> AsyncIterator[FaultyNetwork]:
    """A network, until the context ends."""
    async with trio.open_nursery() as nursery:
        network = FaultyNetwork(conditions, nursery)
        _networks.add(network)
        try:
            yield network
        finally:
            _networks.discard(network)
            nursery.cancel_scope.cancel()
