"""What Linux says about a relay process and its connections: how a test knows that the relay is at rest.

"Nothing has moved for half a second" is wrong on a machine that stalls for a second. The facts here hold at any speed:
all that was sent has arrived in the relay's socket, the relay has not read it, and the relay is asleep, again and again
in the same sleep.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from frelay.net.tcp import unacknowledged
from support.ends import End, block
from support.relay import RelayProcess
from support.waiting import TIMEOUT, eventually

__all__ = ["Queues", "fill", "has_arrived", "relays_queues", "resident", "rests"]

# Less than a fresh TCP window of Linux (64 KiB), so that unread bytes never close the window and a FIN can follow them.
# More than the relay copies at once (16 KiB), so that it begins to splice.
_PIECE: Final = block(48 * 1024)
# How often we must find the relay in the same sleep. Once is not enough: for a microsecond the kernel has queued a
# segment and has not woken the process yet.
_POLLS: Final = 10


@dataclass(frozen=True, slots=True)
class Queues:
    """Of a connection, on the relay's side: bytes not read by the relay, and bytes not taken by the party's kernel."""

    unread: int
    undelivered: int


def _hexadecimal(address: tuple[str, int]) -> str:
    return f"{int.from_bytes(socket.inet_aton(address[0]), 'little'):08X}:{address[1]:04X}"


def relays_queues(end: End) -> Queues:
    """The queues of the relay's socket of ``end``; see proc(5), /proc/net/tcp."""
    sock = end.party.socket
    addresses = [_hexadecimal(sock.getpeername()), _hexadecimal(sock.getsockname())]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == addresses:
            undelivered, unread = fields[4].split(":")
            return Queues(int(unread, 16), int(undelivered, 16))
    raise AssertionError("the relay has no such connection")


def _sleep_of(relay: RelayProcess) -> tuple[int, ...] | None:
    """The number of the relay's current sleep (its context switches so far); None while it is awake."""
    directory = Path(f"/proc/{relay.process.pid}")
    if (directory / "stat").read_text().rpartition(")")[2].split()[0] != "S":
        return None
    lines = (directory / "status").read_text().splitlines()
    return tuple(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def resident(relay: RelayProcess) -> int:
    """The resident memory of the relay, in KiB."""
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def has_arrived(end: End) -> None:
    """Wait until the relay's kernel has all that ``end`` sent, with its FIN."""
    sock = end.party.socket._sock  # type: ignore[attr-defined]
    await eventually(lambda: unacknowledged(sock) == 0, "all that was sent is acknowledged")


async def rests(relay: RelayProcess) -> None:
    """Wait until the relay has nothing to do: each look finds it in the same sleep."""
    looks, found = 0, None
    with trio.fail_after(TIMEOUT):
        while looks < _POLLS:
            now = _sleep_of(relay)
            looks, found = (looks + 1 if now == found is not None else 0), now
            await trio.sleep(0.002)


async def fill(relay: RelayProcess, source: End, sink: End) -> None:
    """Send from ``source`` until the relay reads no more of it, because ``sink``, where nobody reads, is full.

    Nothing else may keep the relay busy at that time.
    """
    while True:
        await source.send(_PIECE)
        await has_arrived(source)
        await eventually(lambda: _sleep_of(relay) is not None, "the relay sleeps")
        if not relays_queues(source).unread:
            continue
        await rests(relay)
        if relays_queues(source).unread:
            assert relays_queues(sink).undelivered, "the relay waits for something else than the sink"
            return
