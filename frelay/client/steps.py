"""The steps of a joining, each a frozen dataclass, and the two loops that perform them. Standard library only.

The generator in :mod:`frelay.client.joining` yields a step. A shell performs it with its own kind of I/O, and the loop
sends the answer back. The loop throws an OSError into the generator instead, so only the generator decides what an
error means. A step that may take time has ``timeout`` in seconds. When it passes, the shell raises TimeoutError without
an errno; one with an errno is the kernel's.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from frelay.client.tls_engine import Engine
from frelay.protocol.messages import Message

__all__ = [
    "Close",
    "Connection",
    "Endpoint",
    "InnerHandshake",
    "Open",
    "Pause",
    "Receive",
    "Resolve",
    "Send",
    "Status",
    "Step",
    "Steps",
    "drive",
    "drive_async",
]

Connection = Literal["outer", "raw"]
"""The name of a TCP connection: the one with the outer TLS, or the second one, which carries the ticket."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address to connect to, as getaddrinfo returns it."""

    family: socket.AddressFamily
    sockaddr: Any

    def __str__(self) -> str:
        host, port = self.sockaddr[:2]
        return f"[{host}]:{port}" if self.family == socket.AF_INET6 else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look up a name; the answer is a list of Endpoint."""

    host: str
    port: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Open:
    """Connect to an endpoint; later steps name the socket by ``connection``."""

    connection: Connection
    endpoint: Endpoint
    timeout: float


@dataclass(frozen=True, slots=True)
class Send:
    """Send all of ``data``."""

    connection: Connection
    data: bytes = field(repr=False)
    timeout: float


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive some bytes; the answer is ``b""`` at FIN."""

    connection: Connection
    timeout: float


@dataclass(frozen=True, slots=True)
class Close:
    """Send ``final_bytes`` if the kernel takes them at once, and close. A connection that is not open is no error."""

    connection: Connection
    final_bytes: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Status:
    """Call the caller's ``on_status``."""

    message: Message


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class InnerHandshake:
    """Do the inner handshake on an SSLSocket over ``connection`` (in ``tunnel``, if there is one).

    Only a shell that set ``inner_tls_on_socket`` gets this step. The answer is the agreed ALPN protocol, and the names
    in the peer's certificate.
    """

    connection: Connection
    context: ssl.SSLContext
    server_side: bool
    tunnel: Engine | None
    timeout: float


Step = Resolve | Open | Send | Receive | Close | Status | Pause | InnerHandshake
T = TypeVar("T")
Steps = Generator[Step, Any, T]


def drive(steps: Steps[T], perform: Callable[[Step], Any], on_status: Callable[[Message], None] | None) -> T:
    """Perform the steps until they are done; returns their result, or raises their error."""
    answer: Any = None
    failure: OSError | None = None
    while True:
        try:
            step = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as done:
            result: T = done.value
            return result
        answer = failure = None
        if isinstance(step, Status):
            # Outside the try below: an OSError of the caller's own function is no fault of the connection.
            if on_status is not None:
                on_status(step.message)
            continue
        try:
            answer = perform(step)
        except OSError as error:
            failure = error


async def drive_async(
    steps: Steps[T], perform: Callable[[Step], Awaitable[Any]], on_status: Callable[[Message], None] | None
) -> T:
    """As :func:`drive`, for a ``perform`` that is awaited."""
    answer: Any = None
    failure: OSError | None = None
    while True:
        try:
            step = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as done:
            result: T = done.value
            return result
        answer = failure = None
        if isinstance(step, Status):
            if on_status is not None:
                on_status(step.message)
            continue
        try:
            answer = await perform(step)
        except OSError as error:
            failure = error
