"""The relay: a running configuration, the nursery tree that serves it, and how it changes and ends.

The tree, from the outside in; each scope ends only after everything in it has::

    root          signals, the file watcher, the readiness set
      pairings    one task a pairing; on the way out they are ended by a deadline, not by a kill
        doors     one listener task an address, with a task for each leg that is not paired yet

So a drain is nothing but leaving the tree in order: the doors close (their waiting legs are told), the pairings get
until ``drain_timeout``, and then the root goes.

A configuration is applied in two halves. First everything that can fail: load and check the file, load the
certificates, bind the new addresses. Only when all of that has succeeded comes the half that cannot fail: swap the
references, stop what is gone. So a bad file changes nothing at all.

With ``workers`` above 1 this class is still what the outside sees, and others serve the routes (:mod:`frelay.workers`):
what differs there is in the methods that a comment names.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from frelay.admission import Admission, raise_descriptor_limit
from frelay.config.load import load
from frelay.config.model import Address, Config, Route
from frelay.config.plan import ListenerKey, Plan, listener_key, plan
from frelay.config.store import RouteFileEdit
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.inspection import follow_clock, judge_again
from frelay.journal import Draining, Journal, PairingEnded, PairingStarted, Reloaded, ReloadRefused
from frelay.listener import Listener
from frelay.lobby import Withdrawn
from frelay.names import Names
from frelay.outcome import Outcome, Record
from frelay.pairing import Forwarding, Pairing
from frelay.privileges import find_account
from frelay.protocol.messages import Refused
from frelay.pump import PipePool
from frelay.reception import Door
from frelay.route import LiveRoute
from frelay.sockets import look_up
from frelay.systemd import RESERVED, Inherited, ServiceManager
from frelay.tickets import TicketOffice
from frelay.tls.context import OuterTls, openssl_version
from frelay.tls.loading import load_outer_tls

if TYPE_CHECKING:
    from frelay.admin.office import Office
    from frelay.servers import Servers

__all__ = ["Places", "Relay", "Staged", "prepare"]

# What a function that was waiting is told to wait before it dials again, while this relay goes away.
_RECONNECT_IN: Final = 1.0
# SIGHUPs and file events closer together than this make one reload: a deployment often touches ten files.
_RELOAD_PAUSE: Final = 0.1


Places = tuple[Address, ...] | OSError
"""What the name of an address stands for, or why nobody knows."""


def prepare(
    config: Config, *, contents: MutableMapping[Path, bytes] | None = None, now: float | None = None
) -> OuterTls | None:
    """Load what the configuration refers to; raises ConfigError. This and loading the file is `frelay check`.

    ``contents`` and ``now`` are those of :func:`~frelay.tls.loading.load_outer_tls`.
    """
    find_account(config)
    if config.tls is None:
        return None
    serves_http = config.admin is not None and config.admin.address is not None
    return load_outer_tls(config.tls, source=config.path, serves_http=serves_http, contents=contents, now=now)


@dataclass(frozen=True, slots=True)
class Staged:
    """A configuration for which all that can fail has been done. One of the two must follow; neither can fail."""

    changes: Plan
    put_in_force: Callable[[], Awaitable[None]]
    abandon: Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Running:
    """The configuration in force, and what it made; replaced field by field in the half that cannot fail."""

    config: Config
    trust: OuterTls | None
    routes: dict[str, LiveRoute]
    listeners: dict[ListenerKey, Listener]
    tables: dict[ListenerKey, dict[str, LiveRoute]]
    """The routes behind each listener."""


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
        inherited: Inherited | None = None,
        service_manager: ServiceManager | None = None,
        log: Any = None,
    ) -> None:
        self._log: Final[Any] = (log or structlog.get_logger("frelay.relay")).bind(relay=config.relay.name)
        self._watch_files: Final = watch_files
        self._inherited: Final = inherited or Inherited()
        self._service_manager: Final = service_manager or ServiceManager()
        self._admission: Final = Admission(config.limits, descriptor_limit=raise_descriptor_limit())
        # Two descriptors a pipe: those that Admission sets aside, so that bulk never takes the place of a newcomer.
        self._forwarding: Final = Forwarding(pipes=PipePool(capacity=self._admission.leg_budget // 2))
        self._tickets: Final = TicketOffice()
        self._names: Final = Names()
        # Of its own: a reload must not stand in a queue behind whatever else waits in threads.
        self._reading: Final = trio.CapacityLimiter(1)
        self._draining: Final = trio.Event()
        self._reload_wanted = trio.Event()
        self._inspection_due = trio.Event()
        self._doors: trio.Nursery | None = None
        self._pairings: trio.Nursery | None = None
        self._retired: Final[set[LiveRoute]] = set()
        """Routes that were removed or replaced and still have pairings."""
        self._was_cut = False
        self._servers: Servers | None = None
        self._attempted = config
        """The last configuration that could be read; if it was refused for another file, that file is watched, too."""
        self._now = _Running(config=config, trust=None, routes={}, listeners={}, tables={})
        self._changing: Final = trio.Lock()
        self.journal: Final = Journal()
        self.started_at: Final = time.time()
        """When, in seconds since the epoch, this and what follows."""
        self.last_reload_at = self.started_at
        self.last_reload_error: ConfigError | None = None
        """Why the last reload was refused; None after one that was taken over."""

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
        return dict(self._now.routes)

    @property
    def pairings(self) -> list[Pairing]:
        """All pairings that run, those of removed routes too."""
        return [
            pairing for route in (*self._now.routes.values(), *self._retired) for pairing in route.pairings.values()
        ]

    def bound(self, route: str) -> list[str]:
        """The addresses on which ``route`` really listens, ``host:port``."""
        return self._now.listeners[listener_key(self._now.config.routes_by_name[route])].bound

    # --- the tree ----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> int:
        """Serve until told to end; gives the exit code: 0, or 1 if a deadline had to cut a pairing.

        Raises ConfigError if the configuration cannot be put in force at all. ``task_status`` is started once every
        address is bound.
        """
        first = self._now.config
        watcher = Watcher(lambda: {*self._now.config.watched_files, *self._attempted.watched_files})
        if self._watch_files:
            # What changed between the caller's load and this mark would otherwise never be noticed.
            await watcher.mark()
            first = await trio.to_thread.run_sync(load, first.path, limiter=self._reading)
        trust = await self._prepare(first)
        try:
            async with trio.open_nursery() as root:
                root.start_soon(self._forwarding.readiness.run)
                root.start_soon(self._service_manager.run)
                await root.start(self._obey_signals)
                await root.start(self._names.run)
                async with trio.open_nursery() as self._pairings, trio.open_nursery() as self._doors:
                    await (await self.stage(first, trust, instead_of=None)).put_in_force()
                    self._start_servers(first, root)
                    self._warn_of_unclaimed_sockets(first)
                    self._log.info("ready", routes=len(first.routes), openssl=openssl_version())
                    self._service_manager.ready(self._status())
                    root.start_soon(self._reload_when_asked)
                    root.start_soon(self._inspect_when_due)
                    root.start_soon(follow_clock, lambda: (*self._now.routes.values(), *self._retired))
                    if self._watch_files:
                        root.start_soon(self._watch, watcher)
                    task_status.started()
                    await self._draining.wait()
                root.cancel_scope.cancel(reason="the relay has drained")
        except* ConfigError as group:
            raise _only(group) from None
        finally:
            for listener in self._now.listeners.values():
                listener.close()
            self._inherited.close()
            self._forwarding.pipes.close()
        self._log.info("stopped", clean=not self._was_cut)
        return 1 if self._was_cut else 0

    def _start_servers(self, config: Config, root: trio.Nursery) -> None:
        """Bind and start the HTTP servers; they last until the root ends, so that a drain can be watched."""
        if config.admin is None and config.metrics is None:
            return
        # Here, because FastAPI and what it brings take half a second, which a relay without a server need not spend.
        from frelay.servers import Servers

        self._servers = Servers(
            config,
            self._new_office(),
            running=lambda: self._now.config,
            trust=lambda: self._now.trust,
            inherited=self._inherited,
        )
        root.start_soon(self._servers.run)
        self._log.info("serving", **{name: ", ".join(places) for name, places in self._servers.bound.items()})

    def _new_office(self) -> Office:
        """Who answers for this relay; a supervisor has another."""
        from frelay.office import RelayOffice

        return RelayOffice(self)

    def _door(self, key: ListenerKey) -> Callable[[], Door]:
        def door() -> Door:
            now = self._now
            return Door(
                routes=now.tables.get(key, {}),
                limits=now.config.limits,
                tcp=now.config.tcp,
                trust=now.trust,
                start_pairing=self._start_pairing,
                listener=key,
                tickets=self._tickets,
                journal=self.journal,
                admission=self._admission,
            )

        return door

    def _start_pairing(self, pairing: Pairing, route: LiveRoute) -> None:
        if self._pairings is None:
            raise AssertionError("a pairing before the relay runs")
        legs = pairing.legs
        self.journal.note(
            PairingStarted(
                pairing=pairing.id,
                route=route.name,
                func1=legs["func1"].identity,
                func2=legs["func2"].identity,
                waited=pairing.waited,
            )
        )
        self._pairings.start_soon(self._run_pairing, pairing, route)

    async def _run_pairing(self, pairing: Pairing, route: LiveRoute) -> None:
        def report(record: Record) -> None:
            if record.outcome is Outcome.DRAINED:
                self._was_cut = True
            self.journal.note(PairingEnded(record=record))
            route.unpair(pairing)
            if not route.pairings:
                self._retired.discard(route)
                self._forget_if_gone(route.name)
            for leg in pairing.legs.values():
                leg.slot.gone()

        await pairing.run(report)

    def _forget_if_gone(self, name: str) -> None:
        """Give up the totals of a route that is not in force, once no pairing of that name runs any more."""
        # A name that was removed, added and removed again may have retired twice.
        if name not in self._now.routes and all(live.name != name for live in self._retired):
            self.journal.forget(name)

    # --- changing ----------------------------------------------------------------------------------------------

    async def _prepare(self, config: Config) -> OuterTls | None:
        """:func:`prepare`, for which a supervisor keeps what was read."""
        return await trio.to_thread.run_sync(prepare, config, limiter=self._reading)

    async def stage(self, new: Config, trust: OuterTls | None, *, instead_of: Config | None) -> Staged:
        """Do for ``new`` all that can fail: bind, and in a supervisor ask the workers. Raises ConfigError."""
        changes = plan(instead_of, new)
        opened = self._open_missing(new, await self._look_up_missing(new))

        async def put_in_force() -> None:
            self._take_over(new, trust, changes, opened)

        async def abandon() -> None:
            for listener in opened.values():
                listener.close()

        return Staged(changes, put_in_force, abandon)

    def _missing(self, new: Config) -> dict[ListenerKey, list[Route]]:
        """What ``new`` needs and nobody has bound yet: the routes that share each."""
        missing: dict[ListenerKey, list[Route]] = {}
        for route in new.routes:
            if listener_key(route) not in self._now.listeners:
                missing.setdefault(listener_key(route), []).append(route)
        return missing

    async def _look_up_missing(self, new: Config) -> Mapping[Address, Places]:
        """The IP addresses that are to be bound for ``new``. A name server may let us wait, while all else goes on."""
        found: dict[Address, Places] = {}

        async def look(address: Address) -> None:
            try:
                found[address] = await look_up(address)
            except OSError as error:
                found[address] = error

        async with trio.open_nursery() as nursery:
            for address in {sharers[-1].listen for sharers in self._missing(new).values()}:
                nursery.start_soon(look, address)
        return found

    def _open_missing(self, new: Config, places: Mapping[Address, Places]) -> dict[ListenerKey, Listener]:
        """Bind what ``new`` needs and nobody has yet, at ``places``; raises ConfigError with nothing bound."""
        return self._open(self._missing(new), places)

    def _take_over(
        self, new: Config, trust: OuterTls | None, changes: Plan, opened: dict[ListenerKey, Listener]
    ) -> None:
        """Put ``new`` in force. Nothing in here can fail."""
        now = self._now
        needed = {listener_key(route) for route in new.routes}
        old_routes = now.routes
        keep = {kept.route.name for kept in changes.keep}
        now.config, now.trust = new, trust
        self._inspection_due.set()
        ends = new.relay.policy_ends_pairings
        now.routes = {}
        now.tables = {key: {} for key in needed}
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
                    trust=lambda: self._now.trust,
                )
            now.routes[route.name] = live
            self.journal.keep(route.name)
            now.tables[listener_key(route)][route.name] = live
        self._admission.limits = new.limits
        self._start(opened)
        for name, live in old_routes.items():
            if name not in keep:
                self._retire(live)
                self._forget_if_gone(name)
        for key in [key for key in now.listeners if key not in needed]:
            now.listeners.pop(key).stop()

    def _open(
        self, wanted: dict[ListenerKey, list[Route]], places: Mapping[Address, Places]
    ) -> dict[ListenerKey, Listener]:
        """Bind all the new addresses or none; each comes with the routes that share it."""
        opened: dict[ListenerKey, Listener] = {}
        problems = []
        for key, sharers in wanted.items():
            route = sharers[-1]
            names = [sharer.name for sharer in sharers]
            try:
                found = places[route.listen]
                if isinstance(found, OSError):
                    raise found
                passed = self._inherited.open(names, route.listen, found)
                opened[key] = Listener(route.listen, passed) if passed else Listener.open(route.listen, found)
            except (OSError, ValueError) as error:
                text = f"cannot listen on {route.listen}: {getattr(error, 'strerror', None) or error}"
                own = next((old for old in self._now.listeners.values() if old.address.overlaps(route.listen)), None)
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

    def _start(self, opened: dict[ListenerKey, Listener]) -> None:
        if self._doors is None:
            raise AssertionError("listeners before the relay runs")
        for key, listener in opened.items():
            self._now.listeners[key] = listener
            self._doors.start_soon(listener.serve, self._door(key), self._admission)
        self._announce(opened)

    def _announce(self, opened: dict[ListenerKey, Listener]) -> None:
        for route in self._now.config.routes:
            key = listener_key(route)
            if key in opened:
                self._log.info("listening", route=route.name, address=", ".join(opened[key].bound))
                if route.name not in RESERVED:
                    for original in self._inherited.take(route.name):
                        original.close()  # its duplicate listens

    def _warn_of_unclaimed_sockets(self, config: Config) -> None:
        for name, places in self._inherited.unclaimed.items():
            if name in RESERVED and getattr(config, name) is not None:
                continue
            self._log.warning(
                "systemd passed a socket that nothing here uses",
                name=name,
                address=", ".join(places),
                remedy="set FileDescriptorName= in its unit to the name of a route with that listen address, "
                "or to admin or metrics where the route file has that section",
            )

    def _status(self) -> str:
        """How it stands, in one line for systemctl."""
        routes, addresses = len(self._now.config.routes), len(self._now.listeners)
        text = f"{routes} route{'' if routes == 1 else 's'} on {addresses} address{'' if addresses == 1 else 'es'}"
        if self.last_reload_error is None:
            return text
        return f"{text}, as before: the last reload was refused: {self.last_reload_error.problems[0]}"

    def _retire(self, live: LiveRoute) -> None:
        if live.pairings:
            self._retired.add(live)
        settings = self._now.config.relay
        patience = settings.drain_timeout if settings.policy_ends_pairings else math.inf
        live.close(
            Withdrawn(Refused("route-removed", f"the route {live.name!r} was removed or replaced", retry_after=1.0)),
            outcome=Outcome.ROUTE_REMOVED,
            cut_at=trio.current_time() + patience,
        )

    async def _inspect_when_due(self) -> None:
        """After each reload: those who are in came in by certificates and lists that may not be the ones in force."""
        while True:
            await self._inspection_due.wait()
            self._inspection_due = trio.Event()
            now = self._now
            if now.trust is None:
                continue
            try:
                await judge_again(
                    [*now.routes.values(), *self._retired],
                    now.trust,
                    ends_pairings=now.config.relay.policy_ends_pairings,
                )
            except Exception:
                # As with a reload: what nobody thought of must not end the pairings of everybody.
                self._log.exception("a bug in frelay ended the inspection after this reload")

    def request_reload(self) -> None:
        """Ask for a reload; several requests in a short time make one."""
        self._reload_wanted.set()

    async def reload(self) -> Plan:
        """Load the file again and put it in force; raises ConfigError with the old configuration whole."""
        # A reload and an edit at one time would each bind for a configuration that the other has just made untrue.
        async with self._changing:
            self._service_manager.reloading()
            try:
                return await self._change(None)
            except ConfigError as error:
                self._note_refused(error)
                raise
            finally:
                self._service_manager.ready(self._status())

    async def edit(self, edit: Callable[[Config], RouteFileEdit]) -> Plan:
        """Change one file of ``routes_dir`` and put it in force: bound, and on disk, when this returns.

        ``edit`` gets the configuration in force, in which nobody else can change anything meanwhile; what it raises
        is passed on. Raises ConfigError or, from the disk, OSError: both with the old configuration and the old file
        whole. A refused edit is the caller's affair and no failed reload.
        """
        async with self._changing:
            changes = await self._change(edit(self._now.config))
            self._service_manager.status(self._status())
            return changes

    async def _change(self, edit: RouteFileEdit | None) -> Plan:
        path = self._now.config.path
        # Parsing a thousand routes takes a while, in which the bytes of everybody else go on.
        new = await trio.to_thread.run_sync(partial(load, path, edit=edit), limiter=self._reading)
        if edit is None:
            self._attempted = new
        trust = await self._prepare(new)
        self._forbid_when_draining()
        staged = await self.stage(new, trust, instead_of=self._now.config)
        try:
            if edit is not None:
                # Last of all that can fail, and before anything is given up.
                await trio.to_thread.run_sync(edit.commit, limiter=self._reading)
            self._forbid_when_draining()
        except BaseException:
            await staged.abandon()
            raise
        await staged.put_in_force()
        changes = staged.changes
        self.last_reload_at, self.last_reload_error = time.time(), None
        entry = Reloaded(
            kept=len(changes.keep),
            added=tuple(added.route.name for added in changes.add),
            removed=tuple(removed.route.name for removed in changes.remove),
            replaced=tuple(replaced.new.name for replaced in changes.replace),
        )
        self._log.info(
            "reloaded",
            kept=entry.kept,
            added=list(entry.added),
            removed=list(entry.removed),
            replaced=list(entry.replaced),
        )
        self.journal.note(entry)
        return changes

    def _forbid_when_draining(self) -> None:
        # It may have begun while files were read. A listener opened now would never be told to stop.
        if self._draining.is_set():
            text = "this relay is draining, and takes nothing over any more"
            raise ConfigError([Problem(self._now.config.path, text, is_conflict=True)])

    def _note_refused(self, error: ConfigError) -> None:
        self.last_reload_at, self.last_reload_error = time.time(), error
        for problem in error.problems:
            self._log.error("reload refused, the old configuration stays", problem=str(problem))
        self.journal.note(ReloadRefused(problems=error.problems))

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            if self._draining.is_set():
                self._log.info("reload ignored: draining")
            else:
                try:
                    await self.reload()
                except ConfigError:
                    pass  # logged, kept in last_reload_error, and nothing has changed
                except Exception as error:
                    # A file that nobody thought of must not end the pairings of everybody.
                    text = f"a bug in frelay: {type(error).__name__}: {error}"
                    self._note_refused(ConfigError([Problem(self._now.config.path, text)]))
                    self._log.exception("a bug in frelay ended this reload, the old configuration stays")
                    self._service_manager.status(self._status())
            await trio.sleep(_RELOAD_PAUSE)

    async def _watch(self, watcher: Watcher) -> None:
        while True:
            changed = await watcher.wait_changed()
            self._log.info("files changed", files=sorted(str(path) for path in changed))
            self.request_reload()

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
        refusal = Refused("draining", "this relay is going away", retry_after=_RECONNECT_IN)
        for listener in self._now.listeners.values():
            listener.stop()
        # Only now: who reads this and starts a successor must find the address free.
        self._log.info("draining", reason=reason, pairings=len(self.pairings), seconds=timeout)
        for route in (*self._now.routes.values(), *self._retired):
            route.close(
                Withdrawn(refusal, reconnect_in=_RECONNECT_IN),
                outcome=Outcome.DRAINED,
                cut_at=trio.current_time() + timeout,
            )

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
