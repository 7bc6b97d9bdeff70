"""What all pairings of a relay share to move bytes, and the two pumps that it makes for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from frelay.net.shares import Pool
from frelay.net.streams import RawStream
from frelay.pairing.bandwidth import Share
from frelay.pairing.pipes import PipePool
from frelay.pairing.pump import Pump, TlsProbe
from frelay.pairing.raw_pump import RawPump
from frelay.pairing.readiness import ReadinessSet
from frelay.pairing.stepping import PolledSocket
from frelay.pairing.stream_pump import Budget, StreamPump
from frelay.protocol.messages import PartyName
from frelay.protocol.outcome import Side
from frelay.tls.stream import TlsStream

__all__ = ["Forwarding", "new_pairing_pool"]

_FORTH: tuple[Side, Side] = ("func1", "func2")
_BACK: tuple[Side, Side] = ("func2", "func1")


def new_pairing_pool() -> Pool[str]:
    """A pool of pairings by their ids. Its last 1/32 is kept for holders that have few."""
    return Pool(part=32, least=1)


@dataclass(slots=True)
class Forwarding:
    """What all pairings of a relay share: the readiness set, the pipes, and the count of pairings by holder."""

    readiness: ReadinessSet = field(default_factory=ReadinessSet)
    pipes: PipePool = field(default_factory=PipePool)
    pool: Pool[str] = field(default_factory=new_pairing_pool)

    @property
    def pairings(self) -> int:
        """How many pairings there are."""
        return len(self.pool)

    def pumps_between(
        self,
        func1: TlsStream | RawStream,
        func2: TlsStream | RawStream,
        *,
        probes: dict[PartyName, TlsProbe | None],
        share: Share | None,
    ) -> dict[PartyName, Pump]:
        """The two pumps between these streams, by the party whose bytes they carry.

        Raw pumps if both are raw; stream pumps if one of them is in TLS, or if the route has a budget (``share``).
        """
        readiness, pipes = self.readiness, self.pipes
        if share is None and isinstance(func1, RawStream) and isinstance(func2, RawStream):
            one, two = PolledSocket(func1.sock), PolledSocket(func2.sock)
            return {
                "func1": RawPump(one, two, sides=_FORTH, readiness=readiness, pipes=pipes, probe=probes["func1"]),
                "func2": RawPump(two, one, sides=_BACK, readiness=readiness, pipes=pipes, probe=probes["func2"]),
            }
        forth: Budget | None = None
        back: Budget | None = None
        if share is not None:
            one, two = PolledSocket(func1.sock), PolledSocket(func2.sock)
            forth, back = Budget(share, one, two), Budget(share, two, one)
        return {
            "func1": StreamPump(func1, func2, sides=_FORTH, readiness=readiness, probe=probes["func1"], budget=forth),
            "func2": StreamPump(func2, func1, sides=_BACK, readiness=readiness, probe=probes["func2"], budget=back),
        }
