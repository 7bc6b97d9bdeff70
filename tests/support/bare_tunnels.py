"""TLS clients that know nothing of frelay (docs/protocol.md, section 6): openssl, socat, stunnel, and Python's ``ssl``.

:func:`bare_tunnel` runs one, with the methods of an ``End`` of ``ends.py``: what a test writes to its local side
arrives at the other party, and the other way round::

    async with bare_tunnel("socat", site, relay.port(), "func1") as one:
        await one.send(b"question")
        await one.send_eof()
        assert await one.receive_to_end() == b"answer"
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal

import trio

from support.site import Site
from support.tools import tool
from support.waiting import TIMEOUT

__all__ = ["KINDS", "BareTunnel", "Kind", "PlainSslSocket", "Program", "bare_tunnel", "installed"]

Kind = Literal["s_client", "socat", "stunnel", "ssl"]
KINDS: Final[tuple[Kind, ...]] = ("s_client", "socat", "stunnel", "ssl")


def installed(kind: Kind) -> Kind:
    """``kind`` itself if its program is installed; else skips (:func:`tool`). In a fixture, pytest shows why."""
    if kind != "ssl":
        tool("openssl" if kind == "s_client" else kind)
    return kind


class BareTunnel:
    """The local side of a bare tunnel. Sending and receiving may be done by two tasks at once."""

    can_half_close: bool = True
    """Whether it passes on the end of one direction while the other goes on."""

    async def send(self, data: bytes) -> None:
        raise NotImplementedError

    async def receive(self, size: int = 65536) -> bytes:
        """Up to ``size`` bytes, ``b""`` at the end of the direction."""
        raise NotImplementedError

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def left_in_order(self) -> bool:
        """Whether it reports a clean end. Call it when both directions have ended."""
        raise NotImplementedError

    async def receive_exactly(self, count: int) -> bytes:
        """``count`` bytes; an earlier end is a failure."""
        parts, left = [], count
        while left:
            data = await self.receive(min(left, 65536))
            assert data, f"the end came with {left} of {count} bytes missing"
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    async def receive_to_end(self) -> bytes:
        """All bytes up to the end of the direction."""
        parts = []
        while data := await self.receive():
            parts.append(data)
        return b"".join(parts)


class Program(BareTunnel):
    """A program whose standard input and output are one socket, the other end of which is ``local``."""

    def __init__(self, process: trio.Process, local: socket.socket, *, can_half_close: bool) -> None:
        self.process: Final = process
        self.local: Final = trio.SocketStream(trio.socket.from_stdlib_socket(local))
        self.can_half_close = can_half_close
        self.stderr = b""

    async def send(self, data: bytes) -> None:
        await self.local.send_all(data)

    async def receive(self, size: int = 65536) -> bytes:
        return await self.local.receive_some(size)

    async def send_eof(self) -> None:
        await self.local.send_eof()

    async def left_in_order(self) -> bool:
        with trio.fail_after(TIMEOUT):
            return await self.process.wait() == 0

    def thread_socket(self) -> socket.socket:
        """The local end as a blocking socket for another thread, such as a TLS client; nobody else may use it then."""
        sock = socket.socket(fileno=os.dup(self.local.socket.fileno()))
        sock.settimeout(TIMEOUT)
        return sock

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for chunk in self.process.stderr:
            self.stderr += chunk


class PlainSslSocket(BareTunnel):
    """The standard library's ``SSLSocket``, in non-blocking mode so that it fits into Trio."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock: Final = sock

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view[:16384]) :]
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._sock)

    async def receive(self, size: int = 65536) -> bytes:
        while True:
            try:
                return self._sock.recv(size)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLZeroReturnError:
                return b""

    async def send_eof(self) -> None:
        # unwrap() also reads: use it only where the other side sends nothing more until it has seen our close_notify.
        with suppress(ssl.SSLWantReadError):
            self._sock.unwrap()

    async def left_in_order(self) -> bool:
        # Without a close_notify receive() has failed already.
        return True


def _command(kind: Kind, site: Site, port: int, name: str) -> list[str]:
    cert, key = site.paths[name]
    ca = site.ca_path
    if kind == "s_client":
        options = f"-quiet -tls1_3 -connect 127.0.0.1:{port} -servername localhost -verify_return_error"
        files = ["-cert", str(cert), "-key", str(key), "-CAfile", str(ca)]
        return [tool("openssl"), "s_client", *options.split(), *files]
    if kind == "socat":
        # -t: how long one direction may outlive the other. shut-down: half-close the local side, too.
        address = (
            f"OPENSSL:127.0.0.1:{port},cert={cert},key={key},cafile={ca},commonname=localhost,"
            "openssl-min-proto-version=TLS1.3"
        )
        return [tool("socat"), "-t", str(TIMEOUT), "FD:0,shut-down", address]
    config = Path(site.directory, f"stunnel-{name}.conf")
    config.write_text(
        f"client = yes\nforeground = quiet\nsyslog = no\nconnect = 127.0.0.1:{port}\n"
        f"cert = {cert}\nkey = {key}\nCAfile = {ca}\nverifyChain = yes\ncheckHost = localhost\n"
        f"sslVersionMin = TLSv1.3\nTIMEOUTclose = {TIMEOUT:.0f}\n"
    )
    return [tool("stunnel"), str(config)]


@asynccontextmanager
async def bare_tunnel(kind: Kind, site: Site, port: int, name: str) -> AsyncIterator[BareTunnel]:
    """A bare tunnel to the relay with the certificate of ``name``; killed at the end if it still runs."""
    if kind == "ssl":
        with await trio.to_thread.run_sync(_plain_socket, site, port, name) as sock:
            yield PlainSslSocket(sock)
        return
    command = _command(kind, site, port, name)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    async with trio.open_nursery() as nursery:
        with theirs:
            process: trio.Process = await nursery.start(
                partial(trio.run_process, command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, check=False)
            )
        # With -quiet s_client ignores the end of its input; otherwise it would drop what still arrives.
        program = Program(process, ours, can_half_close=kind != "s_client")
        nursery.start_soon(program._read_stderr)
        try:
            yield program
        finally:
            program.local.socket.close()
            if process.returncode is None:
                process.kill()


def _plain_socket(site: Site, port: int, name: str) -> ssl.SSLSocket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    tls = site.context(name, alpn=()).wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)
    tls.setblocking(False)
    return tls
