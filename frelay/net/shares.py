"""Fair shares: counts what each holder has of a pool, and decides who may take one of the last.

No I/O. A count changes by one at a time, so every question, that for the greatest count included, takes O(1).

Two rules of fairness use these counts. A full queue evicts the newest place of the holder that has most
(:class:`~frelay.joining.lobby.Lobby`). A :class:`Pool`, from which nothing is taken back, keeps its last part for
holders that have little: so no holder takes everything, and a holder that has nothing gets one while one is free.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeVar

__all__ = ["Pool", "Shares", "address_unit", "holder_at", "holder_in_words"]

H = TypeVar("H", bound=Hashable)
P = TypeVar("P", bound=Hashable)


class Shares(Generic[H, P]):
    """The places of one pool, by their holders. Every method takes O(1)."""

    __slots__ = ("_by_count", "_by_holder", "_most", "_total")

    def __init__(self) -> None:
        # OrderedDict, because dict needs O(n) to find its first key after n earlier keys were removed.
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

    def holds(self, holder: H, place: P) -> bool:
        """Whether ``holder`` has ``place``."""
        return place in self._by_holder.get(holder, ())

    @property
    def most(self) -> int:
        """The greatest number of places that one holder has; 0 if no place is taken."""
        return self._most

    def greediest(self) -> H:
        """The holder of the most places; of several, the first that had so many. Raises KeyError if there is none."""
        return next(iter(self._by_count[self._most]))

    def newest(self, holder: H) -> P:
        """The newest place of ``holder``. Raises KeyError if it has none."""
        return next(reversed(self._by_holder[holder]))

    def oldest(self, holder: H) -> P:
        """The oldest place of ``holder``. Raises KeyError if it has none."""
        return next(iter(self._by_holder[holder]))

    def add(self, holder: H, place: P) -> None:
        """Give the free ``place`` to ``holder``."""
        places = self._by_holder.setdefault(holder, OrderedDict())
        places[place] = None
        self._total += 1
        self._move(holder, len(places) - 1, len(places))
        self._most = max(self._most, len(places))

    def remove(self, holder: H, place: P) -> None:
        """Take ``place`` from ``holder``; raises KeyError if it does not have it."""
        places = self._by_holder[holder]
        del places[place]
        self._total -= 1
        if not places:
            del self._by_holder[holder]
        self._move(holder, len(places) + 1, len(places))
        if self._most not in self._by_count:
            # This holder alone had the most, and now it has one less.
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
    """Things that are taken until they are given back. Each is charged to one holder, to several, or to none.

    Every method that decides takes the pool's size as an argument, because a reload may change it. The last ``1/part``
    of it, and at least ``least``, is only for holders that have fewer things than are still free. Nothing is ever taken
    back from a holder, and no part is reserved for a certain one. Every method takes O(1).
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
        """How many things are charged to ``holder``."""
        return self._shares.held(holder)

    def holders_of(self, thing: P) -> tuple[str, ...]:
        """The holders that ``thing`` is charged to."""
        return self._holders.get(thing, ())

    def is_full(self, size: int) -> bool:
        """Whether all of ``size`` are taken."""
        return len(self) >= size

    def may_take(self, holder: str, size: int) -> bool:
        """Whether ``holder`` may take one more of ``size``."""
        free = size - len(self)
        return free > 0 and (free > max(self._least, size // self._part) or self.held(holder) < free)

    def take(self, thing: P, holders: Iterable[str]) -> None:
        """Take ``thing`` and charge it to ``holders``. If it is taken already, charge it to them instead."""
        self.give_back(thing)
        self._holders[thing] = tuple(dict.fromkeys(holders))
        for holder in self._holders[thing]:
            self._shares.add(holder, thing)

    def give_back(self, thing: P) -> None:
        """Make ``thing`` free again. Idempotent."""
        for holder in self._holders.pop(thing, ()):
            self._shares.remove(holder, thing)


def holder_in_words(holder: str) -> str:
    """The words for a holder in a sentence that the holder itself reads."""
    kind = holder.partition(" ")[0]
    return {"route": "this route", "address": "this address", "addresses": "this /64 network"}.get(
        kind, "this function"
    )


def holder_at(host: str) -> str:
    """The holder that an IP address belongs to: the IPv4 address itself, or the IPv6 /64 network of it."""
    unit = address_unit(host)
    return f"address {unit}" if isinstance(unit, ipaddress.IPv4Address) else f"addresses {unit}"


def address_unit(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Network:
    """What counts as one caller: an IPv4 address, or an IPv6 /64 network, because one customer has all of it."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv6Network((int(address) >> 64 << 64, 64))
