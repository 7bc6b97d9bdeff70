"""What most tests need: a directory with a CA, certificates and a route file, and a relay that runs on it.

::

    async def test_something(site: Site) -> None:              # fixtures: tests/conftest.py
        async with site.relay(ROUTE) as relay:                   # in this process; relay.port("demo")
            one = await site.party(relay, "func1")
            two = await site.party(relay, "func2")
            await pair(one, two)
"""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from frelay.config.load import load
from frelay.relay.run import make_relay
from support.certs import Credential, TestAuthority
from support.party import Party
from support.relay import FRELAY_RUN, RelayInProcess, RelayProcess
from support.through_faults import network_asked_for
from support.waiting import TIMEOUT

__all__ = ["DEMO", "Site"]

DEMO: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
"""


class Site:
    """A directory with a CA, a relay's certificate, and two functions': what most tests need."""

    def __init__(self, directory: Path, ca: TestAuthority | None = None) -> None:
        self.directory = directory
        self.ca = ca or TestAuthority()
        self.ca_path = self.ca.write(directory)
        self.client_ca = self.ca_path
        """The CA by which the relay verifies functions; they verify the relay by ``ca_path``."""
        self.relay_paths = self.ca.relay().write(directory, "relay")
        self.credentials: dict[str, Credential] = {
            name: self.ca.party(dns=[f"{name}.demo"]) for name in ("func1", "func2")
        }
        self.paths: dict[str, tuple[Path, Path]] = {
            name: credential.write(directory, name) for name, credential in self.credentials.items()
        }
        self.config = directory / "relay.toml"
        self.workers: int | None = None
        """The ``workers`` that :meth:`write` puts into the route file; None for none."""
        self.parties: list[Party] = []

    def add(self, name: str, credential: Credential) -> Credential:
        """Make another party known to :meth:`party` and :attr:`paths`."""
        self.credentials[name] = credential
        self.paths[name] = credential.write(self.directory, name)
        return credential

    def write(self, routes: str = DEMO, *, sections: str = "", crl: bool = False) -> Path:
        """Write the route file; ``sections`` is TOML before the routes, e.g. ``[limits]``."""
        tls = f"""
[tls]
certificate = "{self.relay_paths[0].name}"
private_key = "{self.relay_paths[1].name}"
client_ca = "{self.client_ca.name}"
"""
        if crl:
            tls += 'crl = "crl.pem"\n'
        if self.workers is not None:
            before, heading, after = sections.partition("[relay]\n")
            sections = f"{before}[relay]\nworkers = {self.workers}\n{after}"
            sections = sections if heading else f"[relay]\nworkers = {self.workers}\n{before}"
        self.config.write_text(tls + sections + routes)
        return self.config

    @asynccontextmanager
    async def relay(
        self, routes: str = DEMO, *, sections: str = "", crl: bool = False, watch: bool = False
    ) -> AsyncIterator[RelayInProcess]:
        """A relay in this process; a bug that it logged fails the test at the end."""
        relay = make_relay(load(self.write(routes, sections=sections, crl=crl)), watch_files=watch)
        with structlog.testing.capture_logs() as events:
            async with trio.open_nursery() as nursery:
                await nursery.start(relay.run)
                (task,) = nursery.child_tasks
                found = RelayInProcess(relay, events, task)
                try:
                    async with network_asked_for() as found.network:
                        yield found
                finally:
                    relay.drain(reason="the test is over")
                    relay.stop_now()
                    self.hang_up()
        bugs = [e for e in events if "a bug in frelay" in e["event"]]
        assert not bugs, bugs

    @asynccontextmanager
    async def process(
        self,
        routes: str = DEMO,
        *,
        sections: str = "",
        crl: bool = False,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        workers: int | None = None,
    ) -> AsyncIterator[RelayProcess]:
        """A ``frelay run`` process, ready; killed at the end if it still runs. ``launcher`` goes before its command.

        ``workers``, or FRELAY_WORKERS in the environment of the tests, goes into the route file from here on.
        """
        self.workers = workers or int(os.environ.get("FRELAY_WORKERS", "0")) or None
        config = self.write(routes, sections=sections, crl=crl)
        command = [*launcher, *FRELAY_RUN, "-c", str(config), "--log-format", "json", *options]
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    command,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                    env={**os.environ, **(env or {})},
                    pass_fds=pass_fds,
                )
            )
            relay = RelayProcess(process)
            nursery.start_soon(relay._read)
            try:
                # Three programs start before a relay with two workers is ready.
                await relay.log("ready", timeout=4 * TIMEOUT)
                async with network_asked_for() as relay.network:
                    yield relay
            finally:
                self.hang_up()
                if process.returncode is None:
                    process.kill()

    def context(self, name: str | None = "func1", *, alpn: Sequence[str] = ("frelay/1",)) -> ssl.SSLContext:
        """A client context with the certificate of ``name`` (None: none at all)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca_path)
        if name is not None:
            context.load_cert_chain(*self.paths[name])
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    async def dial(self, relay: RelayInProcess | RelayProcess | int, name: str | None, route: str) -> trio.SocketStream:
        """The TCP connection of the party ``name`` to a relay, or to a port of 127.0.0.1; raises OSError."""
        return await trio.open_tcp_stream("127.0.0.1", relay if isinstance(relay, int) else relay.port(route))

    async def connect(
        self,
        relay: RelayInProcess | RelayProcess | int,
        name: str | None = "func1",
        *,
        route: str = "demo",
        alpn: Sequence[str] = ("frelay/1",),
        server_hostname: str | None = "localhost",
        context: ssl.SSLContext | None = None,
    ) -> Party:
        """A party with its TCP connection, before the handshake."""
        stream = await self.dial(relay, name, route)
        party = Party(stream, context or self.context(name, alpn=alpn), server_hostname)
        self.parties.append(party)
        return party

    def hang_up(self) -> None:
        """Close every party that is still connected."""
        for party in self.parties:
            party.close()
        self.parties.clear()

    async def party(
        self,
        relay: RelayInProcess | RelayProcess | int,
        name: str | None = "func1",
        *,
        route: str = "demo",
        alpn: Sequence[str] = ("frelay/1",),
        server_hostname: str | None = "localhost",
    ) -> Party:
        """A party whose outer handshake is done (on its side; the relay may yet refuse it)."""
        party = await self.connect(relay, name, route=route, alpn=alpn, server_hostname=server_hostname)
        with trio.fail_after(TIMEOUT):
            await party.handshake()
        return party
