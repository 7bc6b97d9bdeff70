"""What a supervisor tells its operator: the workers' answers as one, made when it is asked for.

Changes need nothing of their own: they go through :meth:`~frelay.relay.relay.Relay.edit`, as everywhere, and are in
force in all workers before they are answered. A worker that is down or does not answer is not waited for. Its routes
are there with what was counted up to then, and nobody on them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

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
    WaitingView,
    WorkerView,
)
from frelay.config.dump import dump_route
from frelay.config.model import Route
from frelay.journal import Distribution
from frelay.relay.control import RelayControl, etag_of

if TYPE_CHECKING:
    from frelay.relay.workers.supervisor import Supervisor

__all__ = ["SupervisorControl"]

_NOBODY: Final = WaitingView(func1=[], func2=[])


class SupervisorControl(RelayControl):
    """The control of a relay with workers."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        self._supervisor: Final = supervisor

    @property
    def why_not_ready(self) -> str | None:
        down = [post.number for post in self._supervisor.posts if post.process is None]
        if down and not self.is_draining:
            return f"worker {down[0]} is down, and is being started again"
        return super().why_not_ready

    # --- numbers -----------------------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        supervisor = self._supervisor
        await supervisor.look("counts")
        found = [post.counts for post in supervisor.posts if post.counts is not None]
        # A name of the configuration has its series, whether its worker has ever told of it or not.
        none = dict.fromkeys((route.name for route in supervisor.config.routes), 0)
        return Counts(
            pairings=_sum([none, *(one.pairings for one in found)]),
            waiting=_sum(one.waiting for one in found),
            bytes_moved=_sum(one.bytes_moved for one in found),
            outcomes=_sum(one.outcomes for one in found),
            refusals=_sum(one.refusals for one in found),
            reloaded_at=supervisor.last_reload_at,
            reload_was_accepted=supervisor.last_reload_error is None,
            certificates=tuple(self._certificates()),
            durations=_all_durations([one.durations for one in found]),
            loop_lag=max((one.loop_lag for one in found), default=0.0),
            tasks=sum(one.tasks for one in found),
            workers=tuple(post.process.pid for post in supervisor.posts if post.process is not None),
            restarts={post.number: post.restarts for post in supervisor.posts},
        )

    # --- views -------------------------------------------------------------------------------------------------

    async def status(self) -> StatusView:
        supervisor = self._supervisor
        found = {
            number: StatusView.model_validate(answer) for number, answer in (await supervisor.look("status")).items()
        }
        own = await super().status()
        names: dict[int, list[str]] = {post.number: [] for post in supervisor.posts}
        for route in supervisor.config.routes:
            names[supervisor.post_of(route.name).number].append(route.name)
        return own.model_copy(
            update={
                "pairings": sum(status.pairings for status in found.values()),
                "waiting": sum(status.waiting for status in found.values()),
                "descriptors": _all_descriptors([status.descriptors for status in found.values()]),
                "workers": [
                    WorkerView(
                        number=post.number,
                        pid=None if post.process is None else post.process.pid,
                        restarts=post.restarts,
                        routes=names[post.number],
                        descriptors=found[post.number].descriptors if post.number in found else None,
                    )
                    for post in supervisor.posts
                ],
            }
        )

    async def routes(self) -> RoutesView:
        found = _by_name(await self._supervisor.look("routes"))
        return RoutesView(
            routes=[
                RouteView.model_validate(found[route.name]) if route.name in found else self._absent(route)
                for route in self._supervisor.config.routes
            ]
        )

    async def route(self, name: str) -> RouteView:
        route = self._supervisor.config.routes_by_name.get(name)
        if route is None:
            raise UnknownRoute(f"there is no route {name!r}")
        found = _by_name(await self._supervisor.look("routes", [self._supervisor.post_of(name)]))
        return RouteView.model_validate(found[name]) if name in found else self._absent(route)

    async def traffic(self) -> TrafficView:
        found = _by_name(await self._supervisor.look("traffic"))
        return TrafficView(
            now=time.time(),
            last_reload_at=self._supervisor.last_reload_at,
            routes=[
                RouteTrafficView.model_validate(found.get(route.name) or self._absent_traffic(route))
                for route in self._supervisor.config.routes
            ],
        )

    async def pairings(self) -> PairingsView:
        answers = await self._supervisor.look("pairings")
        return PairingsView(
            pairings=[PairingView.model_validate(pairing) for answer in answers.values() for pairing in answer]
        )

    def _absent_traffic(self, route: Route) -> RouteTrafficView:
        """A route whose worker does not answer: what was counted, and nobody there."""
        counts, name = self._supervisor.post_of(route.name).counts, route.name
        outcomes = {} if counts is None else {word: n for (of, word), n in counts.outcomes.items() if of == name}
        refusals = {} if counts is None else {code: n for (of, code), n in counts.refusals.items() if of == name}
        moved: Mapping[Any, int] = {} if counts is None else counts.bytes_moved
        return RouteTrafficView(
            name=name,
            waiting=_NOBODY,
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
            bound=self._supervisor.bound(route.name),
            file=str(route.source),
            is_editable=route.source != self._supervisor.config.path,
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
