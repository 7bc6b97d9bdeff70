"""The Trio client's wire keeps Trio's contract for half-closeable streams, alone and in a tunnel."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
import trio.testing

from frelay.client.contexts import inner_context
from frelay.client.tls_engine import Engine
from frelay.client.trio import TrioWire
from frelay.protocol.messages import Paired
from support.site import Site
from support.streams import clog, unix_pair

PAIRED = Paired("0", "demo", "dns:other.demo", "client", "handoff")


def shake_hands(client: Engine, server: Engine) -> None:
    for _ in range(10):
        done = client.handshake()
        if data := client.take():
            server.feed(data)
        done = server.handshake() and done
        if data := server.take():
            client.feed(data)
        if done:
            return
    raise AssertionError("no end of the handshake")


@pytest.fixture
def contexts(site: Site) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return (
        inner_context("client", *site.paths["func1"], site.ca_path),
        inner_context("server", *site.paths["func2"], site.ca_path),
    )


def engines(contexts: tuple[ssl.SSLContext, ssl.SSLContext], *, in_tunnel: bool) -> tuple[Engine, Engine]:
    below: tuple[Engine | None, Engine | None] = (None, None)
    if in_tunnel:
        outer = Engine(contexts[0]), Engine(contexts[1], server_side=True)
        shake_hands(*outer)
        below = outer
    client = Engine(contexts[0], below=below[0])
    server = Engine(contexts[1], server_side=True, below=below[1])
    shake_hands(client, server)
    return client, server


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = await trio.open_tcp_stream(*listener.getsockname())
        sock, _ = await listener.accept()
        return one, trio.SocketStream(sock)


@pytest.mark.parametrize("in_tunnel", [False, True], ids=["raw", "tunnel"])
async def test_the_wire_is_a_half_closeable_stream(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], in_tunnel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trio.testing.check_half_closeable_stream, clogged streams included."""
    # The checks close some fifty streams whose other end stays open. No check depends on how long a close waits.
    monkeypatch.setattr("frelay.client.trio.wire.LINGER_QUIET", 0.02)
    monkeypatch.setattr("frelay.client.trio.wire.LINGER_LIMIT", 0.1)

    def wires(one: trio.SocketStream, two: trio.SocketStream) -> tuple[TrioWire, TrioWire]:
        client, server = engines(contexts, in_tunnel=in_tunnel)
        return TrioWire(one, client, PAIRED), TrioWire(two, server, PAIRED)

    async def make() -> tuple[TrioWire, TrioWire]:
        return wires(*await sockets())

    async def make_clogged() -> tuple[TrioWire, TrioWire]:
        ends = unix_pair(4096)
        one, two = wires(*(trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in ends))
        for wire, sock in ((one, ends[0]), (two, ends[1])):

            def send(data: bytes, wire: TrioWire = wire, sock: socket.socket = sock) -> None:
                wire._engine.write(data)
                sock.sendall(wire._engine.take())

            clog(sock, send)
        return one, two

    await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_an_end_without_close_notify_is_no_end(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """FIN alone reads as a broken stream; the bytes before it can still be read."""
    one, two = await sockets()
    client, server = engines(contexts, in_tunnel=False)
    wire = TrioWire(one, client, PAIRED)
    server.write(b"half of it")
    await two.send_all(server.take())
    await two.aclose()
    assert await wire.receive_some() == b"half of it"
    with pytest.raises(trio.BrokenResourceError, match="without close_notify"):
        await wire.receive_some()
    await wire.aclose()


async def test_a_close_lets_what_was_written_arrive(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """aclose() right after a large send, while bytes of the other side are unread: nothing is lost."""
    one, two = await sockets()
    client, server = engines(contexts, in_tunnel=False)
    sender, receiver = TrioWire(one, client, PAIRED), TrioWire(two, server, PAIRED)
    await receiver.send_all(b"never read" * 1000)
    got = 0

    async def receive() -> None:
        nonlocal got
        async for data in receiver:
            got += len(data)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await sender.send_all(bytes(2_000_000))
            await sender.aclose()
    assert got == 2_000_000
    await receiver.aclose()
