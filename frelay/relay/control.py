"""What a running relay tells its operator, and what an operator may change: the relay's side of the admin API.

Looks are views of what is there at that moment, made anew for each caller; nothing is kept for them. A change goes
through the same door as a reload (:meth:`~frelay.relay.relay.Relay.edit`), so that an added route is judged by the
rules of the route file, and is bound and on disk before anybody is told so.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from frelay import __version__
from frelay.admin.control import (
    Conflict,
    Control,
    Counts,
    InvalidRequest,
    PreconditionFailed,
    RelayDraining,
    UnknownRoute,
    Unwritable,
)
from frelay.admin.model import (
    CertificateView,
    DescriptorView,
    LegView,
    PairingsView,
    PairingView,
    PartyView,
    ProblemView,
    RefusalView,
    ReloadedView,
    ReloadView,
    RoutesView,
    RouteTrafficView,
    RouteView,
    StatusView,
    TrafficView,
    WaitingView,
    problem_view,
)
from frelay.config.dump import dump_config, dump_route
from frelay.config.model import Config
from frelay.config.route_files import RouteFileEdit, route_file, route_file_content
from frelay.errors import ConfigError, Problem
from frelay.joining.lobby import Waiter
from frelay.journal import RouteTotals
from frelay.protocol.messages import PartyName

if TYPE_CHECKING:
    from frelay.joining.route import LiveRoute
    from frelay.pairing.leg import Leg
    from frelay.pairing.pairing import Pairing
    from frelay.relay.relay import Relay

__all__ = ["RelayControl", "etag_of"]

_PARTIES: Final[tuple[PartyName, PartyName]] = ("func1", "func2")
_NOBODY: Final = WaitingView(func1=[], func2=[])


class RelayControl(Control):
    """The control of one relay."""

    def __init__(self, relay: Relay) -> None:
        self._relay: Final = relay
        self.journal = relay.journal

    # --- looks -----------------------------------------------------------------------------------------------------

    @property
    def why_not_ready(self) -> str | None:
        trust, now = self._relay.trust, time.time()
        if self.is_draining:
            return "draining: it takes nothing new any more"
        if trust is not None and now > trust.not_after:
            return "tls.certificate has expired: no function will trust it"
        if trust is not None and trust.has_expired_list(now):
            return "tls.crl has run out: nobody is let in"
        return None

    @property
    def is_draining(self) -> bool:
        return self._relay.is_draining

    async def counts(self) -> Counts:
        relay, routes, totals = self._relay, self._relay.routes, self.journal.totals
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
            waiting={(name, party): live.lobby.count(party) for name, live in routes.items() for party in _PARTIES},
            bytes_moved=moved,
            outcomes={(name, word): count for name in running for word, count in totals[name].outcomes.items()},
            refusals={(name, code): count for name in ("", *running) for code, count in totals[name].refusals.items()},
            reloaded_at=relay.last_reload_at,
            reload_was_accepted=relay.last_reload_error is None,
            certificates=tuple(self._certificates()),
            durations={name: found.copy() for name, found in self.journal.durations.items()},
        )

    async def status(self) -> StatusView:
        relay = self._relay
        routes = relay.routes.values()
        error = relay.last_reload_error
        return StatusView(
            name=relay.config.relay.name,
            version=__version__,
            openssl=relay.openssl,
            pid=os.getpid(),
            state="draining" if relay.is_draining else "running",
            started_at=relay.started_at,
            now=time.time(),
            config=str(relay.config.path),
            routes=len(relay.config.routes),
            pairings=len(relay.pairings),
            waiting=sum(route.lobby.count("func1") + route.lobby.count("func2") for route in routes),
            last_reload=ReloadView(
                at=relay.last_reload_at,
                ok=error is None,
                problems=[] if error is None else [problem_view(problem) for problem in error.problems],
                restart_only=list(relay.needs_restart),
            ),
            certificates=list(self._certificates()),
            descriptors=DescriptorView(
                open=len(os.listdir("/proc/self/fd")),
                limit=relay.admission.descriptor_limit,
                legs=relay.admission.legs,
                leg_budget=relay.admission.leg_budget,
            ),
            refusals=[
                RefusalView(
                    at=entry.at,
                    code=entry.code,
                    reason=entry.reason,
                    address=entry.address,
                    route=entry.route,
                    party=entry.party,
                    identity=entry.identity,
                    certificate=entry.certificate,
                    count=entry.count,
                )
                for entry in reversed(self.journal.refusals)
            ],
        )

    def _certificates(self) -> Iterator[CertificateView]:
        section, trust = self._relay.config.tls, self._relay.trust
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

    async def routes(self) -> RoutesView:
        # Once through all pairings, and not once a route.
        under_way = self._bytes_under_way()
        return RoutesView(routes=[self._view(route, under_way) for route in self._relay.routes.values()])

    async def route(self, name: str) -> RouteView:
        return self._view(self._find(name), self._bytes_under_way())

    def _find(self, name: str) -> LiveRoute:
        route = self._relay.routes.get(name)
        if route is None:
            raise UnknownRoute(f"there is no route {name!r}")
        return route

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
        under_way = self._bytes_under_way()
        return TrafficView(
            now=time.time(),
            last_reload_at=self._relay.last_reload_at,
            routes=[self._traffic(route, under_way) for route in self._relay.routes.values()],
        )

    def _traffic(self, route: LiveRoute, under_way: Mapping[str, Mapping[PartyName, int]]) -> RouteTrafficView:
        totals = self.journal.totals.get(route.name) or RouteTotals()
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
        func1, func2 = ([self._leg(waiter) for waiter in route.lobby.waiting(party)] for party in _PARTIES)
        return WaitingView(func1=func1, func2=func2) if func1 or func2 else _NOBODY

    def _leg(self, waiter: Waiter) -> LegView:
        leg = waiter.leg
        since = time.time() - self._relay.age(waiter.since)
        return LegView(identity=leg.identity, address=leg.address, mode=leg.mode, since=since)

    async def pairings(self) -> PairingsView:
        now = time.time()
        return PairingsView(pairings=[_pairing(pairing, now) for pairing in self._relay.pairings])

    def configuration(self) -> dict[str, Any]:
        return dump_config(self._relay.config)

    # --- changes ---------------------------------------------------------------------------------------------------

    async def put_route(
        self, name: str, table: Mapping[str, Any], *, if_match: frozenset[str] | None, must_be_new: bool
    ) -> tuple[RouteView, bool]:
        try:
            content = route_file_content(table)
        except (ValueError, TypeError) as error:
            raise InvalidRequest("the route cannot be written as TOML", [ProblemView(message=str(error))]) from error
        is_new = False

        def edit(config: Config) -> RouteFileEdit:
            nonlocal is_new
            is_new = name not in config.routes_by_name
            if is_new and if_match is not None:
                raise PreconditionFailed(f"there is no route {name!r}")
            if not is_new and must_be_new:
                raise PreconditionFailed(f"there is a route {name!r} already")
            return RouteFileEdit(self._editable_file(config, name, if_match), content)

        await self._edit(edit)
        return await self.route(name), is_new

    async def delete_route(self, name: str, *, if_match: frozenset[str] | None) -> None:
        def edit(config: Config) -> RouteFileEdit:
            if name not in config.routes_by_name:
                raise UnknownRoute(f"there is no route {name!r}")
            return RouteFileEdit(self._editable_file(config, name, if_match), None)

        await self._edit(edit)

    def _editable_file(self, config: Config, name: str, if_match: frozenset[str] | None) -> Path:
        """The file of a route that the caller may write now; raises Conflict or PreconditionFailed."""
        if config.relay.routes_dir is None:
            raise AssertionError("a loaded configuration without routes_dir")
        path = route_file(config.relay.routes_dir, name)
        route = config.routes_by_name.get(name)
        if route is not None and route.source != path:
            raise Conflict(
                f"the route {name!r} stands in {route.source}, which frelay never writes: change it there, or remove "
                f"it there to have it in {path}"
            )
        if route is not None and if_match is not None and not if_match & {"*", etag_of(dump_route(route))}:
            raise PreconditionFailed(f"the route {name!r} has changed meanwhile: read it again")
        return path

    async def _edit(self, edit: Any) -> None:
        path: Path | None = None

        def remembered(config: Config) -> RouteFileEdit:
            nonlocal path
            wanted: RouteFileEdit = edit(config)
            path = wanted.path
            return wanted

        try:
            await self._relay.edit(remembered)
        except ConfigError as error:
            raise self._judged(error, path) from error
        except OSError as error:
            raise Unwritable(f"the route could not be written to {path}: {error.strerror or error}") from error

    def _judged(self, error: ConfigError, path: Path | None) -> Conflict | InvalidRequest | RelayDraining:
        if self.is_draining:
            return RelayDraining("this relay is draining, and takes nothing over any more")
        own = [problem for problem in error.problems if problem.file == path and not problem.is_conflict]
        if own:
            # Without file and line: the caller has sent a route, and no file.
            return InvalidRequest("the route is wrong", [ProblemView(key=one.key, message=one.message) for one in own])
        if any(problem.is_conflict for problem in error.problems):
            return Conflict("the route cannot be beside what is there", _views(error.problems))
        return Conflict(
            "the files on disk have problems of their own; mend them first, or a restart would fail",
            _views(error.problems),
        )

    async def reload(self) -> ReloadedView:
        try:
            changes = await self._relay.reload()
        except ConfigError as error:
            if self.is_draining:
                raise RelayDraining("this relay is draining, and takes nothing over any more") from error
            raise Conflict("the configuration was refused, and the old one stays", _views(error.problems)) from error
        return ReloadedView(
            kept=len(changes.keep),
            added=[added.route.name for added in changes.add],
            removed=[removed.route.name for removed in changes.remove],
            replaced=[replaced.new.name for replaced in changes.replace],
            restart_only=list(changes.restart_only),
        )


def _views(problems: tuple[Problem, ...]) -> list[ProblemView]:
    return [problem_view(problem) for problem in problems]


def etag_of(written: Mapping[str, Any]) -> str:
    """The ETag of a route, from :func:`~frelay.config.dump.dump_route`."""
    text = json.dumps(written, sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _pairing(pairing: Pairing, now: float) -> PairingView:
    moved = pairing.bytes_moved
    return PairingView(
        id=pairing.id,
        route=pairing.route,
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
