"""The supervisor: the backend of a relay whose routes are served by workers. :mod:`frelay.relay.workers` tells how.

Its nursery tree::

    root
      workers       ends once all slots are empty, which only a drain brings about
        drain       tells the workers of the drain, and of its end
        slots       one task each: a worker process, and its successor when it dies
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from frelay.config.dump import dump_config
from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan
from frelay.errors import ConfigError, Problem
from frelay.joining.listener import Listener
from frelay.relay.backend import Prepared, Resources, Staged
from frelay.relay.parts import Parts
from frelay.relay.prepare import TlsFiles
from frelay.relay.workers.codec import counts_to_json, key_to_json, tls_files_to_json
from frelay.relay.workers.fleet import Fleet, WorkerSlot, for_each
from frelay.relay.workers.placement import clusters, share, spread
from frelay.relay.workers.process import WorkerLost, WorkerProcess
from frelay.tls.trust import OuterTls

__all__ = ["WORKER_TIMEOUT", "Supervisor"]

WORKER_TIMEOUT: Final = 60
"""Seconds that a worker may be silent, or take to start, to stage or to commit, before it counts as hanging. It reports
every second; a machine that stands still for so long stands still for the supervisor as well."""

# A worker that has lived for so long was not killed by its own start, in seconds: it is started again at once.
_SETTLED: Final = 10.0
# The pauses before all other starts, in seconds: each is twice the one before.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0


class Supervisor:
    """Serves the routes of a relay in the workers of ``fleet``.

    ``log_format`` and ``log_level`` are how the workers log.
    """

    def __init__(self, parts: Parts, resources: Resources, fleet: Fleet, *, log_format: str, log_level: str) -> None:
        self._active: Final = parts.active
        self._log: Final[Any] = parts.log
        self._resources: Final = resources
        self._fleet: Final = fleet
        self._changing: Final = parts.changing
        self._tls_files = TlsFiles({}, 0.0)
        """Those of the configuration in force."""
        self._spawn: Final = partial(
            WorkerProcess.spawn, note=parts.journal.note, log_format=log_format, log_level=log_level
        )
        self._root: trio.Nursery | None = None
        self._has_started = False
        self._drain_reason = ""
        self._draining: Final = parts.draining
        self._stopping: Final = trio.Event()
        self._was_cut = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """The scope in which the workers run; the first configuration that is put in force starts them."""
        try:
            async with trio.open_nursery() as self._root:
                yield
        finally:
            for listener in self._active.listeners.values():
                listener.close()

    # --- changing ----------------------------------------------------------------------------------------------

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to; raises ConfigError."""
        return await self._resources.prepare(config)

    async def stage(self, new: Config, prepared: Prepared, changes: Plan) -> Staged:
        """Bind what is new, and have each worker stage its share; raises ConfigError with nothing changed."""
        fleet, trust, tls_files = self._fleet, prepared.trust, prepared.tls_files
        opened = await self._resources.open_listeners(new, changes)
        placed = spread(clusters(new.routes), (slot.number for slot in fleet.slots), fleet.placed)
        moved = {key for key, number in placed.items() if fleet.placed.get(key, number) != number}
        handed = {**opened, **{key: self._active.listeners[key] for key in moved}}
        asked: list[tuple[WorkerSlot, WorkerProcess]] = []

        async def put_in_force() -> None:
            for key in sorted(moved):
                self._log.warning(
                    "an address moves to another worker",
                    address=str(key),
                    worker=placed[key],
                    reason="a route has come that also listens at an address of that worker",
                    consequence="its waiting legs and its pairings end as those of a route that goes",
                )
            self._tls_files, fleet.placed = tls_files, placed
            self._take_over(new, trust, changes, opened)
            self._resources.report(new, trust, opened)
            if not self._has_started:
                await self._start_workers()
            else:
                await self._commit(asked, new)

        async def abandon() -> None:
            for listener in opened.values():
                listener.close()
            with trio.CancelScope(shield=True):
                await for_each(asked, self._tell_to_abandon)

        problems: list[Problem] = []

        async def ask(slot: WorkerSlot, worker: WorkerProcess) -> None:
            asked.append((slot, worker))
            try:
                await worker.ask("stage", timeout=WORKER_TIMEOUT, **_message_for(new, tls_files, slot, placed, handed))
            except ConfigError as error:
                problems.extend(error.problems)
            except WorkerLost as error:
                problems.append(Problem(new.path, f"worker {slot.number} could not take it over: {error}"))

        try:
            await for_each(fleet.serving, ask)
            if problems:
                # As a rule all workers have the same problems, which are told once.
                raise ConfigError(list(dict.fromkeys(problems)))
        except BaseException:
            await abandon()
            raise
        return Staged(changes, put_in_force, abandon)

    def _take_over(
        self, new: Config, trust: OuterTls | None, changes: Plan, opened: dict[ListenerKey, Listener]
    ) -> None:
        """Put ``new`` in force here. This process serves no route: it keeps the sockets, for workers to come."""
        for listener in self._active.take_over(new, trust, changes, opened).values():
            listener.close()

    async def _commit(self, asked: Iterable[tuple[WorkerSlot, WorkerProcess]], new: Config) -> None:
        everywhere = [route.name for route in new.routes]

        async def commit(slot: WorkerSlot, worker: WorkerProcess) -> None:
            try:
                await worker.ask("commit", timeout=WORKER_TIMEOUT, everywhere=everywhere)
            except WorkerLost as error:
                # Its successor will have it; this one must not go on with the old.
                self._log.error(
                    "worker killed: it did not put a configuration in force", worker=slot.number, reason=str(error)
                )
                worker.kill()

        # Shielded: a caller that goes away must not leave half of the workers with the old configuration.
        with trio.CancelScope(shield=True):
            await for_each(asked, commit)

    async def _tell_to_abandon(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        try:
            await worker.ask("abandon", timeout=WORKER_TIMEOUT)
        except WorkerLost:
            worker.kill()  # it may have staged, and must not keep the sockets

    # --- keeping workers alive ----------------------------------------------------------------------------------

    async def _start_workers(self) -> None:
        """Start all workers; raises ConfigError if one cannot be started at all."""
        if self._root is None:
            raise AssertionError("workers before the relay runs")
        self._has_started = True
        await self._root.start(self._run_workers)

    async def _run_workers(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as drain:
            drain.start_soon(self._pass_on_the_drain)
            async with trio.open_nursery() as slots:
                async with trio.open_nursery() as starting:
                    for slot in self._fleet.slots:
                        starting.start_soon(slots.start, self._keep_filled, slot)
                task_status.started()
            drain.cancel_scope.cancel(reason="all workers have ended")

    async def _keep_filled(self, slot: WorkerSlot, *, task_status: trio.TaskStatus[None]) -> None:
        """Have a worker in ``slot``, and another one when it dies, until the relay drains."""
        began, pause = trio.current_time(), 0.0
        end = await self._run_worker(slot, self._install, task_status)
        while not self._draining.is_set():
            lived = trio.current_time() - began
            pause = 0.0 if lived > _SETTLED else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._log.error(
                "worker died", worker=slot.number, how=end.how, pairings=end.pairings, starts_again_in=pause
            )
            if await self._drains_within(pause):
                return
            slot.restarts += 1
            began = trio.current_time()
            try:
                end = await self._run_worker(slot, self._install_again, trio.TASK_STATUS_IGNORED)
            except ConfigError as error:
                end = _End(str(error), pairings=0, is_clean=False)
        self._was_cut |= not end.is_clean

    async def _drains_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._draining.wait()
        return self._draining.is_set()

    async def _run_worker(
        self,
        slot: WorkerSlot,
        start: Callable[[WorkerSlot, WorkerProcess], Awaitable[None]],
        task_status: trio.TaskStatus[None],
    ) -> _End:
        """Have one worker process in ``slot``, until it ends; raises ConfigError if it cannot be started."""
        path = self._active.config.path
        try:
            worker = self._spawn(slot.number)
        except OSError as error:
            raise ConfigError([Problem(path, f"worker {slot.number} cannot be started: {error}")]) from error
        code = 0

        async def run() -> None:
            nonlocal code
            code = await worker.run()

        problems: list[Problem] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                await start(slot, worker)
            except ConfigError as error:
                problems += error.problems
                worker.kill()
            except WorkerLost as error:
                problems.append(Problem(path, f"worker {slot.number} did not start: {error}"))
                worker.kill()
            else:
                self._log.info("worker started", worker=slot.number, pid=worker.pid)
                task_status.started()
                nursery.start_soon(self._watch_over, slot, worker)
        if problems:
            raise ConfigError(problems)
        pairings = 0 if worker.counts is None else sum(worker.counts.pairings.values())
        slot.vacate(worker)
        return _End(_how(code), pairings, is_clean=code == 0)

    async def _install(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        active = self._active
        details = _message_for(active.config, self._tls_files, slot, self._fleet.placed, active.listeners)
        known = None if slot.counts is None else counts_to_json(slot.counts)
        everywhere = [route.name for route in active.config.routes]
        await worker.ask("start", timeout=WORKER_TIMEOUT, counts=known, everywhere=everywhere, **details)
        slot.process = worker
        if self._draining.is_set():
            await self._tell_to_drain(slot, worker)
        if self._stopping.is_set():
            await self._tell_to_stop(slot, worker)

    async def _install_again(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        # No other configuration may come into force in the meantime.
        async with self._changing:
            await self._install(slot, worker)

    async def _watch_over(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        """Kill a worker that hangs. Silence is counted in ticks and not in time, because a machine may sleep."""
        silent = 0
        while not worker.ended.is_set():
            heard = worker.messages_heard
            with trio.move_on_after(1):
                await worker.ended.wait()
            silent = silent + 1 if worker.messages_heard == heard else 0
            if silent > WORKER_TIMEOUT:
                self._log.error("worker killed: it hangs", worker=slot.number, pid=worker.pid)
                worker.kill()
                return

    # --- ending ------------------------------------------------------------------------------------------------

    def drain(self, *, reason: str, timeout: float) -> None:
        """Accept nothing more; a task of its own tells the workers, once the relay is draining."""
        self._drain_reason = reason
        for listener in self._active.listeners.values():
            listener.stop()

    def stop_now(self) -> None:
        """End the drain: have the workers cut every pairing now."""
        self._stopping.set()

    @property
    def pairing_count(self) -> int:
        """How many pairings run in all workers, by their last counts."""
        return self._fleet.pairing_count

    @property
    def was_cut(self) -> bool:
        """Whether a worker had to cut a pairing, or did not end cleanly."""
        return self._was_cut

    async def _pass_on_the_drain(self) -> None:
        await self._draining.wait()
        left: list[int] = []

        async def drain(slot: WorkerSlot, worker: WorkerProcess) -> None:
            left.append(await self._tell_to_drain(slot, worker))

        await for_each(self._fleet.serving, drain)
        # Not before: an operator who reads this line starts a successor, which must find the addresses free.
        timeout = self._active.config.relay.drain_timeout
        self._log.info("draining", reason=self._drain_reason, pairings=sum(left), seconds=timeout)
        await self._stopping.wait()
        await for_each(self._fleet.serving, self._tell_to_stop)

    async def _tell_to_drain(self, slot: WorkerSlot, worker: WorkerProcess) -> int:
        """Tell one worker of the drain; gives how many pairings it has left."""
        try:
            return int(await worker.ask("drain", timeout=WORKER_TIMEOUT, reason=self._drain_reason))
        except WorkerLost:
            return 0  # it has ended, or hangs and will be killed for that

    async def _tell_to_stop(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        try:
            await worker.ask("stop", timeout=WORKER_TIMEOUT)
        except WorkerLost:
            worker.kill()


@dataclass(frozen=True, slots=True)
class _End:
    """How a worker process ended, and with how many pairings, as far as is known."""

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


def _message_for(
    config: Config,
    tls_files: TlsFiles,
    slot: WorkerSlot,
    placed: Mapping[ListenerKey, int],
    listeners: Mapping[ListenerKey, Listener],
) -> dict[str, Any]:
    """The details of a message that gives the worker in ``slot`` its share of ``config`` and of ``listeners``."""
    own = [(key, listener) for key, listener in listeners.items() if placed.get(key) == slot.number]
    return {
        "config": dump_config(share(config, slot.number, placed)),
        "tls_files": tls_files_to_json(tls_files),
        "listeners": [(key_to_json(key), len(listener.sockets)) for key, listener in own],
        "sockets": [sock for _, listener in own for sock in listener.sockets],
    }
