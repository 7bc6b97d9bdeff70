"""A relay's own resources: it reads the files of ``[tls]`` itself, and binds its addresses, unless systemd has."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from frelay.config.model import Address, Config, Route
from frelay.config.plan import ListenerKey, Plan, listener_keys
from frelay.errors import ConfigError, Problem
from frelay.joining.listener import Listener
from frelay.net.binding import bind_failure, resolve
from frelay.net.passed_sockets import RESERVED, PassedSockets
from frelay.relay.backend import Prepared
from frelay.relay.config_warnings import log_warnings
from frelay.relay.parts import Parts
from frelay.relay.prepare import TlsFiles, prepare
from frelay.tls.trust import OuterTls

__all__ = ["OwnResources", "warn_of_unclaimed_sockets"]

_Addresses = tuple[Address, ...] | OSError
"""The IP addresses that the name in an address stands for, or why they cannot be known."""


class OwnResources:
    """The resources of a process that reads and binds for itself.

    ``inherited`` are sockets that systemd has bound; they are used before any are bound here.
    """

    def __init__(self, parts: Parts, inherited: PassedSockets) -> None:
        self._active: Final = parts.active
        self._reading: Final = parts.reading
        self._log: Final[Any] = parts.log
        self._inherited: Final = inherited

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to; raises ConfigError."""
        contents: dict[Path, bytes] = {}
        now = time.time()
        load = partial(prepare, config, contents=contents, now=now)
        trust = await trio.to_thread.run_sync(load, limiter=self._reading)
        return Prepared(trust, TlsFiles(contents, now))

    async def open_listeners(self, new: Config, changes: Plan) -> dict[ListenerKey, Listener]:
        """Bind what ``changes`` bind for ``new``; raises ConfigError with nothing bound."""
        wanted: dict[ListenerKey, list[Route]] = {}
        for route in new.routes:
            for key in listener_keys(route):
                if key in changes.bind:
                    wanted.setdefault(key, []).append(route)
        # A name server may let us wait; everything else goes on meanwhile.
        return self._open(wanted, await _look_up_all(wanted))

    def _open(
        self, wanted: dict[ListenerKey, list[Route]], found: Mapping[Address, _Addresses]
    ) -> dict[ListenerKey, Listener]:
        """Bind all of ``wanted`` or none; each address comes with the routes that share it."""
        opened: dict[ListenerKey, Listener] = {}
        problems = []
        for key, sharers in wanted.items():
            route, address = sharers[-1], key.address
            names = [sharer.name for sharer in sharers]
            try:
                addresses = found[address]
                if isinstance(addresses, OSError):
                    raise addresses
                passed = self._inherited.open({sharer.name: _known(sharer, found) for sharer in sharers}, addresses)
                opened[key] = Listener(address, passed) if passed else Listener.open(address, addresses)
            except (OSError, ValueError) as error:
                text = f"cannot listen on {address}: {bind_failure(address, error)}"
                own = next((old for old in self._active.listeners.values() if old.address.overlaps(address)), None)
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

    def report(self, config: Config, trust: OuterTls | None, opened: dict[ListenerKey, Listener]) -> None:
        """Log where ``config`` listens anew and the warnings about it; close what systemd has passed for that."""
        for route in config.routes:
            new = [address for key in listener_keys(route) if key in opened for address in opened[key].bound]
            if new:
                self._log.info("listening", route=route.name, address=", ".join(new))
                if route.name not in RESERVED:
                    for original in self._inherited.take(route.name):
                        original.close()  # its duplicate listens
        log_warnings(config, trust, self._log)


def warn_of_unclaimed_sockets(inherited: PassedSockets, config: Config, log: Any) -> None:
    """Log which sockets of systemd nothing uses, now that ``config`` is the first in force."""
    for name, addresses in inherited.unclaimed.items():
        if name in RESERVED and getattr(config, name) is not None:
            continue
        log.warning(
            "systemd passed a socket that nothing here uses",
            name=name,
            address=", ".join(addresses),
            remedy="set FileDescriptorName= in its unit to the name of a route with that listen address, "
            "or to admin or metrics where the route file has that section",
        )


async def _look_up_all(wanted: dict[ListenerKey, list[Route]]) -> Mapping[Address, _Addresses]:
    """The IP addresses of everything that the routes in ``wanted`` listen at."""
    found: dict[Address, _Addresses] = {}

    async def look_up(address: Address) -> None:
        try:
            found[address] = await resolve(address)
        except OSError as error:
            found[address] = error

    async with trio.open_nursery() as nursery:
        routes = [route for sharers in wanted.values() for route in sharers]
        # All addresses of a route, not only the new ones: systemd may have bound any of them.
        for address in {address for route in routes for address in route.listen}:
            nursery.start_soon(look_up, address)
    return found


def _known(route: Route, found: Mapping[Address, _Addresses]) -> dict[Address, tuple[Address, ...]]:
    """The IP addresses of each address of ``route``, as far as they are known."""
    of_route = {address: found[address] for address in route.listen}
    return {address: those for address, those in of_route.items() if not isinstance(those, OSError)}
