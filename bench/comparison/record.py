"""The result of a comparison as a value: every figure of every round, and its JSON.

Measuring and showing are separate. A saved record can be shown again, written into the README or used by model.py
without measuring again. Ratios are computed in one way only, round by round.
"""

from __future__ import annotations

import os
import platform
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # before Python 3.12 pydantic cannot use typing's own

from bench.comparison.own_network import congestion_control
from bench.measuring.load import UsageError
from bench.measuring.measure import ratios

__all__ = ["QUICK", "AboutMachine", "Key", "Record", "Round", "Sizes", "Spread", "about_machine", "now", "read_record"]

Round = Mapping[str, float]


class Key(NamedTuple):
    """One cell: the case, its number (of pairs, idle pairings or routes), and the subject."""

    case: str
    amount: int
    subject: str


class Spread(NamedTuple):
    """The median, the lowest and the highest of the rounds."""

    median: float
    lowest: float
    highest: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How big the cases are."""

    bulk: tuple[int, ...] = (1, 16, 128)
    pingpong: tuple[int, ...] = (1, 16, 256)
    tls: tuple[int, ...] = (1, 16)
    mixed: int = 16
    greedy: int = 256
    """So many pairs with ping-pong, and one more with bulk."""
    held: int = 1000
    """Legs or pairings to see what one costs in memory."""
    idle: tuple[int, ...] = (0, 1000, 5000)
    routes: tuple[int, ...] = (10, 1000)
    beside: int = 16
    """Pairs with load beside idle ones, or on many routes."""
    ways: int = 30
    """How often in a round the time to the first byte is taken."""


QUICK = Sizes((1, 4), (1, 4), (1,), 4, 8, 40, (0, 40), (2, 20), 4, 5)


class AboutMachine(TypedDict):
    """Where it was measured."""

    cpu: str
    cpus: int
    memory_gib: float
    kernel: str
    python: str
    generator_tls: str
    congestion_control: str
    """The TCP congestion control."""


@dataclass
class Record:
    """A run."""

    date: str
    machine: AboutMachine
    seconds: float
    rounds: int
    sizes: Sizes
    names: dict[str, str] = field(default_factory=dict)
    """How the tables call each subject, by its key."""
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """The subjects that could not take part, and why."""
    notes: list[str] = field(default_factory=list)
    results: dict[Key, list[Round]] = field(default_factory=dict)
    """One item for each round; an empty one if the measurement failed."""

    def values(self, key: Key, figure: str) -> list[float | None]:
        """One figure, one value a round."""
        return [one.get(figure) for one in self.results.get(key, [])]

    def spread(self, key: Key, figure: str) -> Spread | None:
        """One figure over the rounds."""
        return _spread([value for value in self.values(key, figure) if value is not None])

    def ratio(self, ours: Key, theirs: Key, figure: str) -> Spread | None:
        """Ours to theirs, taken within each round."""
        one, other = self.values(ours, figure), self.values(theirs, figure)
        return _spread(ratios(one, other)) if len(one) == len(other) else None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "date": self.date,
            "machine": self.machine,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "sizes": asdict(self.sizes),
            "names": self.names,
            "versions": self.versions,
            "missing": self.missing,
            "notes": self.notes,
            "results": [
                {**key._asdict(), "rounds": [dict(one) for one in found]} for key, found in self.results.items()
            ],
        }


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(median(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True, slots=True)
class _Cell:
    """An item of "results", as ``as_json`` writes it."""

    case: str
    amount: int
    subject: str
    rounds: list[Round]


class _Cells(TypedDict):
    results: list[_Cell]


_OBJECT: Final = TypeAdapter(dict[str, Any])
_CELLS: Final = TypeAdapter(_Cells)
_RECORD: Final = TypeAdapter(Record)


def read_record(path: Path) -> Record:
    """Read what ``as_json`` wrote; raises UsageError, which says what is wrong with the file."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        wrong = "does not exist"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        wrong = f"is no record of a comparison: {_first(error)}"
    raise UsageError(f"{path} {wrong}; run bench/compare.py --json FILE first, and give that file")


def _parsed(text: bytes) -> Record:
    """Raises ValidationError."""
    found = _OBJECT.validate_json(text)
    cells = _CELLS.validate_python(found)["results"]
    results = {Key(cell.case, cell.amount, cell.subject): cell.rounds for cell in cells}
    return _RECORD.validate_python({**found, "results": results})


def _first(error: ValidationError) -> str:
    """The first mistake, and its place."""
    mistake = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "missing":
        return f"it lacks {place!r}"
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]


def about_machine() -> AboutMachine:
    """Where this runs."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": os.cpu_count() or 1,
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "generator_tls": ssl.OPENSSL_VERSION,
        "congestion_control": congestion_control(),
    }


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        before, _, after = line.partition(":")
        if before.strip() == name:
            return after.strip()
    return None


def now() -> str:
    """The date and the minute, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
