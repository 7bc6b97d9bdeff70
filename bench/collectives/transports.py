"""The transports: how the ranks of a group reach each other, with frelay, OpenMPI and Redis behind one interface.

A worker process opens one and runs the cases on it (:mod:`bench.collectives.worker`). NumPy arrays go in and out. Only
the program that is measured is imported.
"""

from __future__ import annotations

import abc
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

__all__ = ["OPENERS", "Transport"]

Array = Any
"""A NumPy array. Its types are not checked here: NumPy is installed only where the bench runs."""


class Transport(abc.ABC):
    """One rank of a group."""

    rank: int
    size: int

    @abc.abstractmethod
    def ping(self, data: Array, count: int) -> None:
        """``count`` round trips of ``data`` between ranks 0 and 1."""

    def ping_bare(self, data: Array, count: int) -> bool:
        """As :meth:`ping`, on a bare wire of frelay beside the group; False if there is none."""
        return False

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once all ranks have called it."""

    @abc.abstractmethod
    def bcast(self, data: Array) -> None:
        """Fill ``data`` of all ranks with that of rank 0."""

    @abc.abstractmethod
    def allreduce(self, data: Array) -> None:
        """Replace ``data`` by the sum over all ranks."""

    @abc.abstractmethod
    def alltoall(self, parts: Sequence[Array]) -> Sequence[Any]:
        """Send part i to rank i; returns what all ranks sent here."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the group."""


class FrelayGroup(Transport):
    """frelay.group, blocking: mutual TLS between each two ranks, through the relay."""

    def __init__(self, where: str, rank: int, size: int) -> None:
        import frelay

        address, _, certs = where.partition(" ")
        directory = Path(certs)
        self.rank, self.size = rank, size
        self._where = where
        self._wire: _Wire | None = None
        self._group = frelay.group(
            address,
            name="bench",
            rank=rank,
            size=size,
            peer="dns:rank{rank}.bench",
            cert=directory / f"rank{rank}.pem",
            key=directory / f"rank{rank}.key",
            ca=directory / "ca.pem",
        )

    def ping(self, data: Array, count: int) -> None:
        # Bytes, as on the wire that it is compared with.
        group, sent, into = self._group, data.tobytes(), bytearray(data.nbytes)
        for _ in range(count):
            if self.rank == 0:
                group.send(sent, 1)
                group.recv(1, into)
            else:
                group.recv(0, into)
                group.send(into, 0)

    def ping_bare(self, data: Array, count: int) -> bool:
        if self._wire is None:
            self._wire = _Wire(self._where, self.rank)
        self._wire.ping(data, count)
        return True

    def barrier(self) -> None:
        self._group.barrier()

    def bcast(self, data: Array) -> None:
        self._group.bcast(data)

    def allreduce(self, data: Array) -> None:
        self._group.allreduce(data)

    def alltoall(self, parts: Sequence[Array]) -> Sequence[Any]:
        return self._group.alltoall(parts)

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
        self._group.close()


class _Wire:
    """A wire of ``frelay.connect`` beside a group of two: what the ping-pong of the group is compared with."""

    def __init__(self, where: str, rank: int) -> None:
        import frelay

        address, _, certs = where.partition(" ")
        directory = Path(certs)
        self._is_first = rank == 0
        self._wire: ssl.SSLSocket = frelay.connect(
            address,
            peer=f"dns:rank{1 - rank}.bench",
            cert=directory / f"rank{rank}.pem",
            key=directory / f"rank{rank}.key",
            ca=directory / "ca.pem",
            meet="bench/wire",
            party="func1" if self._is_first else "func2",
            wait=60,
        )

    def ping(self, data: Array, count: int) -> None:
        wire, sent, into = self._wire, data.tobytes(), bytearray(data.nbytes)
        for _ in range(count):
            if self._is_first:
                wire.sendall(sent)
                _fill(wire, into, len(sent))
            else:
                _fill(wire, into, len(sent))
                wire.sendall(into)

    def close(self) -> None:
        self._wire.close()


def _fill(wire: ssl.SSLSocket, into: bytearray, size: int) -> None:
    got = wire.recv_into(into, size)
    while got < size:
        more = wire.recv_into(memoryview(into)[got:], size - got)
        if not more:
            raise EOFError("the other rank has ended the wire")
        got += more


class OpenMpi(Transport):
    """OpenMPI by mpi4py, over TCP on loopback (no shared memory), without encryption."""

    def __init__(self, where: str, rank: int, size: int) -> None:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        MPI.Init()
        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        self._mpi = MPI

    def ping(self, data: Array, count: int) -> None:
        world, into = self._world, np.empty_like(data)
        for _ in range(count):
            if self.rank == 0:
                world.Send(data, 1)
                world.Recv(into, 1)
            else:
                world.Recv(into, 0)
                world.Send(into, 0)

    def barrier(self) -> None:
        self._world.Barrier()

    def bcast(self, data: Array) -> None:
        self._world.Bcast(data)

    def allreduce(self, data: Array) -> None:
        self._world.Allreduce(self._mpi.IN_PLACE, data)

    def alltoall(self, parts: Sequence[Array]) -> Sequence[Any]:
        sent = np.concatenate(parts)
        received = np.empty_like(sent)
        self._world.Alltoall(sent, received)
        return list(received.reshape(self.size, -1))

    def close(self) -> None:
        self._mpi.Finalize()


class RedisLists(Transport):
    """A list for each pair of ranks in one Redis, without encryption: RPUSH sends, BLPOP receives.

    The collectives are those that cost Redis least: rank 0 takes all and gives to all, with one pipeline, since each
    message passes through one server in any case.
    """

    def __init__(self, where: str, rank: int, size: int) -> None:
        import redis

        self.rank, self.size = rank, size
        self._redis = redis.Redis(unix_socket_path=where) if where.startswith("/") else redis.Redis(port=int(where))
        self._redis.ping()

    def _send(self, data: Any, to: int) -> None:
        self._redis.rpush(f"{self.rank}>{to}", data)

    def _receive(self, source: int) -> bytes:
        return self._redis.blpop([f"{source}>{self.rank}"])[1]  # type: ignore[no-any-return]

    def _send_to_others(self, data: Any) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            for to in range(1, self.size):
                pipeline.rpush(f"0>{to}", data)
            pipeline.execute()

    def ping(self, data: Array, count: int) -> None:
        sent = data.tobytes()
        for _ in range(count):
            if self.rank == 0:
                self._send(sent, 1)
                self._receive(1)
            else:
                self._send(self._receive(0), 0)

    def barrier(self) -> None:
        if self.rank == 0:
            for source in range(1, self.size):
                self._receive(source)
            self._send_to_others(b"x")
        else:
            self._send(b"x", 0)
            self._receive(0)

    def bcast(self, data: Array) -> None:
        if self.rank == 0:
            self._send_to_others(data.tobytes())
        else:
            data[:] = np.frombuffer(self._receive(0), data.dtype)

    def allreduce(self, data: Array) -> None:
        if self.rank == 0:
            for source in range(1, self.size):
                data += np.frombuffer(self._receive(source), data.dtype)
            self._send_to_others(data.tobytes())
        else:
            self._send(data.tobytes(), 0)
            data[:] = np.frombuffer(self._receive(0), data.dtype)

    def alltoall(self, parts: Sequence[Array]) -> Sequence[Any]:
        received: list[Any] = [None] * self.size
        received[self.rank] = parts[self.rank]
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            self._send(parts[to].tobytes(), to)
            received[source] = self._receive(source)
        return received

    def close(self) -> None:
        self._redis.close()


OPENERS: Final[Mapping[str, Callable[[str, int, int], Transport]]] = {
    "frelay": FrelayGroup,
    "openmpi": OpenMpi,
    "redis": RedisLists,
}
"""By name: opens rank R of S. The text says where: an address and a directory, a port, or nothing."""
