"""The first bytes of a connection, looked at while they are still in the kernel.

Until they are whole nothing is read, and no TLS state is made: a connection that is silent, or dribbles, is a
descriptor and a task. SO_RCVLOWAT has the kernel wake us only when as many bytes are there as are needed next.

First bytes that cannot become anything the relay knows are an error as soon as they show it.
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
# The kernel may wake us early where it is short of memory; then this is how often we look, in seconds.
_LOOK: Final = 0.05


class Opening(enum.Enum):
    """What a connection begins with."""

    TLS = enum.auto()
    """A whole TLS record of the handshake: a ClientHello, it claims."""
    TICKET = enum.auto()
    """As many bytes as a ticket line has; or fewer, which cannot become one."""


async def wait_for_opening(sock: socket.socket) -> Opening:
    """Wait until the first bytes are whole, and leave them in the kernel.

    Raises RemoteProtocolError if they are neither a TLS handshake nor a ticket line, and ConnectionBroken if the
    connection ends before.
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

    Raises RemoteProtocolError if it is none, and ConnectionBroken if the connection ends before it is whole.
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
    """Wait until the other side ends a connection whose first bytes stay in the kernel; raises ConnectionBroken."""
    try:
        # Some more may come, and tells nothing. It is looked at a few times, not for every byte.
        for more in (1, 16, 256, 4096):
            await _wait_for(sock, _available(sock) + more)
    finally:
        _wake_at(sock, 1)
    await trio.sleep_forever()


async def _peek(sock: socket.socket, count: int) -> bytes:
    await _wait_for(sock, count)
    return sock.recv(count, socket.MSG_PEEK)


async def _wait_for(sock: socket.socket, count: int) -> None:
    """Wait until ``count`` bytes are there."""
    if _available(sock) >= count:
        return
    _wake_at(sock, count)
    while True:
        await trio.lowlevel.wait_readable(sock)
        if _available(sock) >= count:
            return
        if not is_open(sock):
            raise ConnectionBroken("the connection ended before its first bytes were whole")
        await trio.sleep(_LOOK)


def _wake_at(sock: socket.socket, count: int) -> None:
    if sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


def _available(sock: socket.socket) -> int:
    """How many bytes can be read now."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])
