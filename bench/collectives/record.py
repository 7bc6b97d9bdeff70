"""The figures of bench/groups.py as a value: their JSON, their table and their picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.comparison.bars import Bar, Group, as_bars
from bench.comparison.record import AboutMachine, Spread

__all__ = ["NAMES", "GroupRecord", "as_text", "size_in_words", "write_picture"]

NAMES: Final[Mapping[str, str]] = {
    "openmpi": "OpenMPI",
    "frelay": "frelay",
    "redis": "Redis",
    "wire": "frelay, a bare wire",
}
_CPU: Final = "cpu 0"


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One run. ``figures`` holds the milliseconds of all rounds, by ``"RANKS CASE SIZE"`` and subject."""

    date: str
    machine: AboutMachine
    rounds: int
    figures: dict[str, dict[str, list[float]]]

    def add(self, ranks: int, case: str, subject: str, figure: float) -> None:
        """Note a figure of one round."""
        self.figures.setdefault(f"{ranks} {case}", {}).setdefault(subject, []).append(figure)

    def spread(self, ranks: int, case: str, subject: str) -> Spread | None:
        """The median, lowest and highest of all rounds, in ms."""
        found = self.figures.get(f"{ranks} {case}", {}).get(subject)
        return Spread(median(found), min(found), max(found), len(found)) if found else None

    def ratio(self, ranks: int, case: str, subject: str, other: str, *, other_ranks: int | None = None) -> float | None:
        """The median of the ratios of two subjects, round by round."""
        one = self.figures.get(f"{ranks} {case}", {}).get(subject)
        two = self.figures.get(f"{other_ranks or ranks} {case}", {}).get(other)
        return None if not one or not two else median(a / b for a, b in zip(one, two, strict=False))

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"date": self.date, "machine": self.machine, "rounds": self.rounds, "figures": self.figures}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GroupRecord:
        """The record again; raises KeyError or TypeError."""
        return cls(value["date"], value["machine"], value["rounds"], value["figures"])


def size_in_words(size: int) -> str:
    """``8 B``, ``64 KiB``, ``8 MiB``; nothing for 0."""
    if size == 0:
        return ""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB" if size >= 1 << 10 else f"{size} B"


def as_text(record: GroupRecord) -> str:
    """The table: a line for each case and number of ranks."""
    subjects = [name for name in NAMES if any(name in found for found in record.figures.values())]
    machine = record.machine
    lines = [
        f"{record.date}; {machine['cpus']} CPUs, {machine['cpu']}; "
        f"median (lowest-highest) of {record.rounds} rounds, ms",
        "",
        f"{'case':<22}{'ranks':>5}" + "".join(f"{NAMES[name]:>26}" for name in subjects) + f"{'frelay/Redis':>14}",
    ]
    for case, ranks in _rows(record):
        cells = "".join(f"{_cell(record.spread(ranks, case, subject)):>26}" for subject in subjects)
        ratio = record.ratio(ranks, case, "frelay", "redis")
        lines.append(f"{_words(case):<22}{ranks:>5}{cells}{'' if ratio is None else f'{ratio:.2f}':>14}")
    return "\n".join(lines)


def _words(case: str) -> str:
    name, size = case.rsplit(" ", 1)
    if case == _CPU:
        return "CPU of the whole run"
    return f"{name} {size_in_words(int(size))}".strip()


def _rows(record: GroupRecord) -> Iterator[tuple[str, int]]:
    keys = [key.partition(" ") for key in record.figures]
    for case in dict.fromkeys(case for _, _, case in keys):
        yield from ((case, int(ranks)) for ranks, _, found in keys if found == case)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return ""
    digits = 3 if spread.median < 1 else 2 if spread.median < 10 else 0
    return f"{spread.median:.{digits}f} ({spread.lowest:.{digits}f}-{spread.highest:.{digits}f})"


def write_picture(record: GroupRecord, directory: Path) -> None:
    """Draw ``bench-groups.svg``: allreduce of the largest size. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = [int(case.rsplit(" ", 1)[1]) for case, _ in _rows(record) if case.startswith("allreduce ")]
    if not sizes:
        return
    case = f"allreduce {max(sizes)}"
    groups = []
    for ranks in [ranks for found, ranks in _rows(record) if found == case]:
        spreads: Sequence[tuple[str, Spread | None]] = [(one, record.spread(ranks, case, one)) for one in NAMES]
        bars = [Bar(NAMES[one], spread, one == "frelay") for one, spread in spreads if spread is not None]
        groups.append(Group(f"{ranks} ranks", bars))
    rounds = "one round" if record.rounds == 1 else f"median and range of {record.rounds} rounds"
    title = f"allreduce of {size_in_words(max(sizes))} in a group, ms"
    subtitle = f"less is better; frelay with mutual TLS, the others without encryption; {rounds}; {record.date}"
    (directory / "bench-groups.svg").write_text(as_bars(title, subtitle, groups, 0), "utf-8")
