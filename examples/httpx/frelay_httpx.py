"""httpx through frelay: the host of a URL is the name of the function that answers.

    client = httpx.Client(transport=FrelayTransport("relay.example:9001", cert=..., key=..., ca=...))
    client.get("http://func2.demo/things/7")

connects to the function whose certificate has the name ``dns:func2.demo``. Connections are kept and used again, as
httpx does it with TCP. :class:`AsyncFrelayTransport` is the same for ``httpx.AsyncClient`` under asyncio.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpcore
import httpx

import frelay

# An idle connection holds a pairing at the relay. Keep it for a few seconds only.
LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=5.0)


class FrelayTransport(httpx.HTTPTransport):
    """For ``httpx.Client``. The options are those of ``frelay.connect``, except ``peer`` and ``wait``."""

    def __init__(self, relay: str, *, limits: httpx.Limits = LIMITS, **options: Any) -> None:
        super().__init__(limits=limits)
        self._pool = httpcore.ConnectionPool(**_pool_options(limits), network_backend=_Backend(relay, options))


class AsyncFrelayTransport(httpx.AsyncHTTPTransport):
    """For ``httpx.AsyncClient``. The options are those of ``frelay.connect``, except ``peer`` and ``wait``."""

    def __init__(self, relay: str, *, limits: httpx.Limits = LIMITS, **options: Any) -> None:
        super().__init__(limits=limits)
        backend = _AsyncBackend(relay, options)
        self._pool = httpcore.AsyncConnectionPool(**_pool_options(limits), network_backend=backend)


def _pool_options(limits: httpx.Limits) -> dict[str, Any]:
    return {
        "max_connections": limits.max_connections,
        "max_keepalive_connections": limits.max_keepalive_connections,
        "keepalive_expiry": limits.keepalive_expiry,
    }


@contextmanager
def _as_httpcore(timeout: type[Exception], failure: type[Exception]) -> Iterator[None]:
    """Raise the errors of frelay and of its wires as those of httpcore, which httpx turns into its own."""
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error) or "timed out") from error
    except frelay.Refused as error:
        raise (timeout if error.code == "wait-timeout" else failure)(str(error)) from error
    except (frelay.FrelayError, OSError) as error:
        raise failure(str(error)) from error


# --- blocking ---------------------------------------------------------------------------------------------------------


class _Backend(httpcore.NetworkBackend):
    def __init__(self, relay: str, options: dict[str, Any]) -> None:
        self._relay, self._options = relay, options

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
            return _Stream(frelay.connect(self._relay, peer=f"dns:{host}", wait=timeout, **self._options))


class _Stream(httpcore.NetworkStream):
    def __init__(self, wire: frelay.Wire) -> None:
        self._wire = wire

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._wire.settimeout(timeout)
        with _as_httpcore(httpcore.ReadTimeout, httpcore.ReadError):
            return self._wire.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._wire.settimeout(timeout)
        with _as_httpcore(httpcore.WriteTimeout, httpcore.WriteError):
            self._wire.sendall(buffer)

    def close(self) -> None:
        self._wire.close()

    def get_extra_info(self, info: str) -> Any:
        return _has_something_to_read(self._wire) if info == "is_readable" else None


def _has_something_to_read(wire: ssl.SSLSocket) -> bool:
    """Whether an idle connection has bytes or an end to be read: then the other function has closed it."""
    poll = select.poll()
    poll.register(wire, select.POLLIN)
    return bool(wire.pending() or poll.poll(0))


# --- asyncio ----------------------------------------------------------------------------------------------------------


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, relay: str, options: dict[str, Any]) -> None:
        self._relay, self._options = relay, options

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        connect = frelay.client.asyncio.connect
        with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
            return _AsyncStream(*await connect(self._relay, peer=f"dns:{host}", wait=timeout, **self._options))


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as_httpcore(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as_httpcore(httpcore.WriteTimeout, httpcore.WriteError):
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()
        with suppress(OSError):  # the other side is gone already
            await self._writer.wait_closed()

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return None
        return self._reader.at_eof() or self._reader.exception() is not None
