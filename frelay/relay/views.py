"""Views of what a relay serves: its routes, pairings and numbers, as the admin API shows them.

Each view is made when it is asked for, from what is there at that moment; nothing is kept for it. There are two
makers: :class:`LocalViews` for the routes of this process, and :mod:`frelay.relay.workers.views` for those of worker
processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from frelay.admin.control import Counts, UnknownRoute
from frelay.admin.model import (
    CertificateView,
    DescriptorView,
    LegView,
    PairingsView,
    PairingView,
    PartyView,
    RoutesView,
    RouteTrafficView,
    RouteView,
    TrafficView,
    WaitingView,
    WorkerView,
)
from frelay.config.dump import dump_route
from frelay.joining.lobby import LEG_PARTIES, Waiter
from frelay.joining.route import LiveRoute
from frelay.journal import RouteTotals
from frelay.pairing.leg import Leg
from frelay.pairing.pairing import Pairing
from frelay.protocol.messages import PartyName
from frelay.relay.relay import Relay

__all__ = ["NOBODY", "Load", "LocalViews", "Views", "certificates_of", "etag_of"]

NOBODY: Final = WaitingView(func1=[], func2=[], either=[])
"""What is shown for a route at which no leg waits."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a relay's processes, all together and, with workers, each."""

    pairings: int
    waiting: int
    descriptors: DescriptorView
    workers: tuple[WorkerView, ...] = ()


class Views(Protocol):
    """What the control of a relay asks about the routes that are served."""

    @property
    def why_not_ready(self) -> str | None:
        """Why some routes are not served at this moment; None if all are."""

    async def counts(self) -> Counts:
        """The relay in numbers."""

    async def load(self) -> Load:
        """How many pairings, waiting legs and descriptors there are."""

    async def routes(self) -> RoutesView:
        """All routes in force."""

    async def route(self, name: str) -> RouteView:
        """One route in force; raises UnknownRoute."""

    async def traffic(self) -> TrafficView:
        """What goes on at all routes."""

    async def pairings(self) -> PairingsView:
        """All pairings that run."""


class LocalViews:
    """Views of the routes that ``relay`` serves in this process."""

    def __init__(self, relay: Relay) -> None:
        self._relay: Final = relay

    @property
    def why_not_ready(self) -> str | None:
        """None: this process serves all routes in force."""
        return None

    async def counts(self) -> Counts:
        """The relay in numbers."""
        relay, routes, totals = self._relay, self._relay.routes, self._relay.journal.totals
        running = Counter({name: 0 for name in totals if name})
        moved: Counter[tuple[str, PartyName]] = Counter()
        for pairing in relay.pairings:
            running[pairing.route] += 1
            for party, count in pairing.bytes_moved.items():
                moved[pairing.route, party] += count
        for name in running:
            moved[name, "func1"] += totals[name].bytes_func1_to_func2
            moved[name, "func2"] += totals[name].bytes_func2_to_func1
        return Counts(
            pairings=running,
            waiting={(name, party): live.lobby.count(party) for name, live in routes.items() for party in LEG_PARTIES},
            keys={name: live.lobby.keys for name, live in routes.items()},
            bytes_moved=moved,
            outcomes={(name, word): count for name in running for word, count in totals[name].outcomes.items()},
            refusals={(name, code): count for name in ("", *running) for code, count in totals[name].refusals.items()},
            reloaded_at=relay.last_reload_at,
            reload_was_accepted=relay.last_reload_error is None,
            certificates=tuple(certificates_of(relay)),
            durations={name: found.copy() for name, found in relay.journal.durations.items()},
        )

    async def load(self) -> Load:
        """How many pairings, waiting legs and descriptors this process has."""
        relay = self._relay
        return Load(
            pairings=len(relay.pairings),
            waiting=sum(route.lobby.count(party) for route in relay.routes.values() for party in LEG_PARTIES),
            descriptors=DescriptorView(
                open=len(os.listdir("/proc/self/fd")),
                limit=relay.admission.descriptor_limit,
                legs=relay.admission.legs,
                leg_budget=relay.admission.leg_budget,
            ),
        )

    async def routes(self) -> RoutesView:
        """All routes in force."""
        # One pass through all pairings, and not one for each route.
        under_way = self._bytes_under_way()
        return RoutesView(routes=[self._view(route, under_way) for route in self._relay.routes.values()])

    async def route(self, name: str) -> RouteView:
        """One route in force; raises UnknownRoute."""
        route = self._relay.routes.get(name)
        if route is None:
            raise UnknownRoute(f"there is no route {name!r}")
        return self._view(route, self._bytes_under_way())

    def _bytes_under_way(self) -> dict[str, dict[PartyName, int]]:
        under_way: dict[str, dict[PartyName, int]] = {}
        for pairing in self._relay.pairings:
            moved = under_way.setdefault(pairing.route, {"func1": 0, "func2": 0})
            for party, count in pairing.bytes_moved.items():
                moved[party] += count
        return under_way

    def _view(self, route: LiveRoute, under_way: Mapping[str, Mapping[PartyName, int]]) -> RouteView:
        config = route.config
        written = dump_route(config)
        traffic = self._traffic(route, under_way)
        return RouteView(
            **written,
            bound=self._relay.bound(route.name),
            file=str(config.source),
            is_editable=config.source != self._relay.config.path,
            etag=etag_of(written),
            waiting=traffic.waiting,
            pairings=traffic.pairings,
            outcomes=traffic.outcomes,
            refusals=traffic.refusals,
            bytes_func1_to_func2=traffic.bytes_func1_to_func2,
            bytes_func2_to_func1=traffic.bytes_func2_to_func1,
        )

    async def traffic(self) -> TrafficView:
        """What goes on at all routes."""
        under_way = self._bytes_under_way()
        return TrafficView(
            now=time.time(),
            last_reload_at=self._relay.last_reload_at,
            routes=[self._traffic(route, under_way) for route in self._relay.routes.values()],
        )

    def _traffic(self, route: LiveRoute, under_way: Mapping[str, Mapping[PartyName, int]]) -> RouteTrafficView:
        totals = self._relay.journal.totals.get(route.name) or RouteTotals()
        moved = under_way.get(route.name) or {"func1": 0, "func2": 0}
        return RouteTrafficView(
            name=route.name,
            waiting=self._waiting(route),
            pairings=len(route.pairings),
            outcomes=dict(totals.outcomes),
            refusals=dict(totals.refusals),
            bytes_func1_to_func2=totals.bytes_func1_to_func2 + moved["func1"],
            bytes_func2_to_func1=totals.bytes_func2_to_func1 + moved["func2"],
        )

    def _waiting(self, route: LiveRoute) -> WaitingView:
        legs = {party: [self._leg(waiter) for waiter in route.lobby.waiting(party)] for party in LEG_PARTIES}
        return WaitingView(**legs) if any(legs.values()) else NOBODY

    def _leg(self, waiter: Waiter) -> LegView:
        leg = waiter.leg
        since = time.time() - self._relay.age(waiter.since)
        return LegView(identity=leg.identity, address=leg.address, mode=leg.mode, since=since, meet=leg.meet)

    async def pairings(self) -> PairingsView:
        """All pairings that run."""
        now = time.time()
        return PairingsView(pairings=[_pairing(pairing, now) for pairing in self._relay.pairings])


def certificates_of(relay: Relay) -> Iterator[CertificateView]:
    """The certificates and lists in force, with the date at which each ends."""
    section, trust = relay.config.tls, relay.trust
    if section is None or trust is None:
        return
    yield CertificateView(
        what="certificate", file=str(section.certificate), subject=trust.subject, not_after=trust.not_after
    )
    yield CertificateView(
        what="client_ca", file=str(section.client_ca), subject=None, not_after=trust.authorities_not_after
    )
    if section.crl is not None and trust.crl_next_update is not None:
        yield CertificateView(what="crl", file=str(section.crl), subject=None, not_after=trust.crl_next_update)


def etag_of(written: Mapping[str, Any]) -> str:
    """The ETag of a route, from :func:`~frelay.config.dump.dump_route`."""
    text = json.dumps(written, sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _pairing(pairing: Pairing, now: float) -> PairingView:
    moved = pairing.bytes_moved
    return PairingView(
        id=pairing.id,
        route=pairing.route,
        meet=pairing.meet,
        func1=_party(pairing.legs["func1"]),
        func2=_party(pairing.legs["func2"]),
        since=pairing.since,
        age=max(0.0, now - pairing.since),
        waited=pairing.waited,
        is_handed_off=pairing.is_handed_off,
        bytes_func1_to_func2=moved["func1"],
        bytes_func2_to_func1=moved["func2"],
    )


def _party(leg: Leg) -> PartyView:
    return PartyView(identity=leg.identity, address=leg.address, mode=leg.mode)
