"""What an accepted connection is given: what the configuration in force says, and what the whole relay shares."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from frelay.config.model import Limits, TcpSection
from frelay.joining.refusal_log import StrangersRefused
from frelay.joining.routes import ListenerRoutes
from frelay.joining.runner import PairingRunner
from frelay.joining.tickets import TicketRegistry
from frelay.journal import Journal
from frelay.net.slots import Admission
from frelay.tls.trust import OuterTls

__all__ = ["AcceptContext", "AcceptSettings", "SharedParts"]


@dataclass(frozen=True, slots=True)
class AcceptSettings:
    """What a reload replaces. A connection keeps what was in force when it was accepted."""

    routes: ListenerRoutes
    limits: Limits
    tcp: TcpSection
    trust: OuterTls | None


@dataclass(frozen=True, slots=True)
class SharedParts:
    """What all connections of one relay share; no reload changes it."""

    admission: Admission
    """Where connections get their slots."""
    runner: PairingRunner
    """Runs the pairings that connections are matched to."""
    tickets: TicketRegistry
    journal: Journal
    strangers_refused: StrangersRefused
    """Tells the log and the journal of connections that were refused before they showed a certificate."""


@dataclass(frozen=True, slots=True)
class AcceptContext:
    """Everything that one accepted connection is given."""

    listener: Hashable
    """The key of the listener; a ticket is good at all listeners of its leg's route."""
    settings: AcceptSettings
    shared: SharedParts
