"""A function that only sends also learns that its certificate was refused: sending fails, and the alert is there.

The two share one TCP connection on loopback, without a relay, so that the alert has always arrived.
"""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest
import trio

from frelay.client.contexts import inner_context
from frelay.client.tls_engine import Engine
from frelay.client.trio import TrioWire
from frelay.client.wire import Wire
from frelay.errors import CertificateRefused
from frelay.protocol.messages import Paired
from support.certs import TestAuthority
from support.site import Site
from support.waiting import TIMEOUT

MUCH = b"question" * 4_000_000


@pytest.fixture
def context(site: Site) -> ssl.SSLContext:
    """The context of a client whose certificate the server refuses."""
    cert, key = TestAuthority("another CA").party(dns=["func1.demo"]).write(Path(site.directory), "refused")
    return inner_context("client", cert, key, site.ca_path)


def connect(site: Site) -> tuple[socket.socket, threading.Thread]:
    """A connection to a server that refuses the client's certificate and closes."""
    server = inner_context("server", *site.paths["func2"], site.ca_path)

    def refuse() -> None:
        with pytest.raises(ssl.SSLCertVerificationError):
            server.wrap_socket(two, server_side=True)
        two.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=TIMEOUT)
        two, _ = listener.accept()
    two.settimeout(TIMEOUT)
    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    return one, thread


def test_a_wire_says_so(site: Site, context: ssl.SSLContext) -> None:
    sock, thread = connect(site)
    wire = context.wrap_socket(sock, suppress_ragged_eofs=False)
    assert isinstance(wire, Wire)
    thread.join(TIMEOUT)
    with pytest.raises(CertificateRefused, match="unknown ca") as caught:
        wire.sendall(MUCH)
    assert isinstance(caught.value, ssl.SSLError)
    wire.abandon()


async def test_a_trio_stream_says_so(site: Site, context: ssl.SSLContext) -> None:
    sock, thread = connect(site)
    engine = Engine(context)
    while not engine.handshake():
        sock.sendall(engine.take())
        engine.feed(sock.recv(65536))
    sock.sendall(engine.take())
    thread.join(TIMEOUT)
    sock.setblocking(False)
    wire = TrioWire(
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
        engine,
        Paired("0", "demo", "dns:func2.demo", "client", "handoff"),
    )
    with pytest.raises(CertificateRefused, match="unknown ca") as caught:
        await wire.send_all(MUCH)
    assert isinstance(caught.value, trio.BrokenResourceError)
    await wire.aclose()
