"""What systemd and a service say to each other: how it is (sd_notify(3)), and sockets bound for it (sd_listen_fds(3)).

Both are optional. Without their variables in the environment nothing in here does anything, and neither may ever cost
the relay a connection:

* A word to systemd is one datagram that is sent or not, at once. If systemd does not take it (it is being re-executed,
  or busy), it is kept and tried again from the Trio loop, in order; what cannot be sent at all is logged once.
* The watchdog is fed by a Trio task like any other. So it says what systemd wants to know: not that the process is
  there, but that its loop still turns.
* A socket that systemd has bound is used by the route of the same name, in place of one of our own. systemd keeps it
  open: whoever dials while the relay is being restarted waits in its queue instead of being refused.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

import sdnotify  # type: ignore[import-untyped]
import structlog
import trio

from frelay.binding import places_of
from frelay.config.model import Address
from frelay.sockets import format_address

__all__ = ["RESERVED", "Inherited", "ServiceManager"]

RESERVED: Final = frozenset({"admin", "metrics"})
"""Sockets of these names are for the two HTTP servers, and for no route."""

# SD_LISTEN_FDS_START of sd-daemon.h.
_FIRST_DESCRIPTOR: Final = 3
# How often words that systemd would not take are tried again, in seconds, where no watchdog sets the pace.
_RETRY: Final = 1.0
# A systemd that takes nothing for so many words is gone, and will want to hear the last ones only.
_MOST_UNSENT: Final = 16
# systemctl shows the status in one line.
_LONGEST_STATUS: Final = 256
# How much longer than its drain_timeout a drain may take to put everything away, in seconds.
_LEEWAY: Final = 10.0


class ServiceManager:
    """The systemd that started us, if it wants to hear how we are, and otherwise nobody. Nothing here raises or waits.

    ``notifier`` is an ``sdnotify.SystemdNotifier`` that raises and does not block; ``watchdog`` are the seconds between
    two signs of life, None if none are wanted.
    """

    def __init__(self, notifier: Any = None, *, watchdog: float | None = None) -> None:
        self._log: Final[Any] = structlog.get_logger("frelay.systemd")
        self._notifier: Final = notifier
        self._watchdog: Final = watchdog
        self._unsent: Final[deque[str]] = deque(maxlen=_MOST_UNSENT)
        self._is_stopping = False
        self._has_complained = False

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """The one that NOTIFY_SOCKET names."""
        if not os.environ.get("NOTIFY_SOCKET"):
            return cls()
        try:
            # debug: errors are raised. They are ours to handle, as a full queue is not the same as nobody there.
            notifier = sdnotify.SystemdNotifier(debug=True)
        except OSError as error:
            nobody = cls()
            nobody._complain(error)
            return nobody
        # A systemd that does not read, in a debugger say, must not stop us as well.
        notifier.socket.setblocking(False)
        return cls(notifier, watchdog=_watchdog_interval())

    def ready(self, status: str) -> None:
        """Started, or done with reloading, whatever came of it; ``status`` says how it stands now."""
        # systemd would take it for the end of the drain: a reload may still be under way when that begins.
        if not self._is_stopping:
            self._tell("READY=1", _status(status))

    def status(self, status: str) -> None:
        """Nothing has begun or ended, but ``status`` is what to show now."""
        if not self._is_stopping:
            self._tell(_status(status))

    def reloading(self) -> None:
        """A reload begins; :meth:`ready` must follow."""
        if not self._is_stopping:
            # By the time systemd tells this reload from one that began before it asked.
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, seconds: float) -> None:
        """The end begins, and may take ``seconds``; nothing but the watchdog is heard of us after this."""
        if not self._is_stopping:
            # Or a drain_timeout beyond TimeoutStopSec= would end by SIGKILL.
            extension = f"EXTEND_TIMEOUT_USEC={round((seconds + _LEEWAY) * 1e6)}"
            self._tell("STOPPING=1", extension, _status(status))
        self._is_stopping = True

    async def run(self) -> None:
        """Feed the watchdog, and say again what was not taken, until cancelled. Returns at once if nobody listens."""
        if self._notifier is None:
            return
        while True:
            # Not kept if it is not taken: the next one says more.
            if self._send_unsent() and self._watchdog is not None:
                self._send("WATCHDOG=1")
            await trio.sleep(_RETRY if self._watchdog is None else self._watchdog)

    def _tell(self, *assignments: str) -> None:
        if self._notifier is not None:
            self._unsent.append("\n".join(assignments))
            self._send_unsent()

    def _send_unsent(self) -> bool:
        while self._unsent:
            if not self._send(self._unsent[0]):
                return False
            self._unsent.popleft()
        return True

    def _send(self, state: str) -> bool:
        """False if systemd has no room for it now."""
        try:
            self._notifier.notify(state)
        except BlockingIOError:
            return False
        except OSError as error:
            self._complain(error)
        return True

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            self._log.warning("systemd cannot be told how this relay is", reason=error.strerror or str(error))
        self._has_complained = True


def _watchdog_interval() -> float | None:
    """Seconds between two signs of life, None if none are wanted of this process."""
    us = str(os.getpid())
    limit, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", us)
    if process != us or not (limit.isascii() and limit.isdigit()) or int(limit) == 0:
        return None
    # Half of what it grants, as sd_watchdog_enabled(3) says.
    return int(limit) / 1e6 / 2


def _status(text: str) -> str:
    # sdnotify writes Latin-1, and a line end would begin another assignment.
    return f"STATUS={text.encode('unicode_escape').decode('ascii')[:_LONGEST_STATUS]}"


# --- sockets ----------------------------------------------------------------------------------------------------------


class Inherited:
    """The sockets that systemd has passed and nobody has claimed yet, by the names of their ``FileDescriptorName=``."""

    def __init__(self, sockets: Iterable[tuple[str, socket.socket]] = ()) -> None:
        self._sockets: Final[dict[str, list[socket.socket]]] = {}
        self._taken: Final[set[str]] = set()
        for name, sock in sockets:
            sock.setblocking(False)
            self._sockets.setdefault(name, []).append(sock)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Inherited:
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
                _check_place(name, sock, {listen: places_of(listen)})
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
