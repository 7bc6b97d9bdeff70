"""A relay as a test sees it, in the test's process or in one of its own: its ports, its log, its end.

``site.relay(...)`` starts the first, ``site.process(...)`` the second: a real ``frelay run``, for tests of signals and
exit codes.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import trio

from frelay.relay.relay import Relay
from support.faults import FaultyNetwork
from support.party import Party
from support.waiting import TIMEOUT, eventually

__all__ = ["FRELAY_RUN", "RelayInProcess", "RelayProcess", "address_seen"]

FRELAY_RUN: Final = (sys.executable, "-m", "frelay", "run")


class RelayInProcess:
    """A running relay in this process, and its log."""

    def __init__(
        self, relay: Relay, events: list[MutableMapping[str, Any]], task: trio.lowlevel.Task | None = None
    ) -> None:
        self.relay = relay
        self.events = events
        self.task = task
        """The relay's main task; all its other tasks are below it."""
        self.network: FaultyNetwork | None = None
        """The network between the parties and the relay; None: there is none."""

    def port(self, route: str = "demo") -> int:
        """The port to which parties connect for ``route``."""
        return _port_to(self.relay.bound(route)[0], self.network)

    def own_port(self, route: str = "demo") -> int:
        """The port that the relay itself has bound, without a network between."""
        return _port_to(self.relay.bound(route)[0], None)

    def logged(self, event: str, **fields: Any) -> list[MutableMapping[str, Any]]:
        """The log entries of this name with these fields, so far."""
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]

    async def log(self, event: str, **fields: Any) -> MutableMapping[str, Any]:
        """The first log entry of this name with these fields, now or to come."""
        await eventually(lambda: bool(self.logged(event, **fields)), f"log entry {event!r} {fields}")
        return self.logged(event, **fields)[0]

    @property
    def legs(self) -> int:
        """How many connections of parties the relay holds now, in any state."""
        return self.relay.parts.admission.legs

    def waiting(self, route: str = "demo") -> tuple[int, int]:
        """How many legs wait on a route as (func1, func2)."""
        lobby = self.relay.routes[route].lobby
        return lobby.count("func1"), lobby.count("func2")

    async def outcome(self) -> MutableMapping[str, Any]:
        """The record of the first pairing that ended."""
        return await self.log("pairing ended")


class RelayProcess:
    """A real ``frelay run`` process. Its log is read as JSON lines."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.network: FaultyNetwork | None = None
        self.events: list[dict[str, Any]] = []
        self.stderr = ""
        self._more = trio.Condition()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        rest = b""
        async for chunk in self.process.stderr:
            self.stderr += chunk.decode("utf-8", "replace")
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    continue
            async with self._more:
                self._more.notify_all()

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]

    async def log(self, event: str, *, count: int = 1, timeout: float = TIMEOUT, **fields: Any) -> dict[str, Any]:
        """The ``count``-th log entry of this name with these fields, now or within ``timeout`` seconds."""
        with trio.move_on_after(timeout):
            while len(self.logged(event, **fields)) < count:
                if self.process.returncode is not None:
                    break
                async with self._more:
                    with trio.move_on_after(0.1):
                        await self._more.wait()
        found = self.logged(event, **fields)
        assert len(found) >= count, f"no log entry {event!r} {fields}; stderr:\n{self.stderr}"
        return found[count - 1]

    def port(self, route: str = "demo") -> int:
        """The port to which parties connect for ``route``."""
        return _port_to(self.logged("listening", route=route)[-1]["address"], self.network)

    def own_port(self, route: str = "demo") -> int:
        """The port that the relay itself has bound, without a network between."""
        return _port_to(self.logged("listening", route=route)[-1]["address"], None)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def worker(self, number: int) -> int:
        """The process number of a worker."""
        return int(self.logged("worker started", worker=number)[-1]["pid"])

    async def exit_code(self) -> int:
        with trio.fail_after(TIMEOUT * 3):
            return await self.process.wait()


def address_seen(relay: RelayInProcess | RelayProcess, party: Party) -> str:
    """The address of ``party`` as ``relay`` sees it."""
    host, port = party.socket.getsockname()[:2]
    return f"{host}:{port if relay.network is None else relay.network.port_beyond[port]}"


def _port_to(address: str, network: FaultyNetwork | None) -> int:
    """The port to which parties connect for a relay that listens on ``address``."""
    host, _, port = address.rpartition(":")
    if network is None:
        return int(port)
    return network.way_to(int(port), "::1" if host == "[::1]" else "127.0.0.1")
