"""The service manager: what a relay tells systemd (sd_notify(3)) about its start, reloads, end, status and watchdog.

It is optional: without NOTIFY_SOCKET in the environment it does nothing. And it must never cost the relay a connection:

* Each message is one datagram, which is sent at once or not at all. If systemd has no room for it, because it is busy
  or being re-executed, a task tries again, in order. A message that cannot be sent at all is logged once.
* A Trio task like any other feeds the watchdog. So systemd learns what it wants to know: not only that the process
  exists, but that its event loop still runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from typing import Any, Final

import structlog
import trio

__all__ = ["ServiceManager"]

# How often unsent messages are tried again if there is no watchdog, in seconds.
_RETRY: Final = 1.0
# Enough for a systemd that is busy. If it takes nothing for longer, only the last messages matter to it.
_MOST_UNSENT: Final = 16
# systemctl shows the status in one line.
_LONGEST_STATUS: Final = 256
# How much longer than its drain_timeout a drain may take to close everything, in seconds.
_LEEWAY: Final = 10.0


class ServiceManager:
    """The systemd that started this process; without one, all methods do nothing. No method raises or waits.

    ``notify_socket`` is a datagram socket that is connected to systemd and does not block. ``watchdog`` are the seconds
    between two messages to the watchdog; None if systemd wants none.
    """

    def __init__(self, notify_socket: socket.socket | None = None, *, watchdog: float | None = None) -> None:
        self._log: Final[Any] = structlog.get_logger("frelay.systemd")
        self._socket: Final = notify_socket
        self._watchdog: Final = watchdog
        self._unsent: Final[deque[str]] = deque(maxlen=_MOST_UNSENT)
        self._is_stopping = False
        self._has_complained = False

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """The service manager that NOTIFY_SOCKET names: a path, or ``@`` and the name of an abstract socket."""
        address = os.environ.get("NOTIFY_SOCKET")
        if not address:
            return cls()
        notify_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A systemd that does not read, for example in a debugger, must not stop the relay.
        notify_socket.setblocking(False)
        try:
            notify_socket.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            notify_socket.close()
            nobody = cls()
            nobody._complain(error)
            return nobody
        return cls(notify_socket, watchdog=_watchdog_interval())

    def ready(self, status: str) -> None:
        """The start or a reload is over, whether it succeeded or not; ``status`` says how the relay stands now."""
        # A reload may end after the drain has begun, and systemd would take READY=1 for the end of the drain.
        if not self._is_stopping:
            self._tell("READY=1", _status(status))

    def status(self, status: str) -> None:
        """Show ``status`` from now on; nothing has begun or ended."""
        if not self._is_stopping:
            self._tell(_status(status))

    def reloading(self) -> None:
        """A reload begins; :meth:`ready` must follow."""
        if not self._is_stopping:
            # From the time systemd sees that this reload began after it had asked for one.
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, seconds: float) -> None:
        """The drain begins, and may take ``seconds``; after this only the watchdog's messages are sent."""
        if not self._is_stopping:
            # Otherwise systemd would kill a drain that takes longer than TimeoutStopSec=.
            extension = f"EXTEND_TIMEOUT_USEC={round((seconds + _LEEWAY) * 1e6)}"
            self._tell("STOPPING=1", extension, _status(status))
        self._is_stopping = True

    async def run(self) -> None:
        """Feed the watchdog, and send unsent messages again, until cancelled. Returns at once without a systemd."""
        if self._socket is None:
            return
        while True:
            # Not kept if systemd has no room for it: the next one replaces it.
            if self._send_unsent() and self._watchdog is not None:
                self._send("WATCHDOG=1")
            await trio.sleep(_RETRY if self._watchdog is None else self._watchdog)

    def _tell(self, *assignments: str) -> None:
        if self._socket is not None:
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
        if self._socket is None:
            return True
        try:
            self._socket.send(state.encode("ascii"))
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
    """Seconds between two messages to the watchdog; None if systemd wants none from this process."""
    us = str(os.getpid())
    limit, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", us)
    if process != us or not (limit.isascii() and limit.isdigit()) or int(limit) == 0:
        return None
    # Half of the limit, as sd_watchdog_enabled(3) recommends.
    return int(limit) / 1e6 / 2


def _status(text: str) -> str:
    # A line end would begin another assignment.
    return f"STATUS={text.encode('unicode_escape').decode('ascii')[:_LONGEST_STATUS]}"
