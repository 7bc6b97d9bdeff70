"""Where a soak happens: the relay's directory, its addresses, certificates, and its admin API."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio

from frelay.client.options import Options
from frelay.pki.authority import Authority
from frelay.pki.files import crl_file, write_together
from frelay.pki.init import initialise
from frelay.protocol.messages import Mode

__all__ = ["CONSTANT", "TIMEOUT", "Ground", "Trouble", "ask"]

# For a whole scene. The longest takes seconds on an idle machine; on a busy one a ping-pong took half a minute.
TIMEOUT: Final = 120.0

CONSTANT: Final = 3
"""How many routes each of bulk, ping-pong and half-close has for itself."""

_ROUTE_FILE: Final = """\
[relay]
routes_dir = "routes.d"

[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"
crl = "certs/crl.pem"

[limits]                # short, so that silent connections end within the run
handshake_timeout = 2
join_timeout = 2
wait_timeout = 30
ping_interval = 0.5
pong_timeout = 20
half_close_timeout = 30
max_pre_auth_per_ip = 256       # all connections come from one address here

[admin]
listen = "unix:a.sock"

[metrics]
listen = "127.0.0.1:0"
"""


class Trouble(Exception):
    """A scene had the wrong result."""


@dataclass
class Ground:
    """The relay's directory, its addresses, and a TLS context for each certificate."""

    directory: Path
    service: str
    """``host:port`` of the service that the relay dials."""
    ports: dict[str, int] = field(default_factory=dict)
    """The ports of the routes, as soon as they are known."""
    pid: int = 0
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    @property
    def route_file(self) -> Path:
        """The relay's configuration."""
        return self.directory / "relay.toml"

    def write(self) -> None:
        """Write good and bad certificates, and the route file."""
        initialise(self.directory, host_name="localhost")
        certs = self.directory / "certs"
        (self.directory / "routes.d").mkdir()
        authority = Authority.load(certs / "ca.pem", certs / "ca.key")
        revoked = authority.issue(common_name="revoked", dns=["func1.demo"], usage="party")
        others = {
            "stranger": authority.issue(common_name="stranger", dns=["stranger.demo"], usage="party"),
            "revoked": revoked,
            "foreign": Authority.create("foreign CA").issue(common_name="foreign", dns=["func1.demo"], usage="party"),
        }
        for name, issued in others.items():
            issued.write(certs / f"{name}.pem", certs / f"{name}.key")
        entries = [(revoked.certificate.serial_number, datetime.now(UTC))]
        write_together([crl_file(certs / "crl.pem", authority.revocation_list(entries, number=2, days=30))], force=True)
        self.route_file.write_text(self.configuration())
        for name in ("func1", "func2", *others):
            self.contexts[name] = self._context(name)
        self.contexts["nobody"] = self._context(None)

    def configuration(self) -> str:
        """The route file's text."""
        parties = 'func1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'
        dialled = f'func1 = "dns:func1.demo"\nfunc2 = {{ dial = "{self.service}" }}\n'
        plain = 'outer = "none"\nallow_from = ["127.0.0.0/8"]\n'
        names = [f"{kind}-{number}" for kind in ("bulk", "talk", "half") for number in range(CONSTANT)]
        kinds = dict.fromkeys((*names, "reset", "slow", "bare", "cut", "ticket", "door", "lonely"), parties)
        kinds |= {"service": dialled, "plain": plain, "probe": plain}
        return _ROUTE_FILE + "".join(
            f'\n[[route]]\nname = "{name}"\nlisten = "127.0.0.1:0"\n{more}' for name, more in kinds.items()
        )

    def _context(self, name: str | None, *, alpn: bool = True) -> ssl.SSLContext:
        certs = self.directory / "certs"
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if alpn:
            context.set_alpn_protocols(["frelay/1"])
        if name is not None:
            context.load_cert_chain(certs / f"{name}.pem", certs / f"{name}.key")
        return context

    def bare_context(self, name: str) -> ssl.SSLContext:
        """A context for a bare tunnel: without ALPN."""
        return self._context(name, alpn=False)

    def options(self, me: str, mode: Mode) -> Options:
        """The arguments of ``connect``."""
        certs, other = self.directory / "certs", "func2" if me == "func1" else "func1"
        return Options(
            cert=certs / f"{me}.pem",
            key=certs / f"{me}.key",
            ca=certs / "ca.pem",
            peer=f"dns:{other}.demo",
            server_name="localhost",
            wait=TIMEOUT,
            mode=mode,
        )

    def address(self, route: str) -> str:
        """Where ``route`` listens."""
        return f"127.0.0.1:{self.ports[route]}"

    async def dial(self, route: str) -> trio.SocketStream:
        """A TCP connection to ``route``."""
        return await trio.open_tcp_stream("127.0.0.1", self.ports[route])


async def ask(ground: Ground, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send a request to the admin API; returns the status and the JSON of its answer."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    stream = await trio.open_unix_socket(ground.directory / "a.sock")
    async with stream:
        await stream.send_all(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = b""
        while data := await stream.receive_some():
            answer += data
    head_, _, text = answer.partition(b"\r\n\r\n")
    return int(head_.split(b" ")[1]), json.loads(text) if text else None
