"""Is it flat? A straight line through what was measured each second, and by how much that may rise.

What churns goes up and down, so a single reading says nothing. The time after the warm-up is cut into slices, a line is
fitted to their means, and what counts is its growth over that whole time. It must not be above what the quantity may
grow for known reasons; where the growth is less certain than that, as in a short run on a noisy machine, twice its
standard error is let pass. So a longer run is a stricter one, and a short one finds what is coarse.
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
    """Or by this share of its mean, if that is more."""


@dataclass(frozen=True, slots=True)
class Line:
    """A fitted line, from its first moment to its last."""

    begins: tuple[float, float]
    ends: tuple[float, float]
    error: float
    """The standard error of its growth."""

    @property
    def growth(self) -> float:
        """How much higher its end is."""
        return self.ends[1] - self.begins[1]


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one gauge."""

    gauge: Gauge
    mean: float
    highest: float
    line: Line

    @property
    def may_grow(self) -> float:
        """By how much."""
        return max(self.gauge.may_grow, self.gauge.or_share * self.mean)

    @property
    def is_flat(self) -> bool:
        """Whether it may be called so."""
        return self.line.growth - 2 * self.line.error <= self.may_grow


def warm_up(seconds: float) -> float:
    """How much of a run does not count: until every kind of traffic was there, and the allocator has its arenas."""
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
    """Fit what came later than ``after`` seconds."""
    counted = [point for point in points if point[0] >= after]
    values = [value for _, value in counted]
    return Finding(gauge, fmean(values), max(values), fit(counted))
