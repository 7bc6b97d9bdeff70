"""How ``--listen`` notices that a caller has hung up. It must not read: the caller's bytes are for the pairing to come.

A reset says so, and so does a Unix socket whose other end is closed. A FIN alone does not: a caller that has sent
everything (``printf x | nc -N``) also ends its direction, and then waits for the answer. So after a FIN

1. if the caller's socket is on this machine, we ask the kernel (sock_diag(7)) whether a process still owns it;
2. if the caller is on another machine, we know only what it sent: after no byte at all we assume that it has gone,
   otherwise that it waits.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
from typing import Final

import trio

__all__ = ["wait_hung_up"]

# Seconds between two checks of a caller that has ended its direction: when it exits, it sends nothing more.
_CHECK_INTERVAL: Final = 1.0

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states
_PORTS: Final = struct.Struct("!HH")
_NO_INTERFACE_NO_COOKIE: Final = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
_TCP_LISTEN: Final = 10
_STATE_AT: Final = _HEADER.size + 1
_INODE_AT: Final = _HEADER.size + 4 + 48 + 16  # after inet_diag_msg's family and state, its id, and four numbers


async def wait_hung_up(sock: trio.socket.SocketType) -> None:
    """Wait until the caller at the other end of ``sock`` has gone."""
    try:
        poller = select.epoll()
    except OSError:
        # Too many open files. If the caller is gone, the pairing to come will notice it.
        await trio.sleep_forever()
    with poller:
        # Not EPOLLIN, which is set from the caller's first byte on.
        poller.register(sock.fileno(), select.EPOLLRDHUP)
        await trio.lowlevel.wait_readable(poller.fileno())
        if _is_reset(poller):
            return
        poller.modify(sock.fileno(), 0)  # from now on only EPOLLHUP and EPOLLERR
        while _may_be_there(sock):
            with trio.move_on_after(_CHECK_INTERVAL):
                await trio.lowlevel.wait_readable(poller.fileno())
                return


def _is_reset(poller: select.epoll) -> bool:
    return any(events & (select.EPOLLHUP | select.EPOLLERR) for _, events in poller.poll(0))


def _may_be_there(sock: trio.socket.SocketType) -> bool:
    if sock.family == socket.AF_UNIX:
        return True  # when it closes, EPOLLHUP comes
    try:
        here, there = sock.getsockname(), sock.getpeername()
        found = _has_owner(sock.family, there, here)
    except OSError:
        return False  # the connection was reset meanwhile
    if found is not None:
        return found
    return _has_sent(sock)


def _has_sent(sock: trio.socket.SocketType) -> bool:
    try:
        return bool(_plain(sock).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _plain(sock: trio.socket.SocketType) -> socket.socket:
    plain: socket.socket = sock._sock  # type: ignore[attr-defined]  # trio has no call that never waits
    return plain


def _has_owner(family: int, local: tuple[object, ...], remote: tuple[object, ...]) -> bool | None:
    """Whether a process still owns the socket of this machine with these addresses; None if the kernel cannot tell.

    After its process has closed it, a socket stays in the kernel for a while, but without an inode.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_CHECK_INTERVAL)  # Linux answers at once; an emulation of it may never answer
            netlink.send(_question(family, local, remote))
            answer = netlink.recv(8192)
    except OSError:
        return None  # a sandbox may forbid it
    if len(answer) < _INODE_AT + 4 or _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        return None
    if answer[_STATE_AT] == _TCP_LISTEN:
        return None  # there is no such connection, so the kernel answered for the listening socket
    inode: int = struct.unpack_from("=I", answer, _INODE_AT)[0]
    return inode != 0


def _question(family: int, local: tuple[object, ...], remote: tuple[object, ...]) -> bytes:
    addresses = b"".join(_packed(address) for address in (local[0], remote[0]))
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    body += _PORTS.pack(local[1], remote[1]) + addresses + _NO_INTERFACE_NO_COOKIE
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body


def _packed(address: object) -> bytes:
    text = str(address).partition("%")[0]
    return ipaddress.ip_address(text).packed.ljust(16, b"\0")
