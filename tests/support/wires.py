"""Functions that call :func:`frelay.connect`, and fake relays.

``connect`` and :class:`~frelay.client.wire.Wire` block, but a relay in this process must go on. So each call is made in
a thread, with a time limit::

    async with meet(site, relay) as (one, two):                    # both connected, func1 and func2
        await in_thread(one.sendall, b"question")
        assert await in_thread(two.recv, 100) == b"question"

:func:`fake_relay` is a TLS server with a relay's certificate and a script of its own.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import trio

import frelay
from frelay.client.wire import Wire
from support.party import frame
from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.waiting import TIMEOUT

__all__ = ["PAIRED", "WAITING", "connect", "fake_relay", "in_thread", "meet", "options", "read_frame", "read_to_end"]

P = ParamSpec("P")
T = TypeVar("T")

WAITING: Final = frame(
    "WAITING", {"route": "demo", "party": "func1", "identity": "dns:func1.demo", "deadline": 60, "peer_seen": None}
)
PAIRED: Final = frame(
    "PAIRED",
    {
        "pairing": "0123456789abcdef",
        "route": "demo",
        "peer": "dns:func2.demo",
        "role": "client",
        "mode": "handoff",
        "limits": {},
    },
)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call something that blocks; it must have a time limit of its own."""
    return await trio.to_thread.run_sync(partial(function, *args, **kwargs))


def options(site: Site, name: str, **changes: Any) -> dict[str, Any]:
    """The arguments of ``connect`` for the function ``name``, which expects the other of func1 and func2."""
    cert, key = site.paths[name]
    other = "func2" if name == "func1" else "func1"
    return {"cert": cert, "key": key, "ca": site.ca_path, "peer": f"dns:{other}.demo", "wait": TIMEOUT, **changes}


async def connect(
    site: Site, relay: RelayInProcess | RelayProcess | int, name: str, *, route: str | None = None, **changes: Any
) -> Wire:
    """``frelay.connect`` as the function ``name``, in a thread. Its wire gives up after TIMEOUT, too."""
    port = relay if isinstance(relay, int) else relay.port(route or "demo")
    wire = await in_thread(frelay.connect, f"127.0.0.1:{port}", **options(site, name, route=route, **changes))
    wire.settimeout(TIMEOUT)
    return wire


@asynccontextmanager
async def meet(
    site: Site, relay: RelayInProcess | RelayProcess, *, names: tuple[str, str] = ("func1", "func2"), **changes: Any
) -> AsyncIterator[tuple[Wire, Wire]]:
    """Two functions, connected; closed at the end, if they still are open."""
    wires: dict[str, Wire] = {}

    async def join(name: str) -> None:
        wires[name] = await connect(site, relay, name, **changes)

    try:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(join, name)
        yield wires[names[0]], wires[names[1]]
    finally:
        for wire in wires.values():
            wire.abandon()


def read_to_end(wire: ssl.SSLSocket) -> bytes:
    """All that comes up to the end of the direction."""
    return b"".join(iter(partial(wire.recv, 65536), b""))


# --- fake relays ------------------------------------------------------------------------------------------------------


def read_frame(tls: ssl.SSLSocket) -> tuple[int, dict[str, Any]]:
    """The type and payload of the party's next frame."""
    code, _, length = struct.unpack(">BBH", tls.recv(4))
    return code, json.loads(tls.recv(length))


@contextmanager
def fake_relay(
    site: Site,
    script: Callable[[ssl.SSLSocket], None],
    *,
    alpn: Sequence[str] = ("frelay/1",),
    change: Callable[[ssl.SSLContext], None] | None = None,
    listeners: list[socket.socket] | None = None,
) -> Iterator[str]:
    """The address of a server that runs ``script`` with the first connection's TLS, and closes it.

    It is in ``listeners``, if that is given, for a script that takes more connections.

    What the script raises fails the test, except that the other side has gone.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*site.relay_paths)
    context.load_verify_locations(site.ca_path)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if change is not None:
        change(context)
    failures: list[BaseException] = []

    def serve(listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
            sock.settimeout(TIMEOUT)
            # All that a script has sent must leave, even if the script then cuts the connection.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with (
                sock,
                suppress(OSError),
                context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls,
            ):
                script(tls)
        except BaseException as error:
            failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        if listeners is not None:
            listeners.append(listener)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert not failures, failures
