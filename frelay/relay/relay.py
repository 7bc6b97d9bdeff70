"""The relay: what it does from its start to its end, apart from connections.

It obeys signals, watches the files, reloads, tells systemd how it is, serves HTTP for the operator, and drains. Routes
are served by its backend (:mod:`frelay.relay.backend`), so all of this is the same for one process, for a supervisor
with worker processes, and for each of these. :mod:`frelay.relay.run` puts the parts together.

What may go wrong when a configuration is changed is told in :mod:`frelay.relay.reload`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import Plan, plan
from frelay.config.route_files import RouteFileEdit
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.joining.route import LiveRoute
from frelay.journal import Draining, Journal
from frelay.net.passed_sockets import PassedSockets
from frelay.net.resolver import SharedResolver
from frelay.net.slots import Admission
from frelay.pairing.pairing import Pairing
from frelay.relay.backend import Backend, Staged
from frelay.relay.parts import Parts
from frelay.relay.recheck import follow_clock, reload_at_expiry
from frelay.relay.reload import Reloader
from frelay.relay.resources import warn_of_unclaimed_sockets
from frelay.relay.service_manager import ServiceManager
from frelay.tls.context import openssl_version
from frelay.tls.trust import OuterTls

__all__ = ["HttpServers", "OpenServers", "Relay", "merged"]


class HttpServers(Protocol):
    """The HTTP servers of a relay, bound."""

    @property
    def bound(self) -> dict[str, list[str]]:
        """Where they really listen, by ``admin`` and ``metrics``."""

    async def run(self) -> None:
        """Serve until cancelled."""


class OpenServers(Protocol):
    """Binds the HTTP servers that the configuration of a relay asks for."""

    def __call__(self, relay: Relay) -> HttpServers | None:
        """The servers of ``relay``; None if it is to have none. Raises ConfigError with nothing bound."""


class Relay:
    """One relay process. :mod:`frelay.relay.run` makes it of its parts; then :meth:`run` it.

    A worker process does not obey signals and does not watch files: its supervisor does. ``open_servers`` is called
    once the first configuration is in force.
    """

    def __init__(
        self,
        parts: Parts,
        backend: Backend,
        reloader: Reloader,
        *,
        inherited: PassedSockets,
        service_manager: ServiceManager,
        open_servers: OpenServers | None,
        watch_files: bool,
        obeys_signals: bool,
    ) -> None:
        self.parts: Final = parts
        self._backend: Final = backend
        self._reloader: Final = reloader
        self._inherited: Final = inherited
        self._service_manager: Final = service_manager
        self._draining: Final = parts.draining
        self._open_servers: Final = open_servers
        self._watch_files: Final = watch_files
        self._obeys_signals: Final = obeys_signals
        self._resolver: Final = SharedResolver()
        self._servers: HttpServers | None = None
        self._log: Final[Any] = parts.log
        self.started_at: Final = reloader.last_at
        """When it was made, in seconds since the epoch."""

    # --- for the outside ---------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.parts.active.config

    @property
    def is_draining(self) -> bool:
        """Whether it takes nothing new any more."""
        return self._draining.is_set()

    @property
    def trust(self) -> OuterTls | None:
        """The certificates in force; None without ``[tls]``."""
        return self.parts.active.trust

    @property
    def openssl(self) -> str:
        """The version of the OpenSSL that it uses."""
        return openssl_version()

    @property
    def served(self) -> dict[str, list[str]]:
        """Where its HTTP servers really listen, by ``admin`` and ``metrics``."""
        return {} if self._servers is None else self._servers.bound

    def age(self, moment: float) -> float:
        """Seconds since ``moment`` on the clock that lobbies and pairings go by."""
        return trio.current_time() - moment

    @property
    def journal(self) -> Journal:
        """What has happened."""
        return self.parts.journal

    @property
    def admission(self) -> Admission:
        """How many connections there are, and may be."""
        return self.parts.admission

    @property
    def routes(self) -> dict[str, LiveRoute]:
        """The routes in force that this process serves, by name."""
        return dict(self.parts.registry.in_force)

    @property
    def pairings(self) -> list[Pairing]:
        """All pairings that run in this process, those of removed routes too."""
        return self.parts.registry.pairings

    def bound(self, route: str) -> list[str]:
        """The addresses on which ``route`` really listens, ``host:port``."""
        return self.parts.active.bound(route)

    # --- the tree ----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> int:
        """Serve until told to end; gives the exit code: 0, or 1 if a deadline had to cut a pairing.

        Raises ConfigError if the configuration cannot be put in force at all. ``task_status`` is started once every
        address is bound.
        """
        first = self.config
        watcher = Watcher(lambda: self._reloader.watched_files)
        if self._watch_files:
            # What changed between the caller's load and this mark would otherwise never be noticed.
            await watcher.mark()
            first = await trio.to_thread.run_sync(load, first.path, limiter=self.parts.reading)
        prepared = await self._backend.prepare(first)
        try:
            async with trio.open_nursery() as root:
                root.start_soon(self._service_manager.run)
                if self._obeys_signals:
                    await root.start(self._obey_signals)
                await root.start(self._resolver.run)
                async with self._backend.serving():
                    staged = await self._backend.stage(first, prepared, plan(None, first))
                    del prepared  # it holds the bytes of the private key's file
                    if self.is_draining:
                        # The signal came while names were resolved. Nobody would stop a listener that serves now.
                        await staged.abandon()
                    else:
                        await staged.put_in_force()
                        self._start(first, watcher, root)
                        task_status.started()
                    await self._draining.wait()
                root.cancel_scope.cancel(reason="the relay has drained")
        except* ConfigError as group:
            raise merged(group) from None
        finally:
            self._inherited.close()
        was_cut = self._backend.was_cut
        self._log.info("stopped", clean=not was_cut)
        return 1 if was_cut else 0

    def _start(self, first: Config, watcher: Watcher, root: trio.Nursery) -> None:
        """Start all that runs beside the routes, once ``first`` is in force."""
        self._start_servers(root)
        warn_of_unclaimed_sockets(self._inherited, self.config, self._log)
        self._log.info("ready", routes=len(first.routes), openssl=openssl_version())
        self._service_manager.ready(self._reloader.status())
        root.start_soon(self._reloader.run)
        root.start_soon(follow_clock, lambda: self.parts.registry.all)
        if self._watch_files:
            root.start_soon(self._reloader.watch, watcher)
            # Only here: a relay that does not watch files reads nothing again until it is asked to.
            root.start_soon(reload_at_expiry, lambda: self.trust, self.request_reload)

    def _start_servers(self, root: trio.Nursery) -> None:
        """Bind and start the HTTP servers; they last until the root ends, so that a drain can be watched."""
        self._servers = None if self._open_servers is None else self._open_servers(self)
        if self._servers is not None:
            root.start_soon(self._servers.run)
            self._log.info("serving", **{name: ", ".join(places) for name, places in self._servers.bound.items()})

    # --- changing ----------------------------------------------------------------------------------------------

    def request_reload(self) -> None:
        """Ask for a reload; several requests in a short time make one."""
        self._reloader.request()

    async def reload(self) -> Plan:
        """Load the file again and put it in force; raises ConfigError with the old configuration whole."""
        return await self._reloader.reload()

    async def edit(self, edit: Callable[[Config], RouteFileEdit]) -> Plan:
        """Change one file of ``routes_dir`` and put it in force: see :meth:`~frelay.relay.reload.Reloader.edit`."""
        return await self._reloader.edit(edit)

    async def stage(self, new: Config) -> Staged:
        """Do for ``new`` all that can fail: see :meth:`~frelay.relay.reload.Reloader.stage`."""
        return await self._reloader.stage(new)

    @property
    def last_reload_at(self) -> float:
        """When it last reloaded or refused to, in seconds since the epoch; at first, when it was made."""
        return self._reloader.last_at

    @property
    def last_reload_error(self) -> ConfigError | None:
        """Why the last reload was refused; None after one that was taken over."""
        return self._reloader.last_error

    @property
    def needs_restart(self) -> tuple[str, ...]:
        """The keys in which the file differs from what runs, and that only a restart changes."""
        return self._reloader.needs_restart

    # --- ending ------------------------------------------------------------------------------------------------

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        # One receiver for the whole life: a signal that came in a gap would kill the process in its drain.
        with trio.open_signal_receiver(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self.request_reload()
                elif not self._draining.is_set():
                    self.drain(reason=signal.Signals(number).name)
                else:
                    self.stop_now()

    def drain(self, *, reason: str) -> None:
        """Accept nothing more, send away the legs that wait, and let pairings end within ``drain_timeout``."""
        if self._draining.is_set():
            return
        timeout = self.config.relay.drain_timeout
        self._draining.set()
        left = self._backend.pairing_count
        self._service_manager.stopping(f"draining, {left} pairings are left to end", timeout)
        self.journal.note(Draining(reason=reason, seconds=timeout))
        self._backend.drain(reason=reason, timeout=timeout)

    def stop_now(self) -> None:
        """End the drain: every pairing is cut now."""
        self._log.warning("stopping now", pairings=self._backend.pairing_count)
        self._backend.stop_now()


def merged(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    """All the problems of a group of configuration errors as one error."""
    problems: list[Problem] = []
    for error in group.exceptions:
        found = merged(error) if isinstance(error, BaseExceptionGroup) else error
        problems.extend(found.problems)
    return ConfigError(problems)
