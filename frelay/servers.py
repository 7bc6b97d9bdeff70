"""The relay's own HTTP servers: bound before it is ready, and up until its last pairing has ended.

A module of its own because it is only imported by a relay whose route file asks for a server: FastAPI and what it
brings take half a second to load and 30 MB to hold.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import trio

from frelay.admin.api import EventStream, api, is_local_host
from frelay.admin.door import guard
from frelay.admin.metrics import metrics_app
from frelay.admin.office import Office
from frelay.admin.server import bind_unix, serve, unlinked_at_end
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.sockets import bind, format_address
from frelay.systemd import Inherited
from frelay.tls.context import OuterTls

__all__ = ["Servers"]


class Servers:
    """The admin API and the metrics of one relay. Make it to bind them; then give :meth:`run` a task."""

    def __init__(
        self,
        config: Config,
        office: Office,
        *,
        running: Callable[[], Config],
        trust: Callable[[], OuterTls | None],
        inherited: Inherited,
    ) -> None:
        """Bind what ``config`` asks for; raises ConfigError with nothing left bound.

        ``running`` and ``trust`` give the configuration and the certificates in force, now and after any reload.
        Sockets that systemd has bound for "admin" and "metrics" are used instead of own ones.
        """
        self._inherited: Final = inherited
        self._office: Final = office
        self._running: Final = running
        self._trust: Final = trust
        self._admin: socket.socket | None = None
        self._doors: list[socket.socket] = []
        self._metrics: list[socket.socket] = []
        self._api_path: Path | None = None
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
        found: dict[str, list[str]] = {}
        if self._doors:
            found["admin"] = [format_address(sock.getsockname()[:2]) for sock in self._doors]
        elif self._api_path is not None:
            found["admin"] = [f"unix:{self._api_path}"]
        if self._metrics:
            found["metrics"] = [format_address(sock.getsockname()[:2]) for sock in self._metrics]
        return found

    def _bind_admin(self, config: Config, cleaning: ExitStack) -> None:
        admin = config.admin
        if admin is None:
            return
        path = admin.socket_path
        if path is None:
            if admin.address is None:
                raise AssertionError("an admin section that is neither a path nor an address")
            self._doors = self._inherited.take("admin", admin.address) or bind(admin.address)
            for sock in self._doors:
                cleaning.callback(sock.close)
            # Behind the door the API stands on a socket that nobody else can reach.
            path = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="frelay-"))) / "api.sock"
        self._api_path = path
        passed = [] if self._doors else self._inherited.take("admin", path)
        if passed:
            # systemd made the file, with the mode that its unit says, and removes it.
            self._admin = passed[0]
        else:
            self._admin = bind_unix(path)
            cleaning.enter_context(unlinked_at_end(path))
        cleaning.callback(self._admin.close)

    def _bind_metrics(self, config: Config, cleaning: ExitStack) -> None:
        if config.metrics is not None:
            listen = config.metrics.listen
            self._metrics = self._inherited.take("metrics", listen) or bind(listen)
            for sock in self._metrics:
                cleaning.callback(sock.close)

    async def run(self) -> None:
        """Serve until cancelled."""
        events = EventStream()
        with self._cleaning, self._office.journal.listen(events.note):
            async with trio.open_nursery() as nursery:
                if self._admin is not None:
                    app = api(self._office, events, is_own_host=self._is_own_host if self._doors else is_local_host)
                    nursery.start_soon(_serve, app, self._admin, "admin API")
                if self._doors and self._api_path is not None:
                    nursery.start_soon(self._guard, self._api_path)
                for sock in self._metrics:
                    nursery.start_soon(_serve, metrics_app(self._office), sock, "metrics")

    def close(self) -> None:
        """Give everything back without having run."""
        self._cleaning.close()

    async def _guard(self, api_path: Path) -> None:
        def trust() -> OuterTls:
            found = self._trust()
            if found is None:
                raise AssertionError("an admin API on TCP without [tls]; the configuration should not have loaded")
            return found

        def allow():  # type: ignore[no-untyped-def]
            admin = self._running().admin
            return () if admin is None else admin.allow

        await guard(self._doors, api_path, trust=trust, allow=allow)

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


async def _serve(app, sock: socket.socket, what: str) -> None:  # type: ignore[no-untyped-def]
    await serve(app, sock, what=what)


def _problem(config: Config, section: str, error: OSError | ValueError) -> Problem:
    listen = getattr(config, section).listen
    text = f"cannot listen on {listen}: {getattr(error, 'strerror', None) or error}"
    return Problem(config.path, text, key=f"{section}.listen", is_conflict=True)
