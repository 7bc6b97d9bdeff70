"""How a pairing ended: one record a pairing, from a vocabulary small enough to learn.

The words are the value of ``outcome`` in the log, of the label ``outcome`` in the metrics and of the field in the
API, so an operator can go from a graph to a log line without a dictionary. Whoever ends a pairing calls
:meth:`Ending.decide`; the first reason wins, because what follows the first reason (a reset after a cut, say) is its
consequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["Ending", "Outcome", "Record", "Side"]

Side = Literal["func1", "func2", "relay", "both"]
"""Who ended it: a party, the relay by its policy, or both parties in good order."""


class Outcome(Enum):
    """Why a pairing ended."""

    CLOSED = "closed"
    """Both directions were ended by their senders, and every byte before was delivered."""
    HUNG_UP = "hung-up"
    """A party had ended its direction, all of it was delivered, and it closed without taking the rest of the other's.

    Ordinary: a client that has its answer and goes. The other party still gets every byte and the end."""
    RESET = "reset"
    """A leg's connection was reset, or broke, while paired."""
    TRUNCATED = "truncated"
    """A TLS leg ended by FIN without close_notify: its sender may have had more to say."""
    HANDOFF_ABORTED = "handoff-aborted"
    """A leg went away between PAIRED and its close_notify."""
    HANDOFF_TIMEOUT = "handoff-timeout"
    """A leg did not finish its hand-off within handoff_timeout."""
    PROTOCOL_ERROR = "protocol-error"
    """A leg broke frelay/1 or TLS after PAIRED."""
    NOT_TLS = "not-tls"
    """A raw leg's first bytes were no TLS record, where require_inner_tls holds."""
    HALF_CLOSE_TIMEOUT = "half-close-timeout"
    """One direction had ended, and the other stayed silent for half_close_timeout."""
    IDLE_TIMEOUT = "idle-timeout"
    """No byte either way for idle_timeout."""
    STALL_TIMEOUT = "stall-timeout"
    """Bytes were pending and their receiver accepted none for stall_timeout."""
    MAX_LIFETIME = "max-lifetime"
    """The pairing reached max_lifetime."""
    CERTIFICATE_EXPIRED = "certificate-expired"
    """A party's certificate reached its notAfter."""
    REVOKED = "revoked"
    """A party's certificate is no longer accepted by the certificates or CRL loaded since."""
    ROUTE_REMOVED = "route-removed"
    """The route was removed or replaced, and drain_timeout has passed since."""
    DRAINED = "drained"
    """The relay was told to end, and drain_timeout has passed or a second signal came."""
    DIAL_FAILED = "dial-failed"
    """The service that the relay dials for this route could not be reached; no pairing came of it."""
    INTERNAL_ERROR = "internal-error"
    """A bug in frelay; the log has its traceback."""


@dataclass(slots=True)
class Ending:
    """The decision why one pairing ends; the first one made stays."""

    outcome: Outcome | None = None
    side: Side | None = None
    detail: str | None = None

    def decide(self, outcome: Outcome, side: Side, detail: str | None = None) -> None:
        """Set the reason if there is none yet."""
        if self.outcome is None:
            self.outcome, self.side, self.detail = outcome, side, detail


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a pairing that has ended, or could not begin. Bytes are those delivered; times are in seconds."""

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
