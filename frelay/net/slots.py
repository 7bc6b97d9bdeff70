"""Admission control: each connection has a slot, and the slots share the file descriptors of the process.

The budget is ``fd_budget`` of the descriptor limit. It is less if the relay's HTTP servers, its listeners and its own
files leave less. An admitted leg costs two descriptors: its socket, and its share of the pipes. A stranger, which has
not shown its identity yet, costs one. A quarter of the budget is always for strangers, and they may use what legs leave
free, up to :data:`_MOST_STRANGERS`. So legs never keep new connections out, and strangers never keep a leg out: a
stranger is disconnected to make room for it.

:mod:`frelay.net.strangers` says what else limits strangers and which of them is disconnected first.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from typing import Final

import trio

from frelay.config.model import Limits
from frelay.net.shares import Pool, holder_in_words
from frelay.net.strangers import Stranger, Strangers

__all__ = ["Admission", "Slot", "raise_descriptor_limit"]

# What the relay itself needs beside all connections: epoll sets, log, service manager, the files of a reload.
_OWN_DESCRIPTORS: Final = 32
# The last eighth of the legs' budget, and at least four, is only for holders that have few legs.
_PART_KEPT: Final = 8
_LEAST_KEPT: Final = 4
# As many as the kernel queues (net.core.somaxconn). Each costs a task and a socket, some 20 KiB.
_MOST_STRANGERS: Final = 4096
_LEAST_STRANGERS: Final = 4
# Each of the two HTTP servers may have a sixteenth of all descriptors as connections, within these bounds.
_HTTP_SERVERS: Final = 2
_PART_OF_HTTP_SERVER: Final = 16
_FEWEST_HTTP_CONNECTIONS: Final = 4
_MOST_HTTP_CONNECTIONS: Final = 256
# Connections that a listener accepts in one pass of the event loop. With one at a time, a connection behind a flood
# would wait for as many passes as the flood has connections, and each pass does all other work, too. But an evicted
# stranger is closed one pass later, so up to twice this many descriptors are open beyond all slots. Therefore it is at
# most a sixteenth of the descriptors.
_MOST_ACCEPTS: Final = 32
_PART_OF_ACCEPTS: Final = 16


def raise_descriptor_limit() -> int:
    """Raise the soft RLIMIT_NOFILE to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Slot:
    """The slot of one connection: a stranger's at first, then an admitted leg's."""

    __slots__ = ("_admission", "_is_leg", "stranger")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_leg = False
        self.stranger: Stranger | None = None
        """Its entry among the strangers, as long as it is one."""

    @classmethod
    def for_dialled(cls, admission: Admission) -> Slot:
        """The slot of a connection that the relay opens to a service. It is never a stranger's."""
        slot = cls(admission)
        slot._is_leg = True
        admission.admitted += 1
        return slot

    def enter(self, host: str, close: Callable[[], object]) -> str | None:
        """Enter the accepted connection from ``host`` among the strangers; ``close`` disconnects it.

        Returns why there is no room for it, or None.
        """
        found = self._admission.strangers.enter(host, close)
        if isinstance(found, str):
            return found
        self.stranger = found
        return None

    def note_refused(self) -> None:
        """The stranger is refused: until its close it holds a descriptor and nothing else. Idempotent."""
        if self.stranger is not None:
            self._admission.strangers.note_refused(self.stranger)

    def admit(self) -> None:
        """Make the stranger an admitted leg, because its identity is known now. Idempotent."""
        if not self._is_leg:
            self._leave_strangers()
            self._is_leg = True
            self._admission.admitted += 1
            self._admission.strangers.evict_excess()

    def charge(self, holders: Iterable[str]) -> None:
        """Charge the descriptors of the admitted leg to ``holders`` and no longer to the holders before."""
        self._admission.charged.take(self, holders)

    @property
    def holders(self) -> tuple[str, ...]:
        """The holders that its descriptors are charged to; empty until the leg is admitted."""
        return self._admission.charged.holders_of(self)

    def release(self) -> None:
        """Free the slot, because its connection is closed. Idempotent."""
        self._leave_strangers()
        self._admission.charged.give_back(self)
        if self._is_leg:
            self._is_leg = False
            self._admission.admitted -= 1

    def _leave_strangers(self) -> None:
        if self.stranger is not None:
            self._admission.strangers.release(self.stranger)
            self.stranger = None


class Admission:
    """The slots of one relay. Run its :attr:`strangers` in a task."""

    def __init__(self, limits: Limits, *, descriptor_limit: int) -> None:
        self._limits = limits
        self.admitted = 0
        """Admitted legs now: those that wait, those that are paired, and dialled services."""
        self.charged: Final[Pool[Slot]] = Pool(part=_PART_KEPT, least=_LEAST_KEPT)
        """The admitted legs by their holders, so that one function cannot take the descriptors of all."""
        self.descriptor_limit: Final = descriptor_limit
        self.listeners = 0
        """Listening sockets of the routes now."""
        self.strangers: Final = Strangers(limits, room=lambda: self.stranger_budget, clock=trio.current_time)

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self.strangers.set_limits(limits)

    @property
    def legs(self) -> int:
        """All connections of parties now: strangers and admitted legs."""
        return self.admitted + len(self.strangers)

    @property
    def _budget(self) -> int:
        share = int(self.descriptor_limit * self.limits.fd_budget)
        # The descriptors of the listeners, and those that the HTTP servers may need, are never part of the budget.
        rest = self.descriptor_limit - self.listeners - _HTTP_SERVERS * self.connections_per_http_server
        return min(share, rest) - _OWN_DESCRIPTORS

    @property
    def connections_per_http_server(self) -> int:
        """How many connections each of the relay's HTTP servers may have at a time."""
        share = self.descriptor_limit // _PART_OF_HTTP_SERVER
        return max(_FEWEST_HTTP_CONNECTIONS, min(_MOST_HTTP_CONNECTIONS, share))

    @property
    def accepts_at_once(self) -> int:
        """How many connections a listening socket may accept in one pass of the event loop."""
        return max(1, min(_MOST_ACCEPTS, self.descriptor_limit // _PART_OF_ACCEPTS))

    @property
    def _strangers_own(self) -> int:
        return min(_MOST_STRANGERS, max(_LEAST_STRANGERS, self._budget // 4))

    @property
    def leg_budget(self) -> int:
        """How many legs may be admitted. Each costs two descriptors: its socket, and its share of the pipes."""
        return max(2, (self._budget - self._strangers_own) // 2)

    @property
    def stranger_budget(self) -> int:
        """How many strangers there may be now."""
        return max(self._strangers_own, min(_MOST_STRANGERS, self._budget - 2 * self.admitted))

    def objection(self, holders: Iterable[str]) -> str | None:
        """Why one more leg charged to ``holders`` cannot be admitted, in a sentence for that leg; None if it can."""
        budget = self.leg_budget
        if self.charged.is_full(budget):
            return "this relay has no file descriptor left for one more connection (limits.fd_budget)"
        for holder in holders:
            if not self.charged.may_take(holder, budget):
                held = self.charged.held(holder)
                return (
                    f"{holder_in_words(holder)} has {held} of the {budget} connections of this relay "
                    "(limits.fd_budget), and the rest is kept for others"
                )
        return None

    def slot_for_dialled(self, holders: Iterable[str]) -> Slot | str:
        """A slot for a connection to a service, charged to ``holders``; or a sentence that says why there is none."""
        holders = tuple(holders)
        objection = self.objection(holders)
        if objection is None and self.admitted >= self.leg_budget:
            objection = "this relay has no file descriptor left for the service's connection (limits.fd_budget)"
        if objection is not None:
            return objection
        slot = Slot.for_dialled(self)
        slot.charge(holders)
        return slot
