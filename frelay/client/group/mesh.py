"""All wires of one rank, and what their faults mean for the group. Standard library only.

Theory of operation. A mesh never waits. :meth:`Mesh.turn` moves what can be moved now; then the owner waits for
:attr:`Mesh.poll`, and calls it again. It watches all wires and not only those that a call needs, so the death of any
rank is seen at once.

* Both ranks of a wire first send HELLO. Rank 0 has a wire to each rank. When all of them are up, it sends the roster:
  the instance of each rank, 16 random bytes. If the platform has started a rank twice, the roster names one of the two
  processes. The ranks refuse the other one and join again, so the group forms with the first.
* Until the roster stands at this rank, a wire that is lost is made again, if the other rank is back soon. After that a
  lost wire is the end of the group.
* The rank to blame. A rank whose wire was cut is gone. But a rank that fails on purpose, or because of another one,
  first sends ABORT with the rank to blame. So all that has arrived is read before a cut is believed, and an ABORT
  outweighs it (:class:`~frelay.client.group.link.Weight`).
* A group that is broken stays broken: messages may be lost in the middle, and nobody knows whose.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable
from typing import Final

from frelay.client.group.frames import Abort, Hello, Kind, make_tag, read_roster, write_roster
from frelay.client.group.joins import Join, LookUps
from frelay.client.group.link import Fault, Incoming, Link, Ongoing, Outgoing, Weight
from frelay.client.group.plan import GroupPlan
from frelay.client.group.poll import Poll
from frelay.client.group.wires import PeerWire
from frelay.errors import FrelayError, GroupBroken, RemoteProtocolError

__all__ = ["Mesh", "SetUpFailed"]

# One read. Large enough that a message of megabytes costs few system calls.
_READ: Final = 262144
# What is in the kernel's buffers fits into so many; a rank that still sends has not sent ABORT.
_MOST_READS: Final = 64
# A wire that was lost is joined again after a random part of this, so that both sides do not meet a loaded relay again
# at the same moment.
_REJOIN_PAUSE: Final = 0.2
# A rank that lives notices the loss of a wire at the same time, and needs three handshakes to be back. One that is gone
# must be known to all within two seconds.
_COME_BACK: Final = 1.25
# How long a process that was refused may take to read why.
_REFUSAL_TIME: Final = 1.0
_HELLO: Final = make_tag(Kind.HELLO)
_ROSTER: Final = make_tag(Kind.ROSTER)


class Mesh:
    """The wires of one rank; the owner calls :meth:`close`."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan: Final = plan
        self.rank: Final = plan.rank
        self.size: Final = plan.size
        self.poll: Final = Poll()
        self._look_ups: Final = LookUps(self.poll)
        self._joins: Final[dict[int, Join]] = {}
        self._wires: Final[dict[int, PeerWire]] = {}
        self._hellos: Final[dict[int, Incoming]] = {}
        self._lost: Final[dict[int, float]] = {}
        """Ranks whose wire was lost in the set-up, and until when they must be back."""
        self._refused: Final[list[tuple[PeerWire, float]]] = []
        self._scratch: Final = memoryview(bytearray(_READ))
        self._ongoing: Final = Ongoing()
        self._instance: Final = os.urandom(16)
        self._roster: list[bytes] | None = None
        self._roster_message: Incoming | None = None
        self.broken: GroupBroken | None = None
        """Why the group is of no more use."""
        self.is_ending = False
        """Whether the ranks are in ``close`` together, so that an end of a wire is no fault."""
        self.is_closed = False

    # --- for a call ----------------------------------------------------------------------------------------------

    def link(self, rank: int) -> Link | None:
        """The link to ``rank``; None while the join is under way, which this call begins if it must."""
        wire = self._wires.get(rank)
        if wire is not None and wire.is_up:
            return wire.link
        self.join(rank)
        return None

    def only_wire(self) -> PeerWire | None:
        """The wire of a group of two, which has no other to watch."""
        return self._wires[1 - self.rank] if self.size == 2 else None

    def begin_call(self, tag: bytes) -> None:
        """This rank begins a call that all ranks make together."""
        self._ongoing.tag = tag
        for wire in self._wires.values():
            if wire.link.has_kept:
                wire.link.check_all_kept()

    @property
    def moved(self) -> int:
        """Grows with each byte of a message and each new wire."""
        total = len(self._wires)
        for wire in self._wires.values():
            total += wire.link.moved
        return total

    def ping(self) -> None:
        """Ask all ranks whether they are in a call."""
        for wire in self._wires.values():
            wire.link.ping()

    def silent(self) -> list[int]:
        """The ranks that have not answered the last :meth:`ping`."""
        return [rank for rank, wire in self._wires.items() if not wire.link.has_answered]

    # --- for the set-up ------------------------------------------------------------------------------------------

    @property
    def has_roster(self) -> bool:
        """Whether the roster stands at this rank."""
        return self._roster is not None

    @property
    def joining(self) -> int:
        """How many ranks have a join or a hello under way."""
        return len(self._joins) + len(self._hellos)

    def is_joining(self, rank: int) -> bool:
        """Whether a join or a hello with ``rank`` is under way."""
        return rank in self._joins or rank in self._hellos

    def is_up(self, rank: int) -> bool:
        """Whether the wire to ``rank`` is made and its hello checked."""
        return (wire := self._wires.get(rank)) is not None and wire.is_up

    def join(self, rank: int, *, pause: float = 0.0) -> None:
        """Begin to join with ``rank``, if that is not under way or done."""
        if rank not in self._joins and rank not in self._wires:
            self._joins[rank] = Join(self.plan.join_plan(rank), self.poll, self._look_ups, pause=pause)

    def send_roster(self) -> None:
        """At rank 0, when all wires are up: tell all ranks which processes the group has."""
        roster = [self._instance if rank == self.rank else self._wires[rank].instance for rank in range(self.size)]
        self._roster = roster
        payload = memoryview(write_roster(roster))
        for wire in self._wires.values():
            wire.link.send(Outgoing(_ROSTER, payload))

    # --- moving --------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Move all that can be moved now.

        Raises GroupBroken, after :meth:`break_off`, if the group is broken; SetUpFailed if a join has failed.
        """
        is_troubled = False
        for wire in self._wires.values():
            wire.move(self._scratch)
            if wire.link.fault is not None or wire.link.has_ended:
                is_troubled = True
        if self._joins:
            self._turn_joins()
        if self._hellos or self._roster_message is not None:
            self._read_hellos()
            self._read_roster()
        if self._refused:
            self._turn_refused()
        if is_troubled:
            self._judge()
        if self._lost:
            self._look_for_the_lost()

    @property
    def is_busy(self) -> bool:
        """Whether :meth:`turn` has something to do without waiting."""
        return any(wire.is_busy for wire in self._wires.values())

    @property
    def has_output(self) -> bool:
        """Whether something is queued that the kernel has not taken yet."""
        return any(wire.link.has_output for wire in self._wires.values())

    def wakes_in(self) -> float:
        """Seconds until :meth:`turn` must be called if :attr:`poll` reports nothing before; perhaps infinite."""
        if self.is_busy:
            return 0.0
        wakes = [join.wakes_at for join in self._joins.values()]
        wakes += [until for _, until in self._refused]
        wakes += self._lost.values()
        return max(0.0, min(wakes) - time.monotonic()) if wakes else float("inf")

    def _turn_joins(self) -> None:
        now = time.monotonic()
        for rank, join in list(self._joins.items()):
            if join.is_ready or now >= join.wakes_at:
                join.resume()
            if not join.is_done:
                continue
            del self._joins[rank]
            if join.joined is None or join.sock is None:
                raise SetUpFailed(rank, join.error or AssertionError("a join ends with a result or an error"))
            if join.joined.engine is None:
                raise AssertionError("the inner handshake is done without an engine")
            engine = join.joined.engine
            wire = self._wires[rank] = PeerWire(
                join.sock, engine, Link(rank, self.size, engine, self._ongoing), self.poll
            )
            hello = Hello(self.rank, self.size, self._instance, self.plan.name_digest)
            wire.link.send(Outgoing(_HELLO, memoryview(hello.encode())))
            self._hellos[rank] = Incoming(_HELLO)
            wire.link.receive(self._hellos[rank])
            wire.move(self._scratch)

    def _read_hellos(self) -> None:
        for rank, message in list(self._hellos.items()):
            if not message.is_done:
                continue
            del self._hellos[rank]
            wire = self._wires[rank]
            try:
                hello = Hello.decode(message.buffer)
                self._check_hello(hello, rank)
            except RemoteProtocolError as error:
                raise self.break_off(GroupBroken(rank, f"rank {rank} does not fit: {error}")) from None
            wire.instance = hello.instance
            if self._roster is not None and wire.instance != self._roster[rank]:
                self._refuse(rank)
                continue
            wire.is_up = True
            self._lost.pop(rank, None)
            if rank == 0 and self._roster is None:
                self._roster_message = Incoming(_ROSTER)
                wire.link.receive(self._roster_message)

    def _check_hello(self, hello: Hello, rank: int) -> None:
        if hello.size != self.size:
            raise RemoteProtocolError(f"it was started with size={hello.size}, and this rank with size={self.size}")
        if hello.rank != rank:
            raise RemoteProtocolError(f"it is rank {hello.rank}")
        if hello.name != self.plan.name_digest:
            raise RemoteProtocolError("it is in a group of another name")

    def _read_roster(self) -> None:
        if self._roster_message is None or not self._roster_message.is_done:
            return
        try:
            roster = read_roster(self._roster_message.buffer, self.size)
        except RemoteProtocolError as error:
            raise self.break_off(GroupBroken(0, f"rank 0 does not fit: {error}")) from None
        self._roster_message = None
        self._roster = roster
        if roster[self.rank] != self._instance:
            raise self._started_twice()
        for rank, wire in list(self._wires.items()):
            if wire.is_up and wire.instance != roster[rank]:
                self._refuse(rank)

    def _started_twice(self) -> GroupBroken:
        """Leave without a word to the others: they have the other process."""
        text = f"rank {self.rank} was started twice, and the group has the other process"
        self.broken = GroupBroken(self.rank, text)
        self._drop_all()
        return self.broken

    def _refuse(self, rank: int) -> None:
        """Cut the wire to a process that is not in the roster, and wait for the one that is."""
        wire = self._wires.pop(rank)
        text = f"rank {rank} was started twice, and the group has the other process"
        wire.link.abort(Abort(rank, text), to_this_process_alone=True)
        wire.cut()
        self._refused.append((wire, time.monotonic() + _REFUSAL_TIME))
        self.join(rank)

    def _turn_refused(self) -> None:
        now = time.monotonic()
        for one in tuple(self._refused):
            wire, until = one
            wire.move(self._scratch)
            if wire.is_finished or now >= until:
                self._refused.remove(one)
                wire.close()

    # --- faults --------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """A wire has a fault or has ended: make it again, or break the group off."""
        # An ABORT that explains the fault may have arrived on another wire.
        self.poll.wait(0)
        for wire in self._wires.values():
            for _ in range(_MOST_READS):
                if not wire.is_busy or wire.link.fault is not None or wire.link.has_ended:
                    break
                wire.move(self._scratch)
        faults = [fault for rank, wire in self._wires.items() if (fault := self._fault_of(rank, wire)) is not None]
        if not faults:
            return
        heaviest = max(faults, key=lambda fault: fault.weight)
        if heaviest.weight is Weight.REFUSED:
            raise self._started_twice()
        if heaviest.weight is Weight.CUT:
            ranks = sorted(fault.rank for fault in faults if fault.rank is not None)
            if self._roster is None:
                for rank in ranks:
                    self._make_again(rank)
                return
            text = f"the {wires_to(ranks)} broke: {heaviest.text}"
            raise self.break_off(GroupBroken(ranks[0], text))
        raise self.break_off(GroupBroken(heaviest.rank, heaviest.text))

    def _fault_of(self, rank: int, wire: PeerWire) -> Fault | None:
        if wire.link.fault is None and wire.link.has_ended and not self.is_ending:
            return Fault(Weight.CUT, rank, "it has left the group")
        return wire.link.fault

    def _make_again(self, rank: int) -> None:
        self._wires.pop(rank).close()
        self._hellos.pop(rank, None)
        if rank == 0:
            self._roster_message = None
        self._lost.setdefault(rank, time.monotonic() + _COME_BACK)
        self.join(rank, pause=random.uniform(0, _REJOIN_PAUSE))  # noqa: S311  not a secret

    def _look_for_the_lost(self) -> None:
        now = time.monotonic()
        for rank, until in self._lost.items():
            if now >= until:
                text = f"the wire to rank {rank} broke in the set-up, and it did not come back: it is gone"
                raise self.break_off(GroupBroken(rank, text))

    def break_off(self, error: GroupBroken) -> GroupBroken:
        """Tell all ranks that the group is broken, and cut the wires; returns ``error``, for the caller to raise.

        The owner then calls :meth:`turn_ending` until it returns True, or a moment has passed, and :meth:`close`.
        """
        if self.broken is None:
            self.broken = error
            for join in self._joins.values():
                join.close()
            self._joins.clear()
            self._hellos.clear()
            self._lost.clear()
            for wire in self._wires.values():
                wire.link.abort(Abort(error.rank, error.text))
                wire.cut()
                wire.move(self._scratch)
        return self.broken

    # --- the end -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End all wires in good order; the owner calls :meth:`turn_ending` then."""
        self.is_ending = True
        for wire in self._wires.values():
            wire.end()

    def turn_ending(self) -> bool:
        """Move what can be moved, after :meth:`end` or :meth:`break_off`; True when all wires have ended."""
        for wire in self._wires.values():
            wire.move(self._scratch)
        return all(wire.is_finished for wire in self._wires.values())

    def _drop_all(self) -> None:
        for join in self._joins.values():
            join.close()
        for wire in [*self._wires.values(), *(wire for wire, _ in self._refused)]:
            wire.close()
        self._joins.clear()
        self._hellos.clear()
        self._wires.clear()
        self._refused.clear()

    def close(self) -> None:
        """Close all that is open."""
        if not self.is_closed:
            self.is_closed = True
            self._drop_all()
            self._look_ups.close()
            self.poll.close()


class SetUpFailed(FrelayError):
    """A join failed; the cause is its own error."""

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(f"the join with rank {rank} failed: {error}")
        self.rank: Final = rank
        self.error: Final = error


def wires_to(ranks: Iterable[int]) -> str:
    """``wire to rank 3`` or ``wires to ranks 3, 4``."""
    texts = [str(rank) for rank in ranks]
    return f"wire to rank {texts[0]}" if len(texts) == 1 else f"wires to ranks {', '.join(texts)}"
