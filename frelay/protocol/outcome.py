"""How a pairing ended: one record for each pairing, with an outcome from a small fixed set of words.

The log, the metrics (label ``outcome``) and the API use the same words, so an operator can go from a graph to a log
line. The code that ends a pairing calls :meth:`Ending.decide`. The first reason wins, because later ones are its
consequence: for example, a reset follows a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["Ending", "Outcome", "Record", "Side"]

Side = Literal["func1", "func2", "relay", "both"]
"""Who ended the pairing: a party, the relay by its policy, or both parties by a clean end."""


class Outcome(Enum):
    """Why a pairing ended."""

    CLOSED = "closed"
    """Both senders ended their direction, and every byte was delivered."""
    HUNG_UP = "hung-up"
    """A party ended its direction, all of it was delivered, and it closed without reading the rest of the other's.

    This is normal: a client has its answer and closes. The other party still got every byte and the end."""
    RESET = "reset"
    """A leg's connection was reset, or broke, while paired."""
    TRUNCATED = "truncated"
    """A TLS leg ended by FIN without close_notify: its sender may have had more to send."""
    HANDOFF_ABORTED = "handoff-aborted"
    """A leg went away between PAIRED and its close_notify."""
    HANDOFF_TIMEOUT = "handoff-timeout"
    """A leg did not finish its hand-off within handoff_timeout."""
    PROTOCOL_ERROR = "protocol-error"
    """A leg broke frelay/1 or TLS after PAIRED."""
    NOT_TLS = "not-tls"
    """The first bytes of a raw leg were no TLS record, and require_inner_tls demands one."""
    HALF_CLOSE_TIMEOUT = "half-close-timeout"
    """One direction had ended, and the other was silent for half_close_timeout."""
    IDLE_TIMEOUT = "idle-timeout"
    """No byte either way for idle_timeout."""
    STALL_TIMEOUT = "stall-timeout"
    """Bytes were pending and their receiver accepted none for stall_timeout."""
    MAX_LIFETIME = "max-lifetime"
    """The pairing reached max_lifetime."""
    CERTIFICATE_EXPIRED = "certificate-expired"
    """A party's certificate reached its notAfter."""
    REVOKED = "revoked"
    """The CA certificates or the CRL were reloaded, and no longer accept a party's certificate."""
    ROUTE_REMOVED = "route-removed"
    """The route was removed or replaced, and drain_timeout has passed since."""
    DRAINED = "drained"
    """The relay was told to end, and drain_timeout has passed or a second signal came."""
    DIAL_FAILED = "dial-failed"
    """The relay could not reach the service that it dials for this route, so there was no pairing."""
    INTERNAL_ERROR = "internal-error"
    """A bug in frelay; the log has its traceback."""


@dataclass(slots=True)
class Ending:
    """Why one pairing ends; the first reason is kept."""

    outcome: Outcome | None = None
    side: Side | None = None
    detail: str | None = None

    def decide(self, outcome: Outcome, side: Side, detail: str | None = None) -> None:
        """Set the reason if there is none yet."""
        if self.outcome is None:
            self.outcome, self.side, self.detail = outcome, side, detail


@dataclass(frozen=True, slots=True)
class Record:
    """The facts of a pairing that ended, or could not begin. Bytes are those delivered; times are in seconds."""

    pairing: str
    route: str
    func1: str
    func2: str
    outcome: Outcome
    side: Side
    detail: str | None
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int
    duration: float
    meet: str | None = None
    """The key by which the parties met."""
