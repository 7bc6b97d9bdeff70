"""A set of selectors that quickly says whether any of them matches a name.

A certificate has up to hundreds of names, and an address up to thousands of selectors. If each were compared with each,
one function could make the relay compute the product of both at every JOIN. Here a name costs one look-up among the
exact selectors, and one for each shape of selector with wildcards. A shape is the kind, the part that must be equal,
the number of parts, and which of them are ``*``.

The result is always that of :meth:`~frelay.protocol.identity.Selector.matches`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from frelay.protocol.identity import Kind, Name, Selector, may_stand_under_wildcard, split_name

__all__ = ["SelectorSet"]

_Shape = tuple[Kind, object, int]
"""The kind, what must be equal outside the parts, and the number of parts."""
_Wildcards = tuple[int, ...]
"""The indexes of the parts that are wildcards."""


class SelectorSet:
    """An immutable set of selectors."""

    __slots__ = ("_exact", "_wild")

    def __init__(self, selectors: Iterable[Selector] = ()) -> None:
        self._exact: Final[dict[Kind, set[str]]] = {kind: set() for kind in Kind}
        self._wild: Final[dict[_Shape, dict[_Wildcards, set[tuple[str, ...]]]]] = {}
        for selector in selectors:
            if selector.is_exact:
                self._exact[selector.kind].add(selector.pattern)
                continue
            fixed, parts = split_name(selector.kind, selector.pattern)
            wildcards = tuple(index for index, part in enumerate(parts) if part == "*")
            by_wildcards = self._wild.setdefault((selector.kind, fixed, len(parts)), {})
            by_wildcards.setdefault(wildcards, set()).add(tuple(parts))

    @classmethod
    def union(cls, sets: Iterable[SelectorSet]) -> SelectorSet:
        """The selectors of all ``sets``."""
        whole = cls()
        for one in sets:
            for kind, patterns in one._exact.items():
                whole._exact[kind].update(patterns)
            for shape, by_wildcards in one._wild.items():
                own = whole._wild.setdefault(shape, {})
                for wildcards, wanted in by_wildcards.items():
                    own.setdefault(wildcards, set()).update(wanted)
        return whole

    def matches(self, name: Name) -> bool:
        """Whether any of the selectors matches ``name``."""
        if name.value in self._exact[name.kind]:
            return True
        if not self._wild or name.kind is Kind.SPKI:
            return False
        fixed, parts = split_name(name.kind, name.value)
        for wildcards, wanted in self._wild.get((name.kind, fixed, len(parts)), {}).items():
            masked = list(parts)
            for index in wildcards:
                masked[index] = "*"
            if tuple(masked) in wanted and all(may_stand_under_wildcard(parts[index]) for index in wildcards):
                return True
        return False

    def first(self, names: Iterable[Name]) -> Name | None:
        """The first of ``names`` that any of the selectors matches, or None."""
        return next((name for name in names if self.matches(name)), None)
