"""The journal of a relay: each event is noted once and passed to all listeners.

The log is read afterwards. The metrics, the event stream of the admin API and the dashboard need the same facts at once
and as data. So the code that causes an event notes it here as a typed entry. The journal passes the entry to its
listeners, keeps the last refusals, and adds up the totals of each route, which must not lose an event between two
scrapes.

Standard library only, and synchronous. Noting never raises an error: a listener that raises is dropped, because a
broken view of the traffic must not end the traffic.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Final

from frelay.errors import Problem
from frelay.protocol.messages import LegParty
from frelay.protocol.outcome import Record

__all__ = [
    "Distribution",
    "Draining",
    "Entry",
    "HandshakeDone",
    "Journal",
    "LegRefused",
    "LegWaits",
    "PairingEnded",
    "PairingStarted",
    "ReloadRefused",
    "Reloaded",
    "RouteTotals",
]

# Enough for a person to see what is going on. The log and the event stream have all refusals.
_REFUSALS_KEPT: Final = 100

# Upper bounds in seconds. handshake: from a local party to the default handshake_timeout. wait: from a partner that
# waits already to more than wait_timeout. pairing: from one request and its answer to max_lifetime.
_BOUNDS: Final[Mapping[str, tuple[float, ...]]] = {
    "handshake": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    "wait": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    "pairing": (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event. ``at`` is in seconds since the epoch; ``kind`` is its name in the event stream."""

    kind: ClassVar[str]
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeDone(Entry):
    """A party finished its outer TLS handshake, ``seconds`` after its connection was accepted."""

    kind: ClassVar[str] = "handshake"
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LegWaits(Entry):
    """A leg was admitted and waits in the lobby of ``route``."""

    kind: ClassVar[str] = "waiting"
    route: str
    party: LegParty
    identity: str
    address: str
    mode: str
    meet: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LegRefused(Entry):
    """A connection was refused for ``reason``. ``code`` was sent to it if that was possible.

    ``route``, ``party``, ``identity`` and ``meet`` are None if they were not known yet. ``certificate`` describes the
    certificate that was shown, in one escaped line, or is None. With ``count`` above 1 the entry stands for so many
    refusals of the same kind, of strangers, in one second; ``address`` is then the last one.
    """

    kind: ClassVar[str] = "refused"
    code: str
    reason: str
    address: str
    route: str | None = None
    party: LegParty | None = None
    identity: str | None = None
    meet: str | None = None
    certificate: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingStarted(Entry):
    """Two legs were matched. ``waited`` is how long the first one had waited, in seconds."""

    kind: ClassVar[str] = "paired"
    pairing: str
    route: str
    func1: str
    func2: str
    waited: float
    meet: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingEnded(Entry):
    """A pairing has ended, with this record."""

    kind: ClassVar[str] = "ended"
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded(Entry):
    """A configuration was put in force. ``kept`` counts routes; the other fields hold names of routes.

    ``restart_only`` holds the keys whose new value needs a restart.
    """

    kind: ClassVar[str] = "reloaded"
    kept: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    restart_only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadRefused(Entry):
    """A configuration was refused, and the one before it stays in force."""

    kind: ClassVar[str] = "reload-refused"
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Entry):
    """The relay takes no new connections any more, and ends within ``seconds``."""

    kind: ClassVar[str] = "draining"
    reason: str
    seconds: float


@dataclass(slots=True)
class RouteTotals:
    """The counts of one route since it was added. Bytes are those of pairings that have ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    bytes_func1_to_func2: int = 0
    bytes_func2_to_func1: int = 0


@dataclass(slots=True)
class Distribution:
    """A histogram of durations in seconds: their number in each bucket, and their sum.

    ``bounds`` are the upper bounds of the buckets; ``counts`` has one bucket more, for longer durations.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Add one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def plus(self, other: Distribution) -> Distribution:
        """The sum of both, which must have the same bounds."""
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total + other.total)

    def copy(self) -> Distribution:
        """A copy of its current state."""
        return Distribution(self.bounds, list(self.counts), self.total)


class Journal:
    """The journal of one relay: add entries with :meth:`note`, follow them with :meth:`listen`."""

    def __init__(self) -> None:
        self.refusals: Final[deque[LegRefused]] = deque(maxlen=_REFUSALS_KEPT)
        """The last refusals, oldest first."""
        self.totals: Final[dict[str, RouteTotals]] = {"": RouteTotals()}
        """By the name of the route. ``""`` holds the refusals of connections without a route: they were refused before
        a route was chosen, or their route had been removed."""
        self.durations: Final = {
            name: Distribution(bounds, [0] * (len(bounds) + 1)) for name, bounds in _BOUNDS.items()
        }
        """``handshake``: from accept to the end of the handshake, if it succeeded. ``wait``: how long the first party
        of a pairing waited for the second. ``pairing``: of pairings that have ended."""
        self._listeners: Final[list[Callable[[Entry], None]]] = []

    def note(self, entry: Entry) -> None:
        """Add ``entry`` to the totals and tell the listeners."""
        if isinstance(entry, HandshakeDone):
            self.durations["handshake"].add(entry.seconds)
        elif isinstance(entry, LegRefused):
            self.refusals.append(entry)
            self._totals_of(entry.route).refusals[entry.code] += entry.count
        elif isinstance(entry, PairingStarted):
            self.durations["wait"].add(entry.waited)
        elif isinstance(entry, PairingEnded):
            record = entry.record
            self.durations["pairing"].add(record.duration)
            totals = self._totals_of(record.route)
            totals.outcomes[record.outcome.value] += 1
            totals.bytes_func1_to_func2 += record.bytes_func1_to_func2
            totals.bytes_func2_to_func1 += record.bytes_func2_to_func1
        for listener in tuple(self._listeners):
            try:
                listener(entry)
            except Exception:
                self._listeners.remove(listener)

    def _totals_of(self, route: str | None) -> RouteTotals:
        # A removed route refuses its waiting legs after it is forgotten. Totals made for these would stay for ever.
        return self.totals.get(route or "", self.totals[""])

    def keep(self, route: str) -> None:
        """The route exists: keep totals for it from now on, or continue to."""
        self.totals.setdefault(route, RouteTotals())

    def forget(self, route: str) -> None:
        """The route and its last pairing have ended: drop its totals, because names of removed routes would pile up."""
        self.totals.pop(route, None)

    @contextmanager
    def listen(self, listener: Callable[[Entry], None]) -> Iterator[None]:
        """Call ``listener`` with each entry, synchronously, as long as the context is open."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            if listener in self._listeners:
                self._listeners.remove(listener)
