"""Charges: who holds a leg or a pairing of a route, where places are shared fairly.

A side of a route that several functions may be (a list, a group, a wildcard, a plain route's ``allow_from``) is charged
to the function that came; on a plain route, which knows no names, to its address. A side that only one name can fill is
charged to nobody within its route, since a route cannot starve itself; and neither is a service. In the relay, where
routes compete, a pairing with such sides only is charged to its route; where there is only one route, to nobody.

Pure: decided from the configuration of one route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from frelay.config.model import Party, Route
from frelay.protocol.messages import PartyName

if TYPE_CHECKING:
    from frelay.pairing.leg import Leg

__all__ = ["Charges"]


class Charges:
    """Whom the legs and pairings of one route are charged to."""

    def __init__(self, route: Route) -> None:
        self._route: Final = f"route {route.name}"
        sides: tuple[tuple[PartyName, Party], ...] = (("func1", route.func1), ("func2", route.func2))
        self._shared: Final[frozenset[PartyName]] = frozenset(
            party for party, side in sides if route.outer == "none" or _is_shared(side)
        )
        self.is_alone = False
        """Whether the relay has no other route now, for which places would have to be kept."""

    def waiting(self, leg: Leg) -> str:
        """Whom a leg that waits is charged to in the relay's descriptors: its function, or its side of the route."""
        return leg.holder if leg.party in self._shared else f"{self._route}, {leg.party}"

    def in_route(self, *legs: Leg) -> tuple[str, ...]:
        """Whom a pairing is charged to among those of the route; of one of its legs alone, what that leg adds."""
        return tuple(leg.holder for leg in legs if leg.party in self._shared)

    def in_relay(self, *legs: Leg) -> tuple[str, ...]:
        """Whom a pairing is charged to among those of the relay; of one of its legs alone, what that leg adds."""
        if self._shared:
            return self.in_route(*legs)
        return () if self.is_alone else (self._route,)

    def paired(self, leg: Leg, other: Leg) -> tuple[str, ...]:
        """Whom the descriptors of ``leg`` are charged to, which is paired with ``other``."""
        return self.in_route(leg) or self.in_relay(leg, other)


def _is_shared(side: Party) -> bool:
    """Whether several functions may be it."""
    return isinstance(side, tuple) and (len(side) > 1 or any(not one.is_exact for one in side))
