"""Which route a certificate is let in to, and as which party: decided from names and configuration alone.

It stands apart from the reception, which acts on it, so that ``frelay why`` can ask the very same question without a
relay. Pure: no clock, no certificate, no connection.

What a stranger may learn is nothing: until a certificate is known to fit a route of this address, every refusal has
the same code and the same sentence, whether the route asked for exists or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from frelay.config.model import Route
from frelay.errors import FrelayError
from frelay.protocol.identity import Name
from frelay.protocol.messages import Join, PartyName
from frelay.protocol.refusal import Refusal
from frelay.protocol.selector_set import SelectorSet

__all__ = ["Fit", "Fitting", "NotAdmitted", "Parties", "Table", "choose", "not_authorised"]

# How much of a name that a party made up is repeated to it and to the log; a route's name has at most 63 characters.
_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """A party that a certificate may play, and the name that lets it."""

    party: PartyName
    name: Name


class Parties:
    """The two parties of a route, made ready to be asked for names again and again."""

    def __init__(self, route: Route) -> None:
        sides: tuple[tuple[PartyName, object], ...] = (("func1", route.func1), ("func2", route.func2))
        self._sides: Final = tuple((party, SelectorSet(side)) for party, side in sides if isinstance(side, tuple))

    def fits(self, names: tuple[Name, ...]) -> list[Fit]:
        """Which parties a function with these names may play."""
        found = ((party, selectors.first(names)) for party, selectors in self._sides)
        return [Fit(party, name) for party, name in found if name is not None]

    @property
    def selectors(self) -> SelectorSet:
        """Those of both."""
        return SelectorSet.union(selectors for _, selectors in self._sides)


class Fitting(Protocol):
    """A route as far as the choice goes."""

    @property
    def name(self) -> str:
        """The route's name."""

    @property
    def config(self) -> Route:
        """The route as it is written."""

    @property
    def parties(self) -> Parties:
        """Its parties."""


class NotAdmitted(FrelayError):
    """A leg that no route takes; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.logged)
        self.refusal: Final = refusal


def not_authorised(why: str) -> NotAdmitted:
    """The refusal of a certificate that fits no route: the log gets ``why``, and the function learns nothing."""
    return NotAdmitted(Refusal("not-authorised", "this certificate is not admitted here", why=why))


R = TypeVar("R", bound=Fitting)


class Table(Mapping[str, R]):
    """The routes behind one listener, by name, and the answers to what each connection asks of all of them.

    Made once for a configuration. A connection costs the same, however many routes share the address.
    """

    def __init__(self, routes: Mapping[str, R] | None = None) -> None:
        self._routes: Final[dict[str, R]] = dict(routes or {})
        # A server name has no case (RFC 6066, 3); the configuration refuses neighbours that differ in nothing else.
        self._by_folded_name: Final = {name.lower(): route for name, route in self._routes.items()}
        self._longest_name: Final = max(map(len, self._routes), default=0)
        self._selectors: Final = SelectorSet.union(route.parties.selectors for route in self._routes.values())
        self.plain: Final[R | None] = self._first(lambda route: route.outer == "none")
        """The route without outer TLS, which is then the only one."""
        self.hello: Final[R | None] = self._first(lambda route: route.handoff == "hello")
        """The route with the old hand-off, which is then the only one."""

    def _first(self, condition: Callable[[Route], bool]) -> R | None:
        return next((route for route in self._routes.values() if condition(route.config)), None)

    def __getitem__(self, name: str) -> R:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def admits(self, names: tuple[Name, ...]) -> bool:
        """Whether a function with these names may play any party of any of the routes."""
        return self._selectors.first(names) is not None

    def called_by(self, server_name: str) -> R | None:
        """The route that a TLS server name ROUTE.anything calls; of several (`a`, `a.b`) the one with the longest."""
        called = f"{server_name.lower()}."
        end = called.rfind(".", 0, self._longest_name + 1)
        while end > 0:
            route = self._by_folded_name.get(called[:end])
            if route is not None:
                return route
            end = called.rfind(".", 0, end)
        return None


def choose(routes: Table[R], names: tuple[Name, ...], join: Join | None, server_name: str) -> tuple[R, Fit]:
    """The one of ``routes`` that a leg is for, and the party that its certificate fits there; raises NotAdmitted.

    ``names`` are those of the verified certificate. ``join`` is None for a leg without frames.
    """
    asked = join.route if join is not None and join.route is not None else None
    route: R | None
    if asked is not None:
        route = routes.get(asked)
    elif len(routes) == 1:
        route = next(iter(routes.values()))
    else:
        route = routes.called_by(server_name)
    found = [] if route is None else route.parties.fits(names)
    if route is None or not found:
        wanted_route = repr((asked or server_name)[:_SHOWN]) if asked or server_name else "no route"
        if not routes.admits(names):
            raise not_authorised(f"asked for {wanted_route}, fits no route here")
        # At home here, but not there: the answer is the same whether there is such a route or not, or the
        # functions of one route could find out the names of all the others.
        why = f"asked for {wanted_route}, " + ("which does not exist" if route is None else "which it does not fit")
        if asked is None:
            text = "several routes share this address: say which with JOIN.route, or with SNI ROUTE.anything"
            raise NotAdmitted(Refusal("protocol-error", text, why=why))
        text = f"there is no route {wanted_route} for this certificate at this address"
        raise NotAdmitted(Refusal("unknown-route", text, why=why))
    wanted = join.party if join is not None else None
    if wanted is not None:
        chosen = [fit for fit in found if fit.party == wanted]
        if not chosen:
            raise not_authorised(f"the certificate does not fit {wanted} of route {route.name!r}")
        return route, chosen[0]
    if len(found) > 1:
        text = "this certificate fits both parties of the route: say which with JOIN.party"
        raise NotAdmitted(Refusal("protocol-error", text))
    return route, found[0]
