"""Shares: how many places of a pool each holder has, and who may take one of the last.

Plain counting, no I/O. A count moves by one at a time, so every question, the greatest count included, is answered in
O(1), however many places and holders there are.

Two rules of fairness stand on these counts. A queue that is full gives up the newest place of the greediest holder
(:class:`~frelay.lobby.Lobby`). A pool of things that cannot be taken back keeps its last part for those who hold
little (:meth:`Shares.may_take`): so no holder takes them all, and one that holds nothing gets the last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["Shares"]

H = TypeVar("H", bound=Hashable)
P = TypeVar("P", bound=Hashable)


class Shares(Generic[H, P]):
    """The places of one pool by their holders. Every method is O(1)."""

    __slots__ = ("_by_count", "_by_holder", "_most", "_total")

    def __init__(self) -> None:
        # OrderedDict, because a plain one finds its first key in O(n) after n others were taken out before it.
        self._by_holder: Final[dict[H, OrderedDict[P, None]]] = {}
        self._by_count: Final[dict[int, OrderedDict[H, None]]] = {}
        self._most = 0
        self._total = 0

    def __len__(self) -> int:
        """How many places are taken."""
        return self._total

    def holders(self) -> int:
        """How many holders have a place."""
        return len(self._by_holder)

    def held(self, holder: H) -> int:
        """How many places ``holder`` has."""
        places = self._by_holder.get(holder)
        return 0 if places is None else len(places)

    @property
    def most(self) -> int:
        """The greatest number of places that one holder has; 0 if nobody has one."""
        return self._most

    def greediest(self) -> H:
        """The holder of the most places; of several, the first that got so many. Raises KeyError if there is none."""
        return next(iter(self._by_count[self._most]))

    def newest(self, holder: H) -> P:
        """The place that ``holder`` took last, of those it has. Raises KeyError if it has none."""
        return next(reversed(self._by_holder[holder]))

    def oldest(self, holder: H) -> P:
        """The place that ``holder`` took first, of those it has. Raises KeyError if it has none."""
        return next(iter(self._by_holder[holder]))

    def add(self, holder: H, place: P) -> None:
        """``holder`` takes ``place``, which nobody has."""
        places = self._by_holder.setdefault(holder, OrderedDict())
        places[place] = None
        self._total += 1
        self._move(holder, len(places) - 1, len(places))
        self._most = max(self._most, len(places))

    def remove(self, holder: H, place: P) -> None:
        """``holder`` gives up ``place``; KeyError if it does not have it."""
        places = self._by_holder[holder]
        del places[place]
        self._total -= 1
        if not places:
            del self._by_holder[holder]
        self._move(holder, len(places) + 1, len(places))
        if self._most not in self._by_count:
            # It was alone at the top, and is now one lower.
            self._most = len(places)

    def _move(self, holder: H, before: int, now: int) -> None:
        if before:
            equals = self._by_count[before]
            del equals[holder]
            if not equals:
                del self._by_count[before]
        if now:
            self._by_count.setdefault(now, OrderedDict())[holder] = None

    def may_take(self, holder: H, *, free: int, kept: int) -> bool:
        """Whether ``holder`` may take one more place, of a pool with ``free`` left and the last ``kept`` for others.

        Of those last ones a holder gets one only if it holds fewer places than are free. So whoever holds none gets
        one while there is one.
        """
        return free > kept or self.held(holder) < free
