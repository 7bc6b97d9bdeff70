"""One rank's calls: the arguments of a method of the group, checked, as a :class:`~frelay.client.group.work.Call`.

A wrong argument raises TypeError or ValueError before anything is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from frelay.client.group import collectives
from frelay.client.group.buffers import readable, readable_parts, writable
from frelay.client.group.collectives import Steps
from frelay.client.group.frames import Kind, make_tag
from frelay.client.group.link import Incoming, Outgoing
from frelay.client.group.mesh import Mesh
from frelay.client.group.reduction import Operation, Reduction
from frelay.client.group.work import Call, Transfers
from frelay.errors import GroupBroken, LocalProtocolError

__all__ = ["Member"]

T = TypeVar("T")

_SEND: Final = make_tag(Kind.SEND)


class Member:
    """Makes the calls of one rank, and counts those that all ranks make together."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        self._rank: Final = mesh.rank
        self._size: Final = mesh.size
        self._count = 0

    # --- two ranks ---------------------------------------------------------------------------------------------

    # These do without a generator: a small message must cost little more than on a bare wire.

    def send(self, data: Any, to: int) -> Transfers:
        """See :meth:`frelay.Group.send`; what the kernel takes at once is sent already."""
        self._check_other(to, "to")
        message = Outgoing(_SEND, readable(data, "data"))
        return self._transfers([(to, message)], "send")

    def send_rest(self, to: int, encrypted: memoryview) -> Transfers:
        """Send the rest of a message that went to rank ``to`` past its idle link."""
        link = self._mesh.link(to)
        if link is None:
            raise AssertionError("an idle link is there")
        message = Outgoing(_SEND, encrypted)
        link.send_rest(message)
        transfers = Transfers(self._mesh, "send")
        transfers.watch([(to, message)])
        return transfers

    def recv(self, source: int, into: Any) -> tuple[Transfers, Incoming]:
        """See :meth:`frelay.Group.recv`."""
        self._check_other(source, "source")
        message = Incoming(_SEND, None if into is None else writable(into, "into"), is_exact=False)
        return self._transfers([(source, message)], "recv"), message

    def sendrecv(self, data: Any, to: int, source: int, into: Any) -> tuple[Transfers, Incoming]:
        """See :meth:`frelay.Group.sendrecv`."""
        self._check_other(to, "to")
        self._check_other(source, "source")
        message = Incoming(_SEND, None if into is None else writable(into, "into"), is_exact=False)
        outgoing = Outgoing(_SEND, readable(data, "data"))
        return self._transfers([(source, message), (to, outgoing)], "sendrecv"), message

    def _transfers(self, messages: list[tuple[int, Incoming | Outgoing]], name: str) -> Transfers:
        self._check_open()
        transfers = Transfers(self._mesh, name)
        transfers.post(messages)
        return transfers

    # --- all ranks ---------------------------------------------------------------------------------------------

    def barrier(self) -> Call[None]:
        """See :meth:`frelay.Group.barrier`."""
        return self._together(Kind.BARRIER, "", collectives.barrier(self._rank, self._size))

    def close(self) -> Call[None]:
        """The barrier of :meth:`frelay.Group.close`."""
        return self._together(Kind.CLOSE, "", collectives.barrier(self._rank, self._size))

    def bcast(self, buf: Any, root: int) -> Call[None]:
        """See :meth:`frelay.Group.bcast`."""
        self._check_rank(root, "root")
        view = readable(buf, "buf") if self._rank == root else writable(buf, "buf")
        steps = collectives.bcast(self._rank, self._size, view, root)
        return self._together(Kind.BCAST, f"{root} {len(view)}", steps)

    def scatter(self, parts: Sequence[Any] | None, root: int) -> Call[bytearray]:
        """See :meth:`frelay.Group.scatter`."""
        self._check_rank(root, "root")
        views = None
        if self._rank == root:
            if parts is None:
                raise TypeError("parts: the root gives a buffer for each rank")
            views = readable_parts(parts, self._size, "parts")
        return self._together(Kind.SCATTER, f"{root}", collectives.scatter(self._rank, self._size, views, root))

    def gather(self, data: Any, root: int) -> Call[list[bytearray] | None]:
        """See :meth:`frelay.Group.gather`."""
        self._check_rank(root, "root")
        steps = collectives.gather(self._rank, self._size, readable(data, "data"), root)
        return self._together(Kind.GATHER, f"{root}", steps)

    def allgather(self, data: Any) -> Call[list[bytearray]]:
        """See :meth:`frelay.Group.allgather`."""
        steps = collectives.allgather(self._rank, self._size, readable(data, "data"))
        return self._together(Kind.ALLGATHER, "", steps)

    def alltoall(self, parts: Sequence[Any]) -> Call[list[bytearray]]:
        """See :meth:`frelay.Group.alltoall`."""
        steps = collectives.alltoall(self._rank, self._size, readable_parts(parts, self._size, "parts"))
        return self._together(Kind.ALLTOALL, "", steps)

    def reduce(self, buf: Any, op: Operation, root: int) -> Call[None]:
        """See :meth:`frelay.Group.reduce`."""
        self._check_rank(root, "root")
        reduction = Reduction(buf, op)
        steps = collectives.reduce(self._rank, self._size, reduction, root)
        return self._together(Kind.REDUCE, f"{root} {reduction.arguments}", steps)

    def allreduce(self, buf: Any, op: Operation) -> Call[None]:
        """See :meth:`frelay.Group.allreduce`."""
        reduction = Reduction(buf, op)
        steps = collectives.allreduce(self._rank, self._size, reduction)
        return self._together(Kind.ALLREDUCE, reduction.arguments, steps)

    def scan(self, buf: Any, op: Operation) -> Call[None]:
        """See :meth:`frelay.Group.scan`."""
        reduction = Reduction(buf, op)
        return self._together(Kind.SCAN, reduction.arguments, collectives.scan(self._rank, self._size, reduction))

    # --- checks ------------------------------------------------------------------------------------------------

    def _together(self, kind: Kind, arguments: str, steps: Steps[T]) -> Call[T]:
        self._check_open()
        self._count += 1
        return Call(self._mesh, kind, self._count, arguments, steps)

    def _check_open(self) -> None:
        mesh = self._mesh
        if mesh.broken is not None:
            # A new one each time: an error that is raised twice collects both tracebacks.
            raise GroupBroken(mesh.broken.rank, mesh.broken.text)
        if mesh.is_closed:
            raise LocalProtocolError("this group is closed")

    def _check_rank(self, rank: int, what: str) -> None:
        if not 0 <= rank < self._size:
            raise ValueError(f"{what}={rank}: the ranks of this group are 0 to {self._size - 1}")

    def _check_other(self, rank: int, what: str) -> None:
        self._check_rank(rank, what)
        if rank == self._rank:
            raise ValueError(f"{what}={rank}: this is rank {rank} itself")
