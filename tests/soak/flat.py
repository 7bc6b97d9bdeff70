"""Is it flat? A straight line through the samples of each second, and by how much it may rise.

The samples go up and down, so a single one says nothing. The time after the warm-up is cut into slices, a line is
fitted to their means, and its growth over that whole time is judged. The growth must not exceed what has known reasons.
In a short run on a noisy machine the growth is uncertain, so twice its standard error is subtracted first. A longer run
is therefore stricter; a short one finds large leaks only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

__all__ = ["Finding", "Gauge", "Line", "fit", "judge", "warm_up"]

_SLICES: Final = 12


@dataclass(frozen=True, slots=True)
class Gauge:
    """A quantity that must stay flat."""

    name: str
    unit: str
    may_grow: float
    """Over the whole run, in ``unit``."""
    because: str
    """Where that number comes from."""
    or_share: float = 0.0
    """Or this share of its mean, if that is more."""


@dataclass(frozen=True, slots=True)
class Line:
    """A fitted line, from its first moment to its last."""

    begins: tuple[float, float]
    ends: tuple[float, float]
    error: float
    """The standard error of its growth."""

    @property
    def growth(self) -> float:
        """How much higher it ends than it begins."""
        return self.ends[1] - self.begins[1]


@dataclass(frozen=True, slots=True)
class Finding:
    """The judgement of one gauge."""

    gauge: Gauge
    mean: float
    highest: float
    line: Line

    @property
    def may_grow(self) -> float:
        """The allowed growth, in the unit of the gauge."""
        return max(self.gauge.may_grow, self.gauge.or_share * self.mean)

    @property
    def is_flat(self) -> bool:
        """Whether it grew by no more than that, its uncertainty allowed for."""
        return self.line.growth - 2 * self.line.error <= self.may_grow


def warm_up(seconds: float) -> float:
    """How many seconds of a run do not count: until all kinds of traffic run, and the allocator has its arenas."""
    return min(120.0, max(6.0, seconds / 5))


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line of least squares through the means of equal slices of ``points``; there must be three or more."""
    share = max(1, len(points) // _SLICES)
    slices = [points[at : at + share] for at in range(0, len(points), share)]
    xs = [fmean(x for x, _ in part) for part in slices]
    ys = [fmean(y for _, y in part) for part in slices]
    middle, level = fmean(xs), fmean(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    slope = sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / spread
    left = sum((y - level - slope * (x - middle)) ** 2 for x, y in zip(xs, ys, strict=True))
    first, last = points[0][0], points[-1][0]
    error = math.sqrt(left / (len(xs) - 2) / spread) * (last - first)
    ends = [(x, level + slope * (x - middle)) for x in (first, last)]
    return Line(ends[0], ends[1], error)


def judge(gauge: Gauge, points: Sequence[tuple[float, float]], *, after: float) -> Finding:
    """Fit a line to the samples later than ``after`` seconds."""
    counted = [point for point in points if point[0] >= after]
    values = [value for _, value in counted]
    return Finding(gauge, fmean(values), max(values), fit(counted))
