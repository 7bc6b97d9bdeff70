"""The relay: the nursery tree that serves what is in force, and how it begins and ends.

The tree, from the outside in; each scope ends only after everything in it has::

    root          signals, the file watcher, the readiness set
      pairings    one task a pairing; on the way out they are ended by a deadline, not by a kill
        doors     one listener task an address, with a task for each leg that is not paired yet

So a drain is nothing but leaving the tree in order: the doors close (their waiting legs are told), the pairings get
until ``drain_timeout``, and then the root goes.

What is in force, and how one configuration takes the place of another, is told in :mod:`frelay.relay.active_config`;
when that happens, and what may go wrong, in :mod:`frelay.relay.reload`. The relay gives both their tasks, and shows
them to others.

With ``workers`` above 1 this class is still what the outside sees, and others serve the routes
(:mod:`frelay.relay.workers`): what differs there is in the methods that a comment names.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan, listener_keys, plan
from frelay.config.route_files import RouteFileEdit
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.joining.accept_context import SharedParts
from frelay.joining.listener import Listener
from frelay.joining.refusal_log import StrangersRefused
from frelay.joining.route import LiveRoute
from frelay.joining.routes import RouteRegistry
from frelay.joining.runner import PairingRunner
from frelay.joining.tickets import TicketRegistry
from frelay.journal import Draining, Journal
from frelay.net.passed_sockets import PassedSockets
from frelay.net.resolver import SharedResolver
from frelay.net.slots import Admission, raise_descriptor_limit
from frelay.pairing.forwarding import Forwarding
from frelay.pairing.pairing import Pairing
from frelay.pairing.pipes import PipePool
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.relay.active_config import ActiveConfig
from frelay.relay.config_warnings import log_warnings
from frelay.relay.prepare import prepare, with_all_problems
from frelay.relay.recheck import follow_clock, reload_at_expiry
from frelay.relay.reload import Reloader, Staged
from frelay.relay.service_manager import ServiceManager
from frelay.tls.context import OuterTls, openssl_version

if TYPE_CHECKING:
    from frelay.admin.control import Control
    from frelay.admin.servers import Servers

__all__ = ["Relay"]

# What a function that was waiting is told to wait before it dials again, while this relay goes away.
_RECONNECT_IN: Final = 1.0


class Relay:
    """One relay process. Make it from a loaded configuration, and :meth:`run` it.

    ``inherited`` are sockets to use before any are bound, ``service_manager`` is who is told how it goes, and ``log``
    who is told everything else, in place of its own logger.
    """

    def __init__(
        self,
        config: Config,
        *,
        watch_files: bool = True,
        inherited: PassedSockets | None = None,
        service_manager: ServiceManager | None = None,
        log: Any = None,
    ) -> None:
        self._log: Final[Any] = (log or structlog.get_logger("frelay.relay")).bind(relay=config.relay.name)
        self._watch_files: Final = watch_files
        self._inherited: Final = inherited or PassedSockets()
        self._service_manager: Final = service_manager or ServiceManager()
        self._admission: Final = Admission(config.limits, descriptor_limit=raise_descriptor_limit())
        # Two descriptors a pipe: those that Admission sets aside, so that bulk never takes the place of a newcomer.
        self._forwarding: Final = Forwarding(pipes=PipePool(capacity=self._admission.leg_budget // 2))
        self._names: Final = SharedResolver()
        # Of its own: a reload must not stand in a queue behind whatever else waits in threads.
        self._reading: Final = trio.CapacityLimiter(1)
        self._draining: Final = trio.Event()
        self._doors: trio.Nursery | None = None
        self._pairings: trio.Nursery | None = None
        self._servers: Servers | None = None
        self.journal: Final = Journal()
        self._strangers_refused: Final = StrangersRefused(self.journal)
        registry = RouteRegistry(self.journal)
        self._runner: Final = PairingRunner(registry, self.journal)
        self._shared: Final = SharedParts(
            admission=self._admission,
            runner=self._runner,
            tickets=TicketRegistry(),
            journal=self.journal,
            strangers_refused=self._strangers_refused,
        )
        self.started_at: Final = time.time()
        """When, in seconds since the epoch."""
        self._now: Final = ActiveConfig(
            config,
            admission=self._admission,
            forwarding=self._forwarding,
            registry=registry,
            inherited=self._inherited,
            log=self._log,
            serve=self._serve,
        )
        self._reloader: Final = Reloader(
            self,
            since=self.started_at,
            reading=self._reading,
            journal=self.journal,
            service_manager=self._service_manager,
            log=self._log,
        )

    # --- for the outside ---------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._now.config

    @property
    def is_draining(self) -> bool:
        """Whether it takes nothing new any more."""
        return self._draining.is_set()

    @property
    def trust(self) -> OuterTls | None:
        """The certificates in force; None without ``[tls]``."""
        return self._now.trust

    @property
    def openssl(self) -> str:
        """The version of the OpenSSL that speaks for it."""
        return openssl_version()

    @property
    def served(self) -> dict[str, list[str]]:
        """Where its HTTP servers really listen, by ``admin`` and ``metrics``."""
        return {} if self._servers is None else self._servers.bound

    def age(self, moment: float) -> float:
        """Seconds since ``moment`` on the clock that lobbies and pairings go by."""
        return trio.current_time() - moment

    @property
    def admission(self) -> Admission:
        """How many connections there are, and may be."""
        return self._admission

    @property
    def routes(self) -> dict[str, LiveRoute]:
        """The routes in force, by name."""
        return dict(self._now.registry.in_force)

    @property
    def pairings(self) -> list[Pairing]:
        """All pairings that run, those of removed routes too."""
        return self._now.registry.pairings

    def bound(self, route: str) -> list[str]:
        """The addresses on which ``route`` really listens, ``host:port``."""
        keys = listener_keys(self._now.config.routes_by_name[route])
        return [place for key in keys for place in self._now.listeners[key].bound]

    # --- the tree ----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> int:
        """Serve until told to end; gives the exit code: 0, or 1 if a deadline had to cut a pairing.

        Raises ConfigError if the configuration cannot be put in force at all. ``task_status`` is started once every
        address is bound.
        """
        first = self._now.config
        watcher = Watcher(lambda: self._reloader.watched_files)
        if self._watch_files:
            # What changed between the caller's load and this mark would otherwise never be noticed.
            await watcher.mark()
            first = await trio.to_thread.run_sync(load, first.path, limiter=self._reading)
        trust = await self.prepare(first)
        try:
            async with trio.open_nursery() as root:
                root.start_soon(self._forwarding.readiness.run)
                root.start_soon(self._service_manager.run)
                await root.start(self._obey_signals)
                await root.start(self._names.run)
                root.start_soon(self._admission.strangers.run)
                root.start_soon(self._strangers_refused.run)
                async with self._runner.open() as self._pairings, trio.open_nursery() as self._doors:
                    await (await self.stage(first, trust, plan(None, first))).put_in_force()
                    self._start_servers(first, root)
                    self._now.warn_of_unclaimed_sockets()
                    self._log.info("ready", routes=len(first.routes), openssl=openssl_version())
                    self._service_manager.ready(self._reloader.status())
                    root.start_soon(self._reloader.run)
                    root.start_soon(self._now.inspect_when_due)
                    root.start_soon(follow_clock, lambda: self._now.registry.all)
                    if self._watch_files:
                        root.start_soon(self._reloader.watch, watcher)
                        # Only here: elsewhere nothing is to be read again before somebody asks for it.
                        root.start_soon(reload_at_expiry, lambda: self._now.trust, self.request_reload)
                    task_status.started()
                    await self._draining.wait()
                root.cancel_scope.cancel(reason="the relay has drained")
        except* ConfigError as group:
            raise _only(group) from None
        finally:
            for listener in self._now.all_listeners:
                listener.close()
            self._inherited.close()
            self._forwarding.pipes.close()
        self._log.info("stopped", clean=not self._runner.was_cut)
        return 1 if self._runner.was_cut else 0

    def _start_servers(self, config: Config, root: trio.Nursery) -> None:
        """Bind and start the HTTP servers; they last until the root ends, so that a drain can be watched."""
        if config.admin is None and config.metrics is None:
            return
        # Here, because FastAPI and what it brings take half a second, which a relay without a server need not spend.
        from frelay.admin.servers import Servers

        self._servers = Servers(
            config,
            self._new_control(),
            running=lambda: self._now.config,
            trust=lambda: self._now.trust,
            inherited=self._inherited,
            max_connections=self._admission.connections_per_http_server,
        )
        root.start_soon(self._servers.run)
        self._log.info("serving", **{name: ", ".join(places) for name, places in self._servers.bound.items()})

    def _new_control(self) -> Control:
        """Who answers for this relay; a supervisor has another."""
        from frelay.relay.control import RelayControl

        return RelayControl(self)

    def _serve(self, key: ListenerKey, listener: Listener) -> None:
        if self._doors is None:
            raise AssertionError("listeners before the relay runs")
        self._doors.start_soon(listener.serve, key, partial(self._now.accept_settings, key), self._shared)

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
        """The keys that the file in force changes and only a restart can."""
        return self._reloader.needs_restart

    def describe(self) -> str:
        """What is in force, in half a line."""
        return self._now.describe()

    async def prepare(self, config: Config) -> OuterTls | None:
        """:func:`prepare`, for which a supervisor keeps what was read."""
        return await trio.to_thread.run_sync(prepare, config, limiter=self._reading)

    async def with_all_problems(self, error: ConfigError) -> ConfigError:
        """:func:`with_all_problems` of the route file."""
        return await trio.to_thread.run_sync(with_all_problems, self.config.path, error, limiter=self._reading)

    async def stage(self, new: Config, trust: OuterTls | None, changes: Plan) -> Staged:
        """Do for ``new`` all that can fail: bind, and in a supervisor ask the workers. Raises ConfigError."""
        opened = await self._open_missing(new)

        async def put_in_force() -> None:
            self._now.take_over(new, trust, changes, opened)
            self._log_warnings(new, trust)

        async def abandon() -> None:
            for listener in opened.values():
                listener.close()

        return Staged(changes, put_in_force, abandon)

    def _log_warnings(self, new: Config, trust: OuterTls | None) -> None:
        """Log what keeps functions out; a worker leaves that to its supervisor."""
        log_warnings(new, trust, self._log)

    async def _open_missing(self, new: Config) -> dict[ListenerKey, Listener]:
        """What ``new`` needs and nobody has bound yet; a worker has it from its supervisor. Raises ConfigError."""
        return await self._now.open_missing(new)

    # --- ending ------------------------------------------------------------------------------------------------

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        # One receiver through the whole life: a signal that came in a gap would kill the process in its drain.
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
        """Accept nothing more, send the waiting away, and let pairings end within ``drain_timeout``."""
        if self._draining.is_set():
            return
        timeout = self._now.config.relay.drain_timeout
        self._draining.set()
        self._service_manager.stopping(f"draining, {len(self.pairings)} pairings are left to end", timeout)
        self.journal.note(Draining(reason=reason, seconds=timeout))
        refusal = Refusal("draining", "this relay is going away", retry_after=_RECONNECT_IN, reconnect_in=_RECONNECT_IN)
        for listener in self._now.all_listeners:
            listener.stop()
        # Only now: who reads this and starts a successor must find the address free.
        self._log.info("draining", reason=reason, pairings=len(self.pairings), seconds=timeout)
        for route in self._now.registry.all:
            route.close(refusal, outcome=Outcome.DRAINED, cut_at=trio.current_time() + timeout)

    def stop_now(self) -> None:
        """End the drain: every pairing is cut now."""
        self._log.warning("stopping now", pairings=len(self.pairings))
        if self._doors is not None:
            self._doors.cancel_scope.cancel(reason="a second signal ended the drain")
        for pairing in self.pairings:
            pairing.expire_at(trio.current_time(), Outcome.DRAINED, "a second signal ended the drain")


def _only(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    """All the problems of a group of configuration errors as one."""
    problems: list[Problem] = []
    for error in group.exceptions:
        found = _only(error) if isinstance(error, BaseExceptionGroup) else error
        problems.extend(found.problems)
    return ConfigError(problems)
