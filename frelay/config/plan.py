"""Plans what a reload has to do: it compares the running and the new configuration. Pure, no I/O.

A reload must not touch what did not change. So routes are compared by name, and a difference is one of two kinds.
*Wiring* is who the parties of a route are, and how they are admitted and handed off: it decides who may be paired.
Waiting legs were admitted under the old wiring, so a route whose wiring changes is replaced. *Limits* only bound what
happens: the route is kept, and its new limits hold for new legs and pairings. The address of a dialled service is
wiring, the time to reach it is a limit.

Listening sockets are planned apart from routes, since they may outlive them: several routes can share a socket, and a
route that is replaced at the same address keeps its socket, with the connections that queue in it. A route has one
listener for each of its addresses. :func:`listener_keys` identifies it by its address; but port 0 means "any free
port", and each such route has a listener of its own, so the route's name is then added.

The addresses of a route are therefore wiring only if all of them change. If one stays, functions still find the route
there: the route is kept, with its waiting legs and all pairings.

Lists of which any entry may match are compared as sets: another order is no change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from frelay.config.model import Address, Config, Dial, Route, RouteLimits, Section

__all__ = ["Add", "Keep", "ListenerKey", "Plan", "Remove", "Replace", "listener_keys", "plan", "without_restart"]

_WIRING: Final = ("func1", "func2", "outer", "allow_from", "proxy_protocol", "handoff", "require_inner_tls")
_TIMINGS: Final = ("hello_settle", "ticket_timeout")

# The relay's name is in every bound logger. Worker processes and the two HTTP servers are started only once. After
# dropping root we cannot change user again. If the section of a server is added or removed, all of it needs a restart.
_RESTART_ONLY: Final = {"relay": ("name", "user", "workers"), "admin": ("listen",), "metrics": ("listen",)}


@dataclass(frozen=True, slots=True, order=True)
class ListenerKey:
    """The identity of a listener; ``route`` is None unless the port is 0."""

    address: Address
    route: str | None = None

    def __str__(self) -> str:
        return str(self.address) if self.route is None else f"{self.address} (route {self.route})"


def listener_keys(route: Route) -> tuple[ListenerKey, ...]:
    """The listeners of ``route``, in the order of its addresses."""
    return tuple(ListenerKey(address, route.name if address.port == 0 else None) for address in route.listen)


@dataclass(frozen=True, slots=True)
class Keep:
    """A route that stays. ``changed`` names the keys that differ; they hold for new legs and pairings only.

    These are limits, and ``listen`` if some but not all addresses changed.
    """

    route: Route
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Add:
    """A new route."""

    route: Route


@dataclass(frozen=True, slots=True)
class Remove:
    """A route that the new configuration no longer has."""

    route: Route


@dataclass(frozen=True, slots=True)
class Replace:
    """A route whose wiring changed; ``changed`` names all keys that differ."""

    old: Route
    new: Route
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What changes, and what does not. Routes and settings are in the order of the new configuration.

    ``bind`` are listening sockets to open before anything is given up, ``close`` those to close after that.
    ``settings`` names the other settings that differ and take effect with the reload, such as
    ``limits.handshake_timeout``. ``restart_only`` names those that keep their old value until a restart
    (:func:`without_restart`). A section that was added or removed is named as a whole.
    """

    keep: tuple[Keep, ...] = ()
    add: tuple[Add, ...] = ()
    remove: tuple[Remove, ...] = ()
    replace: tuple[Replace, ...] = ()
    bind: frozenset[ListenerKey] = frozenset()
    close: frozenset[ListenerKey] = frozenset()
    settings: tuple[str, ...] = ()
    restart_only: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether both configurations are the same; the certificate files that they name may still have new content."""
        changes_routes = self.add or self.remove or self.replace or any(kept.changed for kept in self.keep)
        return not (changes_routes or self.settings or self.restart_only)

    @property
    def clashes(self) -> tuple[tuple[ListenerKey, ListenerKey], ...]:
        """Pairs (socket to bind, socket to close) that overlap: the first cannot be bound until the second is closed.

        An example is a route that moves from 127.0.0.1:9001 to 0.0.0.0:9001. A reload binds all new sockets before it
        closes any old one; here that fails with "address already in use".
        """
        return tuple(
            (new, old)
            for new in sorted(self.bind, key=str)
            for old in sorted(self.close, key=str)
            if new.address.overlaps(old.address)
        )


def plan(old: Config | None, new: Config) -> Plan:
    """How to get from ``old`` to ``new``; ``old`` is None when the relay starts."""
    before = {} if old is None else old.routes_by_name
    after = new.routes_by_name
    keep: list[Keep] = []
    add: list[Add] = []
    replace: list[Replace] = []
    for route in new.routes:
        running = before.get(route.name)
        if running is None:
            add.append(Add(route))
            continue
        wiring, limits = _changed_wiring(running, route), _changed_limits(running, route)
        moved = () if set(running.listen) == set(route.listen) else ("listen",)
        if wiring or (moved and set(running.listen).isdisjoint(route.listen)):
            replace.append(Replace(running, route, moved + wiring + limits))
        else:
            keep.append(Keep(route, moved + limits))
    bound = {key for route in before.values() for key in listener_keys(route)}
    wanted = {key for route in new.routes for key in listener_keys(route)}
    settled = without_restart(old, new)
    return Plan(
        keep=tuple(keep),
        add=tuple(add),
        remove=tuple(Remove(route) for route in before.values() if route.name not in after),
        replace=tuple(replace),
        bind=frozenset(wanted - bound),
        close=frozenset(bound - wanted),
        settings=() if old is None else _changed_settings(old, settled),
        restart_only=_changed_settings(settled, new),
    )


def without_restart(old: Config | None, new: Config) -> Config:
    """The part of ``new`` that a process that runs ``old`` can apply: what needs a restart is as in ``old``.

    So the configuration in force describes what really runs. If the file moves the admin API from TCP to a Unix socket,
    or removes it, the API stays on TCP until the restart: it keeps its ``allow``, and the ``[tls]`` that it needs.
    """
    if old is None:
        return new
    changes: dict[str, Section | None] = {}
    for name, keys in _RESTART_ONLY.items():
        was: Section | None = getattr(old, name)
        now: Section | None = getattr(new, name)
        if was is None or now is None:
            changes[name] = was
        else:
            changes[name] = now.model_copy(update={key: getattr(was, key) for key in keys})
    if old.admin is not None and new.admin is not None and _is_on_tcp(old) != _is_on_tcp(new):
        changes["admin"] = old.admin  # ``allow`` is for TCP alone
    if _is_on_tcp(old) and new.tls is None:
        changes["tls"] = old.tls
    return new.model_copy(update=changes)


def _is_on_tcp(config: Config) -> bool:
    return config.admin is not None and config.admin.address is not None


def _changed_wiring(old: Route, new: Route) -> tuple[str, ...]:
    return tuple(key for key in _WIRING if _meaning(getattr(old, key)) != _meaning(getattr(new, key)))


def _meaning(value: object) -> object:
    if isinstance(value, Dial):
        return value.address
    return frozenset(value) if isinstance(value, tuple) else value


def _changed_limits(old: Route, new: Route) -> tuple[str, ...]:
    limits = _differing(old.limits, new.limits, RouteLimits.model_fields)
    parties = (("func1", old.func1, new.func1), ("func2", old.func2, new.func2))
    calls = (
        f"{party}.connect_timeout"
        for party, was, now in parties
        if isinstance(was, Dial) and isinstance(now, Dial) and was.connect_timeout != now.connect_timeout
    )
    return (*limits, *_differing(old, new, _TIMINGS), *calls)


def _changed_settings(old: Config, new: Config) -> tuple[str, ...]:
    """All that differs outside routes. Groups and the limits of routes are compared with the routes that use them."""
    changed: list[str] = []
    for name in ("relay", "tls", "limits", "tcp", "admin", "metrics"):
        was: Section | None = getattr(old, name)
        now: Section | None = getattr(new, name)
        if was is None or now is None:
            changed += [name] if was is not now else []
            continue
        keys = [key for key in type(now).model_fields if key not in RouteLimits.model_fields]
        changed += [f"{name}.{key}" for key in _differing(was, now, keys)]
    return tuple(changed)


def _differing(old: object, new: object, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if getattr(old, key) != getattr(new, key))
