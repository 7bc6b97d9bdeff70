"""How ``frelay connect`` joins, what a failure means for its exit code, and how long it pauses before the next join."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from frelay.cli.connect.report import Report
from frelay.cli.connect.service_mark import join_as_service
from frelay.client.options import JoinPlan, Options
from frelay.client.retry import Retry, random_pause
from frelay.client.trio import TrioWire, join
from frelay.errors import FrelayError, Refused
from frelay.protocol.messages import Message

__all__ = ["Joiner", "back_off", "exit_code", "is_wait_timeout"]


class Joiner:
    """Joins the route of the command line. Each join reads all files again."""

    def __init__(self, address: str, options: Options, report: Report) -> None:
        self._address: Final = address
        self._options: Final = options
        self._report: Final = report
        self.wait: Final = options.get("wait")

    async def join(self) -> TrioWire:
        """A wire to the other function; ``--wait`` and ``--retry`` count."""
        options = self._options.copy()
        options["on_status"] = self._report.status
        return await self._connect(options)

    async def join_once(
        self, wait: float | None, on_status: Callable[[Message], None], *, as_service: bool = False
    ) -> TrioWire:
        """A wire, without a retry; raises MetAnotherService if both functions are a ``--to``."""
        options = self._options.copy()
        options["retry"] = None
        options["wait"] = wait
        options["on_status"] = on_status
        return await self._connect(options, as_service=as_service)

    async def _connect(self, options: Options, *, as_service: bool = False) -> TrioWire:
        plan = JoinPlan.make(self._address, **options)
        if as_service:
            wire = await join_as_service(plan, options.get("on_status"))
        else:
            wire = await join(plan, options.get("on_status"))
        self._report.connected(wire)
        return wire


def exit_code(error: FrelayError) -> int:
    """The exit code of the process after ``error``."""
    if isinstance(error, Refused):
        return 4 if error.code == "wait-timeout" else 3
    return 1


def is_wait_timeout(error: FrelayError) -> bool:
    """Whether nobody came in time, which is no fault."""
    return isinstance(error, Refused) and error.code == "wait-timeout"


def back_off(retry: Retry, error: FrelayError, failures: int) -> float:
    """Seconds to wait after any error, as ``retry`` says; its number of tries does not count."""
    at_least = (error.retry_after or 0.0) if isinstance(error, Refused) else 0.0
    return at_least + random_pause(retry, failures)
