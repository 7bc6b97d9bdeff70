"""The terms of a pairing: its time limits, and what else its route sets for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frelay.pairing.bandwidth import Bandwidth

__all__ = ["PairingLimits", "PairingTerms"]


@dataclass(frozen=True, slots=True)
class PairingLimits:
    """The time limits of one pairing, in seconds, and whether the expiry of a certificate ends it."""

    handoff_timeout: float
    half_close_timeout: float
    idle_timeout: float
    stall_timeout: float
    max_lifetime: float
    ends_with_certificates: bool = True
    """Whether the pairing ends when the first certificate of its parties expires."""
    certificate_grace: float = 0.0
    """How long it may go on after that notAfter."""

    def for_paired(self) -> dict[str, float]:
        """The limits that PAIRED tells the functions."""
        return {
            "half_close_timeout": self.half_close_timeout,
            "idle_timeout": self.idle_timeout,
            "stall_timeout": self.stall_timeout,
            "max_lifetime": self.max_lifetime,
        }


@dataclass(frozen=True, slots=True)
class PairingTerms:
    """What a route sets for its pairings. A pairing keeps the terms with which it began."""

    route: str
    """The name of the route."""
    limits: PairingLimits
    require_inner_tls: bool | Literal["always"]
    """Which legs must begin with a TLS record: the raw ones (True), all ("always") or none (False)."""
    bandwidth: Bandwidth | None = None
    """The budget of bytes a second that all pairings of the route share; None if there is no limit."""
