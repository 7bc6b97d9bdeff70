"""Sockets that systemd has bound and passed to this process (sd_listen_fds(3)).

The route with the name of such a socket uses it and binds none itself. systemd keeps the socket open, so a function
that connects while the relay restarts waits in the kernel's queue and is not refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from frelay.config.model import Address
from frelay.net.binding import addresses_of
from frelay.net.sockets import format_address

__all__ = ["RESERVED", "PassedSockets"]

RESERVED: Final = frozenset({"admin", "metrics"})
"""Sockets with these names are for the two HTTP servers and never for a route."""

# SD_LISTEN_FDS_START of sd-daemon.h.
_FIRST_DESCRIPTOR: Final = 3


class PassedSockets:
    """The sockets that systemd passed and that nothing has taken yet, by their ``FileDescriptorName=``."""

    def __init__(self, sockets: Iterable[tuple[str, socket.socket]] = ()) -> None:
        self._sockets: Final[dict[str, list[socket.socket]]] = {}
        self._taken: Final[set[str]] = set()
        for name, sock in sockets:
            sock.setblocking(False)
            self._sockets.setdefault(name, []).append(sock)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> PassedSockets:
        """The sockets of LISTEN_FDS. Removes its variables, because they are valid for this process only."""
        count, process, names = (environ.pop(key, "") for key in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
        if process != str(os.getpid()) or not (count.isascii() and count.isdigit()):
            return cls()
        log = structlog.get_logger("frelay.systemd")
        given = names.split(":")
        found = []
        for index in range(int(count)):
            descriptor = _FIRST_DESCRIPTOR + index
            # systemd itself uses "unknown" for a socket without a name.
            name = given[index] if names and index < len(given) else "unknown"
            try:
                os.set_inheritable(descriptor, False)
                found.append((name, socket.socket(fileno=descriptor)))
            except OSError as error:
                reason = error.strerror or str(error)
                log.warning("systemd passed what is no socket", name=name, descriptor=descriptor, reason=reason)
        return cls(found)

    def take(self, name: str, listen: Address | Path | None = None) -> list[socket.socket]:
        """Take all sockets with this name; the caller owns them now. They are bound and non-blocking.

        ``listen`` is where they must be bound, a path for a Unix socket. Raises ValueError, with nothing taken, for one
        that is bound elsewhere: a mistake in a unit file must not open an API without authentication to the network.
        """
        for sock in self._sockets.get(name, []):
            if isinstance(listen, Path):
                _check_path(name, sock, listen)
            elif listen is not None:
                _check_address(name, sock, {listen: addresses_of(listen)})
        if name in self._sockets:
            self._taken.add(name)
        return self._sockets.pop(name, [])

    def were_taken(self, names: Iterable[str]) -> bool:
        """Whether a socket with one of these names was passed and taken. systemd keeps its own copy of it open."""
        return not self._taken.isdisjoint(names)

    def open(
        self, routes: Mapping[str, Mapping[Address, Sequence[Address]]], resolved: Sequence[Address]
    ) -> list[socket.socket]:
        """Duplicates of the sockets of ``routes`` that are bound at ``resolved``; may be empty.

        ``resolved`` holds the IP addresses of one listen address that the routes share. ``routes`` maps the name of
        each route to all its listen addresses with their IP addresses; a socket with that name must be bound at one of
        these.

        They are duplicates so that a reload that fails later can close them. A reload that succeeds closes the
        originals with :meth:`take`. Raises ValueError, with nothing opened, for a socket that is bound elsewhere, or
        OSError.
        """
        mine = []
        for name, listen in routes.items():
            for sock in self._sockets.get(name, []) if name not in RESERVED else []:
                _check_address(name, sock, listen)
                if _is_bound_at(sock, resolved):
                    mine.append(sock)
        opened: list[socket.socket] = []
        try:
            for sock in mine:
                opened.append(sock.dup())
        except OSError:
            for sock in opened:
                sock.close()
            raise
        return opened

    @property
    def unclaimed(self) -> dict[str, list[str]]:
        """Where the sockets that nothing has taken are bound, by their names."""
        return {name: [_where(sock) for sock in sockets] for name, sockets in self._sockets.items()}

    def close(self) -> None:
        """Close the sockets that nothing has taken."""
        for name in tuple(self._sockets):
            for sock in self.take(name):
                sock.close()


def _where(sock: socket.socket) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return format_address(sock.getsockname()[:2])
    address = sock.getsockname()
    return str(address) if address else "nowhere"


def _check_path(name: str, sock: socket.socket, path: Path) -> None:
    """Raise ValueError unless ``sock`` listens at ``path`` and other users cannot connect to it."""
    what = f"the socket {name!r} that systemd passed"
    if sock.family != socket.AF_UNIX or sock.getsockname() != str(path):
        raise ValueError(
            f"{what} is bound to {_where(sock)}, and not to {path}: make ListenStream= there and listen here agree"
        )
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"{what} ({path}) is no listening stream socket: write ListenStream={path} for it")
    if path.stat().st_mode & 0o007:
        # systemd's own default is 0666.
        raise ValueError(f"{what} ({path}) lets everybody in: write SocketMode=0600 into its unit")


def _is_bound_at(sock: socket.socket, addresses: Sequence[Address]) -> bool:
    """Whether the TCP socket ``sock`` is bound at one of ``addresses``."""
    flags = socket.AI_PASSIVE | socket.AI_NUMERICSERV
    wanted = [
        found
        for address in addresses
        for *_, found in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    ]
    bound = sock.getsockname()
    # Port 0 means any free port, which systemd has chosen.
    return any(address == (*bound[:1], address[1], *bound[2:]) and address[1] in (0, bound[1]) for address in wanted)


def _check_address(name: str, sock: socket.socket, listen: Mapping[Address, Sequence[Address]]) -> None:
    """Raise ValueError unless ``sock`` is a socket that binding one of ``listen`` would give.

    ``listen`` maps each listen address to its IP addresses. A name among these is resolved, which blocks.
    """
    written = " or ".join(map(str, listen))
    what = f"the socket {name!r} that systemd passed"
    is_internet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not is_internet or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"{what} ({_where(sock)}) is no listening TCP socket: write ListenStream={written} for it")
    if not any(_is_bound_at(sock, resolved) for resolved in listen.values()):
        raise ValueError(
            f"{what} is bound to {_where(sock)}, and not to {written}: make ListenStream= there and listen here agree"
        )
    if sock.getsockname()[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        raise ValueError(
            f"{what} takes IPv4 as well, which {written} does not say: write BindIPv6Only=ipv6-only into its unit"
        )
