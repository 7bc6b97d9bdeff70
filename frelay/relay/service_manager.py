"""What a relay tells the systemd that started it (sd_notify(3)): ready, reloading, stopping, a status, signs of life.

It is optional. Without NOTIFY_SOCKET in the environment nothing here does anything, and it must never cost the relay a
connection:

* A word to systemd is one datagram that is sent or not, at once. If systemd does not take it (it is being re-executed,
  or busy), it is kept and tried again from the Trio loop, in order; what cannot be sent at all is logged once.
* The watchdog is fed by a Trio task like any other. So it says what systemd wants to know: not that the process is
  there, but that its loop still turns.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any, Final

import sdnotify  # type: ignore[import-untyped]
import structlog
import trio

__all__ = ["ServiceManager"]

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
