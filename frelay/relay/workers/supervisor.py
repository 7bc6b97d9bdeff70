"""The supervisor: a relay to the outside, whose routes are served by workers. How, is told in
:mod:`frelay.relay.workers`.

The tree below that of :class:`~frelay.relay.relay.Relay`::

    pairings
      crew            ends once all posts are empty, which only a drain brings about
        orders        tells the workers of the drain, and of its end
        posts         one task each: a worker process, and its successor when it dies
"""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from frelay.admin.control import Counts
from frelay.config.dump import dump_config
from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan, listener_keys
from frelay.errors import ConfigError, Problem
from frelay.joining.listener import Listener
from frelay.journal import Draining
from frelay.net.passed_sockets import PassedSockets
from frelay.relay.prepare import prepare
from frelay.relay.relay import Relay
from frelay.relay.reload import Staged
from frelay.relay.service_manager import ServiceManager
from frelay.relay.workers.codec import Papers, counts_to_json, key_to_json
from frelay.relay.workers.placement import clusters, share, spread
from frelay.relay.workers.process import WorkerLost, WorkerProcess
from frelay.tls.context import OuterTls

if TYPE_CHECKING:
    from frelay.admin.control import Control

__all__ = ["PATIENCE", "Post", "Supervisor"]

PATIENCE: Final = 60
"""Seconds that a worker may be silent, or take to start, to stage or to commit, before it counts as hanging. It reports
every second; a machine that stands still for so long stands still for the supervisor as well."""

# A worker that has lived for so long was not killed by its own start, in seconds: it is started again at once.
_SETTLED: Final = 10.0
# The pauses before all other starts, in seconds: each is twice the one before.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
# Whoever asks is a person or a scraper, and does not wait longer than this for a worker that hangs, in seconds.
_LOOK_PATIENCE: Final = 5.0


class Post:
    """The place of one worker: held by one process after another."""

    def __init__(self, number: int) -> None:
        self.number: Final = number
        self.restarts = 0
        self.process: WorkerProcess | None = None
        """The one that serves; None while there is none, or it is still starting."""
        self._known: Counts | None = None

    @property
    def counts(self) -> Counts | None:
        """The last that a worker here has told; after its end, what stays of it."""
        if self.process is not None and self.process.counts is not None:
            return self.process.counts
        return self._known

    def vacate(self, process: WorkerProcess) -> None:
        """``process`` has ended, or never served: nobody waits there, and nothing runs. What it has counted stays."""
        counts = process.counts
        if counts is not None:
            nobody, nothing = dict.fromkeys(counts.waiting, 0), dict.fromkeys(counts.pairings, 0)
            self._known = replace(counts, waiting=nobody, pairings=nothing, tasks=0, loop_lag=0.0)
        self.process = None


class Supervisor(Relay):
    """A relay with workers. ``log_format`` and ``log_level`` are how these log."""

    def __init__(
        self,
        config: Config,
        *,
        watch_files: bool = True,
        inherited: PassedSockets | None = None,
        service_manager: ServiceManager | None = None,
        log_format: str = "console",
        log_level: str = "info",
    ) -> None:
        super().__init__(config, watch_files=watch_files, inherited=inherited, service_manager=service_manager)
        self.posts: Final = tuple(Post(number) for number in range(1, config.relay.worker_count + 1))
        self._placed: dict[ListenerKey, int] = {}
        self._read = self._papers = Papers({}, 0.0)
        self._spawn: Final = partial(
            WorkerProcess.spawn, note=self.journal.note, log_format=log_format, log_level=log_level
        )
        self._has_crew = False
        self._drain_reason = ""
        self._stopping: Final = trio.Event()

    def _new_control(self) -> Control:
        from frelay.relay.workers.control import SupervisorControl

        return SupervisorControl(self)

    def post_of(self, route: str) -> Post:
        """The post that serves ``route``, which must be in force."""
        return self.posts[self._placed[listener_keys(self._now.config.routes_by_name[route])[0]] - 1]

    # --- changing ----------------------------------------------------------------------------------------------

    async def prepare(self, config: Config) -> OuterTls | None:
        """As in a relay; what was read is kept for the workers."""
        contents: dict[Path, bytes] = {}
        now = time.time()
        load = partial(prepare, config, contents=contents, now=now)
        trust = await trio.to_thread.run_sync(load, limiter=self._reading)
        self._read = Papers(contents, now)
        return trust

    async def stage(self, new: Config, trust: OuterTls | None, changes: Plan) -> Staged:
        """As in a relay; and each worker has staged its share."""
        papers = self._read
        opened = await self._open_missing(new)
        placed = spread(clusters(new.routes), (post.number for post in self.posts), self._placed)
        moved = {key for key, number in placed.items() if self._placed.get(key, number) != number}
        handed = {**opened, **{key: self._now.listeners[key] for key in moved}}
        asked: list[tuple[Post, WorkerProcess]] = []

        async def put_in_force() -> None:
            for key in sorted(moved):
                self._log.warning(
                    "an address moves to another worker",
                    address=str(key),
                    worker=placed[key],
                    reason="a route has come that also listens at an address of that worker",
                    consequence="its waiting legs and its pairings end as those of a route that goes",
                )
            self._papers, self._placed = papers, placed
            self._hold(new, trust, opened)
            self._log_warnings(new, trust)
            if not self._has_crew:
                await self._assemble()
            else:
                await self._commit(asked, new)

        async def abandon() -> None:
            for listener in opened.values():
                listener.close()
            with trio.CancelScope(shield=True):
                await _of_each(asked, self._tell_to_abandon)

        problems: list[Problem] = []

        async def ask(post: Post, worker: WorkerProcess) -> None:
            asked.append((post, worker))
            try:
                letter = _letter(new, papers, post, placed, handed)
                await worker.ask("prepare", patience=PATIENCE, **letter)
            except ConfigError as error:
                problems.extend(error.problems)
            except WorkerLost as error:
                problems.append(Problem(new.path, f"worker {post.number} could not take it over: {error}"))

        try:
            await _of_each(self._serving(), ask)
            if problems:
                # Workers agree, as a rule.
                raise ConfigError(list(dict.fromkeys(problems)))
        except BaseException:
            await abandon()
            raise
        return Staged(changes, put_in_force, abandon)

    def _serving(self) -> list[tuple[Post, WorkerProcess]]:
        return [(post, post.process) for post in self.posts if post.process is not None]

    async def _commit(self, asked: Iterable[tuple[Post, WorkerProcess]], new: Config) -> None:
        everywhere = [route.name for route in new.routes]

        async def commit(post: Post, worker: WorkerProcess) -> None:
            try:
                await worker.ask("commit", patience=PATIENCE, everywhere=everywhere)
            except WorkerLost as error:
                # Its successor will have it; this one must not go on with the old.
                self._log.error(
                    "worker killed: it did not put a configuration in force", worker=post.number, reason=str(error)
                )
                worker.kill()

        # Half of the workers must not stay behind because somebody has lost interest.
        with trio.CancelScope(shield=True):
            await _of_each(asked, commit)

    async def _tell_to_abandon(self, post: Post, worker: WorkerProcess) -> None:
        try:
            await worker.ask("abandon", patience=PATIENCE)
        except WorkerLost:
            worker.kill()  # it may have staged, and must not keep the sockets

    def _hold(self, new: Config, trust: OuterTls | None, opened: dict[ListenerKey, Listener]) -> None:
        """Put ``new`` in force, of which this process serves no route: it keeps the sockets, for workers to come."""
        now = self._now
        now.config, now.trust = new, trust
        now.listeners |= opened
        needed = {key for route in new.routes for key in listener_keys(route)}
        for key in [key for key in now.listeners if key not in needed]:
            now.listeners.pop(key).close()
        now.announce(opened)

    # --- the crew ----------------------------------------------------------------------------------------------

    async def _assemble(self) -> None:
        """Start all workers; raises ConfigError if one cannot be started at all."""
        if self._pairings is None:
            raise AssertionError("workers before the relay runs")
        self._has_crew = True
        await self._pairings.start(self._crew)

    async def _crew(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as orders:
            orders.start_soon(self._pass_on_the_end)
            async with trio.open_nursery() as posts:
                async with trio.open_nursery() as starting:
                    for post in self.posts:
                        starting.start_soon(posts.start, self._fill, post)
                task_status.started()
            orders.cancel_scope.cancel(reason="all workers have ended")

    async def _fill(self, post: Post, *, task_status: trio.TaskStatus[None]) -> None:
        """Have a worker on ``post``, and another one when it dies, until the relay drains."""
        began, pause = trio.current_time(), 0.0
        end = await self._employ(post, self._install, task_status)
        while not self.is_draining:
            lived = trio.current_time() - began
            pause = 0.0 if lived > _SETTLED else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._log.error(
                "worker died", worker=post.number, how=end.how, pairings=end.pairings, starts_again_in=pause
            )
            if await self._drains_within(pause):
                return
            post.restarts += 1
            began = trio.current_time()
            try:
                end = await self._employ(post, self._install_again, trio.TASK_STATUS_IGNORED)
            except ConfigError as error:
                end = _End(str(error), pairings=0, is_clean=False)
        self._runner.was_cut |= not end.is_clean

    async def _drains_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._draining.wait()
        return self._draining.is_set()

    async def _employ(
        self, post: Post, start: Callable[[Post, WorkerProcess], Awaitable[None]], task_status: trio.TaskStatus[None]
    ) -> _End:
        """Have one worker process on ``post``, until it ends; raises ConfigError if it cannot be started."""
        path = self._now.config.path
        try:
            worker = self._spawn(post.number)
        except OSError as error:
            raise ConfigError([Problem(path, f"worker {post.number} cannot be started: {error}")]) from error
        code = 0

        async def run() -> None:
            nonlocal code
            code = await worker.run()

        problems: list[Problem] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                await start(post, worker)
            except ConfigError as error:
                problems += error.problems
                worker.kill()
            except WorkerLost as error:
                problems.append(Problem(path, f"worker {post.number} did not start: {error}"))
                worker.kill()
            else:
                self._log.info("worker started", worker=post.number, pid=worker.pid)
                task_status.started()
                nursery.start_soon(self._watch_over, post, worker)
        if problems:
            raise ConfigError(problems)
        pairings = 0 if worker.counts is None else sum(worker.counts.pairings.values())
        post.vacate(worker)
        return _End(_how(code), pairings, is_clean=code == 0)

    async def _install(self, post: Post, worker: WorkerProcess) -> None:
        now = self._now
        letter = _letter(now.config, self._papers, post, self._placed, now.listeners)
        known = None if post.counts is None else counts_to_json(post.counts)
        everywhere = [route.name for route in now.config.routes]
        await worker.ask("start", patience=PATIENCE, counts=known, everywhere=everywhere, **letter)
        post.process = worker
        if self.is_draining:
            await self._tell_to_drain(post, worker)
        if self._stopping.is_set():
            await self._tell_to_stop(post, worker)

    async def _install_again(self, post: Post, worker: WorkerProcess) -> None:
        # What is in force must not change in the meantime.
        async with self._reloader.changing:
            await self._install(post, worker)

    async def _watch_over(self, post: Post, worker: WorkerProcess) -> None:
        """Kill a worker that hangs. Ticks are counted, and not time: a machine may sleep."""
        silent = 0
        while not worker.ended.is_set():
            heard = worker.messages_heard
            with trio.move_on_after(1):
                await worker.ended.wait()
            silent = silent + 1 if worker.messages_heard == heard else 0
            if silent > PATIENCE:
                self._log.error("worker killed: it hangs", worker=post.number, pid=worker.pid)
                worker.kill()
                return

    # --- looking -----------------------------------------------------------------------------------------------

    async def look(self, at: str, posts: Iterable[Post] | None = None) -> dict[int, Any]:
        """Ask all workers, or those of ``posts``, for a look; gives the answers of those that answer."""
        answers: dict[int, Any] = {}

        async def ask(post: Post, worker: WorkerProcess) -> None:
            try:
                answers[post.number] = await worker.ask("look", patience=_LOOK_PATIENCE, at=at)
            except (WorkerLost, ConfigError):
                pass  # it is down, or has logged why; the caller sees who is missing

        wanted = self.posts if posts is None else posts
        await _of_each([(post, post.process) for post in wanted if post.process is not None], ask)
        return answers

    # --- ending ------------------------------------------------------------------------------------------------

    def drain(self, *, reason: str) -> None:
        """As in a relay; the workers are told by a task of the crew."""
        if self._draining.is_set():
            return
        timeout = self._now.config.relay.drain_timeout
        self._drain_reason = reason
        self._draining.set()
        self._service_manager.stopping(f"draining, {self._last_known_pairings()} pairings are left to end", timeout)
        self.journal.note(Draining(reason=reason, seconds=timeout))
        for listener in self._now.listeners.values():
            listener.stop()

    def stop_now(self) -> None:
        """As in a relay."""
        self._log.warning("stopping now", pairings=self._last_known_pairings())
        self._stopping.set()

    def _last_known_pairings(self) -> int:
        return sum(sum(post.counts.pairings.values()) for post in self.posts if post.counts is not None)

    async def _pass_on_the_end(self) -> None:
        await self._draining.wait()
        left: list[int] = []

        async def drain(post: Post, worker: WorkerProcess) -> None:
            left.append(await self._tell_to_drain(post, worker))

        await _of_each(self._serving(), drain)
        # Only now: who reads this and starts a successor must find the addresses free.
        timeout = self._now.config.relay.drain_timeout
        self._log.info("draining", reason=self._drain_reason, pairings=sum(left), seconds=timeout)
        await self._stopping.wait()
        await _of_each(self._serving(), self._tell_to_stop)

    async def _tell_to_drain(self, post: Post, worker: WorkerProcess) -> int:
        """Gives how many pairings it has left."""
        try:
            return int(await worker.ask("drain", patience=PATIENCE, reason=self._drain_reason))
        except WorkerLost:
            return 0  # it has ended, or hangs and will be killed for that

    async def _tell_to_stop(self, post: Post, worker: WorkerProcess) -> None:
        try:
            await worker.ask("stop", patience=PATIENCE)
        except WorkerLost:
            worker.kill()


@dataclass(frozen=True, slots=True)
class _End:
    """How the time of a worker on its post ended, and with how many pairings, as far as is known."""

    how: str
    pairings: int
    is_clean: bool


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _letter(
    config: Config,
    papers: Papers,
    post: Post,
    placed: Mapping[ListenerKey, int],
    listeners: Mapping[ListenerKey, Listener],
) -> dict[str, Any]:
    """What a worker needs for its share of ``config``; ``listeners`` are those that it does not have yet."""
    own = [(key, listener) for key, listener in listeners.items() if placed.get(key) == post.number]
    return {
        "config": dump_config(share(config, post.number, placed)),
        "papers": papers.to_json(),
        "listeners": [(key_to_json(key), len(listener.sockets)) for key, listener in own],
        "sockets": [sock for _, listener in own for sock in listener.sockets],
    }


async def _of_each(
    workers: Iterable[tuple[Post, WorkerProcess]], do: Callable[[Post, WorkerProcess], Awaitable[None]]
) -> None:
    """Do it for all of them at a time."""
    async with trio.open_nursery() as nursery:
        for post, worker in workers:
            nursery.start_soon(do, post, worker)
