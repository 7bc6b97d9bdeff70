"""Charges: to which holder a leg or a pairing counts, where functions share a limit fairly.

Within a route:

* If several functions can be the party (a list, a group, a wildcard), its leg is charged to the function that came.
* On a plain route, which knows no names, it is charged to the address.
* If only one name can be the party, or it is a service, it is charged to nobody: it competes with nobody there.

In the relay, where routes compete, a pairing is charged as in its route. If it is charged to nobody there, it is
charged to its route; if there is only one route, to nobody.

Pure: decided from the configuration of one route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from frelay.config.model import Party, Route
from frelay.protocol.messages import LegParty, PartyName

if TYPE_CHECKING:
    from frelay.pairing.leg import Leg

__all__ = ["Charges"]


class Charges:
    """The holders to which the legs and pairings of one route are charged."""

    def __init__(self, route: Route) -> None:
        self._route: Final = f"route {route.name}"
        sides: tuple[tuple[PartyName, Party], ...] = (("func1", route.func1), ("func2", route.func2))
        shared: set[LegParty] = {party for party, side in sides if route.outer == "none" or _is_shared(side)}
        if shared:
            shared.add("either")
        self._shared: Final = frozenset(shared)
        self.is_alone = False
        """Whether the relay has no other route now, with which this one would compete."""

    def waiting(self, leg: Leg) -> str:
        """The holder of a waiting leg's descriptors: its function, or its side of the route."""
        return leg.holder if leg.party in self._shared else f"{self._route}, {leg.party}"

    def in_route(self, *legs: Leg) -> tuple[str, ...]:
        """The holders of a pairing of these legs within the route; for one leg alone, what that leg adds."""
        return tuple(leg.holder for leg in legs if leg.party in self._shared)

    def in_relay(self, *legs: Leg) -> tuple[str, ...]:
        """The holders of a pairing of these legs within the relay; for one leg alone, what that leg adds."""
        if self._shared:
            return self.in_route(*legs)
        return () if self.is_alone else (self._route,)

    def paired(self, leg: Leg, other: Leg) -> tuple[str, ...]:
        """The holders of the descriptors of ``leg``, which is paired with ``other``."""
        return self.in_route(leg) or self.in_relay(leg, other)


def _is_shared(side: Party) -> bool:
    """Whether several functions can be this party."""
    return isinstance(side, tuple) and (len(side) > 1 or any(not one.is_exact for one in side))
