"""HAProxy, nginx and socat as subjects, each configured as a careful operator would, with nothing that slows it down.

One thread or worker each, as frelay has one; socat always uses a process for each connection. For handshakes and
tunnels HAProxy has and requires certificates of the same authority and key type as frelay's, P-256 in TLS 1.3, and like
frelay it resumes no session. So a full mutual handshake is compared with another one.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Final

from bench.measuring.load import BenchError, SocketPair
from bench.measuring.subjects import START, STEP, Forwarder, dial
from frelay.pki.init import initialise

__all__ = ["HAProxy", "HAProxyAccept", "HAProxyFront", "HAProxyTunnel", "Nginx", "Socat"]

_HAPROXY: Final = """\
global
    nbthread 1
    tune.ssl.cachesize 0
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
"""
_TO_BACKEND: Final = "    default_backend out\nbackend out\n    server ours 127.0.0.1:{target}"
_NGINX_STREAM: Final = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def _words(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "?"


class HAProxy(Forwarder):
    """HAProxy in TCP mode with one thread; ``splices`` turns its splice-auto on."""

    def __init__(self, directory: Path, *, splices: bool = False) -> None:
        super().__init__(directory)
        self._splices: Final = splices
        self.name = "HAProxy, splice-auto" if splices else "HAProxy"

    def command(self, listening: int, target: int) -> list[str]:
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(_HAPROXY + self.proxies(listening, target))
        return ["haproxy", "-db", "-f", str(configuration)]

    def proxies(self, listening: int, target: int) -> str:
        """The configuration after the defaults."""
        splice = "    option splice-auto\n" if self._splices else ""
        return f"{splice}frontend in\n    bind fd@{listening}\n{_TO_BACKEND.format(target=target)}\n"

    @property
    def version(self) -> str:
        return "HAProxy " + _found(r"version (\S+)", _words("haproxy", "-v"))


class _HAProxyWithCertificates(HAProxy):
    """The common part of the three that use TLS."""

    def start(self) -> None:
        initialise(self.directory, host_name="localhost")
        certs = self.directory / "certs"
        for name in ("relay", "func2"):
            both = (certs / f"{name}.pem").read_text() + (certs / f"{name}.key").read_text()
            (certs / f"{name}.both").write_text(both)
        self._dialling = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        self._dialling.minimum_version = ssl.TLSVersion.TLSv1_3
        self._dialling.load_cert_chain(certs / "func1.pem", certs / "func1.key")
        self._serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._serving.num_tickets = 0
        self._serving.minimum_version = ssl.TLSVersion.TLSv1_3
        self._serving.verify_mode = ssl.CERT_REQUIRED
        self._serving.load_verify_locations(certs / "ca.pem")
        self._serving.load_cert_chain(certs / "relay.pem", certs / "relay.key")
        super().start()

    def bind(self, listening: int) -> str:
        """A bind line with mutual TLS."""
        certs = self.directory / "certs"
        return f"    bind fd@{listening} ssl crt {certs / 'relay.both'} ca-file {certs / 'ca.pem'} verify required\n"

    @property
    def version(self) -> str:
        openssl = _found(r"Running on OpenSSL version : (OpenSSL \S+)", _words("haproxy", "-vv"))
        return f"{super().version} with {openssl}"

    def dial_tls(self) -> ssl.SSLSocket:
        """A client with a certificate, its side of the handshake done."""
        sock = dial(self._address)
        try:
            return self._dialling.wrap_socket(sock, server_hostname="localhost")
        except BaseException:
            sock.close()
            raise


class HAProxyFront(_HAProxyWithCertificates):
    """HAProxy that accepts mutual TLS and dials a plain connection."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.name = "HAProxy, mTLS in front"

    def proxies(self, listening: int, target: int) -> str:
        return f"frontend in\n{self.bind(listening)}{_TO_BACKEND.format(target=target)}\n"

    def connect(self) -> SocketPair:
        client = self.dial_tls()
        try:
            return SocketPair(client, self._accept())
        except BaseException:
            client.close()
            raise


class HAProxyAccept(_HAProxyWithCertificates):
    """The handshake alone: HAProxy accepts mutual TLS and closes, without dialling. The lowest possible cost."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.name = "HAProxy, mTLS accept alone"

    def proxies(self, listening: int, target: int) -> str:
        return f"frontend in\n{self.bind(listening)}    tcp-request content reject\n"

    def connect(self) -> SocketPair:
        raise BenchError(f"{self.name} has no pairs")

    def check(self) -> None:
        self.admit()

    def admit(self) -> None:
        with self.dial_tls() as client:
            # Its close shows that it has verified our certificate: in TLS 1.3 a client is done before that.
            try:
                client.recv(1)
            except ConnectionResetError:
                pass  # any kind of close will do


class HAProxyTunnel(_HAProxyWithCertificates):
    """HAProxy with mutual TLS on both sides: it ends the client's, and dials the server with its own."""

    in_tls = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.name = "HAProxy, TLS to TLS"

    def proxies(self, listening: int, target: int) -> str:
        certs = self.directory / "certs"
        return (
            f"frontend in\n{self.bind(listening)}{_TO_BACKEND.format(target=target)} ssl verify required "
            f"ca-file {certs / 'ca.pem'} crt {certs / 'func2.both'} verifyhost localhost no-ssl-reuse\n"
        )

    def connect(self) -> SocketPair:
        client = self.dial_tls()
        try:
            server = self._accept()
            server.settimeout(STEP)
            return SocketPair(client, self._serving.wrap_socket(server, server_side=True))
        except BaseException:
            client.close()
            raise


class Nginx(Forwarder):
    """nginx's stream proxy with one worker."""

    name = "nginx stream"

    def command(self, listening: int, target: int) -> list[str]:
        configuration = self.directory / "nginx.conf"
        configuration.write_text(
            f"""\
{f"load_module {_NGINX_STREAM};" if _NGINX_STREAM.exists() else ""}
daemon off;
worker_processes 1;
pid {self.directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 16384; }}
stream {{
    server {{
        listen {self._address[0]}:{self._address[1]};
        proxy_pass 127.0.0.1:{target};
        proxy_timeout 1h;
    }}
}}
"""
        )
        # nginx passes its listening sockets to a new binary like this, so it takes ours.
        return ["env", f"NGINX={listening};", "nginx", "-e", "stderr", "-c", str(configuration)]

    @property
    def version(self) -> str:
        return "nginx " + _found(r"nginx/(\S+)", _words("nginx", "-v"))


class Socat(Forwarder):
    """socat: a process for each connection."""

    name = "socat"

    def command(self, listening: int, target: int) -> list[str]:
        # It cannot take over a listening socket, so use a port that was free a moment ago.
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self._address = sock.getsockname()
        listen = f"TCP-LISTEN:{self._address[1]},bind=127.0.0.1,reuseaddr,backlog=1024,fork"
        return ["socat", listen, f"TCP:127.0.0.1:{target}"]

    def check(self) -> None:
        deadline = time.monotonic() + START
        while True:
            try:
                return self.connect().close()
            except ConnectionRefusedError:
                self.must_run()
                if time.monotonic() > deadline:
                    raise BenchError("socat does not listen") from None
                time.sleep(0.02)

    @property
    def version(self) -> str:
        return "socat " + _found(r"socat version (\S+)", _words("socat", "-V"))
