"""The relay's own HTTP servers: bound before it is ready, and up until its last pairing has ended.

A module of its own because it is only imported by a relay whose route file asks for a server: FastAPI and what it
brings take half a second to load and 30 MB to hold.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import trio

from frelay.admin.api import EventStream, api, is_local_host
from frelay.admin.control import Control
from frelay.admin.metrics import Metrics, metrics_app
from frelay.admin.mtls import TlsDoor
from frelay.admin.server import Admit, bind_unix, let_in, serve, unlinked_at_end
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.net.binding import bind
from frelay.net.passed_sockets import PassedSockets
from frelay.net.sockets import format_address
from frelay.protocol.identity import Selector
from frelay.tls.context import OuterTls

__all__ = ["Servers"]


class Servers:
    """The admin API and the metrics of one relay. Make it to bind them; then give :meth:`run` a task."""

    def __init__(
        self,
        config: Config,
        control: Control,
        *,
        running: Callable[[], Config],
        trust: Callable[[], OuterTls | None],
        inherited: PassedSockets,
        places: int,
    ) -> None:
        """Bind what ``config`` asks for; raises ConfigError with nothing left bound.

        Each of the two has at most ``places`` connections at a time. ``running`` and ``trust`` give the configuration
        and the certificates in force, now and after any reload. Sockets that systemd has bound for "admin" and
        "metrics" are used instead of own ones.
        """
        self._inherited: Final = inherited
        self._places: Final = places
        self._control: Final = control
        self._running: Final = running
        self._trust: Final = trust
        self._admin: list[socket.socket] = []
        self._metrics: list[socket.socket] = []
        self._is_local: Final = config.admin is None or config.admin.socket_path is not None
        problems: list[Problem] = []
        with ExitStack() as cleaning:
            try:
                self._bind_admin(config, cleaning)
            except (OSError, ValueError) as error:
                problems.append(_problem(config, "admin", error))
            try:
                self._bind_metrics(config, cleaning)
            except (OSError, ValueError) as error:
                problems.append(_problem(config, "metrics", error))
            if problems:
                raise ConfigError(problems)
            self._cleaning = cleaning.pop_all()

    @property
    def bound(self) -> dict[str, list[str]]:
        """Where they really listen: ``unix:PATH`` or ``HOST:PORT``, by ``admin`` and ``metrics``."""
        found = {"admin": [_place(sock) for sock in self._admin], "metrics": [_place(sock) for sock in self._metrics]}
        return {name: places for name, places in found.items() if places}

    def _bind_admin(self, config: Config, cleaning: ExitStack) -> None:
        admin = config.admin
        if admin is None:
            return
        path, address = admin.socket_path, admin.address
        if path is not None:
            # One that systemd has bound: it made the file, with the mode that its unit says, and removes it.
            self._admin = self._inherited.take("admin", path)
            if not self._admin:
                self._admin = [bind_unix(path)]
                cleaning.enter_context(unlinked_at_end(path))
        elif address is not None:
            self._admin = self._inherited.take("admin", address) or bind(address)
        for sock in self._admin:
            cleaning.callback(sock.close)

    def _bind_metrics(self, config: Config, cleaning: ExitStack) -> None:
        if config.metrics is not None:
            listen = config.metrics.listen
            self._metrics = self._inherited.take("metrics", listen) or bind(listen)
            for sock in self._metrics:
                cleaning.callback(sock.close)

    async def run(self) -> None:
        """Serve until cancelled."""
        events, metrics = EventStream(self._places // 2), Metrics(self._control)
        journal = self._control.journal
        with self._cleaning, journal.listen(events.note):
            async with trio.open_nursery() as nursery:
                if self._admin:
                    is_own_host = is_local_host if self._is_local else self._is_own_host
                    app = api(self._control, events, is_own_host=is_own_host)
                    admit: Admit = let_in if self._is_local else TlsDoor(self._needed_trust, self._allow)
                    nursery.start_soon(partial(serve, app, self._admin, admit, most=self._places))
                if self._metrics:
                    nursery.start_soon(metrics.run)
                    app = metrics_app(self._control, metrics)
                    nursery.start_soon(partial(serve, app, self._metrics, let_in, most=self._places))

    def close(self) -> None:
        """Give everything back without having run."""
        self._cleaning.close()

    def _needed_trust(self) -> OuterTls:
        trust = self._trust()
        if trust is None:
            raise AssertionError("an admin API on TCP without [tls]; the configuration should not have loaded")
        return trust

    def _allow(self) -> Sequence[Selector]:
        admin = self._running().admin
        return () if admin is None else admin.allow

    def _is_own_host(self, host: str) -> bool:
        """On TCP: this machine's own names, any address, or a name in the relay's certificate."""
        if is_local_host(host) or _is_address(host):
            return True  # a rebound name is a name, so an address cannot be one
        trust = self._trust()
        return trust is not None and host in trust.server_names


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.removeprefix("[").removesuffix("]"))
        except OSError:
            continue
        return True
    return False


def _place(sock: socket.socket) -> str:
    place = sock.getsockname()
    return f"unix:{place}" if isinstance(place, str) else format_address(place[:2])


def _problem(config: Config, section: str, error: OSError | ValueError) -> Problem:
    listen = getattr(config, section).listen
    text = f"cannot listen on {listen}: {_reason(str(listen), error)}"
    return Problem(config.path, text, key=f"{section}.listen", is_conflict=True)


def _reason(listen: str, error: OSError | ValueError) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE and listen.startswith("unix:"):
        if not Path(listen.removeprefix("unix:")).is_socket():
            return "there is a file of that name, and it is no socket: remove it, or choose another path"
        return "another process answers there; if that is a relay with this file, it runs already: see frelay status"
    if number == errno.ENOENT and listen.startswith("unix:"):
        return "its directory does not exist"
    return str(getattr(error, "strerror", None) or error)
