"""Many selectors at once: whether any of them matches a name, without trying one after the other.

A certificate has up to hundreds of names, and an address up to thousands of selectors; the product of both is what a
member of one route could make the relay compute at each JOIN. Here a name costs one look-up among the exact selectors,
and one for each way in which selectors with wildcards are built: their kind, what must be equal, how many parts they
have, and which of those are ``*``.

What matches is what :meth:`~frelay.protocol.identity.Selector.matches` says, no more and no less. Standard library
only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from frelay.protocol.identity import Kind, Name, Selector, may_stand_under_wildcard, split_name

__all__ = ["SelectorSet"]

_Shape = tuple[Kind, object, int]
"""Kind, what must be equal outside the parts, and how many parts there are."""
_Places = tuple[int, ...]
"""Which of the parts are wildcards."""


class SelectorSet:
    """An immutable set of selectors."""

    __slots__ = ("_exact", "_wild")

    def __init__(self, selectors: Iterable[Selector] = ()) -> None:
        self._exact: Final[dict[Kind, set[str]]] = {kind: set() for kind in Kind}
        self._wild: Final[dict[_Shape, dict[_Places, set[tuple[str, ...]]]]] = {}
        for selector in selectors:
            if selector.is_exact:
                self._exact[selector.kind].add(selector.pattern)
                continue
            fixed, parts = split_name(selector.kind, selector.pattern)
            places = tuple(place for place, part in enumerate(parts) if part == "*")
            by_places = self._wild.setdefault((selector.kind, fixed, len(parts)), {})
            by_places.setdefault(places, set()).add(tuple(parts))

    @classmethod
    def union(cls, sets: Iterable[SelectorSet]) -> SelectorSet:
        """The selectors of all ``sets``."""
        whole = cls()
        for one in sets:
            for kind, patterns in one._exact.items():
                whole._exact[kind].update(patterns)
            for shape, by_places in one._wild.items():
                own = whole._wild.setdefault(shape, {})
                for places, wanted in by_places.items():
                    own.setdefault(places, set()).update(wanted)
        return whole

    def matches(self, name: Name) -> bool:
        """Whether any of the selectors matches ``name``."""
        if name.value in self._exact[name.kind]:
            return True
        if not self._wild or name.kind is Kind.SPKI:
            return False
        fixed, parts = split_name(name.kind, name.value)
        for places, wanted in self._wild.get((name.kind, fixed, len(parts)), {}).items():
            masked = list(parts)
            for place in places:
                masked[place] = "*"
            if tuple(masked) in wanted and all(may_stand_under_wildcard(parts[place]) for place in places):
                return True
        return False

    def first(self, names: Iterable[Name]) -> Name | None:
        """The first of ``names`` that any of the selectors matches, or None."""
        return next((name for name in names if self.matches(name)), None)
