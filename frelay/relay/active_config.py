"""What is in force: one configuration, with the certificates, routes and listeners that were made of it.

It is replaced as a whole, in two halves. :meth:`ActiveConfig.open_missing` is the one that can fail: it finds and binds
the addresses that nobody has yet, all or none. :meth:`ActiveConfig.take_over` cannot: it swaps the references and stops
what is gone. A route whose wiring is unchanged keeps its sockets, its waiting legs and its pairings. One that was
removed or replaced has *retired*: see :mod:`frelay.joining.routes`.

A route is reached at each of its addresses, and an address may have several routes. So there is a table of routes for
each listener, and a route stands in as many tables as it has addresses.

Nothing here starts a task. Who has the nursery says how a new listener is served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

from frelay.config.model import Address, Config, Route
from frelay.config.plan import ListenerKey, Plan, listener_keys
from frelay.errors import ConfigError, Problem
from frelay.joining.accept_context import AcceptSettings
from frelay.joining.listener import Listener
from frelay.joining.route import LiveRoute
from frelay.joining.routes import ListenerRoutes, RouteRegistry
from frelay.net.binding import bind_failure, resolve
from frelay.net.passed_sockets import RESERVED, PassedSockets
from frelay.net.slots import Admission
from frelay.pairing.forwarding import Forwarding
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.relay.recheck import recheck_credentials
from frelay.tls.context import OuterTls

__all__ = ["ActiveConfig"]

_Places = tuple[Address, ...] | OSError
"""What the name of an address stands for, or why nobody knows."""


class ActiveConfig:
    """The configuration in force, and what it made; at first ``config`` with nothing made of it.

    ``serve`` gives a listener that is new its task, and is called with the key under which its routes are found.
    """

    def __init__(
        self,
        config: Config,
        *,
        admission: Admission,
        forwarding: Forwarding,
        registry: RouteRegistry,
        inherited: PassedSockets,
        log: Any,
        serve: Callable[[ListenerKey, Listener], None],
    ) -> None:
        self._admission: Final = admission
        self._forwarding: Final = forwarding
        self.registry: Final = registry
        """The routes in force, and those that have retired."""
        self._inherited: Final = inherited
        self._log: Final[Any] = log
        self._serve: Final = serve
        self.config = config
        self.trust: OuterTls | None = None
        self.listeners: dict[ListenerKey, Listener] = {}
        self._left: set[Listener] = set()
        """Listeners at addresses that are gone, where legs may still wait whose routes have stayed."""
        self.tables: dict[ListenerKey, ListenerRoutes] = {}
        """The routes behind each listener."""
        self.inspection_due = trio.Event()

    # --- looking -----------------------------------------------------------------------------------------------

    def accept_settings(self, key: ListenerKey) -> AcceptSettings:
        """What a connection that comes in by the listener ``key`` is given now."""
        return AcceptSettings(
            routes=self.tables.get(key) or ListenerRoutes(),
            limits=self.config.limits,
            tcp=self.config.tcp,
            trust=self.trust,
        )

    @property
    def all_listeners(self) -> tuple[Listener, ...]:
        """Those that accept, and those that only look after legs that wait."""
        return (*self.listeners.values(), *self._left)

    def describe(self) -> str:
        """How much it is, in half a line for systemctl."""
        routes, addresses = len(self.config.routes), len(self.listeners)
        return f"{routes} route{'' if routes == 1 else 's'} on {addresses} address{'' if addresses == 1 else 'es'}"

    # --- what can fail -----------------------------------------------------------------------------------------

    async def open_missing(self, new: Config) -> dict[ListenerKey, Listener]:
        """Bind what ``new`` needs and nobody has yet; raises ConfigError with nothing bound."""
        places = await self._look_up_missing(new)
        return self._open(self._missing(new), places)

    def _missing(self, new: Config) -> dict[ListenerKey, list[Route]]:
        """What ``new`` needs and nobody has bound yet: the routes that share each."""
        missing: dict[ListenerKey, list[Route]] = {}
        for route in new.routes:
            for key in listener_keys(route):
                if key not in self.listeners:
                    missing.setdefault(key, []).append(route)
        return missing

    async def _look_up_missing(self, new: Config) -> Mapping[Address, _Places]:
        """The IP addresses that are to be bound for ``new``. A name server may let us wait, while all else goes on."""
        found: dict[Address, _Places] = {}

        async def look(address: Address) -> None:
            try:
                found[address] = await resolve(address)
            except OSError as error:
                found[address] = error

        async with trio.open_nursery() as nursery:
            routes = [route for sharers in self._missing(new).values() for route in sharers]
            # All of a route, as systemd may have bound any of them.
            for address in {address for route in routes for address in route.listen}:
                nursery.start_soon(look, address)
        return found

    def _open(
        self, wanted: dict[ListenerKey, list[Route]], places: Mapping[Address, _Places]
    ) -> dict[ListenerKey, Listener]:
        """Bind all the new addresses or none; each comes with the routes that share it."""
        opened: dict[ListenerKey, Listener] = {}
        problems = []
        for key, sharers in wanted.items():
            route, address = sharers[-1], key.address
            names = [sharer.name for sharer in sharers]
            try:
                found = places[address]
                if isinstance(found, OSError):
                    raise found
                passed = self._inherited.open({sharer.name: _found(sharer, places) for sharer in sharers}, found)
                opened[key] = Listener(address, passed) if passed else Listener.open(address, found)
            except (OSError, ValueError) as error:
                text = f"cannot listen on {address}: {bind_failure(address, error)}"
                own = next((old for old in self.listeners.values() if old.address.overlaps(address)), None)
                if own is not None:
                    text += (
                        f"; this relay itself has {own.address}: remove that route in one reload, add this in a second"
                    )
                elif self._inherited.were_taken(names):
                    text += "; systemd holds it, since it once passed it for a route that is gone: restart the relay"
                problems.append(Problem(route.source, text, key=f"route[{route.name}].listen", is_conflict=True))
        if problems:
            for listener in opened.values():
                listener.close()
            raise ConfigError(problems)
        return opened

    # --- what cannot -------------------------------------------------------------------------------------------

    def take_over(
        self, new: Config, trust: OuterTls | None, changes: Plan, opened: dict[ListenerKey, Listener]
    ) -> None:
        """Put ``new`` in force. Nothing in here can fail."""
        needed = {key for route in new.routes for key in listener_keys(route)}
        old_routes = self.registry.in_force
        keep = {kept.route.name for kept in changes.keep}
        self.config, self.trust = new, trust
        self.inspection_due.set()
        ends = new.relay.policy_ends_pairings
        routes: list[LiveRoute] = []
        tables: dict[ListenerKey, dict[str, LiveRoute]] = {key: {} for key in needed}
        for route in new.routes:
            if route.name in keep:
                live = old_routes[route.name]
                live.retune(route, new.limits, policy_ends_pairings=ends)
            else:
                live = LiveRoute(
                    route,
                    new.limits,
                    policy_ends_pairings=ends,
                    forwarding=self._forwarding,
                    trust=lambda: self.trust,
                    instead_of=old_routes.get(route.name),
                )
            routes.append(live)
            for key in listener_keys(route):
                tables[key][route.name] = live
            live.charges.is_alone = len(new.routes) == 1
        old_tables, self.tables = self.tables, {key: ListenerRoutes(table) for key, table in tables.items()}
        self._admission.limits = new.limits
        for key, listener in opened.items():
            self.listeners[key] = listener
            self._serve(key, listener)
        self.announce(opened)
        for live in self.registry.put_in_force(routes):
            self._close_route(live)
        self._left = {listener for listener in self._left if not listener.has_ended}
        for key in [key for key in self.listeners if key not in needed]:
            listener = self.listeners.pop(key)
            if any(name in keep for name in old_tables.get(key, ())):
                # The route has stayed at another address, and those who came by this one wait on.
                listener.leave()
                self._left.add(listener)
            else:
                listener.stop()
        self._admission.listeners = sum(len(listener.sockets) for listener in self.listeners.values())
        self._forwarding.pipes.limit(self._admission.leg_budget // 2)

    def announce(self, opened: dict[ListenerKey, Listener]) -> None:
        """Say where it listens now, and let go of what systemd has passed for that."""
        for route in self.config.routes:
            new = [place for key in listener_keys(route) if key in opened for place in opened[key].bound]
            if new:
                self._log.info("listening", route=route.name, address=", ".join(new))
                if route.name not in RESERVED:
                    for original in self._inherited.take(route.name):
                        original.close()  # its duplicate listens

    def _close_route(self, live: LiveRoute) -> None:
        settings = self.config.relay
        patience = settings.drain_timeout if settings.policy_ends_pairings else math.inf
        live.close(
            Refusal("route-removed", f"the route {live.name!r} was removed or replaced", retry_after=1.0),
            outcome=Outcome.ROUTE_REMOVED,
            cut_at=trio.current_time() + patience,
        )

    # --- what comes of it --------------------------------------------------------------------------------------

    async def inspect_when_due(self) -> None:
        """After each reload: those who are in came in by certificates and lists that may not be the ones in force."""
        while True:
            await self.inspection_due.wait()
            self.inspection_due = trio.Event()
            if self.trust is None:
                continue
            try:
                await recheck_credentials(
                    self.registry.all,
                    self.trust,
                    ends_pairings=self.config.relay.policy_ends_pairings,
                )
            except Exception:
                # As with a reload: what nobody thought of must not end the pairings of everybody.
                self._log.exception("a bug in frelay ended the inspection after this reload")

    def warn_of_unclaimed_sockets(self) -> None:
        """Once the first configuration is in force."""
        for name, places in self._inherited.unclaimed.items():
            if name in RESERVED and getattr(self.config, name) is not None:
                continue
            self._log.warning(
                "systemd passed a socket that nothing here uses",
                name=name,
                address=", ".join(places),
                remedy="set FileDescriptorName= in its unit to the name of a route with that listen address, "
                "or to admin or metrics where the route file has that section",
            )


def _found(route: Route, places: Mapping[Address, _Places]) -> dict[Address, tuple[Address, ...]]:
    """The IP addresses of each address of ``route``, in as far as they are known."""
    found = {address: places[address] for address in route.listen}
    return {address: those for address, those in found.items() if not isinstance(those, OSError)}
