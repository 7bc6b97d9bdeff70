"""Sockets that systemd has bound and passed to this process (sd_listen_fds(3)).

The route of the same name uses such a socket in place of one of its own. systemd keeps the socket open, so a function
that dials while the relay restarts waits in the kernel's queue and is not refused.
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
"""Sockets of these names are for the two HTTP servers, and for no route."""

# SD_LISTEN_FDS_START of sd-daemon.h.
_FIRST_DESCRIPTOR: Final = 3


class PassedSockets:
    """The sockets that systemd has passed and nobody has claimed yet, by the names of their ``FileDescriptorName=``."""

    def __init__(self, sockets: Iterable[tuple[str, socket.socket]] = ()) -> None:
        self._sockets: Final[dict[str, list[socket.socket]]] = {}
        self._taken: Final[set[str]] = set()
        for name, sock in sockets:
            sock.setblocking(False)
            self._sockets.setdefault(name, []).append(sock)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> PassedSockets:
        """Those of LISTEN_FDS; the variables are taken away, as they are true of this process alone."""
        count, process, names = (environ.pop(key, "") for key in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
        if process != str(os.getpid()) or not (count.isascii() and count.isdigit()):
            return cls()
        log = structlog.get_logger("frelay.systemd")
        given = names.split(":")
        found = []
        for place in range(int(count)):
            descriptor = _FIRST_DESCRIPTOR + place
            # The name that systemd itself uses where there is none.
            name = given[place] if names and place < len(given) else "unknown"
            try:
                os.set_inheritable(descriptor, False)
                found.append((name, socket.socket(fileno=descriptor)))
            except OSError as error:
                reason = error.strerror or str(error)
                log.warning("systemd passed what is no socket", name=name, descriptor=descriptor, reason=reason)
        return cls(found)

    def take(self, name: str, listen: Address | Path | None = None) -> list[socket.socket]:
        """All sockets of this name, now the caller's: non-blocking, and as bound as systemd made them.

        ``listen`` is where they must be bound, a path for a Unix socket. Raises ValueError, with nothing taken, for one
        that is bound elsewhere: an API that asks nobody who he is must not appear on a network by a slip in a unit.
        """
        for sock in self._sockets.get(name, []):
            if isinstance(listen, Path):
                _check_path(name, sock, listen)
            elif listen is not None:
                _check_place(name, sock, {listen: addresses_of(listen)})
        if name in self._sockets:
            self._taken.add(name)
        return self._sockets.pop(name, [])

    def were_taken(self, names: Iterable[str]) -> bool:
        """Whether there was a socket of one of these names, and somebody took it. systemd keeps its own hold on it."""
        return not self._taken.isdisjoint(names)

    def open(
        self, routes: Mapping[str, Mapping[Address, Sequence[Address]]], places: Sequence[Address]
    ) -> list[socket.socket]:
        """Duplicates of those sockets of ``routes`` that are bound at ``places``; none if there are none.

        ``places`` are the IP addresses of one address that the routes share. ``routes`` has, by name, all addresses
        where each of them listens, with their IP addresses: a socket of that name must be at one of these.

        Duplicates, so that a reload that fails in the end can close what it opened; one that succeeds closes the
        originals with :meth:`take`. Raises ValueError, with nothing opened, for a socket that is bound elsewhere, or
        OSError.
        """
        mine = []
        for name, listen in routes.items():
            for sock in self._sockets.get(name, []) if name not in RESERVED else []:
                _check_place(name, sock, listen)
                if _is_at(sock, places):
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
        """Where the sockets that are left are bound, by their names."""
        return {name: [_place(sock) for sock in sockets] for name, sockets in self._sockets.items()}

    def close(self) -> None:
        """Close those that are left."""
        for name in tuple(self._sockets):
            for sock in self.take(name):
                sock.close()


def _place(sock: socket.socket) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return format_address(sock.getsockname()[:2])
    place = sock.getsockname()
    return str(place) if place else "nowhere"


def _check_path(name: str, sock: socket.socket, path: Path) -> None:
    """Raise ValueError unless ``sock`` is the Unix socket at ``path``, and not everybody's."""
    what = f"the socket {name!r} that systemd passed"
    if sock.family != socket.AF_UNIX or sock.getsockname() != str(path):
        raise ValueError(
            f"{what} is bound to {_place(sock)}, and not to {path}: make ListenStream= there and listen here agree"
        )
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"{what} ({path}) is no listening stream socket: write ListenStream={path} for it")
    if path.stat().st_mode & 0o007:
        # systemd's own default is 0666.
        raise ValueError(f"{what} ({path}) lets everybody in: write SocketMode=0600 into its unit")


def _is_at(sock: socket.socket, places: Sequence[Address]) -> bool:
    """Whether ``sock``, an Internet socket, is bound at one of ``places``."""
    flags = socket.AI_PASSIVE | socket.AI_NUMERICSERV
    wanted = [
        found
        for place in places
        for *_, found in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=flags)
    ]
    bound = sock.getsockname()
    # Port 0 says "any free one", and systemd has chosen.
    return any(place == (*bound[:1], place[1], *bound[2:]) and place[1] in (0, bound[1]) for place in wanted)


def _check_place(name: str, sock: socket.socket, listen: Mapping[Address, Sequence[Address]]) -> None:
    """Raise ValueError unless ``sock`` is what binding one of ``listen`` would have given.

    ``listen`` has the IP addresses of each, or names in their place, which are looked up, and that blocks.
    """
    written = " or ".join(map(str, listen))
    what = f"the socket {name!r} that systemd passed"
    is_internet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not is_internet or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"{what} ({_place(sock)}) is no listening TCP socket: write ListenStream={written} for it")
    if not any(_is_at(sock, places) for places in listen.values()):
        raise ValueError(
            f"{what} is bound to {_place(sock)}, and not to {written}: make ListenStream= there and listen here agree"
        )
    if sock.getsockname()[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        raise ValueError(
            f"{what} takes IPv4 as well, which {written} does not say: write BindIPv6Only=ipv6-only into its unit"
        )
