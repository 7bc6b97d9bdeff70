"""The result of a soak: its samples and its verdict, as a table, as JSON and as curves."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from soak.flat import Finding, Gauge
from soak.plot import Curve, Panel, as_svg

__all__ = ["GAUGES", "Result", "Sample", "as_json", "as_picture", "as_table"]

GAUGES: Final = {
    "descriptors": Gauge("open descriptors", "", 8, "the pool keeps the pipes of the busiest moment, two ends each"),
    "memory": Gauge("memory (RSS)", "MiB", 4, "Python and malloc refill their arenas with other objects"),
    "tasks": Gauge("tasks", "", 10, "by chance, three pairings more at the end than at the beginning"),
    "lag": Gauge("loop lag, median", "ms", 5, "other load on the machine, which may double", 1.0),
}


@dataclass(slots=True)
class Sample:
    """The readings of one second."""

    at: float
    descriptors: int
    memory: float
    """MiB."""
    threads: int
    tasks: int
    cpu: float
    """Seconds so far."""
    lag: float | None = None
    longest_lag: float | None = None
    """Milliseconds: the median and the longest way of a byte through the relay."""


@dataclass
class Result:
    """A finished run."""

    seconds: float
    warm_up: float
    samples: list[Sample]
    findings: list[Finding]
    before: dict[str, int]
    after: dict[str, int]
    """What the relay held at rest, before and after."""
    scenes: dict[str, int]
    outcomes: Counter[str]
    troubles: Counter[str]
    others: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether there was no fault."""
        return not self.faults()

    def faults(self) -> list[str]:
        """All faults, one sentence each."""
        found = [f"{f.gauge.name} grew by {f.line.growth:.1f} {f.gauge.unit}" for f in self.findings if not f.is_flat]
        found += [
            f"at rest it holds {self.after[name]} {name}, and held {count} before"
            for name, count in self.before.items()
            if self.after[name] != count
        ]
        return [*found, *(f"{text} ({count} times)" for text, count in self.troubles.items()), *self.others]


def as_table(result: Result) -> str:
    """The figures, for a person."""
    rows = [["", "mean", "highest", "growth", "+/-", "may grow", ""]]
    for f in result.findings:
        unit, grown = f" {f.gauge.unit}".rstrip(), f.line.growth
        numbers = (f.mean, f.highest, grown, 2 * f.line.error)
        shown = [f"{number:.1f}{unit}" for number in numbers]
        rows.append([f.gauge.name, *shown, f"{f.may_grow:.1f}{unit}", "flat" if f.is_flat else "NOT FLAT"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pads = [str.ljust, *[str.rjust] * (len(row) - 2), str.ljust]
        lines.append("  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip())
    cpu = (result.samples[-1].cpu - result.samples[0].cpu) / (result.samples[-1].at - result.samples[0].at)
    scenes = ", ".join(f"{count} {name}" for name, count in result.scenes.items())
    outcomes = ", ".join(f"{count} {name}" for name, count in result.outcomes.most_common())
    longest = max((s.longest_lag or 0.0) for s in result.samples)
    lines += [
        "",
        f"{result.seconds:g} s, the first {result.warm_up:g} s of them not counted; the relay used {cpu:.2f} cores.",
        f"Scenes: {scenes}.",
        f"Pairings: {sum(result.outcomes.values())}: {outcomes}.",
        f"The longest way of a byte through the relay took {longest:.0f} ms, the load on this machine included.",
        "At rest, before and after: "
        + ", ".join(f"{result.before[name]} and {result.after[name]} {name}" for name in result.before)
        + ".",
        *(f"FAULT: {fault}" for fault in result.faults()),
    ]
    return "\n".join(lines)


def as_json(result: Result) -> dict[str, Any]:
    """Everything, each sample included."""
    return {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "seconds": result.seconds,
        "warm_up": result.warm_up,
        "is_good": result.is_good,
        "faults": result.faults(),
        "findings": [
            {**asdict(f.gauge), "mean": f.mean, "highest": f.highest, "growth": f.line.growth, "error": f.line.error}
            for f in result.findings
        ],
        "at_rest": {"before": result.before, "after": result.after},
        "scenes": result.scenes,
        "outcomes": dict(result.outcomes),
        "troubles": dict(result.troubles),
        "samples": [asdict(sample) for sample in result.samples],
    }


def as_picture(result: Result) -> str:
    """The curves and the lines through them."""
    panels = []
    for (name, gauge), finding in zip(GAUGES.items(), result.findings, strict=True):
        points = [(s.at, value) for s in result.samples if (value := getattr(s, name)) is not None]
        growth = f"grows by {finding.line.growth:+.1f} {gauge.unit}".rstrip()
        line = (finding.line.begins, finding.line.ends)
        panels.append(Panel(gauge.name, gauge.unit, [Curve(growth, points)], line))
    pairings = sum(result.outcomes.values())
    text = (
        f"{pairings:,} pairings in {sum(result.scenes.values()):,} scenes, good and hostile, in "
        f"{result.seconds / 60:g} minutes; shaded: the warm-up"
    )
    return as_svg("A relay under everything at once", text, panels, warm_up=result.warm_up)
