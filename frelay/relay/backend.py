"""The backend of a relay: what serves its routes, and puts a configuration in force there.

A :class:`~frelay.relay.relay.Relay` has the file, the signals, the reloads and the drain. Everything about connections
it leaves to its backend: this process (:mod:`frelay.relay.local`), or worker processes
(:mod:`frelay.relay.workers.supervisor`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan
from frelay.joining.listener import Listener
from frelay.relay.prepare import TlsFiles
from frelay.tls.trust import OuterTls

__all__ = ["Backend", "Prepared", "Resources", "Staged"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a configuration refers to, loaded: the certificates, and the files that they were read from."""

    trust: OuterTls | None
    tls_files: TlsFiles


@dataclass(frozen=True, slots=True)
class Staged:
    """A configuration whose steps that can fail have all succeeded.

    The caller must then call ``put_in_force`` or ``abandon``. Neither can fail.
    """

    changes: Plan
    put_in_force: Callable[[], Awaitable[None]]
    abandon: Callable[[], Awaitable[None]]


class Backend(Protocol):
    """What a relay and its reloader ask of a backend."""

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to; raises ConfigError."""

    async def stage(self, new: Config, prepared: Prepared, changes: Plan) -> Staged:
        """Do for ``new`` all else that can fail; ``changes`` lead to it. Raises ConfigError with nothing changed."""

    def serving(self) -> AbstractAsyncContextManager[None]:
        """The scope in which routes are served. After :meth:`drain` it ends with the last pairing."""

    def drain(self, *, reason: str, timeout: float) -> None:
        """Accept nothing more, send waiting legs away, and let pairings end within ``timeout`` seconds."""

    def stop_now(self) -> None:
        """End the drain: cut every pairing now."""

    @property
    def pairing_count(self) -> int:
        """How many pairings run, as far as is known at this moment."""

    @property
    def was_cut(self) -> bool:
        """Whether a drain had to cut a pairing."""


class Resources(Protocol):
    """Where a process gets what a configuration needs from outside: the files of ``[tls]`` and listening sockets.

    A process of its own reads and binds them; a worker process is given them by its supervisor.
    """

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to; raises ConfigError."""

    async def open_listeners(self, new: Config, changes: Plan) -> dict[ListenerKey, Listener]:
        """The listeners that ``changes`` bind for ``new``; raises ConfigError with nothing bound."""

    def report(self, config: Config, trust: OuterTls | None, opened: dict[ListenerKey, Listener]) -> None:
        """Log what was ``opened`` for ``config``, which is in force now, and the warnings about it."""
