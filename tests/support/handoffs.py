"""Two parties in the middle of their hand-off, and what the kernel knows of their connections."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.party import Party
from support.records import RecordForge, log_keys
from support.relay import RelayInProcess, RelayProcess
from support.rounds import settled
from support.site import Site

__all__ = ["TcpInfo", "client_hello", "corked", "forging_party", "is_silent", "met", "relay_has_read", "tcp_info"]


async def met(
    site: Site,
    relay: RelayInProcess | RelayProcess,
    mode1: str = "handoff",
    mode2: str = "handoff",
    *,
    one: Party | None = None,
) -> tuple[Party, Party]:
    """func1 and func2, both after PAIRED and before their answer; ``one`` may be a func1 made before."""
    one = one or await site.party(relay, "func1")
    two = await site.party(relay, "func2")
    await one.join(modes=[mode1])
    await one.expect("WAITING")
    await two.join(modes=[mode2])
    await two.expect("WAITING")
    assert (await one.expect("PAIRED"))["mode"] == mode1
    assert (await two.expect("PAIRED"))["mode"] == mode2
    return one, two


async def forging_party(
    site: Site, relay: RelayInProcess | RelayProcess, keylog: Path, name: str = "func1"
) -> tuple[Party, RecordForge]:
    """A party whose handshake is done, and the forge that writes its records from then on."""
    party = await site.connect(relay, name, context=log_keys(site.context(name), keylog))
    await party.handshake()
    return party, RecordForge(party.tls, keylog)


def client_hello(site: Site, name: str = "func1") -> bytes:
    """A real first flight of the functions' own TLS."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(*site.paths[name])
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="func2.demo")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


@contextmanager
def corked(party: Party) -> Iterator[None]:
    """All that is sent within leaves in as few segments as possible."""
    party.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    yield
    party.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Some of ``struct tcp_info`` (include/uapi/linux/tcp.h)."""

    bytes_received: int
    data_segments_sent: int


def tcp_info(party: Party) -> TcpInfo:
    """The kernel's counts for this connection."""
    data = party.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    return TcpInfo(*struct.unpack_from("=Q", data, 128), *struct.unpack_from("=I", data, 156))


async def relay_has_read(relay: RelayInProcess) -> None:
    """Wait until the relay in this process has nothing to do: it has read all that was there."""
    await settled(0.002)


async def is_silent(party: Party) -> bool:
    """Whether nothing from the relay is left to read, and it has not closed. Let it run before you ask."""
    await settled(0.002)
    try:
        party.socket._sock.recv(1, socket.MSG_PEEK)  # type: ignore[attr-defined]
    except BlockingIOError:
        return True
    return False
