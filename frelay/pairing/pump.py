"""Pumps: each carries one direction of a pairing, the bytes from its source to its sink and then their end.

There are two kinds with one interface (:class:`Pump`). :class:`~frelay.pairing.raw_pump.RawPump` joins two raw legs,
whose bytes stay in the kernel. :class:`~frelay.pairing.stream_pump.StreamPump` joins two streams, whose bytes pass
through the process.

The unit of both is the *step*: a function call that moves what can be moved now, never waits, and says what the next
step waits for (:class:`~frelay.pairing.stepping.Interest`). The readiness set (:mod:`frelay.pairing.readiness`) calls
it, while the pump's task sleeps until something other than bytes happens. (A stream pump with a budget is not stepped:
its task does everything.)

Both end a direction the same way: after all bytes, the end of the source becomes the end of the sink (FIN or
close_notify). Both read nothing while bytes that they have read are undelivered. That is the whole back-pressure: the
kernel buffer of the source fills, its window closes, its sender waits. Both check a leg's first bytes where
``require_inner_tls`` demands it (:class:`TlsProbe`). The watch, the metrics and the log may read ``moved`` and
``is_blocked`` at any time. A pump that fails raises :class:`Cut`, with the outcome and the side that caused it.
"""

from __future__ import annotations

from typing import Final, Protocol

from frelay.protocol.outcome import Outcome, Side

__all__ = ["Cut", "Pump", "TlsProbe"]


class Cut(Exception):
    """Control flow: a direction ended other than cleanly. Its pairing always catches it."""

    def __init__(self, outcome: Outcome, side: Side, detail: str, *, only_writing: bool = False) -> None:
        super().__init__(f"{outcome.value} by {side}: {detail}")
        self.outcome = outcome
        self.side: Side = side
        self.detail = detail
        self.only_writing = only_writing
        """Whether we only know that ``side`` takes nothing more.

        What ``side`` sent before, and the end of it, may still be in the relay's kernel. The pump of that direction
        carries it, and finds out whether it ends with an end or a reset.
        """


class Pump(Protocol):
    """One direction of a pairing."""

    moved: int
    """Bytes accepted by the sink so far."""

    @property
    def is_blocked(self) -> bool:
        """Whether it holds bytes that the sink has not accepted."""

    @property
    def is_held_back(self) -> bool:
        """Whether it holds bytes until the route's budget allows them: the relay causes that, so it is no silence."""

    async def run(self) -> None:
        """Carry the direction to its end; raises Cut."""

    def on_idle(self) -> None:
        """Nothing has moved since the last sample: free what only a flow of bytes needs."""


class TlsProbe:
    """Checks the first bytes of a leg: they must begin a TLS record (content type 22, major version 3).

    ``check`` gets what has come so far. It returns True (TLS) or None (too short to tell), or raises Cut.
    """

    __slots__ = ("_side",)

    NEEDED: Final = 3

    def __init__(self, side: Side) -> None:
        self._side: Side = side

    def check(self, first: bytes | bytearray | memoryview) -> bool | None:
        """Whether ``first``, the first bytes of the leg, begin a TLS record; raises Cut if they cannot."""
        expected = (0x16, 0x03)
        if any(byte != wanted for byte, wanted in zip(first, expected, strict=False)) or (
            len(first) >= self.NEEDED and first[2] > 0x0F
        ):
            raise Cut(Outcome.NOT_TLS, self._side, "the leg's first bytes are not a TLS record; set up mTLS inside")
        return True if len(first) >= self.NEEDED else None

    def check_end(self, held: int) -> None:
        """The leg ended after ``held`` bytes, too few to tell; raises Cut if there were any."""
        if held:
            raise Cut(Outcome.NOT_TLS, self._side, f"the leg ended after {held} bytes, before any TLS record")
