"""The control of a relay: what it tells its operator, and what an operator may change.

This is the relay's side of the admin API. A change takes the same way as a reload
(:meth:`~frelay.relay.relay.Relay.edit`): the rules of the route file judge an added route, and it is bound and on disk
before the caller has its answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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
    PairingsView,
    ProblemView,
    RefusalView,
    ReloadedView,
    ReloadView,
    RoutesView,
    RouteView,
    StatusView,
    TrafficView,
    problem_view,
)
from frelay.config.dump import dump_config, dump_route
from frelay.config.model import Config
from frelay.config.route_files import RouteFileEdit, route_file, route_file_content
from frelay.errors import ConfigError, Problem
from frelay.relay.relay import Relay
from frelay.relay.views import Views, certificates_of, etag_of

__all__ = ["RelayControl"]


class RelayControl(Control):
    """The control of ``relay``; ``views`` show what it serves."""

    def __init__(self, relay: Relay, views: Views) -> None:
        self._relay: Final = relay
        self._views: Final = views
        self.journal = relay.journal

    # --- views -----------------------------------------------------------------------------------------------------

    @property
    def why_not_ready(self) -> str | None:
        trust, now = self._relay.trust, time.time()
        if self.is_draining:
            return "draining: it takes nothing new any more"
        if (reason := self._views.why_not_ready) is not None:
            return reason
        if trust is not None and now > trust.not_after:
            return "tls.certificate has expired: no function will trust it"
        if trust is not None and trust.has_expired_list(now):
            return "tls.crl has run out: nobody is let in"
        return None

    @property
    def is_draining(self) -> bool:
        return self._relay.is_draining

    async def counts(self) -> Counts:
        return await self._views.counts()

    async def status(self) -> StatusView:
        load = await self._views.load()
        relay = self._relay
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
            pairings=load.pairings,
            waiting=load.waiting,
            last_reload=ReloadView(
                at=relay.last_reload_at,
                ok=error is None,
                problems=[] if error is None else [problem_view(problem) for problem in error.problems],
                restart_only=list(relay.needs_restart),
            ),
            certificates=list(certificates_of(relay)),
            descriptors=load.descriptors,
            refusals=[
                RefusalView(
                    at=entry.at,
                    code=entry.code,
                    reason=entry.reason,
                    address=entry.address,
                    route=entry.route,
                    party=entry.party,
                    identity=entry.identity,
                    meet=entry.meet,
                    certificate=entry.certificate,
                    count=entry.count,
                )
                for entry in reversed(self.journal.refusals)
            ],
            workers=list(load.workers),
        )

    async def routes(self) -> RoutesView:
        return await self._views.routes()

    async def route(self, name: str) -> RouteView:
        return await self._views.route(name)

    async def traffic(self) -> TrafficView:
        return await self._views.traffic()

    async def pairings(self) -> PairingsView:
        return await self._views.pairings()

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
            raise self._refusal(error, path) from error
        except OSError as error:
            raise Unwritable(f"the route could not be written to {path}: {error.strerror or error}") from error

    def _refusal(self, error: ConfigError, path: Path | None) -> Conflict | InvalidRequest | RelayDraining:
        """How the API answers an edit of ``path`` that was refused with ``error``."""
        if self.is_draining:
            return RelayDraining("this relay is draining, and takes no changes any more")
        own = [problem for problem in error.problems if problem.file == path and not problem.is_conflict]
        if own:
            # Without file and line: the caller has sent a route and not a file.
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
                raise RelayDraining("this relay is draining, and takes no changes any more") from error
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
