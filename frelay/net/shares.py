"""Shares: how many places of a pool each holder has, and who may take one of the last.

Plain counting, no I/O. A count moves by one at a time, so every question, the greatest count included, is answered in
O(1), however many places and holders there are.

Two rules of fairness stand on these counts. A queue that is full gives up the newest place of the greediest holder
(:class:`~frelay.joining.lobby.Lobby`). A :class:`Pool` of things that are not taken back keeps its last part for those
who hold little: so no holder takes them all, and one that holds nothing gets one while there is one.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeVar

__all__ = ["Pool", "Shares", "holder_at", "holder_in_words"]

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


class Pool(Generic[P]):
    """Things that are taken until they are given back, each charged to one holder, to several, or to none.

    Its size is said with each question, because a reload may change it. The last ``1/part`` of it, and at least
    ``least``, goes only to holders that hold fewer of them than are still free. Nothing that runs is ever taken back,
    and nobody's part is reserved by name. Every method is O(1) in what is taken.
    """

    __slots__ = ("_holders", "_least", "_part", "_shares")

    def __init__(self, *, part: int, least: int) -> None:
        self._part: Final = part
        self._least: Final = least
        self._holders: Final[dict[P, tuple[str, ...]]] = {}
        self._shares: Final[Shares[str, P]] = Shares()

    def __len__(self) -> int:
        """How many are taken."""
        return len(self._holders)

    def held(self, holder: str) -> int:
        """How many are charged to ``holder``."""
        return self._shares.held(holder)

    def holders_of(self, thing: P) -> tuple[str, ...]:
        """To whom ``thing`` is charged."""
        return self._holders.get(thing, ())

    def is_full(self, size: int) -> bool:
        """Whether all of ``size`` are taken."""
        return len(self) >= size

    def may_take(self, holder: str, size: int) -> bool:
        """Whether ``holder`` may take one more of ``size``."""
        free = size - len(self)
        return free > 0 and (free > max(self._least, size // self._part) or self.held(holder) < free)

    def take(self, thing: P, holders: Iterable[str]) -> None:
        """Take ``thing`` and charge it to ``holders``; one that is taken already is charged to them from now on."""
        self.give_back(thing)
        self._holders[thing] = tuple(dict.fromkeys(holders))
        for holder in self._holders[thing]:
            self._shares.add(holder, thing)

    def give_back(self, thing: P) -> None:
        """``thing`` is free again. Idempotent."""
        for holder in self._holders.pop(thing, ()):
            self._shares.remove(holder, thing)


def holder_in_words(holder: str) -> str:
    """What a holder is called in a sentence to itself."""
    kind = holder.partition(" ")[0]
    return {"route": "this route", "address": "this address", "addresses": "this /64 network"}.get(
        kind, "this function"
    )


def holder_at(host: str) -> str:
    """The holder that an IP address stands for: all of an IPv6 /64, which is what one customer gets, are one."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return f"address {address}"
    if address.ipv4_mapped is not None:
        return f"address {address.ipv4_mapped}"
    network = ipaddress.ip_network((int(address) >> 64 << 64, 64))
    return f"addresses {network}"
