"""The routes of a relay together: those in force and those that have retired, and those that share an address.

A route that was removed or replaced *retires*: it takes no leg in any more, and stays in the registry until its last
pairing has ended. The journal drops the totals of a route when no route of that name is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from frelay.config.model import Route
from frelay.joining.route import LiveRoute
from frelay.joining.route_selection import PartyTable
from frelay.journal import Journal
from frelay.pairing.pairing import Pairing

__all__ = ["ListenerRoutes", "RouteRegistry"]


class RouteRegistry:
    """All routes of one relay, and the totals that its journal keeps for them."""

    def __init__(self, journal: Journal) -> None:
        self._journal: Final = journal
        self.in_force: dict[str, LiveRoute] = {}
        """The routes of the configuration in force, by name."""
        self.retired: Final[set[LiveRoute]] = set()
        """Routes that were removed or replaced and still have pairings."""
        self.everywhere: frozenset[str] = frozenset()
        """In a worker, the names of all routes in force, those of other workers, too."""

    @property
    def all(self) -> tuple[LiveRoute, ...]:
        """The routes in force, and those that have retired."""
        return (*self.in_force.values(), *self.retired)

    @property
    def pairings(self) -> list[Pairing]:
        """All pairings that run, those of retired routes too."""
        return [pairing for route in self.all for pairing in route.pairings.values()]

    def put_in_force(self, routes: Iterable[LiveRoute]) -> list[LiveRoute]:
        """Replace the routes in force by ``routes``; gives those that are not among them, for the caller to close."""
        old, self.in_force = self.in_force, {route.name: route for route in routes}
        for name in self.in_force:
            self._journal.keep(name)
        gone = [route for name, route in old.items() if self.in_force.get(name) is not route]
        for route in gone:
            if route.pairings:
                self.retired.add(route)
            self.forget_if_gone(route.name)
        return gone

    def unpair(self, route: LiveRoute, pairing: Pairing) -> None:
        """``pairing`` of ``route`` has ended; a retired route goes with its last one."""
        route.unpair(pairing)
        if not route.pairings:
            self.retired.discard(route)
            self.forget_if_gone(route.name)

    def forget_if_gone(self, name: str) -> None:
        """Give up the totals of a route that is not in force, once no pairing of that name runs any more."""
        # A name that was removed, added and removed again may have retired twice. A name that has moved to another
        # worker has totals in both workers, and their sum must not fall.
        if name in self.in_force or name in self.everywhere or any(route.name == name for route in self.retired):
            return
        self._journal.forget(name)


class ListenerRoutes(Mapping[str, LiveRoute]):
    """The routes that share the address of one listener, by name, and what every connection there asks of them.

    Made once for a configuration.
    """

    def __init__(self, routes: Mapping[str, LiveRoute] | None = None) -> None:
        self._routes: Final = dict(routes or {})
        self.parties: Final = PartyTable({name: route.parties for name, route in self._routes.items()})
        self.plain: Final = self._first(lambda route: route.outer == "none")
        """The route without outer TLS, which is then the only one."""
        self.hello: Final = self._first(lambda route: route.handoff == "hello")
        """The route with the old hand-off, which is then the only one."""
        self.only_name: Final = next(iter(self._routes)) if len(self._routes) == 1 else None
        """The name of the route if there is only one."""

    def _first(self, condition: Callable[[Route], bool]) -> LiveRoute | None:
        return next((route for route in self._routes.values() if condition(route.config)), None)

    def __getitem__(self, name: str) -> LiveRoute:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def come_by_proxy(self, host: str) -> bool:
        """Whether connections from ``host`` come by a balancer, and must begin with a PROXY header."""
        # All routes of an address have the same proxy_protocol.
        route = next(iter(self._routes.values()), None)
        return route is not None and route.comes_by_proxy(host)
