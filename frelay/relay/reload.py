"""The reloader: when a relay's configuration is changed, one change at a time, and what is told of how it went.

A configuration is applied in two halves. First everything that can fail: load and check the file, load the
certificates, bind the new addresses. Only when all of that has succeeded comes the half that cannot fail. So a bad file
changes nothing at all. A reload and an edit by the API are the same but for one thing: an edit imagines one file, and
writes it last of all that can fail.

What there is to be replaced, and by what steps, the reloader does not know: a relay stages it (:class:`Changeable`),
and a relay with workers in another way than one without.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import Plan, plan, without_restart
from frelay.config.route_files import RouteFileEdit
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.journal import Journal, Reloaded, ReloadRefused
from frelay.relay.privileges import find_account
from frelay.relay.service_manager import ServiceManager
from frelay.tls.context import OuterTls

__all__ = ["Changeable", "Reloader", "Staged"]

# SIGHUPs and file events closer together than this make one reload: a deployment often touches ten files.
_RELOAD_PAUSE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Staged:
    """A configuration for which all that can fail has been done. One of the two must follow; neither can fail."""

    changes: Plan
    put_in_force: Callable[[], Awaitable[None]]
    abandon: Callable[[], Awaitable[None]]


class Changeable(Protocol):
    """What a relay is to its reloader."""

    @property
    def config(self) -> Config:
        """The configuration in force."""

    @property
    def is_draining(self) -> bool:
        """Whether it takes nothing new any more."""

    def describe(self) -> str:
        """What is in force, in half a line."""

    async def prepare(self, config: Config) -> OuterTls | None:
        """Load what ``config`` refers to; raises ConfigError."""

    async def with_all_problems(self, error: ConfigError) -> ConfigError:
        """``error``, for which the route file was refused, and what is wrong with the files that it names."""

    async def stage(self, new: Config, trust: OuterTls | None, changes: Plan) -> Staged:
        """Do for ``new`` all else that can fail; ``changes`` led to it. Raises ConfigError."""


def _read(path: Path, edit: RouteFileEdit | None) -> Config:
    """Load a configuration, and judge also what of it waits for a restart; raises ConfigError."""
    config = load(path, edit=edit)
    find_account(config)
    return config


class Reloader:
    """Changes the configuration of ``relay`` when it is asked to. :meth:`run` is what asks in its own time."""

    def __init__(
        self,
        relay: Changeable,
        *,
        since: float,
        reading: trio.CapacityLimiter,
        journal: Journal,
        service_manager: ServiceManager,
        log: Any,
    ) -> None:
        self._relay: Final = relay
        self._reading: Final = reading
        self._journal: Final = journal
        self._service_manager: Final = service_manager
        self._log: Final[Any] = log
        self._attempted = relay.config
        """The last configuration that could be read; if it was refused for another file, that file is watched, too."""
        self._wanted = trio.Event()
        self.changing: Final = trio.Lock()
        """Held while what is in force may be replaced."""
        self.last_at = since
        """When it last reloaded or refused to, in seconds since the epoch; at first, when the relay began."""
        self.last_error: ConfigError | None = None
        """Why the last reload was refused; None after one that was taken over."""
        self.needs_restart: tuple[str, ...] = ()
        """The keys in which the file differs from what runs and that only a restart changes, as ``admin.listen``."""

    @property
    def watched_files(self) -> set[Path]:
        """The files whose change may matter."""
        return {*self._relay.config.watched_files, *self._attempted.watched_files}

    def status(self) -> str:
        """How it stands, in one line for systemctl."""
        text = self._relay.describe()
        if self.needs_restart:
            text += f", a restart is needed for {', '.join(self.needs_restart)}"
        if self.last_error is None:
            return text
        return f"{text}, as before: the last reload was refused: {self.last_error.problems[0]}"

    # --- asked by somebody who waits for the answer ------------------------------------------------------------------

    async def reload(self) -> Plan:
        """Load the file again and put it in force; raises ConfigError with the old configuration whole."""
        # A reload and an edit at one time would each bind for a configuration that the other has just made untrue.
        async with self.changing:
            self._service_manager.reloading()
            try:
                return await self._change(None)
            except ConfigError as refused:
                if self._relay.is_draining:
                    self._note_refused(refused)
                    raise
                error = await self._relay.with_all_problems(refused)
                self._note_refused(error)
                raise error from None
            finally:
                self._service_manager.ready(self.status())

    async def edit(self, edit: Callable[[Config], RouteFileEdit]) -> Plan:
        """Change one file of ``routes_dir`` and put it in force: bound, and on disk, when this returns.

        ``edit`` gets the configuration in force, in which nobody else can change anything meanwhile; what it raises
        is passed on. Raises ConfigError or, from the disk, OSError: both with the old configuration and the old file
        whole. A refused edit is the caller's affair and no failed reload.
        """
        async with self.changing:
            changes = await self._change(edit(self._relay.config))
            self._service_manager.status(self.status())
            return changes

    async def _change(self, edit: RouteFileEdit | None) -> Plan:
        path = self._relay.config.path
        # Parsing a thousand routes takes a while, in which the bytes of everybody else go on.
        new = await trio.to_thread.run_sync(_read, path, edit, limiter=self._reading)
        if edit is None:
            self._attempted = new
        staged = await self.stage(new)
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
        self.last_at, self.last_error = time.time(), None
        self.needs_restart = changes.restart_only
        entry = Reloaded(
            kept=len(changes.keep),
            added=tuple(added.route.name for added in changes.add),
            removed=tuple(removed.route.name for removed in changes.remove),
            replaced=tuple(replaced.new.name for replaced in changes.replace),
            restart_only=changes.restart_only,
        )
        self._log.info(
            "reloaded",
            kept=entry.kept,
            added=list(entry.added),
            removed=list(entry.removed),
            replaced=list(entry.replaced),
            **({"restart_only": list(entry.restart_only)} if entry.restart_only else {}),
        )
        self._journal.note(entry)
        return changes

    async def stage(self, new: Config) -> Staged:
        """Do for ``new`` all that can fail, but for the disk. Raises ConfigError.

        What needs a restart stays as it runs, and is named in the plan.
        """
        running = self._relay.config
        changes, settled = plan(running, new), without_restart(running, new)
        trust = await self._relay.prepare(settled)
        self._forbid_when_draining()
        return await self._relay.stage(settled, trust, changes)

    def _forbid_when_draining(self) -> None:
        # It may have begun while files were read. A listener opened now would never be told to stop.
        if self._relay.is_draining:
            text = "this relay is draining, and takes nothing over any more"
            raise ConfigError([Problem(self._relay.config.path, text, is_conflict=True)])

    def _note_refused(self, error: ConfigError) -> None:
        self.last_at, self.last_error = time.time(), error
        for problem in error.problems:
            self._log.error("reload refused, the old configuration stays", problem=str(problem))
        self._journal.note(ReloadRefused(problems=error.problems))

    # --- asked by a signal or by the files themselves ----------------------------------------------------------------

    def request(self) -> None:
        """Ask for a reload; several requests in a short time make one."""
        self._wanted.set()

    async def run(self) -> None:
        """Reload whenever it is requested, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            if self._relay.is_draining:
                self._log.info("reload ignored: draining")
            else:
                try:
                    await self.reload()
                except ConfigError:
                    pass  # logged, kept in last_error, and nothing has changed
                except Exception as error:
                    # A file that nobody thought of must not end the pairings of everybody.
                    text = f"a bug in frelay: {type(error).__name__}: {error}"
                    self._note_refused(ConfigError([Problem(self._relay.config.path, text)]))
                    self._log.exception("a bug in frelay ended this reload, the old configuration stays")
                    self._service_manager.status(self.status())
            await trio.sleep(_RELOAD_PAUSE)

    async def watch(self, watcher: Watcher) -> None:
        """Request a reload whenever ``watcher`` finds a change, until cancelled."""
        while True:
            changed = await watcher.wait_changed()
            self._log.info("files changed", files=sorted(str(path) for path in changed))
            self.request()
