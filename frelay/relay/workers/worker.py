"""A worker: a relay without a file, signals or servers of its own, that does what its supervisor says.

It obeys the supervisor's messages in the order in which they come. What takes time (a view, a configuration to be
staged) goes on beside the next messages; what changes something is done at once. The first message is ``start``; then::

    stage       do all for a configuration that can fail   -> its problems, or nothing
    commit      put it in force                            -> once it is
    abandon     forget it
    poll        answer a question of the admin API
    drain       accept nothing more                        -> how many pairings are left
    stop        end those, too

In the other direction it sends the answers, entries of the journal as they are noted, and every second the counts.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Mapping
from typing import Any, Final, cast

import structlog
import trio

from frelay.admin.control import Counts
from frelay.admin.loop_lag import LoopLag
from frelay.config.dump import load_dump
from frelay.errors import ConfigError, Problem
from frelay.journal import Journal, RouteTotals
from frelay.net.channel import Channel, ChannelEnded, Received
from frelay.relay import logging as relay_logging
from frelay.relay import privileges
from frelay.relay.backend import Staged
from frelay.relay.control import RelayControl
from frelay.relay.relay import Relay, merged
from frelay.relay.run import make_worker_relay
from frelay.relay.views import LocalViews
from frelay.relay.workers.codec import counts_from_json, counts_to_json, problem_to_json
from frelay.relay.workers.handed import HandedResources
from frelay.relay.workers.outbox import Outbox

__all__ = ["main"]

# Seconds between two reports: little is lost with a worker that dies, and a report costs almost nothing.
_REPORT_INTERVAL: Final = 1.0


class _Worker:
    """Runs the relay of this process, and does with it what the supervisor asks through ``channel``."""

    def __init__(self, channel: Channel, relay_log: Any) -> None:
        self._channel: Final = channel
        self._relay_log: Final = relay_log
        self._log: Final[Any] = structlog.get_logger("frelay.workers")
        self._outbox: Final = Outbox(channel)
        self._lag: Final = LoopLag()
        self._resources: Final = HandedResources()
        self._staged: Staged | None = None
        self._change = 0
        """The number of the last change that was staged or abandoned."""

    async def run(self) -> int:
        """From the first message to the end; gives the exit code."""
        try:
            first = await self._channel.receive()
            relay = await self._relay_for(first)
        except ChannelEnded:
            return 1
        self._relay: Relay = relay
        self._control: RelayControl = RelayControl(relay, LocalViews(relay))
        code = 1
        async with trio.open_nursery() as nursery:

            async def live(task_status: trio.TaskStatus[None]) -> None:
                nonlocal code
                code = await relay.run(task_status=task_status)
                # The last entries and the final counts, before the channel ends.
                await self._report_once()
                await self._outbox.flushed()
                nursery.cancel_scope.cancel(reason="this worker has drained")

            nursery.start_soon(self._outbox.run)
            with relay.journal.listen(self._outbox.note):
                try:
                    await nursery.start(live)
                except* ConfigError as group:
                    self._refuse(first.message["number"], list(merged(group).problems))
                    await self._outbox.flushed()
                    nursery.cancel_scope.cancel(reason="this worker cannot start")
                else:
                    self._outbox.answer({"answer": first.message["number"], "value": None})
                    nursery.start_soon(self._lag.watch)
                    nursery.start_soon(self._report)
                    await self._obey(nursery)
        return code

    async def _relay_for(self, first: Received) -> Relay:
        message = first.message
        config = await trio.to_thread.run_sync(load_dump, message["config"])
        self._resources.take(first, config)
        everywhere = frozenset(message["everywhere"])
        relay = make_worker_relay(config, self._resources, log=self._relay_log)
        relay.parts.registry.everywhere = everywhere
        if message["counts"] is not None:
            _continue_from(counts_from_json(message["counts"]), relay.journal, everywhere)
        return relay

    # --- obeying -----------------------------------------------------------------------------------------------

    async def _obey(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                received = await self._channel.receive()
            except ChannelEnded:
                self._log.warning("the supervisor has gone: this worker ends with it")
                nursery.cancel_scope.cancel(reason="the supervisor has gone")
                return
            message = received.message
            match message["ask"]:
                case "stage":
                    nursery.start_soon(self._stage, received)
                case "poll":
                    nursery.start_soon(self._poll, message)
                case "commit":
                    await self._commit(message)
                    self._answer(message)
                case "abandon":
                    await self._abandon()
                    self._answer(message)
                case "drain":
                    self._relay.drain(reason=message["reason"])
                    self._answer(message, len(self._relay.pairings))
                case "stop":
                    self._relay.stop_now()
                    self._answer(message)

    def _answer(self, message: Mapping[str, Any], value: Any = None) -> None:
        self._outbox.answer({"answer": message["number"], "value": value})

    def _refuse(self, number: int, problems: list[Problem]) -> None:
        self._outbox.answer({"answer": number, "problems": [problem_to_json(problem) for problem in problems]})

    async def _stage(self, received: Received) -> None:
        message, relay = received.message, self._relay
        self._change += 1
        change = self._change
        try:
            self._resources.take(received, relay.config)
            new = await trio.to_thread.run_sync(load_dump, message["config"])
            staged = await relay.stage(new)
        except ConfigError as error:
            self._resources.let_go()
            self._refuse(message["number"], list(error.problems))
        except Exception as error:
            self._resources.let_go()
            self._log.exception("a bug in frelay ended this reload, the old configuration stays")
            self._refuse(message["number"], [Problem(relay.config.path, f"a bug in frelay: {error!r}")])
        else:
            if change != self._change:
                await staged.abandon()  # it took so long that the supervisor has given up
            else:
                self._staged = staged
            self._answer(message)

    async def _commit(self, message: Mapping[str, Any]) -> None:
        if self._staged is None:
            raise AssertionError("a commit of nothing")
        registry = self._relay.parts.registry
        registry.everywhere = frozenset(message["everywhere"])
        await self._staged.put_in_force()
        for name in tuple(self._relay.journal.totals):
            if name:
                registry.forget_if_gone(name)
        self._staged = None

    async def _abandon(self) -> None:
        self._change += 1
        if self._staged is not None:
            await self._staged.abandon()
            self._staged = None

    # --- answering and reporting --------------------------------------------------------------------------------

    async def _poll(self, message: Mapping[str, Any]) -> None:
        try:
            await self._answer_poll(message)
        except Exception as error:
            # A bug in a view must not end the pairings that it shows.
            self._log.exception("a bug in frelay ended this look")
            self._refuse(message["number"], [Problem(self._relay.config.path, f"a bug in frelay: {error!r}")])

    async def _answer_poll(self, message: Mapping[str, Any]) -> None:
        control = self._control
        match message["view"]:
            case "counts":
                # Sent as a report, so that they are also the last known counts, and the answer follows them.
                await self._report_once()
                self._answer(message)
            case "status":
                self._answer(message, (await control.status()).model_dump(mode="json"))
            case "routes":
                self._answer(message, (await control.routes()).model_dump(mode="json")["routes"])
            case "traffic":
                self._answer(message, (await control.traffic()).model_dump(mode="json")["routes"])
            case "pairings":
                self._answer(message, (await control.pairings()).model_dump(mode="json")["pairings"])

    async def _report_once(self) -> None:
        table = counts_to_json(await self._control.counts())
        tasks = trio.lowlevel.current_statistics().tasks_living
        self._outbox.report({**table, "loop_lag": self._lag.worst, "tasks": tasks})

    async def _report(self) -> None:
        while True:
            await self._report_once()
            await trio.sleep(_REPORT_INTERVAL)


def _continue_from(counts: Counts, journal: Journal, everywhere: frozenset[str]) -> None:
    """Begin a new journal with the last known counts of the worker before this one, which has died."""

    def totals(route: str) -> RouteTotals:
        return journal.totals.setdefault(route, RouteTotals())

    for (route, word), count in counts.outcomes.items():
        if route in everywhere:
            totals(route).outcomes[word] = count
    for (route, code), count in counts.refusals.items():
        if route in everywhere or not route:
            totals(route).refusals[code] = count
    for (route, party), count in counts.bytes_moved.items():
        if route in everywhere:
            if party == "func1":
                totals(route).bytes_func1_to_func2 = count
            else:
                totals(route).bytes_func2_to_func1 = count
    for name, found in counts.durations.items():
        journal.durations[name].counts[:] = found.counts
        journal.durations[name].total = found.total


def main(number: str, descriptor: str, log_format: str, log_level: str) -> int:
    """Run the process of worker ``number``, whose channel is ``descriptor``; gives its exit code."""
    for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    privileges.seal()  # before the log, which has a thread
    relay_logging.configure(cast("relay_logging.LogFormat", log_format), log_level)
    structlog.contextvars.bind_contextvars(worker=int(number))
    # The supervisor logs the start, the reloads and the end of the relay once; its workers must not repeat it.
    level = max(logging.WARNING, getattr(logging, log_level.upper()))
    relay_log = structlog.wrap_logger(
        None,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory_args=("frelay.relay",),
    )
    os.set_inheritable(int(descriptor), False)
    sock = socket.socket(fileno=int(descriptor))
    sock.setblocking(False)

    async def run() -> int:
        channel = Channel(sock)
        try:
            return await _Worker(channel, relay_log).run()
        finally:
            channel.close()

    gc.collect()
    gc.freeze()  # as in `frelay run`
    return trio.run(run)
