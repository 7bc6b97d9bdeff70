"""What a rank does until something is reached: the set-up, a call, the end. Standard library only.

Each is a :class:`Work`. A shell calls ``advance`` until it returns True, and between two calls it waits for the mesh's
``poll``, at most ``wakes_in()`` seconds. So the shells have no decisions in them.
"""

from __future__ import annotations

import time
import traceback
from typing import Final, Generic, Protocol, TypeVar

from frelay.client.group.collectives import Received, Steps
from frelay.client.group.frames import Kind, make_tag
from frelay.client.group.link import Incoming, Outgoing
from frelay.client.group.mesh import Mesh, SetUpFailed, wires_to
from frelay.client.group.schedule import in_order, linked_ranks
from frelay.errors import GroupBroken, Refused, RemoteProtocolError

__all__ = ["Call", "Ending", "SetUp", "Transfers", "Work", "failure_of", "received"]

T = TypeVar("T")
Message = Incoming | Outgoing

# How long the last words of a broken group may take. The whole group must know within two seconds.
_LAST_WORDS: Final = 0.5
# How long the wires of a group that has ended in good order may take to end.
_FAREWELL: Final = 2.0


class Work(Protocol):
    """Something that takes several turns."""

    def advance(self) -> bool:
        """Go on as far as possible without waiting; True when it is done."""

    def wakes_in(self) -> float:
        """Seconds until :meth:`advance` must be called, also if the kernel reports nothing."""


class _Patience:
    """Since when there is no progress, and how long that may last."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        self._timeout: Final = mesh.plan.timeout
        self._moved = -1
        self._since = time.monotonic()
        self.has_asked = False

    def look(self) -> None:
        """Take note of progress."""
        moved = self._mesh.moved
        if moved != self._moved:
            self._moved, self._since, self.has_asked = moved, time.monotonic(), False

    @property
    def idle(self) -> float:
        """Seconds without progress, as a share of the timeout: 1.0 is its end."""
        return (time.monotonic() - self._since) / self._timeout

    def wakes_in(self) -> float:
        """Seconds until half of the timeout, or all of it, has passed."""
        share = 1.0 if self.has_asked else 0.5
        return max(0.0, self._since + share * self._timeout - time.monotonic())


class SetUp:
    """Make the wires of this rank, and wait for the roster."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        plan = mesh.plan
        self._linked: Final = linked_ranks(plan.rank, plan.size, plan.eager)
        self._ahead: Final = [rank for rank in in_order(plan.rank, plan.size) if rank in self._linked]
        self._patience: Final = _Patience(mesh)

    def advance(self) -> bool:
        """See Work. Raises GroupBroken, and all that ``connect`` raises."""
        mesh = self._mesh
        try:
            mesh.turn()
        except SetUpFailed as failed:
            text = f"rank {mesh.rank} could not join with rank {failed.rank}: {failed.error}"
            mesh.break_off(GroupBroken(mesh.rank, text))
            if isinstance(failed.error, Refused) and failed.error.code == "not-authorised":
                failed.error.add_note("A certificate of a group must fit both parties of the route, func1 and func2.")
            raise failed.error from None
        while self._ahead and mesh.joining < mesh.plan.at_once and not self._must_wait_for_rank_1():
            mesh.join(self._ahead.pop(0))
        missing = [rank for rank in self._linked if not mesh.is_up(rank)]
        if not missing and not mesh.has_roster and mesh.rank == 0:
            mesh.send_roster()
            mesh.turn()
        if not missing and mesh.has_roster and not mesh.has_output:
            return True
        self._patience.look()
        if self._patience.idle >= 1:
            timeout = mesh.plan.timeout
            if missing:
                wires = wires_to(sorted(missing))
                text = (
                    f"this rank has no {wires} after {timeout:g} s: was each rank started, and once, "
                    "and does peer= fit its certificate?"
                )
                # A rank that this one has not turned to yet is not to blame. Rank 0 may only be waiting for rank 1.
                to_blame = min(missing, key=lambda rank: (not mesh.is_joining(rank), rank == 0, rank))
                raise mesh.break_off(GroupBroken(to_blame, text))
            raise mesh.break_off(GroupBroken(0, f"rank 0 sent no roster within {timeout:g} s: not all ranks have come"))
        return False

    def _must_wait_for_rank_1(self) -> bool:
        """Whether this is rank 0, and rank 1 has not taken this process for it.

        Rank 0 says which processes the group has, so if the platform has started it twice, only one of the two may get
        wires: if each had some, neither would ever have all. Rank 1 takes one of them, and the other one stays here.
        """
        return self._mesh.rank == 0 and self._ahead[0] != 1 and not self._mesh.is_up(1)

    def wakes_in(self) -> float:
        """See Work."""
        return min(self._mesh.wakes_in(), self._patience.wakes_in())


class Transfers:
    """Messages that may all be under way at once, until all of them are done."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh: Final = mesh
        self._name: Final = name
        self._messages: list[tuple[int, Message]] = []
        self._unlinked: list[tuple[int, Message]] = []
        self._patience: _Patience | None = None

    def post(self, messages: list[tuple[int, Message]]) -> None:
        """Hand these messages to the links of their ranks; those without a link wait for it."""
        self._messages = messages
        self._unlinked = self._hand_over(messages)

    def watch(self, messages: list[tuple[int, Message]]) -> None:
        """Wait for messages that their links have already."""
        self._messages = messages

    def _hand_over(self, messages: list[tuple[int, Message]]) -> list[tuple[int, Message]]:
        """Give each message to the link of its rank; returns those whose link is not there yet."""
        unlinked = []
        for rank, message in messages:
            link = self._mesh.link(rank)
            if link is None:
                unlinked.append((rank, message))
            elif isinstance(message, Incoming):
                link.receive(message)
            else:
                link.send(message)
        return unlinked

    def is_done(self) -> bool:
        """Whether all messages are done."""
        return all(message.is_done for _, message in self._messages)

    def advance(self) -> bool:
        """See Work. Raises GroupBroken."""
        if self.is_done():
            return True
        self._turn()
        if self.is_done():
            return True
        self._look_at_the_clock()
        return False

    def _turn(self) -> None:
        mesh = self._mesh
        try:
            mesh.turn()
        except SetUpFailed as failed:
            text = f"rank {mesh.rank} could not join with rank {failed.rank}: {failed.error}"
            raise mesh.break_off(GroupBroken(failed.rank, text)) from failed.error
        if self._unlinked:
            # After the turn, which may have made the link: nothing else may happen for a long time.
            self._unlinked = self._hand_over(self._unlinked)

    def _look_at_the_clock(self) -> None:
        patience = self._patience
        if patience is None:
            # Only now: most messages are done before there is anything to wait for.
            patience = self._patience = _Patience(self._mesh)
        patience.look()
        idle = patience.idle
        if idle >= 0.5 and not patience.has_asked:
            patience.has_asked = True
            self._mesh.ping()
            self._turn()
        if idle >= 1:
            raise self._mesh.break_off(self._timed_out())

    def _timed_out(self) -> GroupBroken:
        """Who is to blame: a rank that does not answer, and of several one that this call waits for."""
        timeout = self._mesh.plan.timeout
        awaited = sorted({rank for rank, message in self._messages if not message.is_done})
        silent = self._mesh.silent()
        to_blame = [rank for rank in awaited if rank in silent] or sorted(silent) or awaited
        rank = to_blame[0]
        if rank in silent:
            text = f"rank {rank} does not answer: it is not in a call, or it has stopped"
        else:
            text = f"rank {rank} answers, but its message does not come"
        return GroupBroken(rank, f"{self._name} made no progress for {timeout:g} s: {text}")

    def wakes_in(self) -> float:
        """See Work."""
        patience = self._patience
        return self._mesh.wakes_in() if patience is None else min(self._mesh.wakes_in(), patience.wakes_in())


class Call(Transfers, Generic[T]):
    """One call of a collective, from its generator of steps to its ``result``."""

    def __init__(self, mesh: Mesh, kind: Kind, sequence: int, arguments: str, steps: Steps[T]) -> None:
        super().__init__(mesh, kind.name.lower())
        self._tag: Final = make_tag(kind, sequence, arguments)
        mesh.begin_call(self._tag)
        self._steps: Final = steps
        self._receives: list[Incoming] | None = None
        self.result: T

    def advance(self) -> bool:
        """See Work. Raises GroupBroken, and what the generator raises."""
        while super().advance():
            if not self._resume():
                return True
        return False

    def _resume(self) -> bool:
        """Take the next step; False if there is none."""
        found = None if self._receives is None else [received(message) for message in self._receives]
        try:
            step = next(self._steps) if found is None else self._steps.send(found)
        except StopIteration as done:
            self.result = done.value
            return False
        except RemoteProtocolError as error:
            raise self._mesh.break_off(GroupBroken(None, f"{self._name} failed: {error}")) from None
        tag = self._tag
        self._receives = [Incoming(tag, view) for _, view in step.receives]
        # What is received first has its buffer then, and need not be kept.
        messages: list[tuple[int, Message]] = [
            (rank, message) for (rank, _), message in zip(step.receives, self._receives, strict=True)
        ]
        messages += [(rank, Outgoing(tag, view)) for rank, view in step.sends]
        self.post(messages)
        return True


def received(message: Incoming) -> Received:
    """The bytes of a message that is done: its own buffer, or the part of the given one that it fills."""
    if message.has_own_buffer or message.view is None:
        return message.buffer
    return message.view[: message.length]


def failure_of(rank: int, error: BaseException) -> GroupBroken:
    """What the other ranks hear if ``error`` ends the part of this one."""
    if isinstance(error, GroupBroken):
        return error
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return GroupBroken(rank, f"rank {rank} has left the group: {text}")


class Ending:
    """After the last call, or after a failure: until all wires have ended, or for a moment at most."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Final = mesh
        self._until: Final = time.monotonic() + (_FAREWELL if mesh.broken is None else _LAST_WORDS)

    def advance(self) -> bool:
        """See Work."""
        return self._mesh.turn_ending() or time.monotonic() >= self._until

    def wakes_in(self) -> float:
        """See Work."""
        return max(0.0, min(self._mesh.wakes_in(), self._until - time.monotonic()))
