"""Resolves names so that a name server that does not answer delays only those who need its names.

A look-up is a call into the C library that cannot be cancelled. Without an answer it tries all name servers, which
easily takes half a minute. Trio runs it in one of the forty threads that all tasks of the process share, and a caller
that gives up leaves its thread behind. So forty callers of one service with a dead name server would keep the relay
from reading its own files, because that also needs a thread.

Here look-ups have their own threads, and each name has one look-up at a time, whose answer all callers get. So a name
costs one thread, however many callers it has and however soon they give up. Answers are not cached: the system and the
name server decide how long one is valid.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any, Final

import trio

__all__ = ["SharedResolver"]

# So many names without an answer may block threads before others must wait. A relay has about one name per service.
_THREADS: Final = 64


@dataclass(slots=True)
class _LookUp:
    """A running look-up, and its result."""

    is_over: trio.Event = field(default_factory=trio.Event)
    found: list[Any] = field(default_factory=list)
    error: OSError | None = None


class SharedResolver(trio.abc.HostnameResolver):
    """Trio's resolver as long as :meth:`run` runs, in a task of its own."""

    def __init__(self) -> None:
        self._threads: Final = trio.CapacityLimiter(_THREADS)
        self._under_way: Final[dict[tuple[object, ...], _LookUp]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Resolve names until cancelled; then running look-ups are abandoned."""
        async with trio.open_nursery() as self._nursery:
            before = trio.socket.set_custom_hostname_resolver(self)
            if before is not None:
                # A program that embeds the relay has set its own resolver: keep it.
                trio.socket.set_custom_hostname_resolver(before)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                trio.socket.set_custom_hostname_resolver(before)

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As :func:`socket.getaddrinfo`; Trio calls this for names only, not for addresses."""
        if self._nursery is None:
            raise AssertionError("a name before there is a task to look it up")
        question = (host, port, family, type, proto, flags)
        look_up = self._under_way.get(question)
        if look_up is None:
            look_up = self._under_way[question] = _LookUp()
            # Not in the caller's task: this caller may give up before the others that wait for the same answer.
            self._nursery.start_soon(self._answer, question, look_up)
        await look_up.is_over.wait()
        if look_up.error is not None:
            # A new error for each caller: the traceback of a shared one would grow with each task.
            raise socket.gaierror(*look_up.error.args) from look_up.error
        return list(look_up.found)

    async def _answer(self, question: tuple[Any, ...], look_up: _LookUp) -> None:
        try:
            look_up.found = await trio.to_thread.run_sync(
                socket.getaddrinfo, *question, abandon_on_cancel=True, limiter=self._threads
            )
        except OSError as error:
            look_up.error = error
        finally:
            del self._under_way[question]
            look_up.is_over.set()

    async def getnameinfo(
        self, sockaddr: tuple[str, int] | tuple[str, int, int] | tuple[str, int, int, int], flags: int
    ) -> tuple[str, str]:
        """The relay never resolves addresses to names: the owner of the reverse zone could answer anything."""
        raise NotImplementedError
