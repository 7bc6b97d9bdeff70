"""Joining a route from Trio code: :func:`connect` returns a stream.

This is a shell of :mod:`frelay.client.joining`: it performs the steps on sockets that do not block.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, Unpack

import trio

from frelay.client.joining import Joining
from frelay.client.options import JoinPlan, Options
from frelay.client.signature import shows_its_options
from frelay.client.sockets import Connections, look_up, numeric
from frelay.client.steps import Close, Endpoint, Open, Pause, Receive, Resolve, Send, Step, drive_async
from frelay.client.trio.wire import TrioWire
from frelay.protocol.messages import Message

__all__ = ["connect", "join"]

_READ: Final = 65536
T = TypeVar("T")


@shows_its_options
async def connect(address: str, **options: Unpack[Options]) -> TrioWire:
    """Join a route, wait for the other function, and return a stream to it: end-to-end mTLS, ready for use.

    The arguments and errors are those of :func:`frelay.connect`. You may cancel it at any point: nothing stays open,
    and the relay is told at once that we no longer wait.
    """
    return await join(JoinPlan.make(address, **options), options.get("on_status"))


async def join(plan: JoinPlan, on_status: Callable[[Message], None] | None = None) -> TrioWire:
    """As :func:`connect`, with a plan that was made before."""
    joining = Joining(plan, trio.current_time)
    shell = _Shell()
    try:
        joined = await drive_async(joining.steps(), shell.perform, on_status)
        if joined.engine is None:
            raise AssertionError("the inner handshake is done without an engine")
        sock = trio.socket.from_stdlib_socket(shell.connections.take(joined.connection))
        return TrioWire(trio.SocketStream(sock), joined.engine, joined.paired)
    finally:
        shell.connections.close_all(joining.final_bytes)


class _Shell:
    """Performs steps on sockets that do not block."""

    def __init__(self) -> None:
        self.connections: Final = Connections()

    async def perform(self, step: Step) -> Any:
        match step:
            case Receive(connection, timeout):
                return await _within(timeout, lambda: _receive(self.connections.sockets[connection]))
            case Send(connection, data, timeout):
                return await _within(timeout, lambda: _send(self.connections.sockets[connection], data))
            case Resolve(host, port, timeout):
                return await _within(timeout, lambda: _look_up(host, port))
            case Open(connection, endpoint, timeout):
                sock = self.connections.add(connection, endpoint)
                return await _within(timeout, lambda: _open(sock, endpoint))
            case Close(connection, final_bytes):
                return self.connections.close(connection, final_bytes)
            case Pause(seconds):
                return await trio.sleep(seconds)
            case _:
                raise AssertionError(f"{step} is not for this shell")


async def _within(timeout: float, call: Callable[[], Awaitable[T]]) -> T:
    with trio.move_on_after(timeout):
        return await call()
    raise TimeoutError("timed out")


async def _receive(sock: socket.socket) -> bytes:
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return sock.recv(_READ)
        except BlockingIOError:
            continue


async def _send(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        await trio.lowlevel.wait_writable(sock)
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            continue


async def _open(sock: socket.socket, endpoint: Endpoint) -> None:
    sock.setblocking(False)
    await trio.lowlevel.checkpoint()
    number = sock.connect_ex(endpoint.sockaddr)
    if number == errno.EINPROGRESS:
        await trio.lowlevel.wait_writable(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


async def _look_up(host: str, port: int) -> list[Endpoint]:
    found = numeric(host, port)
    if found is not None:
        await trio.lowlevel.checkpoint()
        return found
    return await trio.to_thread.run_sync(look_up, host, port, abandon_on_cancel=True)
