"""The local backend: this process serves the routes itself.

The nursery tree, from the outside in; each scope ends only after everything in it has::

    root          the readiness set, the recheck, and the bounds for connections without a certificate yet
      pairings    one task a pairing; in a drain their deadline ends them
        accepting one listener task an address, with a task for each leg that is not paired yet

A drain leaves the tree in this order: the listeners stop (their waiting legs are told), the pairings have until
``drain_timeout``, and then the root ends.

One configuration replaces another in two halves. :meth:`LocalBackend.stage` is the half that can fail: it binds the new
addresses, all or none. The half that it returns cannot fail: it swaps the references and stops what is gone. A route
whose wiring is unchanged keeps its sockets, its waiting legs and its pairings. One that was removed or replaced
retires (:mod:`frelay.joining.routes`).

A route is reached at each of its addresses, and an address may have several routes. So there is a table of routes for
each listener, and a route stands in as many tables as it has addresses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio

from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan, listener_keys
from frelay.joining.accept_context import AcceptSettings
from frelay.joining.listener import Listener
from frelay.joining.route import LiveRoute
from frelay.joining.routes import ListenerRoutes
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.relay.backend import Prepared, Resources, Staged
from frelay.relay.parts import Parts
from frelay.tls.trust import OuterTls

__all__ = ["LocalBackend"]

# How long a function that was waiting is told to wait before it dials again, while this relay goes away, in seconds.
_RECONNECT_IN: Final = 1.0


class LocalBackend:
    """Serves the routes of a relay in this process; ``resources`` give it certificates and sockets."""

    def __init__(self, parts: Parts, resources: Resources) -> None:
        self._parts: Final = parts
        self._log: Final[Any] = parts.log
        self._resources: Final = resources
        self._accepting: trio.Nursery | None = None
        self._tables: dict[ListenerKey, ListenerRoutes] = {}
        """The routes behind each listener."""
        self._left: set[Listener] = set()
        """Listeners at addresses that are gone, where legs may still wait whose routes have stayed."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """The scope in which routes are served."""
        parts = self._parts
        try:
            async with trio.open_nursery() as root:
                root.start_soon(parts.forwarding.readiness.run)
                root.start_soon(parts.admission.strangers.run)
                root.start_soon(parts.shared.strangers_refused.run)
                root.start_soon(parts.recheck.run)
                async with parts.runner.open(), trio.open_nursery() as self._accepting:
                    yield
                root.cancel_scope.cancel(reason="the relay has drained")
        finally:
            for listener in self._all_listeners:
                listener.close()
            parts.forwarding.pipes.close()

    @property
    def _all_listeners(self) -> tuple[Listener, ...]:
        """The listeners that accept, and those that accept no more but still have waiting legs."""
        return (*self._parts.active.listeners.values(), *self._left)

    # --- changing ----------------------------------------------------------------------------------------------

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to; raises ConfigError."""
        return await self._resources.prepare(config)

    async def stage(self, new: Config, prepared: Prepared, changes: Plan) -> Staged:
        """Open the listeners that ``new`` needs; raises ConfigError with none of them open."""
        trust = prepared.trust
        opened = await self._resources.open_listeners(new, changes)

        async def put_in_force() -> None:
            self._take_over(new, trust, changes, opened)
            self._resources.report(new, trust, opened)

        async def abandon() -> None:
            for listener in opened.values():
                listener.close()

        return Staged(changes, put_in_force, abandon)

    def _take_over(
        self, new: Config, trust: OuterTls | None, changes: Plan, opened: dict[ListenerKey, Listener]
    ) -> None:
        """Put ``new`` in force. Nothing in here can fail."""
        parts = self._parts
        unneeded = parts.active.take_over(new, trust, changes, opened)
        keep = {kept.route.name for kept in changes.keep}
        routes = self._routes_of(new, keep)
        old_tables, self._tables = self._tables, _tables(routes)
        parts.recheck.request()
        parts.admission.limits = new.limits
        for key, listener in opened.items():
            self._serve(key, listener)
        for route in parts.registry.put_in_force(routes):
            self._close_route(route)
        self._left = {listener for listener in self._left if not listener.has_ended}
        for key, listener in unneeded.items():
            if any(name in keep for name in old_tables.get(key, ())):
                # The route has stayed at another address, and the legs that came by this one wait on.
                listener.leave()
                self._left.add(listener)
            else:
                listener.stop()
        parts.admission.listeners = sum(len(listener.sockets) for listener in parts.active.listeners.values())
        parts.forwarding.pipes.limit(parts.admission.leg_budget // 2)

    def _routes_of(self, new: Config, keep: set[str]) -> list[LiveRoute]:
        """The routes of ``new``; those named in ``keep`` live on with new limits."""
        active, old = self._parts.active, self._parts.registry.in_force
        ends = new.relay.policy_ends_pairings
        routes: list[LiveRoute] = []
        for route in new.routes:
            if route.name in keep:
                live = old[route.name]
                live.retune(route, new.limits, policy_ends_pairings=ends)
            else:
                live = LiveRoute(
                    route,
                    new.limits,
                    policy_ends_pairings=ends,
                    forwarding=self._parts.forwarding,
                    trust=lambda: active.trust,
                    instead_of=old.get(route.name),
                )
            live.charges.is_alone = len(new.routes) == 1
            routes.append(live)
        return routes

    def _close_route(self, route: LiveRoute) -> None:
        settings = self._parts.active.config.relay
        timeout = settings.drain_timeout if settings.policy_ends_pairings else math.inf
        route.close(
            Refusal("route-removed", f"the route {route.name!r} was removed or replaced", retry_after=1.0),
            outcome=Outcome.ROUTE_REMOVED,
            cut_at=trio.current_time() + timeout,
        )

    # --- serving -----------------------------------------------------------------------------------------------

    def _serve(self, key: ListenerKey, listener: Listener) -> None:
        if self._accepting is None:
            raise AssertionError("listeners before the relay runs")
        self._accepting.start_soon(listener.serve, key, partial(self._accept_settings, key), self._parts.shared)

    def _accept_settings(self, key: ListenerKey) -> AcceptSettings:
        """What a connection that comes in by the listener ``key`` is given now."""
        active = self._parts.active
        return AcceptSettings(
            routes=self._tables.get(key) or ListenerRoutes(),
            limits=active.config.limits,
            tcp=active.config.tcp,
            trust=active.trust,
        )

    # --- ending ------------------------------------------------------------------------------------------------

    def drain(self, *, reason: str, timeout: float) -> None:
        """Accept nothing more, send away the legs that wait, and let pairings end within ``timeout`` seconds."""
        for listener in self._all_listeners:
            listener.stop()
        # Not before: an operator who reads this line starts a successor, which must find the addresses free.
        self._log.info("draining", reason=reason, pairings=self.pairing_count, seconds=timeout)
        refusal = Refusal("draining", "this relay is going away", retry_after=_RECONNECT_IN, reconnect_in=_RECONNECT_IN)
        for route in self._parts.registry.all:
            route.close(refusal, outcome=Outcome.DRAINED, cut_at=trio.current_time() + timeout)

    def stop_now(self) -> None:
        """End the drain: cut every pairing now."""
        if self._accepting is not None:
            self._accepting.cancel_scope.cancel(reason="a second signal ended the drain")
        for pairing in self._parts.registry.pairings:
            pairing.expire_at(trio.current_time(), Outcome.DRAINED, "a second signal ended the drain")

    @property
    def pairing_count(self) -> int:
        """How many pairings run."""
        return len(self._parts.registry.pairings)

    @property
    def was_cut(self) -> bool:
        """Whether a drain had to cut a pairing."""
        return self._parts.runner.was_cut


def _tables(routes: list[LiveRoute]) -> dict[ListenerKey, ListenerRoutes]:
    tables: defaultdict[ListenerKey, dict[str, LiveRoute]] = defaultdict(dict)
    for route in routes:
        for key in listener_keys(route.config):
            tables[key][route.name] = route
    return {key: ListenerRoutes(table) for key, table in tables.items()}
