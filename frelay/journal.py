"""The journal of a relay: what happened, told once, to everyone who wants to know.

The log is for reading afterwards; metrics, the event stream of the admin API and the dashboard want the same facts as
data, at once. So each fact is noted here as a typed entry, by whoever makes it true, and the journal passes it on to
its listeners, keeps the last refusals, and adds up what must never be lost between two looks: the totals of each route.

Standard library only, synchronous, and never an error for the one who notes: a listener that raises is dropped, because
a broken view of the traffic must not end the traffic.
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
from frelay.protocol.messages import PartyName
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

# Enough for a person to see what is going on; whoever wants all of them reads the log or the event stream.
_REFUSALS_KEPT: Final = 100

# Seconds. From a local party to the default handshake_timeout; from a partner that is there already to beyond
# wait_timeout; from one answered question to max_lifetime.
_BOUNDS: Final[Mapping[str, tuple[float, ...]]] = {
    "handshake": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    "wait": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    "pairing": (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that happened; ``at`` is in seconds since the epoch, ``kind`` its name in the event stream."""

    kind: ClassVar[str]
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeDone(Entry):
    """A party's outer TLS handshake was finished, ``seconds`` after its connection was accepted."""

    kind: ClassVar[str] = "handshake"
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LegWaits(Entry):
    """A leg was admitted and waits in the lobby of ``route``."""

    kind: ClassVar[str] = "waiting"
    route: str
    party: PartyName
    identity: str
    address: str
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LegRefused(Entry):
    """A connection was refused: with ``code`` where it could be told, and for ``reason`` in any case.

    ``route``, ``party`` and ``identity`` are None as far as they were not known yet; ``certificate`` is one line about
    the certificate that was shown, escaped, or None. ``count`` above 1 stands for so many of one kind in one second, of
    strangers; ``address`` is then that of the last.
    """

    kind: ClassVar[str] = "refused"
    code: str
    reason: str
    address: str
    route: str | None = None
    party: PartyName | None = None
    identity: str | None = None
    certificate: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingStarted(Entry):
    """Two legs were matched; ``waited`` is how long the first of them had waited, in seconds."""

    kind: ClassVar[str] = "paired"
    pairing: str
    route: str
    func1: str
    func2: str
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingEnded(Entry):
    """A pairing is over, and this is its record."""

    kind: ClassVar[str] = "ended"
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded(Entry):
    """A configuration was put in force; ``kept`` counts routes, the others are their names.

    ``restart_only`` are the keys in which it differs from what runs, and that only a restart changes.
    """

    kind: ClassVar[str] = "reloaded"
    kept: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    restart_only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadRefused(Entry):
    """A configuration was not put in force, and the one before it stays."""

    kind: ClassVar[str] = "reload-refused"
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Entry):
    """The relay takes nothing new any more, and ends within ``seconds``."""

    kind: ClassVar[str] = "draining"
    reason: str
    seconds: float


@dataclass(slots=True)
class RouteTotals:
    """What has been on one route since it is there. Bytes are those of pairings that have ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    bytes_func1_to_func2: int = 0
    bytes_func2_to_func1: int = 0


@dataclass(slots=True)
class Distribution:
    """How many durations there were up to each of ``bounds`` and beyond the last, and their sum, in seconds."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def plus(self, other: Distribution) -> Distribution:
        """Both together; they must have the same bounds."""
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total + other.total)

    def copy(self) -> Distribution:
        """As it is now."""
        return Distribution(self.bounds, list(self.counts), self.total)


class Journal:
    """What happened in one relay. Note with :meth:`note`, follow with :meth:`listen`."""

    def __init__(self) -> None:
        self.refusals: Final[deque[LegRefused]] = deque(maxlen=_REFUSALS_KEPT)
        """The last ones, oldest first."""
        self.totals: Final[dict[str, RouteTotals]] = {"": RouteTotals()}
        """By the name of a route that is there; ``""`` holds the refusals that belong to none: of those who had not
        come as far as to a route, or whose route was gone by then."""
        self.durations: Final = {
            name: Distribution(bounds, [0] * (len(bounds) + 1)) for name, bounds in _BOUNDS.items()
        }
        """``handshake``: from accept to its end, of those that succeeded; ``wait``: of the first party of a pairing for
        the second; ``pairing``: of those that have ended."""
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
        # A removed route tells its waiting legs after it is forgotten; an entry made for them would never go again.
        return self.totals.get(route or "", self.totals[""])

    def keep(self, route: str) -> None:
        """There is such a route: add up what happens on it, from now on or further."""
        self.totals.setdefault(route, RouteTotals())

    def forget(self, route: str) -> None:
        """The route is gone, and its last pairing too: routes come and go by the API, and their names would pile up."""
        self.totals.pop(route, None)

    @contextmanager
    def listen(self, listener: Callable[[Entry], None]) -> Iterator[None]:
        """Have ``listener`` called with each entry, synchronously, as long as the context is open."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            if listener in self._listeners:
                self._listeners.remove(listener)
