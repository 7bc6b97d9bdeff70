"""Services for the relay to dial, good and bad, and the function that calls one.

A :class:`Service` counts its connections and gives each to its handler::

    async with serving(echo) as service:                       # echo, tls_echo(...), or a test's own
        async with site.relay(dialling(service)) as relay:
            end = await call(site, relay, "raw")                # or tunnel, bare, ticket, hello
            await end.send(b"question")

:func:`nobody` is a port that refuses, :func:`black_hole` one that never answers.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Literal

import trio

from frelay.net.sockets import format_address
from support.ends import End
from support.party import Party
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

__all__ = [
    "CALLERS",
    "Caller",
    "EndStream",
    "Handler",
    "Service",
    "black_hole",
    "call",
    "dialling",
    "echo",
    "nobody",
    "serving",
    "tls_echo",
]

Handler = Callable[[trio.SocketStream], Awaitable[None]]
Caller = Literal["raw", "ticket", "tunnel", "bare", "hello"]

CALLERS: Final[tuple[Caller, ...]] = ("raw", "ticket", "tunnel", "bare", "hello")
_HELLO: Final = b"Hello\n"


class Service:
    """A TCP service on loopback."""

    def __init__(self, host: str, port: int) -> None:
        self.address: Final = format_address((host, port))
        self.connections = 0
        """How many connections came so far."""


@asynccontextmanager
async def serving(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[Service]:
    """A service that gives each connection to ``handler`` and closes it afterwards."""
    (listener,) = await trio.open_tcp_listeners(0, host=host)
    service = Service(host, listener.socket.getsockname()[1])

    async def handle(stream: trio.SocketStream) -> None:
        service.connections += 1
        try:
            await handler(stream)
        except trio.BrokenResourceError:
            pass  # the other side was cut, as many tests want

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        yield service
        nursery.cancel_scope.cancel(reason="the test is over")


async def echo(stream: trio.abc.Stream) -> None:
    """Send back all that comes, up to its end."""
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def tls_echo(context: ssl.SSLContext) -> Handler:
    """An echo inside the service's own TLS; the relay does not see that."""

    async def handle(stream: trio.SocketStream) -> None:
        await echo(trio.SSLStream(stream, context, server_side=True))

    return handle


def dialling(target: Service | str, *, party: str = "func2", options: str = "", more: str = "") -> str:
    """The route "demo" with a place to dial; ``options`` go into its table, ``more`` into the route."""
    address = target if isinstance(target, str) else target.address
    table = f'{{ dial = "{address}"{options} }}'
    other = "func1" if party == "func2" else "func2"
    return f"""
[[route]]
name = "demo"
listen = "127.0.0.1:0"
{party} = {table}
{other} = "dns:{other}.demo"
{more}
"""


@contextmanager
def nobody() -> Iterator[str]:
    """An address that refuses every connection, as long as the context is open."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield format_address(sock.getsockname())


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that answers no connection: its accept queue is full, and stays so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        crowd = [socket.socket() for _ in range(4)]
        try:
            for sock in crowd:
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            yield format_address(listener.getsockname())
        finally:
            for sock in crowd:
                sock.close()


# --- callers --------------------------------------------------------------------------------------------------------


async def call(site: Site, relay: RelayInProcess, caller: Caller = "raw", *, name: str = "func1") -> End:
    """A function that joins, is paired with the service, and has its end of the wire."""
    if caller in ("bare", "hello"):
        before = len(relay.logged("handed off"))
        party = await site.party(relay, name, alpn=())
        if caller == "hello":
            await party.send(_HELLO)
            assert await party.receive() == _HELLO
            return End(party, "raw")
        await eventually(lambda: len(relay.logged("handed off")) > before, "the bare leg is paired")
        return End(party, "bare")
    modes = {"raw": "handoff", "ticket": "ticket", "tunnel": "tunnel"}
    party = await site.party(relay, name)
    await party.join(modes=[modes[caller]])
    await party.expect("WAITING")
    paired = await party.expect("PAIRED")
    if caller == "tunnel":
        return End(party, "tunnel")
    if caller == "raw":
        await party.hand_off()
        return End(party, "raw")
    second = Party(await trio.open_tcp_stream("127.0.0.1", relay.port()), site.context(name), "localhost")
    site.parties.append(second)
    await second.send_raw(f"FRELAY/1 {paired['ticket']}\n".encode())
    return End(second, "raw")


class EndStream(trio.abc.Stream):
    """An ``End`` as a Trio stream, for the function's own TLS on top of it."""

    def __init__(self, end: End) -> None:
        self._end = end

    @classmethod
    def inner_tls(
        cls, end: End, context: ssl.SSLContext, name: str | None, *, server_side: bool = False
    ) -> trio.SSLStream[EndStream]:
        return trio.SSLStream(cls(end), context, server_hostname=name, server_side=server_side)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._end.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._end.receive(max_bytes or 65536)

    async def aclose(self) -> None:
        self._end.party.close()
        await trio.lowlevel.checkpoint()
