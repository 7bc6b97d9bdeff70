"""The figures as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.measuring.load import Generator
from bench.measuring.measure import Case, Figures, Plan, median_figures, ratio
from bench.measuring.subjects import Subject

__all__ = ["Run", "as_json", "as_table", "grid"]

# Above this share of a core, other processes influence throughput and latencies.
_NOISE: Final = 0.15


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    field: str
    digits: int


_COLUMNS: Final = (
    _Column("Gbit/s", "gbit_per_second", 2),
    _Column("CPU ms/GB", "cpu_ms_per_gb", 0),
    _Column("round trips/s", "round_trips_per_second", 0),
    _Column("p50 us", "p50_us", 0),
    _Column("p99 us", "p99_us", 0),
    _Column("CPU us/message", "cpu_us_per_message", 2),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    plan: Plan
    subjects: Sequence[Subject]
    generators: Mapping[str, Generator]
    """By the subject's name."""
    versions: Mapping[str, str]
    """By the subject's name, if it has one."""
    results: Mapping[Case, Sequence[Figures]]
    notes: Sequence[str]
    comparisons: Sequence[tuple[Subject, Subject]]
    """(ours, theirs)."""

    def rounds(self, subject: Subject, pairs: int) -> list[Figures]:
        """Everything measured of one subject at one number of pairs: one :class:`Figures` a round, loads merged."""
        columns = [self.results[Case(subject.name, pairs, load)] for load in self.plan.loads]
        return [_merged(figures) for figures in zip(*columns, strict=True)]


def _merged(figures: Sequence[Figures]) -> Figures:
    values: dict[str, float | None] = {}
    for column in _COLUMNS:
        values[column.field] = next((v for one in figures if (v := getattr(one, column.field)) is not None), None)
    return Figures(**values)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = []
    for row in rows:
        cells = [pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def as_table(run: Run) -> str:
    """The table, the ratios, and the notes that a reader needs."""
    plan = run.plan
    columns = [c for c in _COLUMNS if any(getattr(f, c.field) is not None for fs in run.results.values() for f in fs)]
    rows = [["", "pairs", *(column.title for column in columns)]]
    for subject in run.subjects:
        for pairs in plan.pairs:
            figures = median_figures(run.rounds(subject, pairs))
            rows.append([subject.name, str(pairs), *(_number(getattr(figures, c.field), c.digits) for c in columns)])
    lines = grid(rows)

    if run.comparisons:
        rows = [["ratio", "pairs", *(column.title for column in columns)]]
        for ours, theirs in run.comparisons:
            for pairs in plan.pairs:
                one, other = run.rounds(ours, pairs), run.rounds(theirs, pairs)
                ratios = [_number(ratio(one, other, c.field), 2) for c in columns]
                rows.append([f"{ours.name} : {theirs.name}", str(pairs), *ratios])
        lines += ["", *grid(rows)]

    about = machine()
    what = ", ".join(dict.fromkeys(run.versions.values()))
    rounds = "one round" if plan.rounds == 1 else f"median of {plan.rounds} interleaved rounds"
    lines += [
        "",
        f"{rounds} of {plan.seconds:g} s; messages of {plan.message_size} B; 1 GB = 10^9 bytes; a round trip is two "
        "messages through the relay.",
        "CPU is the relay's user and system time as the kernel counted it.",
        f"{what + '; ' if what else ''}Linux {about['kernel']}, {about['cpus']} CPUs, Python {about['python']}.",
        *run.notes,
        *_about_load(run),
    ]
    return "\n".join(lines)


def _about_load(run: Run) -> list[str]:
    notes = []
    in_tls = [f for s in run.subjects if s.in_tls for c, fs in run.results.items() if c.subject == s.name for f in fs]
    cores = [figures.generator_cores for figures in in_tls if figures.generator_cores is not None]
    if cores:
        notes.append(
            f"In the TLS rows the load is TLS in Python and took up to {max(cores):.1f} cores itself: their throughput "
            "is a lower bound, their CPU figures are the relay's own."
        )
    others = [f.other_cores for figures in run.results.values() for f in figures if f.other_cores is not None]
    noise = sum(others) / len(others)
    if noise > _NOISE:
        notes.append(
            f"Noisy: other processes used {noise:.1f} of {os.cpu_count()} cores. Throughput and latency "
            "suffer from that; CPU figures and the ratios of one run suffer less."
        )
    return notes


def as_json(run: Run) -> dict[str, Any]:
    """Everything, each round included."""
    plan = run.plan
    return {
        "machine": machine(),
        "plan": asdict(plan),
        "versions": dict(run.versions),
        "notes": [*run.notes, *_about_load(run)],
        "results": [
            {
                "subject": case.subject,
                "pairs": case.pairs,
                "load": case.load,
                "generator": run.generators[case.subject].title,
                "median": _present(median_figures(rounds)),
                "rounds": [_present(figures) for figures in rounds],
            }
            for case, rounds in run.results.items()
        ],
        "ratios": [
            {
                "ours": ours.name,
                "theirs": theirs.name,
                "pairs": pairs,
                **{
                    column.field: value
                    for column in _COLUMNS
                    if (value := ratio(run.rounds(ours, pairs), run.rounds(theirs, pairs), column.field)) is not None
                },
            }
            for ours, theirs in run.comparisons
            for pairs in plan.pairs
        ],
    }


def _present(figures: Figures) -> dict[str, float]:
    return {name: value for name, value in asdict(figures).items() if value is not None}
