"""Whom there is room for: a place for each connection, out of a share of the descriptors.

The budget is ``fd_budget`` of the descriptor limit, or what the relay's HTTP servers (they have a share of their own),
its listeners and its own files leave, if that is less. An admitted leg takes two of it: its own, and one for its share
of pipes. Strangers, who have not shown yet who they are, take one each, and have a share of their own: a quarter is
theirs even where legs would use it, and as long as legs leave room they may have more, up to :data:`_MOST_STRANGERS`.
So no number of legs shuts the door, and no number of strangers takes the place of a leg: they give way to it.

What else bounds strangers, and who of them gives way to whom, is told in :mod:`frelay.net.strangers`.
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

# Epoll sets, log, service manager, and the files of a reload: what the relay itself needs, beside all connections.
_OWN_DESCRIPTORS: Final = 32
# The last part of the budget for legs goes only to those who hold few of them: an eighth, or four.
_PART_KEPT: Final = 8
_LEAST_KEPT: Final = 4
# As many as may queue in the kernel (net.core.somaxconn); each is a task and a socket, some 20 KiB.
_MOST_STRANGERS: Final = 4096
_LEAST_STRANGERS: Final = 4
# How many connections each of the two HTTP servers may have at a time: a sixteenth of all descriptors, within reason.
_SERVERS: Final = 2
_PART_OF_A_SERVER: Final = 16
_FEWEST_PLACES: Final = 4
_MOST_PLACES: Final = 256
# Connections accepted in one pass of the event loop. One at a time, a flood before it would let the next one wait for
# so many passes, and each of them takes as long as all that there is to do. But who gives way to a newcomer is closed a
# pass later, so this many descriptors, twice, come on top of all places: a sixteenth of few descriptors.
_MOST_ACCEPTS: Final = 32
_PART_OF_ACCEPTS: Final = 16


def raise_descriptor_limit() -> int:
    """Raise the soft RLIMIT_NOFILE to the hard one; gives the limit that is in force now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Slot:
    """One connection's place in the relay: a stranger's at first, then a leg's."""

    __slots__ = ("_admission", "_is_leg", "stranger")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_leg = False
        self.stranger: Stranger | None = None
        """Its place among the strangers, while it is one."""

    @classmethod
    def for_dialled(cls, admission: Admission) -> Slot:
        """The slot of a connection that the relay itself opens, which was never a stranger's."""
        slot = cls(admission)
        slot._is_leg = True
        admission.admitted += 1
        return slot

    def enter(self, host: str, close: Callable[[], object]) -> str | None:
        """A connection from ``host`` was accepted, which ``close`` ends; gives why it cannot stay, or None."""
        found = self._admission.strangers.enter(host, close)
        if isinstance(found, str):
            return found
        self.stranger = found
        return None

    def note_refused(self) -> None:
        """The stranger is told no: from now on it holds a descriptor and nothing else. Idempotent."""
        if self.stranger is not None:
            self._admission.strangers.note_refused(self.stranger)

    def admit(self) -> None:
        """The leg is known now, and no stranger any more. Idempotent."""
        if not self._is_leg:
            self._leave_strangers()
            self._is_leg = True
            self._admission.admitted += 1
            self._admission.strangers.evict_excess()

    def charge(self, holders: Iterable[str]) -> None:
        """Charge the leg's descriptors to ``holders``, instead of to those before; the leg is admitted."""
        self._admission.charged.take(self, holders)

    @property
    def holders(self) -> tuple[str, ...]:
        """To whom they are charged; nobody before the leg is admitted."""
        return self._admission.charged.holders_of(self)

    def release(self) -> None:
        """The connection is closed. Idempotent."""
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
    """The slots of one relay. Its :attr:`strangers` want a task."""

    def __init__(self, limits: Limits, *, descriptor_limit: int) -> None:
        self._limits = limits
        self.admitted = 0
        """Legs in the relay now, whether they wait, are paired, or are services that were dialled."""
        self.charged: Final[Pool[Slot]] = Pool(part=_PART_KEPT, least=_LEAST_KEPT)
        """The admitted legs by whom they are charged to: one function must not take the descriptors of all."""
        self.descriptor_limit: Final = descriptor_limit
        self.listeners = 0
        """Sockets on which the routes listen now."""
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
        """Connections of parties in the relay now, in whatever state."""
        return self.admitted + len(self.strangers)

    @property
    def _budget(self) -> int:
        share = int(self.descriptor_limit * self.limits.fd_budget)
        # Whatever fd_budget says, nobody takes what the HTTP servers and the listeners have or may come to have.
        rest = self.descriptor_limit - self.listeners - _SERVERS * self.connections_per_http_server
        return min(share, rest) - _OWN_DESCRIPTORS

    @property
    def connections_per_http_server(self) -> int:
        """How many connections each of the relay's HTTP servers may have at a time."""
        return max(_FEWEST_PLACES, min(_MOST_PLACES, self.descriptor_limit // _PART_OF_A_SERVER))

    @property
    def accepts_at_once(self) -> int:
        """How many connections a listening socket may accept in one pass of the event loop."""
        return max(1, min(_MOST_ACCEPTS, self.descriptor_limit // _PART_OF_ACCEPTS))

    @property
    def _strangers_own(self) -> int:
        return min(_MOST_STRANGERS, max(_LEAST_STRANGERS, self._budget // 4))

    @property
    def leg_budget(self) -> int:
        """How many legs may be admitted: one descriptor each, and one for their share of pipes."""
        return max(2, (self._budget - self._strangers_own) // 2)

    @property
    def stranger_budget(self) -> int:
        """How many strangers there may be now."""
        return max(self._strangers_own, min(_MOST_STRANGERS, self._budget - 2 * self.admitted))

    def objection(self, holders: Iterable[str]) -> str | None:
        """Why one more leg that is charged to ``holders`` cannot be admitted, in a sentence for it; None if it can."""
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
        """A slot for a connection to a service, charged to ``holders``; or why there is none."""
        holders = tuple(holders)
        objection = self.objection(holders)
        if objection is None and self.admitted >= self.leg_budget:
            objection = "this relay has no file descriptor left for the service's connection (limits.fd_budget)"
        if objection is not None:
            return objection
        slot = Slot.for_dialled(self)
        slot.charge(holders)
        return slot
