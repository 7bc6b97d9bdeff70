"""Looking names up, so that a resolver that never answers holds up nobody but those who asked for that name.

A look-up is a call into the C library, and nothing can cut it short: without an answer it takes the time of all tries
at all name servers, half a minute easily. Trio runs it in one of forty threads that everything in the process shares,
and a caller that gives up leaves its thread behind. So forty callers of one service whose name server is gone would be
enough to keep the relay from reading its own files, which is done in threads, too.

Here look-ups have threads of their own, and there is one look-up of a name at a time, whoever else asks meanwhile:
they all get its answer. So a name costs one thread, however many call it, and however soon they give up. An answer is
not kept; how long it may be is the name server's affair, and the system's.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any, Final

import trio

__all__ = ["SharedResolver"]

# Names that do not answer before others must wait for a thread. A relay has about as many names as it has services.
_THREADS: Final = 64


@dataclass(slots=True)
class _LookUp:
    """One that is under way, and what came of it."""

    is_over: trio.Event = field(default_factory=trio.Event)
    found: list[Any] = field(default_factory=list)
    error: OSError | None = None


class SharedResolver(trio.abc.HostnameResolver):
    """Trio's resolver while :meth:`run` runs, in a task of its own."""

    def __init__(self) -> None:
        self._threads: Final = trio.CapacityLimiter(_THREADS)
        self._under_way: Final[dict[tuple[object, ...], _LookUp]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled. Look-ups that are under way then are left to themselves."""
        async with trio.open_nursery() as self._nursery:
            before = trio.socket.set_custom_hostname_resolver(self)
            if before is not None:
                # Whoever runs us inside a program of his own has his reasons.
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
        """As :func:`socket.getaddrinfo`; Trio asks this for names only, not for addresses."""
        if self._nursery is None:
            raise AssertionError("a name before there is a task to look it up")
        question = (host, port, family, type, proto, flags)
        look_up = self._under_way.get(question)
        if look_up is None:
            look_up = self._under_way[question] = _LookUp()
            # Not the asker's own task: it may give up before those who came after it.
            self._nursery.start_soon(self._answer, question, look_up)
        await look_up.is_over.wait()
        if look_up.error is not None:
            # A new one for each: a traceback must not grow with every task that the error passes through.
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
        """The relay never asks what an address is called: whoever has its reverse zone could answer anything."""
        raise NotImplementedError
