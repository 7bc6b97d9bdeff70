"""Both ends of ``frelay connect``: a local port on one side, a local service on the other, and callers.

async with serving(echo) as service, site.relay() as relay:
    async with offering(site, relay, service.address) as there, port_here(site, relay) as (here, address):
        async with await dial(address) as caller:
            await still_echoes(caller)
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from frelay.client.options import split_address
from support.commands import Command, arguments, command
from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.waiting import TIMEOUT

__all__ = ["dial", "ends_by_reset", "offering", "port_here", "reset", "still_echoes"]

_CUT: Final = b"\1\0\0\0\0\0\0\0"


@asynccontextmanager
async def offering(
    site: Site, relay: RelayInProcess | RelayProcess | int, address: str, *more: str
) -> AsyncIterator[Command]:
    """func2 with ``--to``, once its first leg waits."""
    port = relay if isinstance(relay, int) else relay.port()
    async with command(arguments(site, f"127.0.0.1:{port}", "func2", "func1", "--to", address, *more)) as there:
        await there.say("waiting")
        yield there


@asynccontextmanager
async def port_here(
    site: Site, relay: RelayInProcess | RelayProcess | int, *more: str, at: str = "127.0.0.1:0", lives: bool = True
) -> AsyncIterator[tuple[Command, str]]:
    """func1 with ``--listen``, and the address that it listens on; with ``lives`` it must outlive the test."""
    port = relay if isinstance(relay, int) else relay.port()
    async with command(arguments(site, f"127.0.0.1:{port}", "func1", "func2", "--listen", at, *more)) as here:
        yield here, (await here.say("listening"))["address"]
        assert not lives or here.process.returncode is None, here.stderr
        assert "Traceback" not in here.stderr


async def dial(address: str) -> trio.SocketStream:
    """A connection to ``HOST:PORT`` or ``unix:PATH``."""
    with trio.fail_after(TIMEOUT):
        if address.startswith("unix:"):
            return await trio.open_unix_socket(os.fspath(address.removeprefix("unix:")))
        return await trio.open_tcp_stream(*split_address(address))


async def still_echoes(stream: trio.SocketStream, text: bytes = b"as before") -> None:
    """The service sends back what it gets, and nothing else."""
    with trio.fail_after(TIMEOUT):
        await stream.send_all(text)
        heard = b""
        while len(heard) < len(text):
            data = await stream.receive_some(65536)
            assert data, f"an end after {heard!r}"
            heard += data
        assert heard == text


def reset(stream: trio.SocketStream) -> None:
    """Close it by RST."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CUT)
    stream.socket.close()


async def ends_by_reset(stream: trio.SocketStream) -> bool:
    """Whether it ends by RST, and not by an end that looks complete."""
    with trio.fail_after(TIMEOUT):
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            return True
        return False
