"""What the groups of the Trio and the asyncio client share: all but the waiting. Standard library only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from frelay.client.group.collectives import Received
from frelay.client.group.link import Incoming
from frelay.client.group.member import Member
from frelay.client.group.mesh import Mesh
from frelay.client.group.reduction import Operation
from frelay.client.group.work import Call, Ending, SetUp, Transfers, Work, failure_of, received
from frelay.errors import GroupBroken, LocalProtocolError

__all__ = ["AwaitedGroup"]

T = TypeVar("T")


class AwaitedGroup(ABC):
    """As :class:`frelay.Group`, with methods that are awaited, and ``async with``.

    One task at a time may be in a call. A call that is cancelled has perhaps sent a part of a message, so it breaks the
    group, as any other failure does.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        self._member: Final = Member(mesh)
        self._is_busy = False

    async def _begin(self) -> Self:
        """Set the group up."""
        with self._calling():
            await self._drive_or_fail(SetUp(self._mesh))
        return self

    @property
    def rank(self) -> int:
        """The number of this function."""
        return self._mesh.rank

    @property
    def size(self) -> int:
        """How many functions there are."""
        return self._mesh.size

    @property
    def name(self) -> str:
        """The name of the group."""
        return self._mesh.plan.name

    # --- two ranks -----------------------------------------------------------------------------------------------

    async def send(self, data: Any, to: int) -> None:
        """See :meth:`frelay.Group.send`."""
        with self._calling():
            await self._checkpoint()
            await self._drive_or_fail(self._member.send(data, to))

    async def recv(self, source: int, into: Any = None) -> Received:
        """See :meth:`frelay.Group.recv`."""
        return await self._receive(lambda: self._member.recv(source, into))

    async def sendrecv(self, data: Any, to: int, source: int, into: Any = None) -> Received:
        """See :meth:`frelay.Group.sendrecv`."""
        return await self._receive(lambda: self._member.sendrecv(data, to, source, into))

    # --- all ranks -----------------------------------------------------------------------------------------------

    async def barrier(self) -> None:
        """See :meth:`frelay.Group.barrier`."""
        await self._run(lambda: self._member.barrier())

    async def bcast(self, buf: Any, root: int = 0) -> None:
        """See :meth:`frelay.Group.bcast`."""
        await self._run(lambda: self._member.bcast(buf, root))

    async def scatter(self, parts: Sequence[Any] | None = None, root: int = 0) -> bytearray:
        """See :meth:`frelay.Group.scatter`."""
        return await self._run(lambda: self._member.scatter(parts, root))

    async def gather(self, data: Any, root: int = 0) -> list[bytearray] | None:
        """See :meth:`frelay.Group.gather`."""
        return await self._run(lambda: self._member.gather(data, root))

    async def allgather(self, data: Any) -> list[bytearray]:
        """See :meth:`frelay.Group.allgather`."""
        return await self._run(lambda: self._member.allgather(data))

    async def alltoall(self, parts: Sequence[Any]) -> list[bytearray]:
        """See :meth:`frelay.Group.alltoall`."""
        return await self._run(lambda: self._member.alltoall(parts))

    async def reduce(self, buf: Any, op: Operation = "sum", root: int = 0) -> None:
        """See :meth:`frelay.Group.reduce`."""
        await self._run(lambda: self._member.reduce(buf, op, root))

    async def allreduce(self, buf: Any, op: Operation = "sum") -> None:
        """See :meth:`frelay.Group.allreduce`."""
        await self._run(lambda: self._member.allreduce(buf, op))

    async def scan(self, buf: Any, op: Operation = "sum") -> None:
        """See :meth:`frelay.Group.scan`."""
        await self._run(lambda: self._member.scan(buf, op))

    # --- the end -------------------------------------------------------------------------------------------------

    async def abort(self, text: str) -> None:
        """See :meth:`frelay.Group.abort`."""
        with self._calling():
            if not self._mesh.is_closed:
                self._mesh.break_off(GroupBroken(self.rank, f"rank {self.rank} aborted: {text}"))
                await self._leave_shielded()

    async def close(self) -> None:
        """See :meth:`frelay.Group.close`."""
        if self._mesh.is_closed:
            await self._checkpoint()
            return
        self._mesh.is_ending = True
        await self._run(self._member.close)
        self._mesh.end()
        await self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        elif not self._mesh.is_closed:
            self._mesh.break_off(failure_of(self.rank, error))
            await self._leave_shielded()

    # --- waiting -------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _wait(self, seconds: float) -> None:
        """Let other tasks run, until the mesh's poll is readable, or for so long at most."""

    @abstractmethod
    async def _checkpoint(self) -> None:
        """Let other tasks run once, and be cancelled."""

    @abstractmethod
    async def _leave_shielded(self) -> None:
        """:meth:`_leave`, although this task is cancelled: the other ranks must hear why."""

    @contextmanager
    def _calling(self) -> Iterator[None]:
        if self._is_busy:
            raise LocalProtocolError("another task is in a call of this group: a group makes one call at a time")
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    async def _run(self, make: Callable[[], Call[T]]) -> T:
        with self._calling():
            await self._checkpoint()
            call = make()
            await self._drive_or_fail(call)
            return call.result

    async def _receive(self, make: Callable[[], tuple[Transfers, Incoming]]) -> Received:
        with self._calling():
            await self._checkpoint()
            transfers, message = make()
            await self._drive_or_fail(transfers)
            return received(message)

    async def _drive_or_fail(self, work: Work) -> None:
        try:
            await self._drive(work)
        except BaseException as error:
            self._mesh.break_off(failure_of(self.rank, error))
            await self._leave_shielded()
            raise

    async def _drive(self, work: Work) -> None:
        while not work.advance():
            await self._wait(work.wakes_in())
            self._mesh.poll.wait(0)

    async def _leave(self) -> None:
        try:
            await self._drive(Ending(self._mesh))
        finally:
            self._mesh.close()
