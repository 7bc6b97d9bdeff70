"""Acceptance: which partners a leg with a key accepts, and the names by which their lists judge it.

Two legs accept each other if each one's list, where it has one, matches a name of the other's verified certificate. An
exact selector costs one look-up, however many names the certificate has. One with a wildcard is compared with each
name, so :attr:`Acceptance.cost` lets a long search give way to other tasks.

Standard library only, and pure: no clock, no connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Final

from frelay.protocol.identity import Name, parse_selector
from frelay.protocol.selector_set import SelectorSet

__all__ = ["Acceptance"]


class Acceptance:
    """One leg's list of partners, and its own names. ``partners`` is the ``partner`` of its JOIN, or None."""

    def __init__(self, names: tuple[Name, ...], partners: Iterable[str] | None) -> None:
        selectors = None if partners is None else [parse_selector(text) for text in partners]
        self.has_list: Final = selectors is not None
        self._names: Final = names
        self._exact: Final = frozenset(str(one) for one in selectors or () if one.is_exact)
        wild = [one for one in selectors or () if not one.is_exact]
        self._wild: Final = SelectorSet(wild) if wild else None

    @cached_property
    def _texts(self) -> frozenset[str]:
        # Made when another leg with a list comes: most legs are never compared.
        return frozenset(map(str, self._names))

    def accepts(self, other: Acceptance) -> bool:
        """Whether ``other`` has a name that the list allows; without a list every leg is accepted."""
        if not self.has_list or not self._exact.isdisjoint(other._texts):
            return True
        return self._wild is not None and self._wild.first(other._names) is not None

    def cost(self, other: Acceptance) -> int:
        """About how many names are looked up to compare the two."""
        return 1 + (len(other._names) if self._wild else 0) + (len(self._names) if other._wild else 0)
