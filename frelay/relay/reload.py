"""The reloader: it changes the configuration of a relay, one change at a time, and says how that went.

A configuration is applied in two halves. The first half is everything that can fail: load and check the file, load the
certificates, bind the new addresses. The second half cannot fail, and begins only when all of the first has succeeded.
So a bad file changes nothing at all. A reload and an edit by the API differ in one thing: an edit loads the
configuration as if one file were written already, and writes that file as the last step that can fail.

The steps themselves are those of the backend (:class:`~frelay.relay.backend.Backend`), which differ with and without
worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import Plan, plan, without_restart
from frelay.config.route_files import RouteFileEdit
from frelay.config.watch import Watcher
from frelay.errors import ConfigError, Problem
from frelay.journal import Reloaded, ReloadRefused
from frelay.relay.backend import Backend, Staged
from frelay.relay.parts import Parts
from frelay.relay.prepare import with_all_problems
from frelay.relay.privileges import find_account
from frelay.relay.service_manager import ServiceManager

__all__ = ["Reloader"]

# SIGHUPs and file events closer together than this make one reload: a deployment often touches ten files.
_RELOAD_PAUSE: Final = 0.1


def _read(path: Path, edit: RouteFileEdit | None) -> Config:
    """Load a configuration, and check also the key that only a restart changes, ``relay.user``; raises ConfigError."""
    config = load(path, edit=edit)
    find_account(config)
    return config


class Reloader:
    """Replaces the active configuration by what the files say, with the steps of ``backend``.

    :meth:`reload` and :meth:`edit` do it at once. :meth:`run` does it whenever it was requested by :meth:`request`.
    """

    def __init__(self, parts: Parts, backend: Backend, service_manager: ServiceManager) -> None:
        self._active: Final = parts.active
        self._journal: Final = parts.journal
        self._log: Final[Any] = parts.log
        self._backend: Final = backend
        self._draining: Final = parts.draining
        self._changing: Final = parts.changing
        self._reading: Final = parts.reading
        self._service_manager: Final = service_manager
        self._attempted = self._active.config
        """The last configuration that could be read. Its files are watched too: one may be why it was refused."""
        self._wanted = trio.Event()
        self.last_at = time.time()
        """When it last reloaded or refused to, in seconds since the epoch; at first, when the relay was made."""
        self.last_error: ConfigError | None = None
        """Why the last reload was refused; None after one that was taken over."""
        self.needs_restart: tuple[str, ...] = ()
        """The keys in which the file differs from what runs and that only a restart changes, as ``admin.listen``."""

    @property
    def watched_files(self) -> set[Path]:
        """The files whose change may matter."""
        return {*self._active.config.watched_files, *self._attempted.watched_files}

    def status(self) -> str:
        """How it stands, in one line for systemctl."""
        text = self._active.describe()
        if self.needs_restart:
            text += f", a restart is needed for {', '.join(self.needs_restart)}"
        if self.last_error is None:
            return text
        return f"{text}, as before: the last reload was refused: {self.last_error.problems[0]}"

    # --- asked by a caller that waits for the answer -----------------------------------------------------------------

    async def reload(self) -> Plan:
        """Load the file again and put it in force; raises ConfigError with the old configuration whole."""
        # A reload and an edit at the same time would each bind for a configuration that the other has just replaced.
        async with self._changing:
            self._service_manager.reloading()
            try:
                return await self._change(None)
            except ConfigError as refused:
                if self._draining.is_set():
                    self._note_refused(refused)
                    raise
                error = await trio.to_thread.run_sync(
                    with_all_problems, self._active.config.path, refused, limiter=self._reading
                )
                self._note_refused(error)
                raise error from None
            finally:
                self._service_manager.ready(self.status())

    async def edit(self, edit: Callable[[Config], RouteFileEdit]) -> Plan:
        """Change one file of ``routes_dir`` and put it in force: bound, and on disk, when this returns.

        ``edit`` is called with the configuration in force, which nothing else can change meanwhile; what it raises
        is passed on. Raises ConfigError or, from the disk, OSError: both with the old configuration and the old file
        whole. A refused edit is told to the caller only, and is not shown as a failed reload.
        """
        async with self._changing:
            changes = await self._change(edit(self._active.config))
            self._service_manager.status(self.status())
            return changes

    async def _change(self, edit: RouteFileEdit | None) -> Plan:
        path = self._active.config.path
        # In a thread: parsing a thousand routes takes a while, and everybody else's bytes go on meanwhile.
        new = await trio.to_thread.run_sync(_read, path, edit, limiter=self._reading)
        if edit is None:
            self._attempted = new
        staged = await self.stage(new)
        try:
            if edit is not None:
                # The last step that can fail, before any address or route is given up.
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
        """Do for ``new`` all that can fail, except for writing a file. Raises ConfigError.

        Keys that need a restart keep the values that run, and the plan names them.
        """
        running = self._active.config
        changes, settled = plan(running, new), without_restart(running, new)
        prepared = await self._backend.prepare(settled)
        self._forbid_when_draining()
        return await self._backend.stage(settled, prepared, changes)

    def _forbid_when_draining(self) -> None:
        # The drain may have begun while files were read. It would never stop a listener that is opened now.
        if self._draining.is_set():
            text = "this relay is draining, and takes no changes any more"
            raise ConfigError([Problem(self._active.config.path, text, is_conflict=True)])

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
            if self._draining.is_set():
                self._log.info("reload ignored: draining")
            else:
                try:
                    await self.reload()
                except ConfigError:
                    pass  # logged, kept in last_error, and nothing has changed
                except Exception as error:
                    # A file that triggers a bug must not end the pairings of everybody.
                    text = f"a bug in frelay: {type(error).__name__}: {error}"
                    self._note_refused(ConfigError([Problem(self._active.config.path, text)]))
                    self._log.exception("a bug in frelay ended this reload, the old configuration stays")
                    self._service_manager.status(self.status())
            await trio.sleep(_RELOAD_PAUSE)

    async def watch(self, watcher: Watcher) -> None:
        """Request a reload whenever ``watcher`` finds a change, until cancelled."""
        while True:
            changed = await watcher.wait_changed()
            self._log.info("files changed", files=sorted(str(path) for path in changed))
            self.request()
