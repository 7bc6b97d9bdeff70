"""The two HTTP servers of a relay, for the admin API and the metrics: bound before it is ready, up until it ends.

Only a relay whose route file has ``[admin]`` or ``[metrics]`` imports this module: FastAPI and its dependencies take
half a second to load and 30 MB of memory.
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

from frelay.admin.api import api
from frelay.admin.control import Control
from frelay.admin.events import EventStream
from frelay.admin.guard import is_local_host
from frelay.admin.metrics import Metrics, metrics_app
from frelay.admin.mtls import MutualTlsGate
from frelay.admin.server import Admit, admit_anyone, bind_unix, serve, unlinked_at_end
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.net.binding import bind
from frelay.net.passed_sockets import PassedSockets
from frelay.net.sockets import format_address
from frelay.protocol.identity import Selector
from frelay.tls.trust import OuterTls

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
        max_connections: int,
    ) -> None:
        """Bind the sockets that ``config`` asks for; raises ConfigError with nothing left bound.

        Each server has at most ``max_connections`` at a time. ``running`` and ``trust`` give the configuration and the
        certificates in force, also after a reload. A socket that systemd passed as "admin" or "metrics" is used instead
        of an own one.
        """
        self._inherited: Final = inherited
        self._max_connections: Final = max_connections
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
        """Where they listen in fact: ``unix:PATH`` or ``HOST:PORT``, by ``admin`` and ``metrics``."""
        found = {"admin": self._admin, "metrics": self._metrics}
        return {name: [_bound_to(sock) for sock in sockets] for name, sockets in found.items() if sockets}

    def _bind_admin(self, config: Config, cleaning: ExitStack) -> None:
        admin = config.admin
        if admin is None:
            return
        path, address = admin.socket_path, admin.address
        if path is not None:
            # systemd creates and removes the file of a socket that it passes, with the mode that its unit says.
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
        events, metrics = EventStream(self._max_connections // 2), Metrics(self._control)
        journal = self._control.journal
        with self._cleaning, journal.listen(events.note):
            async with trio.open_nursery() as nursery:
                if self._admin:
                    is_own_host = is_local_host if self._is_local else self._is_own_host
                    app = api(self._control, events, is_own_host=is_own_host)
                    admit: Admit = admit_anyone if self._is_local else MutualTlsGate(self._required_trust, self._allow)
                    nursery.start_soon(partial(serve, app, self._admin, admit, most=self._max_connections))
                if self._metrics:
                    nursery.start_soon(metrics.run)
                    app = metrics_app(self._control, metrics)
                    nursery.start_soon(partial(serve, app, self._metrics, admit_anyone, most=self._max_connections))

    def close(self) -> None:
        """Close the sockets of servers that never ran."""
        self._cleaning.close()

    def _required_trust(self) -> OuterTls:
        trust = self._trust()
        if trust is None:
            raise AssertionError("an admin API on TCP without [tls]; the configuration should not have loaded")
        return trust

    def _allow(self) -> Sequence[Selector]:
        admin = self._running().admin
        return () if admin is None else admin.allow

    def _is_own_host(self, host: str) -> bool:
        """On TCP: localhost, any IP address, or a name in the relay's certificate."""
        if is_local_host(host) or _is_address(host):
            return True  # An IP address is no DNS name that an attacker could point here.
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


def _bound_to(sock: socket.socket) -> str:
    address = sock.getsockname()
    return f"unix:{address}" if isinstance(address, str) else format_address(address[:2])


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
