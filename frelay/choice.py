"""Which route a certificate is let in to, and as which party: decided from names and configuration alone.

It stands apart from the reception, which acts on it, so that ``frelay why`` can ask the very same question without a
relay. Pure: no clock, no certificate, no connection.

What a stranger may learn is nothing: until a certificate is known to fit a route of this address, every refusal has
the same code and the same sentence, whether the route asked for exists or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from frelay.config.model import Route
from frelay.protocol.identity import Name, Selector, match
from frelay.protocol.messages import Join, PartyName, Refused

__all__ = ["Fit", "Fitting", "TurnedAway", "choose", "fits"]

_STRANGER: Final = Refused("not-authorised", "this certificate is not admitted here")
# How much of a name that a party made up is repeated to it and to the log; a route's name has at most 63 characters.
_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """A party that a certificate may play, and the name that lets it."""

    party: PartyName
    name: Name


class Fitting(Protocol):
    """A route as far as the choice goes."""

    @property
    def name(self) -> str:
        """The route's name."""

    def fits(self, names: tuple[Name, ...]) -> list[Fit]:
        """Which parties of this route a function with these names may play."""


class TurnedAway(Exception):
    """A leg that is refused before it could come near a lobby; ``refusal`` is for it, ``why`` for the log."""

    def __init__(self, refusal: Refused, why: str) -> None:
        super().__init__(why)
        self.refusal = refusal
        self.why = why


R = TypeVar("R", bound=Fitting)


def fits(route: Route, names: tuple[Name, ...]) -> list[Fit]:
    """Which parties of ``route`` a function with these names may play."""
    found = []
    sides: tuple[tuple[PartyName, object], ...] = (("func1", route.func1), ("func2", route.func2))
    for party, selectors in sides:
        if isinstance(selectors, tuple):
            name = match((item for item in selectors if isinstance(item, Selector)), names)
            if name is not None:
                found.append(Fit(party, name))
    return found


def choose(routes: Mapping[str, R], names: tuple[Name, ...], join: Join | None, server_name: str) -> tuple[R, Fit]:
    """The one of ``routes`` that a leg is for, and the party that its certificate fits there; raises TurnedAway.

    ``routes`` are those behind one listener, ``names`` those of the verified certificate. ``join`` is None for a leg
    without frames.
    """
    asked = join.route if join is not None and join.route is not None else None
    route: R | None
    if asked is not None:
        route = routes.get(asked)
    elif len(routes) == 1:
        route = next(iter(routes.values()))
    else:
        route = _called_by(server_name, routes)
    found = [] if route is None else route.fits(names)
    if route is None or not found:
        wanted_route = repr((asked or server_name)[:_SHOWN]) if asked or server_name else "no route"
        if not any(other.fits(names) for other in routes.values()):
            raise TurnedAway(_STRANGER, f"asked for {wanted_route}, fits no route here")
        # At home here, but not there: the answer is the same whether there is such a route or not, or the
        # functions of one route could find out the names of all the others.
        why = f"asked for {wanted_route}, " + ("which does not exist" if route is None else "which it does not fit")
        if asked is None:
            text = "several routes share this address: say which with JOIN.route, or with SNI ROUTE.anything"
            raise TurnedAway(Refused("protocol-error", text), why)
        text = f"there is no route {wanted_route} for this certificate at this address"
        raise TurnedAway(Refused("unknown-route", text), why)
    wanted = join.party if join is not None else None
    if wanted is not None:
        chosen = [fit for fit in found if fit.party == wanted]
        if not chosen:
            raise TurnedAway(_STRANGER, f"the certificate does not fit {wanted} of route {route.name!r}")
        return route, chosen[0]
    if len(found) > 1:
        text = "this certificate fits both parties of the route: say which with JOIN.party"
        raise TurnedAway(Refused("protocol-error", text), text)
    return route, found[0]


def _called_by(server_name: str, routes: Mapping[str, R]) -> R | None:
    """The route that a TLS server name ROUTE.anything calls; of several (`a`, `a.b`) the one with the longest name."""
    # A server name has no case (RFC 6066, 3); the configuration refuses neighbours that differ in nothing else.
    called = f"{server_name.lower()}."
    found = [name for name in routes if called.startswith(f"{name.lower()}.")]
    return routes[max(found, key=len)] if found else None
