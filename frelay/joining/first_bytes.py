"""The first bytes of a connection, which stay in the kernel until they are complete.

Until then the relay reads nothing and makes no TLS state. So a connection that is silent, or sends byte by byte, costs
a descriptor and a task only. SO_RCVLOWAT makes the kernel wake the task only when as many bytes are there as it needs.

If the bytes cannot become anything that the relay knows, that is an error as soon as they show it.
"""

from __future__ import annotations

import enum
import fcntl
import socket
import struct
import termios
from typing import Final

import trio

from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.tickets import TICKET_LINE_LENGTH
from frelay.net.tcp import is_open
from frelay.protocol.proxy import LONGEST_HEADER, PROXY_SIGNATURES, ProxyHeader, parse_proxy_header

__all__ = ["Opening", "take_proxy_header", "wait_for_end", "wait_for_opening"]

_HANDSHAKE: Final = 0x16
_RECORD_HEADER: Final = 5
# RFC 8446, 5.1. More is an error in any record that is not encrypted.
_LONGEST_RECORD: Final = 16384
_TICKET_START: Final = b"FRELAY/1 "
# The kernel may wake the task too early if it is short of memory; then the task checks this often, in seconds.
_POLL_INTERVAL: Final = 0.05


class Opening(enum.Enum):
    """What a connection begins with."""

    TLS = enum.auto()
    """A complete TLS record of type handshake, which should be a ClientHello."""
    TICKET = enum.auto()
    """As many bytes as a ticket line has, or fewer that cannot become one."""


async def wait_for_opening(sock: socket.socket) -> Opening:
    """Wait until the first bytes are complete, and leave them in the kernel.

    Raises RemoteProtocolError if they are neither a TLS handshake nor a ticket line, and ConnectionBroken if the
    connection ends before they are complete.
    """
    try:
        start = await _peek(sock, 1)
        if start[0] == _HANDSHAKE:
            header = await _peek(sock, _RECORD_HEADER)
            length = int.from_bytes(header[3:5], "big")
            if header[1] != 3 or length > _LONGEST_RECORD:
                raise RemoteProtocolError("the first bytes are no TLS record")
            await _wait_for(sock, _RECORD_HEADER + length)
            return Opening.TLS
        if start == _TICKET_START[:1]:
            if await _peek(sock, len(_TICKET_START)) == _TICKET_START:
                await _wait_for(sock, TICKET_LINE_LENGTH)
            return Opening.TICKET
        if start in [signature[:1] for signature in PROXY_SIGNATURES]:
            raise RemoteProtocolError(
                "the first bytes are neither a TLS handshake nor a ticket; if they are a PROXY header, its sender is "
                "not in the route's proxy_protocol"
            )
        raise RemoteProtocolError("the first bytes are neither a TLS handshake nor a ticket")
    finally:
        _wake_at(sock, 1)


async def take_proxy_header(sock: socket.socket) -> ProxyHeader:
    """Read the PROXY header that a connection must begin with, and not a byte more.

    Raises RemoteProtocolError if there is none, and ConnectionBroken if the connection ends before it is complete.
    """
    try:
        needed = 1
        while True:
            await _wait_for(sock, needed)
            found = parse_proxy_header(sock.recv(LONGEST_HEADER, socket.MSG_PEEK))
            if isinstance(found, ProxyHeader):
                sock.recv(found.length)
                return found
            needed = found
    finally:
        _wake_at(sock, 1)


async def wait_for_end(sock: socket.socket) -> None:
    """Raise ConnectionBroken when the other side ends the connection; its first bytes stay in the kernel."""
    try:
        # More bytes may come, and mean nothing. The task wakes for them a few times, not for every byte.
        for more in (1, 16, 256, 4096):
            await _wait_for(sock, _available(sock) + more)
    finally:
        _wake_at(sock, 1)
    await trio.sleep_forever()


async def _peek(sock: socket.socket, count: int) -> bytes:
    await _wait_for(sock, count)
    return sock.recv(count, socket.MSG_PEEK)


async def _wait_for(sock: socket.socket, count: int) -> None:
    """Wait until ``count`` bytes can be read."""
    if _available(sock) >= count:
        return
    _wake_at(sock, count)
    while True:
        await trio.lowlevel.wait_readable(sock)
        if _available(sock) >= count:
            return
        if not is_open(sock):
            raise ConnectionBroken("the connection ended before its first bytes were whole")
        await trio.sleep(_POLL_INTERVAL)


def _wake_at(sock: socket.socket, count: int) -> None:
    if sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


def _available(sock: socket.socket) -> int:
    """How many bytes can be read now."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])
