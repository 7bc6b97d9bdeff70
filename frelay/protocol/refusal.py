"""A refusal: the one value that says no inside the relay, whether TLS, a route, a lobby or a limit decided it.

It has two ends. A function that speaks frelay/1 is sent the frame :class:`~frelay.protocol.messages.Refused`, which
:meth:`Refusal.message` makes, and its client raises :class:`frelay.errors.Refused`. The log and the journal get
``code`` and :attr:`Refusal.logged`.
"""

from __future__ import annotations

from dataclasses import dataclass

from frelay.protocol.messages import Refused

__all__ = ["Refusal"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """No, and why; times are in seconds."""

    code: str
    """One of :data:`~frelay.protocol.messages.REFUSAL_CODES`."""
    reason: str
    """The sentence for the function."""
    retry_after: float | None = None
    """When another try may help; None if it cannot help until somebody changes something."""
    why: str | None = None
    """The reason for the log, if the function must not be told it; None if the log gets ``reason``, too."""
    reconnect_in: float | None = None
    """When to dial again, if the relay goes away: DRAINING tells it to a waiting function before its refusal."""

    @property
    def logged(self) -> str:
        """The reason for the log and the journal."""
        return self.reason if self.why is None else self.why

    def message(self) -> Refused:
        """The frame that tells a function."""
        return Refused(self.code, self.reason, self.retry_after)
