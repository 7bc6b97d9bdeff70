"""Views of what worker processes serve: the answers of all workers as one, made when a caller asks.

A worker that is down or does not answer is not waited for. Its routes are shown with what was counted up to then, and
with nobody at them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from frelay.admin.control import Counts, UnknownRoute
from frelay.admin.model import (
    DescriptorView,
    PairingsView,
    PairingView,
    RoutesView,
    RouteTrafficView,
    RouteView,
    StatusView,
    TrafficView,
    WorkerView,
)
from frelay.config.dump import dump_route
from frelay.config.model import Route
from frelay.journal import Distribution
from frelay.relay.relay import Relay
from frelay.relay.views import NOBODY, Load, certificates_of, etag_of
from frelay.relay.workers.fleet import Fleet

__all__ = ["WorkerViews"]


class WorkerViews:
    """Views of the routes of ``relay``, which the workers of ``fleet`` serve."""

    def __init__(self, relay: Relay, fleet: Fleet) -> None:
        self._relay: Final = relay
        self._fleet: Final = fleet

    @property
    def why_not_ready(self) -> str | None:
        """The first worker that is down; None if all are there."""
        down = [slot.number for slot in self._fleet.slots if slot.process is None]
        return f"worker {down[0]} is down, and is being started again" if down else None

    # --- numbers -----------------------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """The relay in numbers: the sums of all workers."""
        relay, slots = self._relay, self._fleet.slots
        await self._fleet.poll("counts")
        found = [slot.counts for slot in slots if slot.counts is not None]
        # Every route of the configuration has its series, even if its worker has not counted anything for it.
        none = dict.fromkeys((route.name for route in relay.config.routes), 0)
        return Counts(
            pairings=_sum([none, *(one.pairings for one in found)]),
            waiting=_sum(one.waiting for one in found),
            keys=_sum(one.keys for one in found),
            bytes_moved=_sum(one.bytes_moved for one in found),
            outcomes=_sum(one.outcomes for one in found),
            refusals=_sum(one.refusals for one in found),
            reloaded_at=relay.last_reload_at,
            reload_was_accepted=relay.last_reload_error is None,
            certificates=tuple(certificates_of(relay)),
            durations=_all_durations([one.durations for one in found]),
            loop_lag=max((one.loop_lag for one in found), default=0.0),
            tasks=sum(one.tasks for one in found),
            workers=tuple(slot.process.pid for slot in slots if slot.process is not None),
            restarts={slot.number: slot.restarts for slot in slots},
        )

    async def load(self) -> Load:
        """How many pairings, waiting legs and descriptors all workers have together, and what each has."""
        fleet = self._fleet
        found = {number: StatusView.model_validate(answer) for number, answer in (await fleet.poll("status")).items()}
        names: dict[int, list[str]] = {slot.number: [] for slot in fleet.slots}
        for route in self._relay.config.routes:
            names[fleet.slot_of(route).number].append(route.name)
        return Load(
            pairings=sum(status.pairings for status in found.values()),
            waiting=sum(status.waiting for status in found.values()),
            descriptors=_all_descriptors([status.descriptors for status in found.values()]),
            workers=tuple(
                WorkerView(
                    number=slot.number,
                    pid=None if slot.process is None else slot.process.pid,
                    restarts=slot.restarts,
                    routes=names[slot.number],
                    descriptors=found[slot.number].descriptors if slot.number in found else None,
                )
                for slot in fleet.slots
            ),
        )

    # --- routes and pairings -----------------------------------------------------------------------------------

    async def routes(self) -> RoutesView:
        """All routes in force."""
        found = _by_name(await self._fleet.poll("routes"))
        return RoutesView(
            routes=[
                RouteView.model_validate(found[route.name]) if route.name in found else self._absent(route)
                for route in self._relay.config.routes
            ]
        )

    async def route(self, name: str) -> RouteView:
        """One route in force; raises UnknownRoute."""
        route = self._relay.config.routes_by_name.get(name)
        if route is None:
            raise UnknownRoute(f"there is no route {name!r}")
        found = _by_name(await self._fleet.poll("routes", self._fleet.slot_of(route)))
        return RouteView.model_validate(found[name]) if name in found else self._absent(route)

    async def traffic(self) -> TrafficView:
        """What goes on at all routes."""
        found = _by_name(await self._fleet.poll("traffic"))
        return TrafficView(
            now=time.time(),
            last_reload_at=self._relay.last_reload_at,
            routes=[
                RouteTrafficView.model_validate(found.get(route.name) or self._absent_traffic(route))
                for route in self._relay.config.routes
            ],
        )

    async def pairings(self) -> PairingsView:
        """All pairings that run."""
        answers = await self._fleet.poll("pairings")
        return PairingsView(
            pairings=[PairingView.model_validate(pairing) for answer in answers.values() for pairing in answer]
        )

    def _absent_traffic(self, route: Route) -> RouteTrafficView:
        """The traffic of a route whose worker does not answer: what was counted, and nobody there."""
        counts, name = self._fleet.slot_of(route).counts, route.name
        outcomes = {} if counts is None else {word: n for (of, word), n in counts.outcomes.items() if of == name}
        refusals = {} if counts is None else {code: n for (of, code), n in counts.refusals.items() if of == name}
        moved: Mapping[Any, int] = {} if counts is None else counts.bytes_moved
        return RouteTrafficView(
            name=name,
            waiting=NOBODY,
            pairings=0,
            outcomes=outcomes,
            refusals=refusals,
            bytes_func1_to_func2=moved.get((name, "func1"), 0),
            bytes_func2_to_func1=moved.get((name, "func2"), 0),
        )

    def _absent(self, route: Route) -> RouteView:
        written = dump_route(route)
        traffic = self._absent_traffic(route)
        return RouteView(
            **written,
            bound=self._relay.bound(route.name),
            file=str(route.source),
            is_editable=route.source != self._relay.config.path,
            etag=etag_of(written),
            **{key: value for key, value in dict(traffic).items() if key != "name"},
        )


def _by_name(answers: Mapping[int, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {view["name"]: view for answer in answers.values() for view in answer}


def _sum(several: Iterable[Mapping[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for one in several:
        total.update(one)
    return total


def _all_durations(several: list[Mapping[str, Distribution]]) -> Mapping[str, Distribution]:
    total: dict[str, Distribution] = {}
    for one in several:
        for name, found in one.items():
            total[name] = total[name].plus(found) if name in total else found.copy()
    return total


def _all_descriptors(several: list[DescriptorView]) -> DescriptorView:
    return DescriptorView(
        open=sum(one.open for one in several),
        limit=sum(one.limit for one in several),
        legs=sum(one.legs for one in several),
        leg_budget=sum(one.leg_budget for one in several),
    )
