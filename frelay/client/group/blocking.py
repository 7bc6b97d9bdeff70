"""A group in ordinary blocking code: :func:`group` and :class:`Group`. Standard library only.

This is the shell that waits by blocking. :mod:`frelay.client.group.mesh` does all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from frelay.client.group.collectives import Received
from frelay.client.group.link import Incoming
from frelay.client.group.member import Member
from frelay.client.group.mesh import Mesh
from frelay.client.group.plan import ConnectOptions, GroupPlan, Peer
from frelay.client.group.reduction import Operation
from frelay.client.group.short import ShortWay
from frelay.client.group.work import Call, Ending, SetUp, Transfers, Work, failure_of, received
from frelay.errors import GroupBroken

__all__ = ["Group", "group"]

T = TypeVar("T")

# epoll takes milliseconds as an int, so 24 days at most.
_LONGEST_WAIT: Final = 86400.0


def group(
    address: str,
    *,
    name: str,
    rank: int,
    size: int,
    peer: Peer,
    timeout: float = 60.0,
    eager: bool | None = None,
    at_once: int = 4,
    **connect: Unpack[ConnectOptions],
) -> Group:
    """Join with the other functions of a job; returns when this rank has its wires and the group is complete.

    Each function of the job calls it with the same ``name``, ``size`` and route, and with a ``rank`` of its own. The
    route must let every certificate be both parties, and so has the same list for func1 and func2.

    Args:
        address: the relay's ``host:port``.
        name: the name of this run of the job, which no other run has: visible ASCII without spaces.
        rank: the number of this function, from 0.
        size: how many functions there are.
        peer: the name that each rank's certificate must have. In a text ``{rank}`` stands for the rank:
            ``"dns:rank{rank}.job42"``. Or a sequence with a name for each rank, or a function that returns the name of
            a rank. The relay keeps to it, and each rank checks it once more, end to end.
        timeout: how many seconds a call may be without any progress, and the set-up without a new wire. It must be
            longer than a rank computes between two calls.
        eager: make a wire to every rank now (True), or now only to those that most collectives need and to the others
            on demand (False). None: every rank in a group of up to 16.
        at_once: how many joins of this rank are under way at the same time.
        connect: ``cert``, ``ca``, and as needed ``key``, ``route``, ``server_name``, ``inner_cert``, ``inner_key``,
            ``inner_ca``, ``mode``, ``proxy`` and ``traceparent``, as for :func:`frelay.connect`.

    Raises:
        GroupBroken: not all ranks came in time, or another rank failed; see its ``rank``.
        RelayUnreachable, Refused, RelayTooOld, PeerIdentityMismatch, CertificateError: as :func:`frelay.connect`.
        ValueError, TypeError: an argument cannot be used.
    """
    plan = GroupPlan.make(
        address,
        name=name,
        rank=rank,
        size=size,
        peer=peer,
        timeout=timeout,
        eager=eager,
        at_once=at_once,
        options=connect,
    )
    return Group._begin(plan)


class Group:
    """N functions of one job, each with an end-to-end encrypted wire to the others; :func:`frelay.group` makes one.

    All ranks call the same collective methods in the same order. Buffers are bytes-like objects, ``array.array`` or
    NumPy arrays, all contiguous; those that are received into are changed in place. A method that returns bytes returns
    a new ``bytearray``. Elements are as in the buffer, so all ranks need the same element type and byte order.

    If a rank dies, leaves, aborts or is out of step, every method raises :class:`~frelay.GroupBroken` at all ranks, and
    the group is of no more use. So does an interrupted call. A group is for one thread at a time.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        self._member: Final = Member(mesh)
        self._short: ShortWay | None = None

    @classmethod
    def _begin(cls, plan: GroupPlan) -> Self:
        group = cls(Mesh(plan))
        group._drive_or_fail(SetUp(group._mesh))
        group._short = ShortWay.of(group._mesh, group._member)
        return group

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

    def send(self, data: Any, to: int) -> None:
        """Send a message to one rank, which receives it by :meth:`recv` or :meth:`sendrecv`.

        It returns when the kernel has all of it, perhaps before the other rank has received it. Up to 16 MiB go through
        even if the other rank itself sends first; ranks that exchange more use :meth:`sendrecv`.
        """
        short = self._short
        if short is None:
            self._drive_or_fail(self._member.send(data, to))
            return
        try:
            rest = short.send(data, to)
        except BaseException as error:
            self._fail_if_torn(short, error)
            raise
        if rest is not None:
            self._drive_or_fail(rest)

    def recv(self, source: int, into: Any = None) -> Received:
        """Receive the next message from one rank, into a new bytearray or into ``into``, which must be large enough.

        Returns the bytes that came: the bytearray, or the part of ``into`` that they fill.
        """
        short = self._short
        if short is not None:
            try:
                found = short.recv(source, into)
            except BaseException as error:
                self._fail_if_torn(short, error)
                raise
            if found is not None:
                return found
        return self._receive(*self._member.recv(source, into))

    def sendrecv(self, data: Any, to: int, source: int, into: Any = None) -> Received:
        """:meth:`send` and :meth:`recv` at the same time, with one rank or two."""
        return self._receive(*self._member.sendrecv(data, to, source, into))

    # --- all ranks -----------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._run(self._member.barrier())

    def bcast(self, buf: Any, root: int = 0) -> None:
        """Copy the root's ``buf`` into the ``buf`` of all ranks; it has the same length everywhere."""
        self._run(self._member.bcast(buf, root))

    def scatter(self, parts: Sequence[Any] | None = None, root: int = 0) -> bytearray:
        """Give each rank its part. The root gives a buffer for each rank, of any lengths; the others give None."""
        return self._run(self._member.scatter(parts, root))

    def gather(self, data: Any, root: int = 0) -> list[bytearray] | None:
        """The ``data`` of all ranks, of any lengths, in their order at the root; None at the others."""
        return self._run(self._member.gather(data, root))

    def allgather(self, data: Any) -> list[bytearray]:
        """The ``data`` of all ranks, of any lengths, in their order at all of them."""
        return self._run(self._member.allgather(data))

    def alltoall(self, parts: Sequence[Any]) -> list[bytearray]:
        """Give a buffer for each rank, of any lengths; get the one that each rank has for this one."""
        return self._run(self._member.alltoall(parts))

    def reduce(self, buf: Any, op: Operation = "sum", root: int = 0) -> None:
        """Fold ``buf`` of all ranks, element by element, into the root's; the others stay as they are.

        ``op`` is ``"sum"``, ``"prod"``, ``"min"``, ``"max"``, or an associative function of two: of two elements, or of
        two arrays if ``buf`` is a NumPy array. It gets the lower ranks first, so it need not commute. Integers wrap
        around.
        """
        self._run(self._member.reduce(buf, op, root))

    def allreduce(self, buf: Any, op: Operation = "sum") -> None:
        """As :meth:`reduce`, with the result in the ``buf`` of all ranks, the same bits everywhere."""
        self._run(self._member.allreduce(buf, op))

    def scan(self, buf: Any, op: Operation = "sum") -> None:
        """As :meth:`reduce`, where each rank gets the fold of the ranks up to itself."""
        self._run(self._member.scan(buf, op))

    # --- the end -------------------------------------------------------------------------------------------------

    def abort(self, text: str) -> None:
        """End the group at once: all ranks raise GroupBroken with this rank and this text."""
        if not self._mesh.is_closed:
            self._mesh.break_off(GroupBroken(self.rank, f"rank {self.rank} aborted: {text}"))
            self._leave()

    def close(self) -> None:
        """End the group in good order. All ranks call it; it returns when all have."""
        if self._mesh.is_closed:
            return
        call = self._member.close()
        self._mesh.is_ending = True
        self._run(call)
        self._mesh.end()
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._mesh.is_closed:
            self._fail(error)

    # --- waiting -------------------------------------------------------------------------------------------------

    def _run(self, call: Call[T]) -> T:
        self._drive_or_fail(call)
        return call.result

    def _receive(self, transfers: Transfers, message: Incoming) -> Received:
        self._drive_or_fail(transfers)
        return received(message)

    def _drive_or_fail(self, work: Work) -> None:
        try:
            self._drive(work)
        except BaseException as error:
            # Also by KeyboardInterrupt: it may have lost a part of a message.
            self._fail(error)
            raise

    def _fail_if_torn(self, short: ShortWay, error: BaseException) -> None:
        if short.is_under_way:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._mesh.break_off(failure_of(self.rank, error))
        self._leave()

    def _drive(self, work: Work) -> None:
        poll = self._mesh.poll
        while not work.advance():
            poll.wait(min(work.wakes_in(), _LONGEST_WAIT))

    def _leave(self) -> None:
        self._short = None
        try:
            self._drive(Ending(self._mesh))
        finally:
            self._mesh.close()
