"""Interleaved rounds of measurements: subjects are measured side by side, several times, and the median counts.

On a shared machine a figure may be different a minute later. So every round measures all subjects one right after the
other under the same load, and the next round in the opposite order. Ratios are taken within each round, and then the
median of these ratios.

A *message* is one delivery through the subject; a round trip is two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bench.measuring.cpu import CpuReading, read_cpu
from bench.measuring.load import BenchError, Generator, Load
from bench.measuring.subjects import Subject

__all__ = ["Case", "Figures", "Plan", "measure_load", "median_figures", "ratio", "ratios", "run_rounds"]

# Time for TCP to grow its windows, and for frelay's pumps to choose how they carry bytes.
WARMUP: Final = 0.4


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table."""

    subject: str
    pairs: int
    load: Load


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one measurement; None where there is none: bulk has no round trips, loopback no process.

    With a greedy pair, Gbit/s is that of the greedy one, and all else is about the others; their CPU per message
    includes the greedy pair's bytes.
    """

    gbit_per_second: float | None = None
    cpu_ms_per_gb: float | None = None
    round_trips_per_second: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    cpu_us_per_message: float | None = None
    subject_cores: float | None = None
    """CPU seconds a second of the subject, and of the load generator."""
    generator_cores: float | None = None
    other_cores: float | None = None
    """... and of all other processes on the machine: the noise."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, how long, how often."""

    pairs: tuple[int, ...]
    loads: tuple[Load, ...]
    seconds: float
    rounds: int
    message_size: int


def run_rounds(
    plan: Plan,
    subjects: Sequence[Subject],
    generator_for: Callable[[Subject], Generator],
    on_progress: Callable[[int, int, Case], None],
) -> dict[Case, list[Figures]]:
    """Measure everything in ``plan``; returns the figures of each case, one for each round. Raises BenchError."""
    steps = list(_steps(plan, subjects))
    results: dict[Case, list[Figures]] = {}
    for number, (subject, count, load) in enumerate(steps, 1):
        case = Case(subject.name, count, load)
        on_progress(number, len(steps), case)
        figures = measure_load(
            subject, count, load, generator_for(subject), seconds=plan.seconds, size=plan.message_size
        )
        results.setdefault(case, []).append(figures)
    return results


def _steps(plan: Plan, subjects: Sequence[Subject]) -> Iterator[tuple[Subject, int, Load]]:
    for number in range(plan.rounds):
        for load in plan.loads:
            for count in plan.pairs:
                for subject in subjects if number % 2 == 0 else reversed(subjects):
                    yield subject, count, load


def measure_load(
    subject: Subject, count: int, load: Load, generator: Generator, *, seconds: float, size: int
) -> Figures:
    """Put ``load`` on ``count`` new pairs for ``seconds``, in messages of ``size`` bytes; raises BenchError."""
    readings: list[CpuReading] = []
    with subject.pairs(count) as pairs:
        tally = generator.run(
            load,
            pairs,
            seconds=seconds,
            # Shorter windows are only for trying, so their figures may be missing.
            warmup=min(WARMUP, seconds),
            size=size,
            on_edge=lambda: readings.append(read_cpu(subject.pids)),
        )
        if not tally.count:
            raise BenchError(f"nothing came through in {seconds:g} s ({count} pairs, {load})")
    before, after = readings
    used = after.subject - before.subject
    others = after.machine - before.machine - used - tally.cpu
    shares = {
        "subject_cores": used / tally.seconds if subject.pids else None,
        "generator_cores": tally.cpu / tally.seconds,
        "other_cores": min(max(0.0, others / tally.seconds), float(os.cpu_count() or 1)),
    }
    if load == "bulk":
        return Figures(
            gbit_per_second=tally.count * 8 / tally.seconds / 1e9,
            cpu_ms_per_gb=used * 1e3 / (tally.count / 1e9) if subject.pids else None,
            **shares,
        )
    return Figures(
        gbit_per_second=tally.bytes * 8 / tally.seconds / 1e9 if load in ("mixed", "greedy") else None,
        round_trips_per_second=tally.count / tally.seconds,
        p50_us=tally.p50,
        p99_us=tally.p99,
        cpu_us_per_message=used * 1e6 / (2 * tally.count) if subject.pids else None,
        **shares,
    )


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over the rounds."""
    values = {name: [getattr(one, name) for one in rounds] for name in Figures.__dataclass_fields__}
    return Figures(**{name: None if None in column else median(column) for name, column in values.items()})


def ratio(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> float | None:
    """The median of one figure's ratios, ours to theirs, of each round; None if a figure is missing or 0."""
    found = ratios([getattr(one, name) for one in ours], [getattr(other, name) for other in theirs])
    return median(found) if len(found) == len(ours) else None


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """The ratio in each round in which both have a figure, and the second is not 0."""
    return [above / below for above, below in zip(ours, theirs, strict=True) if above is not None and below]
