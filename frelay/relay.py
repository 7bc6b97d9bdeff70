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
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import structlog
import trio

from frelay.admission import Admission, raise_descriptor_limit
from frelay.config.load import load
from frelay.config.model import Config, Dial, Route
from frelay.config.plan import Plan, listener_key, plan
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.listener import Listener
from frelay.lobby import Withdrawn
from frelay.outcome import Outcome, Record
from frelay.pairing import Forwarding, Pairing
from frelay.protocol.messages import Refused
from frelay.pump import PipePool
from frelay.reception import Door
from frelay.route import LiveRoute
from frelay.tickets import TicketOffice
from frelay.tls.context import OuterTls, load_outer_tls, openssl_version

__all__ = ["Relay", "prepare"]

# What a function that was waiting is told to wait before it dials again, while this relay goes away.
_RECONNECT_IN: Final = 1.0
# SIGHUPs and file events closer together than this make one reload: a deployment often touches ten files.
_RELOAD_PAUSE: Final = 0.1


def prepare(config: Config) -> OuterTls | None:
    """Load what the configuration refers to; raises ConfigError. This and loading the file is `frelay check`."""
    problems = [
        Problem(
            route.source, "is not in this version: name the function that dials in", key=f"route[{route.name}].{key}"
        )
        for route in config.routes
        for key in ("func1", "func2")
        if isinstance(getattr(route, key), Dial)
    ]
    if problems:
        raise ConfigError(problems)
    return None if config.tls is None else load_outer_tls(config.tls, source=config.path)


@dataclass(slots=True)
class _Running:
    """The configuration in force, and what it made; replaced field by field in the half that cannot fail."""

    config: Config
    trust: OuterTls | None
    routes: dict[str, LiveRoute]
    listeners: dict[Hashable, Listener]
    tables: dict[Hashable, dict[str, LiveRoute]]
    """The routes behind each listener."""


class Relay:
    """One relay process. Make it from a loaded configuration, and :meth:`run` it."""

    def __init__(self, config: Config, *, watch_files: bool = True) -> None:
        self._log: Final[Any] = structlog.get_logger("frelay.relay").bind(relay=config.relay.name)
        self._watch_files: Final = watch_files
        self._admission: Final = Admission(config.limits, descriptor_limit=raise_descriptor_limit())
        # Two descriptors a pipe: those that Admission sets aside, so that bulk never takes the place of a newcomer.
        self._forwarding: Final = Forwarding(pipes=PipePool(capacity=self._admission.leg_budget // 2))
        self._tickets: Final = TicketOffice()
        self._draining: Final = trio.Event()
        self._reload_wanted = trio.Event()
        self._doors: trio.Nursery | None = None
        self._pairings: trio.Nursery | None = None
        self._retired: Final[set[LiveRoute]] = set()
        """Routes that were removed or replaced and still have pairings."""
        self._was_cut = False
        self._attempted = config
        """The last configuration that could be read; if it was refused for another file, that file is watched, too."""
        self._now = _Running(config=config, trust=None, routes={}, listeners={}, tables={})
        self.last_reload_error: ConfigError | None = None
        """Why the last reload was refused; None after one that was taken over."""

    # --- for the outside ---------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._now.config

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
        return self._now.listeners[listener_key(self._now.routes[route].config)].bound

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
            first = await trio.to_thread.run_sync(load, first.path)
        trust = await trio.to_thread.run_sync(prepare, first)
        try:
            async with trio.open_nursery() as root:
                root.start_soon(self._forwarding.readiness.run)
                await root.start(self._obey_signals)
                async with trio.open_nursery() as self._pairings, trio.open_nursery() as self._doors:
                    self._apply(first, trust, plan(None, first))
                    self._log.info("ready", routes=len(first.routes), openssl=openssl_version())
                    root.start_soon(self._reload_when_asked)
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
            self._forwarding.pipes.close()
        self._log.info("stopped", clean=not self._was_cut)
        return 1 if self._was_cut else 0

    def _door(self, key: Hashable) -> Callable[[], Door]:
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
            )

        return door

    def _start_pairing(self, pairing: Pairing, route: LiveRoute) -> None:
        if self._pairings is None:
            raise AssertionError("a pairing before the relay runs")
        self._pairings.start_soon(self._run_pairing, pairing, route)

    async def _run_pairing(self, pairing: Pairing, route: LiveRoute) -> None:
        def report(record: Record) -> None:
            if record.outcome is Outcome.DRAINED:
                self._was_cut = True
            del route.pairings[pairing.id]
            if not route.pairings:
                self._retired.discard(route)
            for party, leg in pairing.legs.items():
                route.lobby.note_seen(party)
                leg.slot.gone()

        await pairing.run(report)

    # --- changing ----------------------------------------------------------------------------------------------

    def _apply(self, new: Config, trust: OuterTls | None, changes: Plan) -> None:
        """Put ``new`` in force; raises ConfigError with nothing changed."""
        now = self._now
        needed = {listener_key(route): route for route in new.routes}
        opened = self._open({key: route for key, route in needed.items() if key not in now.listeners})
        # From here on nothing can fail.
        old_routes = now.routes
        keep = {kept.route.name for kept in changes.keep}
        now.config, now.trust = new, trust
        now.routes = {}
        now.tables = {key: {} for key in needed}
        for route in new.routes:
            if route.name in keep:
                live = old_routes[route.name]
                live.retune(route, new.limits)
            else:
                live = LiveRoute(route, new.limits, forwarding=self._forwarding, trust=lambda: self._now.trust)
            now.routes[route.name] = live
            now.tables[listener_key(route)][route.name] = live
        self._admission.limits = new.limits
        self._start(opened)
        for name, live in old_routes.items():
            if name not in keep:
                self._retire(live)
        for key in [key for key in now.listeners if key not in needed]:
            now.listeners.pop(key).stop()

    def _open(self, wanted: dict[Hashable, Route]) -> dict[Hashable, Listener]:
        """Bind all the new addresses or none."""
        opened: dict[Hashable, Listener] = {}
        problems = []
        for key, route in wanted.items():
            try:
                opened[key] = Listener.open(route.listen)
            except OSError as error:
                text = f"cannot listen on {route.listen}: {error.strerror or error}"
                own = next((old for old in self._now.listeners.values() if old.address.overlaps(route.listen)), None)
                if own is not None:
                    text += (
                        f"; this relay itself has {own.address}: remove that route in one reload, add this in a second"
                    )
                problems.append(Problem(route.source, text, key=f"route[{route.name}].listen"))
        if problems:
            for listener in opened.values():
                listener.close()
            raise ConfigError(problems)
        return opened

    def _start(self, opened: dict[Hashable, Listener]) -> None:
        if self._doors is None:
            raise AssertionError("listeners before the relay runs")
        for key, listener in opened.items():
            self._now.listeners[key] = listener
            self._doors.start_soon(listener.serve, self._door(key), self._admission)
        for route in self._now.routes.values():
            key = listener_key(route.config)
            if key in opened:
                self._log.info("listening", route=route.name, address=", ".join(opened[key].bound))

    def _retire(self, live: LiveRoute) -> None:
        if live.pairings:
            self._retired.add(live)
        live.close(
            Withdrawn(Refused("route-removed", f"the route {live.name!r} was removed or replaced", retry_after=1.0)),
            outcome=Outcome.ROUTE_REMOVED,
            cut_at=trio.current_time() + self._now.config.relay.drain_timeout,
        )

    def request_reload(self) -> None:
        """Ask for a reload; several requests in a short time make one."""
        self._reload_wanted.set()

    async def reload(self) -> Plan:
        """Load the file again and put it in force; raises ConfigError with the old configuration whole."""
        old = self._now.config
        try:
            # Parsing a thousand routes takes a while, in which the bytes of everybody else go on.
            new = self._attempted = await trio.to_thread.run_sync(load, old.path)
            trust = await trio.to_thread.run_sync(prepare, new)
            if self._draining.is_set():
                # It began while the files were read. A listener opened now would never be told to stop.
                raise ConfigError([Problem(old.path, "this relay is draining, and takes nothing over any more")])
            changes = plan(self._now.config, new)
            self._apply(new, trust, changes)
        except ConfigError as error:
            self.last_reload_error = error
            for problem in error.problems:
                self._log.error("reload refused, the old configuration stays", problem=str(problem))
            raise
        self.last_reload_error = None
        self._log.info(
            "reloaded",
            kept=len(changes.keep),
            added=[added.route.name for added in changes.add],
            removed=[removed.route.name for removed in changes.remove],
            replaced=[replaced.new.name for replaced in changes.replace],
        )
        return changes

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
                    self.last_reload_error = ConfigError([Problem(self._now.config.path, text)])
                    self._log.exception("a bug in frelay ended this reload, the old configuration stays")
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
