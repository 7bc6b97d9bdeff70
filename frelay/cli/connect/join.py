"""How ``frelay connect`` joins, what a failure means for its exit code, and how long it pauses before the next join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from frelay.cli.connect.report import Report
from frelay.cli.connect.service_mark import join_as_service
from frelay.client.options import JoinPlan, Options
from frelay.client.plans import Plans
from frelay.client.retry import Retry, random_pause, read_retry
from frelay.client.trio import TrioWire, join
from frelay.errors import FrelayError, Refused
from frelay.protocol.messages import Message

__all__ = ["Joiner", "back_off", "exit_code"]


class Joiner:
    """Joins the route of the command line. Each join reads the files again if they have changed."""

    def __init__(self, address: str, options: Options, report: Report) -> None:
        self._retry: Final = read_retry(options.get("retry"))
        self._report: Final = report
        self.wait: Final = options.get("wait")
        options = options.copy()
        options["retry"] = None  # most joins are one try
        self.plans: Final = Plans(address, options)

    async def join(self) -> TrioWire:
        """A wire to the other function; ``--wait`` and ``--retry`` count."""
        return self._connected(await join(replace(self.plans.current(), retry=self._retry), self._report.status))

    async def join_once(self, wait: float | None, on_status: Callable[[Message], None]) -> TrioWire:
        """A wire, without a retry, within ``wait`` seconds."""
        return self._connected(await join(replace(self.plans.current(), wait=wait), on_status))

    async def join_as_service(self, plan: JoinPlan, on_status: Callable[[Message], None]) -> TrioWire:
        """A wire, by one of our ``plans``; raises MetAnotherService if both functions are a ``--to``."""
        return self._connected(await join_as_service(plan, on_status))

    def _connected(self, wire: TrioWire) -> TrioWire:
        self._report.connected(wire)
        return wire


def exit_code(error: FrelayError) -> int:
    """The exit code of the process after ``error``."""
    if isinstance(error, Refused):
        return 4 if error.code == "wait-timeout" else 3
    return 1


def back_off(retry: Retry, error: FrelayError, failures: int) -> float:
    """Seconds to wait after any error, as ``retry`` says; its number of tries does not count."""
    at_least = (error.retry_after or 0.0) if isinstance(error, Refused) else 0.0
    return at_least + random_pause(retry, failures)
