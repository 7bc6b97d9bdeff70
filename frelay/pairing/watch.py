"""The watch of a pairing: it samples the two pumps, and ends the pairing when a time limit is over.

The pumps do not report to the watch. It compares their counters every quarter of the shortest time limit, so moving a
byte costs no timer. Each limit may therefore act up to a quarter late, and never early.
"""

from __future__ import annotations

import math
import socket
from typing import Final

from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.pump import Pump
from frelay.pairing.terms import PairingLimits
from frelay.protocol.messages import PartyName
from frelay.protocol.outcome import Ending, Outcome, Side

__all__ = ["Sample", "Watch"]

# In seconds. Sampling more often would cost more than it tells.
_SHORTEST_INTERVAL: Final = 0.02
# The samples of all pairings fall on common moments, so many in an interval. With thousands of idle pairings one
# wake-up of the process then serves dozens of them, which takes milliseconds and delays no other task for long.
_MOMENTS: Final = 128


class Sample:
    """What the watch knows of one pump, and of the bytes that it sent and the receiver has not acknowledged yet."""

    __slots__ = ("_in_kernel", "blocked_since", "changed_at", "moved", "pump", "sink")

    def __init__(self, pump: Pump, sink: socket.socket, now: float) -> None:
        self.pump = pump
        self.sink = sink
        self.moved = 0
        self.changed_at = now
        self.blocked_since: float | None = None
        """When a sample first saw bytes pending, of which the receiver has taken none since."""
        self._in_kernel = 0

    def take(self, now: float) -> None:
        """Compare the pump and its sink with the sample before."""
        # The pump alone cannot tell a slow receiver from a stalled one: Linux reports "writable" again only when a
        # third of the send buffer, megabytes, is free. And bytes still wait in the kernel after the pump has finished.
        moved, in_kernel = self.pump.moved, unacknowledged(self.sink)
        if in_kernel and is_dead(self.sink):
            # The peer is dead: its unacknowledged bytes never arrive, so they are no stall. What it sent before may
            # still be on its way to the other party.
            in_kernel = 0
        if moved != self.moved or in_kernel != self._in_kernel or self.pump.is_held_back:
            self.moved, self._in_kernel = moved, in_kernel
            self.changed_at, self.blocked_since = now, None
        else:
            self.pump.on_idle()
        # Counted from the first sample that saw bytes pending, not from the last that saw none: late, but never early.
        is_pending = self.pump.is_blocked or in_kernel > 0
        self.blocked_since = (self.blocked_since or now) if is_pending else None


class Watch:
    """Holds the two pumps of a pairing to its time limits."""

    __slots__ = ("_ending", "_half_closed_at", "_interval", "_limits", "_samples")

    def __init__(self, limits: PairingLimits, ending: Ending, samples: dict[PartyName, Sample]) -> None:
        self._limits: Final = limits
        self._ending: Final = ending
        self._samples: Final = samples
        """By the party whose bytes the pump carries."""
        shortest = min(limits.half_close_timeout, limits.idle_timeout, limits.stall_timeout)
        self._interval: Final = max(_SHORTEST_INTERVAL, shortest / 4)
        self._half_closed_at = math.inf

    def check(self, now: float, *, is_half_closed: bool) -> None:
        """Take a sample, and decide the ending if a limit is over. ``is_half_closed``: a direction has ended."""
        limits, ending, samples = self._limits, self._ending, self._samples
        if is_half_closed:
            self._half_closed_at = min(self._half_closed_at, now)
        for sample in samples.values():
            sample.take(now)
        for party, sample in samples.items():
            if sample.blocked_since is not None and now - sample.blocked_since >= limits.stall_timeout:
                receiver: Side = "func2" if party == "func1" else "func1"
                ending.decide(
                    Outcome.STALL_TIMEOUT, receiver, f"{receiver} accepted no byte for {limits.stall_timeout:g} s"
                )
        if any(sample.blocked_since is not None for sample in samples.values()):
            return  # pending bytes are no silence: stall_timeout limits how long they may wait
        last_change = max(sample.changed_at for sample in samples.values())
        if now - max(self._half_closed_at, last_change) >= limits.half_close_timeout:
            ending.decide(
                Outcome.HALF_CLOSE_TIMEOUT,
                "relay",
                f"one direction had ended, and the other was silent for {limits.half_close_timeout:g} s",
            )
        if now - last_change >= limits.idle_timeout:
            ending.decide(Outcome.IDLE_TIMEOUT, "relay", f"no byte either way for {limits.idle_timeout:g} s")

    def next_check(self, now: float) -> float:
        """When to check again: the last common moment before the interval is over, so that no limit acts too late."""
        moment = self._interval / _MOMENTS
        return (now + self._interval) // moment * moment
