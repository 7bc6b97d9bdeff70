"""Which route a certificate is let in to, and as which party: decided from names and configuration alone.

It stands apart from :mod:`frelay.joining.connection`, which acts on it, so that ``frelay why`` can ask the same
question without a relay. Pure: no clock, no certificate, no connection.

A stranger learns nothing: until a certificate is known to fit a route of this address, every refusal has the same code
and the same sentence, whether the route asked for exists or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from frelay.config.model import Route
from frelay.errors import FrelayError
from frelay.protocol.identity import Name
from frelay.protocol.messages import Join, PartyName
from frelay.protocol.refusal import Refusal
from frelay.protocol.selector_set import SelectorSet

__all__ = ["NotAdmitted", "Parties", "PartyMatch", "PartyTable", "not_authorised", "select_route"]

# How much of a name that a party made up is repeated to it and to the log; a route's name has at most 63 characters.
_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class PartyMatch:
    """A party that a certificate may play, and the name of the certificate that fits it."""

    party: PartyName
    name: Name


class Parties:
    """The two parties of one route, prepared to be compared with the names of many certificates."""

    def __init__(self, route: Route) -> None:
        sides: tuple[tuple[PartyName, object], ...] = (("func1", route.func1), ("func2", route.func2))
        self._sides: Final = tuple((party, SelectorSet(side)) for party, side in sides if isinstance(side, tuple))

    def matches(self, names: tuple[Name, ...]) -> list[PartyMatch]:
        """The parties that a function with these names may play."""
        found = ((party, selectors.first(names)) for party, selectors in self._sides)
        return [PartyMatch(party, name) for party, name in found if name is not None]

    @property
    def selectors(self) -> SelectorSet:
        """The selectors of both parties."""
        return SelectorSet.union(selectors for _, selectors in self._sides)


class PartyTable(Mapping[str, Parties]):
    """The parties of the routes that share an address, by the name of the route.

    It is made once for a configuration, so that a connection costs the same however many routes share the address.
    """

    def __init__(self, parties: Mapping[str, Parties]) -> None:
        self._parties: Final = dict(parties)
        # Server names are compared without case (RFC 6066, 3). The configuration refuses routes of one address whose
        # names differ in case alone.
        self._names: Final = {name.lower(): name for name in self._parties}
        self._longest_name: Final = max(map(len, self._parties), default=0)
        self._selectors: Final = SelectorSet.union(one.selectors for one in self._parties.values())

    def __getitem__(self, name: str) -> Parties:
        return self._parties[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parties)

    def __len__(self) -> int:
        return len(self._parties)

    def admits(self, names: tuple[Name, ...]) -> bool:
        """Whether a function with these names may play any party of any of the routes."""
        return self._selectors.first(names) is not None

    def called_by(self, server_name: str) -> str | None:
        """The name of the route that a TLS server name ROUTE.anything asks for; of several (`a`, `a.b`) the longest."""
        called = f"{server_name.lower()}."
        end = called.rfind(".", 0, self._longest_name + 1)
        while end > 0:
            name = self._names.get(called[:end])
            if name is not None:
                return name
            end = called.rfind(".", 0, end)
        return None


class NotAdmitted(FrelayError):
    """No route takes the leg; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.logged)
        self.refusal: Final = refusal


def not_authorised(why: str) -> NotAdmitted:
    """The refusal of a certificate that fits no route: the log gets ``why``, and the function learns nothing."""
    return NotAdmitted(Refusal("not-authorised", "this certificate is not admitted here", why=why))


def select_route(
    table: PartyTable, names: tuple[Name, ...], join: Join | None, server_name: str
) -> tuple[str, list[PartyMatch]]:
    """The name of the route that a leg is for, and the party that its certificate fits there; raises NotAdmitted.

    There are two parties if the certificate fits both, and the JOIN names a key and no party: then the pairing decides.
    ``names`` are those of the verified certificate. ``join`` is None for a leg without frames.
    """
    asked = join.route if join is not None and join.route is not None else None
    route: str | None
    if asked is not None:
        route = asked if asked in table else None
    elif len(table) == 1:
        route = next(iter(table))
    else:
        route = table.called_by(server_name)
    found = [] if route is None else table[route].matches(names)
    if route is None or not found:
        wanted_route = repr((asked or server_name)[:_SHOWN]) if asked or server_name else "no route"
        if not table.admits(names):
            raise not_authorised(f"asked for {wanted_route}, fits no route here")
        # The certificate fits another route of this address. The answer is the same whether the route that it asked
        # for exists or not; otherwise the functions of one route could find out the names of all others.
        why = f"asked for {wanted_route}, " + ("which does not exist" if route is None else "which it does not fit")
        if asked is None:
            text = "several routes share this address: say which with JOIN.route, or with SNI ROUTE.anything"
            raise NotAdmitted(Refusal("protocol-error", text, why=why))
        text = f"there is no route {wanted_route} for this certificate at this address"
        raise NotAdmitted(Refusal("unknown-route", text, why=why))
    wanted = join.party if join is not None else None
    if wanted is not None:
        chosen = [match for match in found if match.party == wanted]
        if not chosen:
            raise not_authorised(f"the certificate does not fit {wanted} of route {route!r}")
        return route, chosen
    if len(found) > 1 and (join is None or join.meet is None):
        text = "this certificate fits both parties of the route: say which with JOIN.party"
        raise NotAdmitted(Refusal("protocol-error", text))
    return route, found
