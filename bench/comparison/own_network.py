"""A network namespace for one comparison: only loopback, and one TCP congestion control for all.

The congestion control limits how fast anything can be here, with or without a relay, and each machine has its own
default (``net.ipv4.tcp_congestion_control``). Figures of two machines can be compared only if it was the same.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from pathlib import Path
from typing import Final

from bench.comparison.install import install
from bench.measuring.load import BenchError, UsageError

__all__ = ["congestion_control", "enter_own_network"]

_CLONE_NEWNET: Final = 0x40000000  # include/uapi/linux/sched.h
# The two routes of loopback: of the network, and of the address.
_ROUTES: Final = (("127.0.0.0/8",), ("127.0.0.1", "src", "127.0.0.1"))
_AVAILABLE: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_NAME_SIZE: Final = 16  # TCP_CA_NAME_MAX


def congestion_control() -> str:
    """The congestion control of a new TCP connection over loopback."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_SIZE).rstrip(b"\0").decode()


def enter_own_network(name: str, *, allowed: bool) -> None:
    """Move this process, and all that it starts later, to a network of its own with the congestion control ``name``.

    There is no way back, and nothing can be installed from there. ``allowed``: missing tools may be installed before.
    Raises UsageError without root or for a name that the kernel does not know, and BenchError for other failures.
    """
    if os.geteuid() != 0:
        raise UsageError(f"a network with congestion control {name} needs root; use sudo, or leave the option out")
    known = _AVAILABLE.read_text().split()
    if name not in known:
        raise UsageError(f"this kernel has no congestion control {name}; it has {', '.join(known)}")
    if reason := install("ip", ("iproute2",), allowed=allowed):
        raise BenchError(reason)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise BenchError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    _ip("link", "set", "lo", "up")
    for route in _ROUTES:
        _ip("route", "replace", "local", *route, "dev", "lo", "table", "local", "congctl", name)
    if (found := congestion_control()) != name:
        raise BenchError(f"congestion control {name} was set, but TCP uses {found}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
