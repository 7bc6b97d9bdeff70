"""Joining a route from asyncio code: :func:`connect` returns a (reader, writer) pair. Standard library only.

This is a shell of :mod:`frelay.client.joining`: it performs the steps on sockets that do not block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Unpack

from frelay.client.asyncio.wire import WireTransport
from frelay.client.joining import Joining
from frelay.client.options import JoinPlan, Options
from frelay.client.signature import shows_its_options
from frelay.client.sockets import Connections, look_up_in_thread, numeric
from frelay.client.steps import Close, Endpoint, Open, Pause, Receive, Resolve, Send, Step, drive_async
from frelay.protocol.messages import Message

__all__ = ["connect", "join"]

_READ: Final = 65536


@shows_its_options
async def connect(
    address: str, *, limit: int = 65536, **options: Unpack[Options]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Join a route, wait for the other function, and return (reader, writer) to it: end-to-end mTLS, ready for use.

    The arguments and errors are those of :func:`frelay.connect`; ``limit`` is the reader's, as in
    ``asyncio.open_connection``. ``writer.write_eof()`` ends this direction, and reading goes on. ``writer.close()`` and
    ``await writer.wait_closed()`` end the wire in good order. If the connection breaks or ends without close_notify,
    the reader raises ConnectionResetError. You may cancel it at any point: nothing stays open, and the relay is told at
    once that we no longer wait.
    """
    loop = asyncio.get_running_loop()
    plan = JoinPlan.make(address, **options)
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = await join(plan, protocol, options.get("on_status"))
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def join(
    plan: JoinPlan, protocol: asyncio.Protocol, on_status: Callable[[Message], None] | None = None
) -> WireTransport:
    """As :func:`connect`, with a plan that was made before; ``protocol`` gets the transport that is returned."""
    loop = asyncio.get_running_loop()
    joining = Joining(plan, loop.time)
    shell = _Shell(loop)
    try:
        joined = await drive_async(joining.steps(), shell.perform, on_status)
        if joined.engine is None:
            raise AssertionError("the inner handshake is done without an engine")
        transport = WireTransport(loop, joined.engine, protocol)
        sock = shell.connections.sockets[joined.connection]
        # The plain transport owns the socket from here on, and closes it also when this call is cancelled.
        await loop.create_connection(transport.plain_protocol, sock=sock)
        shell.connections.take(joined.connection)
        return transport
    finally:
        shell.connections.close_all(joining.final_bytes)


class _Shell:
    """Performs steps on sockets that do not block."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connections: Final = Connections()
        self._loop: Final = loop

    async def perform(self, step: Step) -> Any:
        loop = self._loop
        match step:
            case Receive(connection, timeout):
                # sock_recv does not yield to the loop if bytes are there, and a relay may send without end.
                await asyncio.sleep(0)
                async with asyncio.timeout(timeout):
                    return await loop.sock_recv(self.connections.sockets[connection], _READ)
            case Send(connection, data, timeout):
                async with asyncio.timeout(timeout):
                    return await loop.sock_sendall(self.connections.sockets[connection], data)
            case Resolve(host, port, timeout):
                async with asyncio.timeout(timeout):
                    return await self._look_up(host, port)
            case Open(connection, endpoint, timeout):
                sock = self.connections.add(connection, endpoint)
                sock.setblocking(False)
                async with asyncio.timeout(timeout):
                    return await loop.sock_connect(sock, endpoint.sockaddr)
            case Close(connection, final_bytes):
                return self.connections.close(connection, final_bytes)
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case _:
                raise AssertionError(f"{step} is not for this shell")

    async def _look_up(self, host: str, port: int) -> list[Endpoint]:
        found = numeric(host, port)
        if found is not None:
            return found
        # Not loop.getaddrinfo: at the end, asyncio.run() would wait for its thread, however long the look-up takes.
        answer: asyncio.Future[list[Endpoint] | OSError] = self._loop.create_future()

        def settle(result: list[Endpoint] | OSError) -> None:
            if not answer.done():
                answer.set_result(result)

        def done(result: list[Endpoint] | OSError) -> None:
            try:
                self._loop.call_soon_threadsafe(settle, result)
            except RuntimeError:
                pass  # the loop is closed, so nothing waits for the answer

        look_up_in_thread(host, port, done)
        result = await answer
        if isinstance(result, OSError):
            raise result
        return result
