"""Connected sockets and streams without a relay, for tests of the modules below it.

Every function returns two ends that are connected to each other; the caller closes both.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from typing import TypeAlias

import trio
from OpenSSL import SSL

from frelay.config.load import load
from frelay.tls.loading import load_outer_tls
from frelay.tls.stream import TlsStream
from support.site import Site
from support.waiting import TIMEOUT

__all__ = [
    "ClientStream",
    "SocketMaker",
    "client_context",
    "clog",
    "read_to_end",
    "server_context",
    "tcp_pair",
    "tls_over",
    "unix_pair",
]

SocketMaker: TypeAlias = Callable[[int | None], tuple[socket.socket, socket.socket]]
"""Gives two non-blocking ends; the argument is the size of their kernel buffers, None for the system's."""


def tcp_pair(buffer: int | None = None) -> tuple[socket.socket, socket.socket]:
    """The two ends of one TCP connection over loopback."""
    with socket.socket() as listener:
        one = socket.socket()
        for sock in (listener, one):
            if buffer is not None:
                # Before connecting, because the announced window depends on it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    return one, other


def unix_pair(buffer: int | None = None) -> tuple[socket.socket, socket.socket]:
    """The two ends of a socketpair: written bytes arrive at once, and a full socket stays full."""
    one, other = socket.socketpair()
    for sock in (one, other):
        sock.setblocking(False)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    return one, other


def clog(sock: socket.socket, send: Callable[[bytes], object]) -> None:
    """Fill a socket of :func:`unix_pair` completely, so that the next write must wait.

    A TCP socket does not stay full: the kernel goes on moving its bytes.
    """
    limit = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    while int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder) < limit:
        send(b"x")


class ClientStream(TlsStream):
    """Our stream as the TLS client."""

    def __init__(self, sock: socket.socket, context: SSL.Context) -> None:
        super().__init__(sock, context)
        self.connection.set_connect_state()


def server_context(site: Site) -> SSL.Context:
    """The relay's own context, made from the route file."""
    config = load(site.write())
    assert config.tls is not None
    return load_outer_tls(config.tls, source=config.path).context


def client_context(site: Site) -> SSL.Context:
    """The context of ``func1``."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    certificate, key = site.paths["func1"]
    context.use_certificate_chain_file(str(certificate))
    context.use_privatekey_file(str(key))
    context.load_verify_locations(str(site.ca_path))
    context.set_verify(SSL.VERIFY_PEER)
    return context


async def tls_over(
    sockets: tuple[socket.socket, socket.socket], server: SSL.Context, client: SSL.Context
) -> tuple[TlsStream, ClientStream]:
    """TLS over two connected sockets, the handshake done; the first one is the server's."""
    streams = TlsStream(sockets[0], server), ClientStream(sockets[1], client)
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.do_handshake)
    return streams


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """All bytes that arrive until the other side ends the connection; a reset counts as an end."""
    received = b""
    with trio.fail_after(TIMEOUT):
        try:
            while data := await stream.receive_some(65536):
                received += data
        except trio.BrokenResourceError:
            pass
    return received
