"""Pumps: each carries one direction of a pairing, from its source's bytes to its sink's, and then the end of them.

There are two kinds with one face (:class:`Pump`): :class:`~frelay.pairing.raw_pump.RawPump` joins two raw legs, whose
bytes stay in the kernel, and :class:`~frelay.pairing.stream_pump.StreamPump` two streams whose bytes pass through the
process.

The unit of both is the *step*: a function call that moves what can be moved now, never waits, and says what the next
step waits for (:class:`~frelay.pairing.stepping.Interest`). The readiness set (:mod:`frelay.pairing.readiness`) calls
it, while the pump's task sleeps until something other than bytes happens. (A stream pump with a budget is not stepped:
its task does everything.)

Both end a direction the same way: the source's end is passed on as the sink's end (FIN or close_notify), after all
bytes. Both read nothing while anything read before is undelivered. That is all of back-pressure: the source's kernel
buffer fills, its window closes, its sender waits. Both check a leg's first bytes where ``require_inner_tls`` holds
(:class:`TlsProbe`). Both keep ``moved`` and ``is_blocked`` readable at any time for the watch, the metrics and the log.
A pump that fails raises :class:`Cut`, which says with what outcome and by whose fault.
"""

from __future__ import annotations

from typing import Final, Protocol

from frelay.protocol.outcome import Outcome, Side

__all__ = ["Cut", "Pump", "TlsProbe"]


class Cut(Exception):
    """A pump's end other than the clean one."""

    def __init__(self, outcome: Outcome, side: Side, detail: str, *, only_writing: bool = False) -> None:
        super().__init__(f"{outcome.value} by {side}: {detail}")
        self.outcome = outcome
        self.side: Side = side
        self.detail = detail
        self.only_writing = only_writing
        """Whether all that is known is that ``side`` takes nothing more.

        What it sent before, and the end of that, may still be in the relay's kernel. The pump of that direction carries
        it, and finds out whether it was the end or a reset.
        """


class Pump(Protocol):
    """One direction of a pairing."""

    moved: int
    """Bytes accepted by the sink so far."""

    @property
    def is_blocked(self) -> bool:
        """Whether bytes are held that the sink has not accepted."""

    @property
    def is_held_back(self) -> bool:
        """Whether bytes are held until the route's budget allows them: that is the relay's doing, and no silence."""

    async def run(self) -> None:
        """Carry the direction to its end; raises Cut."""

    def on_idle(self) -> None:
        """Nothing has moved since the last sample: free what only a flow of bytes needs."""


class TlsProbe:
    """Looks at the first bytes of a leg: they must open a TLS record (content type 22, major version 3).

    ``check`` is given what has come so far and answers True (TLS), None (too short to tell), or raises Cut.
    """

    __slots__ = ("_side",)

    NEEDED: Final = 3

    def __init__(self, side: Side) -> None:
        self._side: Side = side

    def check(self, first: bytes | bytearray | memoryview) -> bool | None:
        """Judge the first bytes of the leg."""
        expected = (0x16, 0x03)
        if any(byte != wanted for byte, wanted in zip(first, expected, strict=False)) or (
            len(first) >= self.NEEDED and first[2] > 0x0F
        ):
            raise Cut(Outcome.NOT_TLS, self._side, "the leg's first bytes are not a TLS record; set up mTLS inside")
        return True if len(first) >= self.NEEDED else None

    def check_end(self, held: int) -> None:
        """The leg ended after ``held`` undecided bytes."""
        if held:
            raise Cut(Outcome.NOT_TLS, self._side, f"the leg ended after {held} bytes, before any TLS record")
