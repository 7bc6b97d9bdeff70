"""A caller of the admin API: httpx on the Unix socket, or over TLS, under Trio.

::

    async with site.relay(ROUTE, sections=ADMIN) as relay, admin(site) as api:
        answer = await api.put("/v1/routes/two", json={...})
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from support.site import Site
from support.waiting import TIMEOUT

__all__ = ["ADMIN", "ROUTE", "Events", "admin", "events", "forwarded", "keys", "route_body"]

ADMIN: Final = '[admin]\nlisten = "unix:a.sock"\n'

ROUTE: Final = {"listen": "127.0.0.1:0", "func1": "dns:func1.demo", "func2": ["dns:func2.demo"]}
"""A route as the API takes it; the same parties as site.DEMO's."""


def route_body(**changes: Any) -> dict[str, Any]:
    """``ROUTE`` with other keys."""
    return {**ROUTE, **changes}


@asynccontextmanager
async def admin(site: Site, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client on the Unix socket of :data:`ADMIN`."""
    transport = httpx.AsyncHTTPTransport(uds=str(site.directory / "a.sock"))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=TIMEOUT, **options
    ) as client:
        yield client


def keys(answer: httpx.Response) -> set[str | None]:
    """The keys that an error answer names."""
    return {problem["key"] for problem in answer.json()["problems"]}


class Events:
    """An open event stream, and the events that have come so far."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self._more = trio.Condition()

    async def read(self, answer: httpx.Response) -> None:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                self.seen.append(json.loads(line.removeprefix("data: ")))
                async with self._more:
                    self._more.notify_all()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of one kind."""
        return [event["data"] for event in self.seen if event["kind"] == kind]

    async def wait(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The data of the ``count``-th event of this kind, now or to come."""
        with trio.fail_after(TIMEOUT):
            async with self._more:
                while len(self.of(kind)) < count:
                    await self._more.wait()
        return self.of(kind)[count - 1]


@asynccontextmanager
async def events(api: httpx.AsyncClient, **headers: str) -> AsyncIterator[Events]:
    """Follow ``/v1/events``; the stream is open when this enters."""
    found = Events()
    async with api.stream("GET", "/v1/events", headers=headers) as answer:
        assert answer.status_code == 200
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.read, answer)
            yield found
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def forwarded(path: Path) -> AsyncIterator[int]:
    """A loopback port that leads to a Unix socket, as with `ssh -L`: for programs that cannot use Unix sockets."""
    async with trio.open_nursery() as nursery:

        async def carry(client: trio.SocketStream) -> None:
            try:
                server = await trio.open_unix_socket(str(path))
                async with client, server, trio.open_nursery() as both:

                    async def one_way(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                        async for data in source:
                            await sink.send_all(data)
                        await sink.send_eof()

                    both.start_soon(one_way, client, server)
                    both.start_soon(one_way, server, client)
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # either side may hang up at any time

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        try:
            yield port
        finally:
            nursery.cancel_scope.cancel()


def can_bind(address: tuple[str, int]) -> bool:
    """Whether nobody listens at an address; connections in TIME_WAIT do not count."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            return False
    return True
