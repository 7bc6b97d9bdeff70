"""Who may even begin: slots for connections that nobody has vouched for yet, and a share of the descriptors.

A connection costs the relay nothing until it is accepted, and a stranger's connection must never cost a known
function its place. So a slot is taken *before* ``accept``: when all are in use, newcomers wait in the kernel's backlog,
for free. A slot is given back once the leg is admitted (its certificate verified, its JOIN read, and room for it in the
lobby) or has gone, and handshake_timeout + join_timeout bound how long that can take.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterable
from typing import Final

import trio

from frelay.config.model import Limits
from frelay.shares import Pool, described

__all__ = ["Admission", "Slot", "raise_descriptor_limit"]

# Listeners, epoll sets, log, admin API, reload: what the relay itself needs, beside its legs.
_OWN_DESCRIPTORS: Final = 32
# The last part of the budget for legs goes only to those who hold few of them: an eighth, or four.
_PART_KEPT: Final = 8
_LEAST_KEPT: Final = 4


def raise_descriptor_limit() -> int:
    """Raise the soft RLIMIT_NOFILE to the hard one; gives the limit that is in force now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Slot:
    """The right of one connection to be in the relay unauthenticated, for a short time."""

    __slots__ = ("_admission", "_host", "_is_admitted", "_is_counted")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._host: str | None = None
        self._is_admitted = False
        self._is_counted = False
        """Whether a connection is in it that counts among the legs."""

    @classmethod
    def for_own_call(cls, admission: Admission) -> Slot:
        """The slot of a connection that the relay itself opens, which was never a stranger's."""
        slot = cls(admission)
        slot._is_admitted = slot._is_counted = True
        admission.legs += 1
        return slot

    def occupy(self, host: str) -> str | None:
        """A connection from ``host`` was accepted into this slot; gives why it cannot stay, or None."""
        admission = self._admission
        self._host = host
        self._is_counted = True
        admission._by_host[host] += 1
        admission.legs += 1
        if admission._by_host[host] > admission.limits.max_pre_auth_per_ip:
            return f"{admission.limits.max_pre_auth_per_ip} connections from this address are unauthenticated already"
        if admission.legs > admission.leg_budget:
            return "the share of file descriptors for legs is used up (limits.fd_budget)"
        return None

    def admitted(self) -> None:
        """The leg is known now: the slot is free for the next stranger. Idempotent."""
        if not self._is_admitted:
            self._is_admitted = True
            self._admission._free.release()
            if self._host is not None:
                self._admission._forget(self._host)

    def charge(self, holders: Iterable[str]) -> None:
        """Charge the leg's descriptors to ``holders``, instead of to those before; the leg is admitted."""
        self._admission.charged.take(self, holders)

    @property
    def holders(self) -> tuple[str, ...]:
        """To whom they are charged; nobody before the leg is admitted."""
        return self._admission.charged.holders_of(self)

    def gone(self) -> None:
        """The connection is closed."""
        self.admitted()
        self._admission.charged.give_back(self)
        if self._is_counted:
            self._is_counted = False
            self._admission.legs -= 1


class Admission:
    """The slots of one relay."""

    def __init__(self, limits: Limits, *, descriptor_limit: int) -> None:
        self.limits = limits
        """May be replaced by a reload; ``max_pre_auth`` itself counts from the start of the process."""
        self.legs = 0
        """Connections of parties in the relay now, in whatever state."""
        self.charged: Final[Pool[Slot]] = Pool(part=_PART_KEPT, least=_LEAST_KEPT)
        """The admitted legs by whom they are charged to: one function must not take the descriptors of all."""
        self.descriptor_limit: Final = descriptor_limit
        self._free: Final = trio.Semaphore(limits.max_pre_auth)
        self._by_host: Final[Counter[str]] = Counter()

    @property
    def leg_budget(self) -> int:
        """How many legs the descriptor budget carries: one descriptor each, and one for their share of pipes."""
        budget = int(self.descriptor_limit * self.limits.fd_budget) - _OWN_DESCRIPTORS
        return max(2, budget // 2)

    async def slot(self) -> Slot:
        """Wait until a stranger may come in."""
        await self._free.acquire()
        return Slot(self)

    def objection(self, holder: str) -> str | None:
        """Why ``holder`` cannot have one more admitted leg, in a sentence for it; None if it can."""
        budget = self.leg_budget
        if self.charged.may_take(holder, budget):
            return None
        if self.charged.is_full(budget):
            return "this relay has no file descriptor left for one more connection (limits.fd_budget)"
        return (
            f"{described(holder)} has {self.charged.held(holder)} of the {budget} connections of this relay "
            "(limits.fd_budget), and the rest is kept for others"
        )

    def slot_for_own_call(self, holder: str) -> Slot | str:
        """A slot for a connection to a service, charged to ``holder``; or why there is none."""
        objection = self.objection(holder)
        if objection is None and self.legs >= self.leg_budget:
            objection = "this relay has no file descriptor left for the service's connection (limits.fd_budget)"
        if objection is not None:
            return objection
        slot = Slot.for_own_call(self)
        slot.charge([holder])
        return slot

    def _forget(self, host: str) -> None:
        self._by_host[host] -= 1
        if self._by_host[host] <= 0:
            del self._by_host[host]
