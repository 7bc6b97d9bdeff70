"""The parts of one relay process, which live as long as it does. :mod:`frelay.relay.run` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from frelay.joining.accept_context import SharedParts
from frelay.joining.routes import RouteRegistry
from frelay.joining.runner import PairingRunner
from frelay.journal import Journal
from frelay.net.slots import Admission
from frelay.pairing.forwarding import Forwarding
from frelay.relay.active_config import ActiveConfig
from frelay.relay.recheck import CredentialRecheck

__all__ = ["Parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the relay, its backend, its reloader and its control have in common."""

    active: ActiveConfig
    """The configuration in force."""
    registry: RouteRegistry
    """The routes that this process serves; a supervisor serves none."""
    runner: PairingRunner
    """Runs the pairings of these routes."""
    recheck: CredentialRecheck
    """Judges the legs of these routes again after a reload."""
    admission: Admission
    """How many connections there are, and may be."""
    forwarding: Forwarding
    """What all pumps share."""
    shared: SharedParts
    """What all connections share."""
    journal: Journal
    draining: trio.Event
    """Set once the relay drains: it takes nothing new any more."""
    changing: trio.Lock
    """Held while the active configuration may be replaced."""
    reading: trio.CapacityLimiter
    """Limits the threads that read files. It has no other use: a reload must not wait for what else runs in threads."""
    log: Any
    """The relay's logger."""
