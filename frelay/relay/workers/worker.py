"""A worker: a relay without a file, signals or servers of its own, that does what its supervisor says.

The supervisor's messages are obeyed in the order in which they come. What takes time (a look, a configuration to be
staged) goes on beside the next ones; what changes something is done at once. The first message is ``start``; then::

    prepare     stage a configuration          -> its problems, or nothing
    commit      put it in force                -> once it is
    abandon     forget it
    look        answer a question of the admin API
    drain       accept nothing more            -> how many pairings are left
    stop        end those, too

In the other direction go the answers, entries of the journal as they are noted, and every second the counts.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, cast

import structlog
import trio

from frelay.admin.control import Counts
from frelay.admin.loop_lag import LoopLag
from frelay.config.dump import load_dump
from frelay.config.model import Config
from frelay.config.plan import ListenerKey, listener_keys
from frelay.errors import ConfigError, Problem
from frelay.joining.listener import Listener
from frelay.journal import Entry, Journal, RouteTotals
from frelay.net.channel import Channel, ChannelEnded, Received
from frelay.relay import logging as relay_logging
from frelay.relay import privileges
from frelay.relay.control import RelayControl
from frelay.relay.prepare import prepare
from frelay.relay.relay import Relay
from frelay.relay.reload import Staged
from frelay.relay.workers.codec import (
    Papers,
    counts_from_json,
    counts_to_json,
    entry_to_json,
    is_told,
    key_from_json,
    problem_to_json,
)
from frelay.tls.context import OuterTls

__all__ = ["main"]

# About a second of everything at a busy worker. What a supervisor that does not read costs is bounded by this.
_LONGEST_QUEUE: Final = 4096
# Often enough that little is lost with a worker that dies, seldom enough to cost nothing.
_REPORT_INTERVAL: Final = 1.0


class _WorkerRelay(Relay):
    """The relay in a worker."""

    def __init__(self, config: Config, papers: Papers, everywhere: frozenset[str], *, log: Any) -> None:
        super().__init__(config, watch_files=False, log=log)
        self.papers = papers
        """Those of the configuration that is to be prepared."""
        self._now.registry.everywhere = everywhere
        self.handed: Final[dict[ListenerKey, list[socket.socket]]] = {}
        """Sockets from the supervisor that nothing listens on yet."""

    async def prepare(self, config: Config) -> OuterTls | None:
        papers = self.papers
        return await trio.to_thread.run_sync(lambda: prepare(config, contents=dict(papers.contents), now=papers.at))

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()  # they are the supervisor's

    def _log_warnings(self, new: Config, trust: OuterTls | None) -> None:
        pass  # the supervisor has told them

    async def _open_missing(self, new: Config) -> dict[ListenerKey, Listener]:
        wanted = dict.fromkeys(key for route in new.routes for key in listener_keys(route))
        return {key: Listener(key.address, self.handed.pop(key)) for key in wanted if key not in self._now.listeners}

    async def prepare_and_stage(self, new: Config, papers: Papers) -> Staged:
        """Everything of a reload that can fail."""
        self.papers = papers
        return await self._reloader.stage(new)

    async def put_in_force(self, staged: Staged, everywhere: frozenset[str]) -> None:
        """The rest of it, after which ``everywhere`` are the names of all routes in force."""
        self._now.registry.everywhere = everywhere
        await staged.put_in_force()
        for name in tuple(self.journal.totals):
            if name:
                self._now.registry.forget_if_gone(name)


class _Outbox:
    """What is to be told to the supervisor: bounded, and never waited for."""

    def __init__(self, channel: Channel) -> None:
        self._channel: Final = channel
        self._entries: Final[deque[dict[str, Any]]] = deque(maxlen=_LONGEST_QUEUE)
        self._dropped = 0
        self._counts: dict[str, Any] | None = None
        self._answers: Final[deque[dict[str, Any]]] = deque()
        self._news = trio.Event()
        self._is_empty = trio.Event()

    def note(self, entry: Entry) -> None:
        """The journal's listener."""
        if is_told(entry):
            self._dropped += len(self._entries) == _LONGEST_QUEUE
            self._entries.append(entry_to_json(entry))
            self._wake()

    def report(self, counts: dict[str, Any]) -> None:
        """Tell ``counts`` instead of any that are not told yet."""
        self._counts = counts
        self._wake()

    def answer(self, answer: dict[str, Any]) -> None:
        """Tell an answer, after all that was noted before."""
        self._answers.append(answer)
        self._wake()

    def _wake(self) -> None:
        self._news.set()

    async def flushed(self) -> None:
        """Wait until all is sent."""
        self._is_empty = trio.Event()
        self._wake()
        await self._is_empty.wait()

    async def run(self) -> None:
        """Send, until cancelled or until the channel ends, which its reader is told as well."""
        try:
            while True:
                self._news = trio.Event()
                while message := self._next():
                    await self._channel.send(message)
                self._is_empty.set()
                await self._news.wait()
        except ChannelEnded:
            pass

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = {}
        if self._entries:
            message["entries"], message["dropped"] = list(self._entries), self._dropped
            self._entries.clear()
            self._dropped = 0
        if self._counts is not None:
            message["counts"], self._counts = self._counts, None
        if self._answers:
            message |= self._answers.popleft()
        return message


class _Worker:
    def __init__(self, channel: Channel, relay_log: Any) -> None:
        self._channel: Final = channel
        self._relay_log: Final = relay_log
        self._log: Final[Any] = structlog.get_logger("frelay.workers")
        self._outbox: Final = _Outbox(channel)
        self._lag: Final = LoopLag()
        self._staged: Staged | None = None
        self._change = 0
        """Counts what was prepared and abandoned."""

    async def run(self) -> int:
        """From the first message to the end; gives the exit code."""
        try:
            first = await self._channel.receive()
            relay = await self._relay_for(first)
        except ChannelEnded:
            return 1
        self._relay: _WorkerRelay = relay
        self._control: RelayControl = RelayControl(relay)
        code = 1
        async with trio.open_nursery() as nursery:

            async def live(task_status: trio.TaskStatus[None]) -> None:
                nonlocal code
                code = await relay.run(task_status=task_status)
                # The last that happened, and how it all adds up, before the channel ends.
                await self._report_once()
                await self._outbox.flushed()
                nursery.cancel_scope.cancel(reason="this worker has drained")

            nursery.start_soon(self._outbox.run)
            with relay.journal.listen(self._outbox.note):
                try:
                    await nursery.start(live)
                except* ConfigError as group:
                    self._refuse(first.message["number"], _problems(group))
                    await self._outbox.flushed()
                    nursery.cancel_scope.cancel(reason="this worker cannot start")
                else:
                    self._outbox.answer({"answer": first.message["number"], "value": None})
                    nursery.start_soon(self._lag.watch)
                    nursery.start_soon(self._report)
                    await self._obey(nursery)
        return code

    async def _relay_for(self, first: Received) -> _WorkerRelay:
        message = first.message
        config = await trio.to_thread.run_sync(load_dump, message["config"])
        papers = Papers.from_json(message["papers"])
        everywhere = frozenset(message["everywhere"])
        relay = _WorkerRelay(config, papers, everywhere, log=self._relay_log)
        self._take_sockets(relay, first)
        if message["counts"] is not None:
            _continue_from(counts_from_json(message["counts"]), relay.journal, everywhere)
        return relay

    def _take_sockets(self, relay: _WorkerRelay, received: Received) -> None:
        """Take over the sockets of a message; raises ConfigError if some are missing."""
        if not received.is_complete:
            received.close()
            text = "a worker has no room for more sockets: raise the limit of descriptors"
            raise ConfigError([Problem(relay.config.path, text, is_conflict=True)])
        rest = iter(received.sockets)
        for key, count in received.message["listeners"]:
            relay.handed[key_from_json(key)] = [next(rest) for _ in range(count)]

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
                case "prepare":
                    nursery.start_soon(self._prepare, received)
                case "look":
                    nursery.start_soon(self._look, message)
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

    async def _prepare(self, received: Received) -> None:
        message, relay = received.message, self._relay
        self._change += 1
        change = self._change
        try:
            self._take_sockets(relay, received)
            new = await trio.to_thread.run_sync(load_dump, message["config"])
            staged = await relay.prepare_and_stage(new, Papers.from_json(message["papers"]))
        except ConfigError as error:
            self._let_go_of_handed()
            self._refuse(message["number"], list(error.problems))
        except Exception as error:
            self._let_go_of_handed()
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
        await self._relay.put_in_force(self._staged, frozenset(message["everywhere"]))
        self._staged = None

    async def _abandon(self) -> None:
        self._change += 1
        if self._staged is not None:
            await self._staged.abandon()
            self._staged = None

    def _let_go_of_handed(self) -> None:
        for sockets in self._relay.handed.values():
            for sock in sockets:
                sock.close()
        self._relay.handed.clear()

    # --- telling -----------------------------------------------------------------------------------------------

    async def _look(self, message: Mapping[str, Any]) -> None:
        try:
            await self._answer_look(message)
        except Exception as error:
            # Whoever looks must not end those whom he looks at.
            self._log.exception("a bug in frelay ended this look")
            self._refuse(message["number"], [Problem(self._relay.config.path, f"a bug in frelay: {error!r}")])

    async def _answer_look(self, message: Mapping[str, Any]) -> None:
        control = self._control
        match message["at"]:
            case "counts":
                # Beside the answer, so that they are also the last known.
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
    """Have a new journal go on where that of a worker that died has ended, as far as anybody knows."""

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


def _problems(group: BaseExceptionGroup[ConfigError]) -> list[Problem]:
    found: list[Problem] = []
    for error in group.exceptions:
        found += _problems(error) if isinstance(error, BaseExceptionGroup) else error.problems
    return found


def main(number: str, descriptor: str, log_format: str, log_level: str) -> int:
    """The process of worker ``number``, whose channel is ``descriptor``; gives its exit code."""
    for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    privileges.seal()  # before the log, which has a thread
    relay_logging.configure(cast("relay_logging.LogFormat", log_format), log_level)
    structlog.contextvars.bind_contextvars(worker=int(number))
    # What becomes of the relay is the supervisor's to tell, once, and not that of each of its workers.
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
