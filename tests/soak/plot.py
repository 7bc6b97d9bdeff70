"""Curves over time as an SVG: panels one above the other, each with its own scale from zero on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.measuring.svg import WIDTH, drawing, text_of

__all__ = ["Curve", "Panel", "as_svg"]

Point = tuple[float, float]

_LEFT: Final = 64
_RIGHT: Final = 20
_TOP: Final = 72
_PANEL: Final = 96
_GAP: Final = 44
_BOTTOM: Final = 36
# More points than pixels would only make the file bigger.
_MOST_POINTS: Final = 800

_LIGHT: Final = """.grid { stroke: #d8dee4; stroke-width: 1 }
.early { fill: #eaeef2 }
.curve { fill: none; stroke-width: 1.4; stroke-linejoin: round }
.c0 { stroke: #0969da } .c1 { stroke: #bc4c00 }
.trend { stroke: #1a7f37; stroke-width: 1.6; stroke-dasharray: 6 4 }"""
_DARK: Final = """.grid { stroke: #30363d }
  .early { fill: #151b23 } .c0 { stroke: #4493f8 } .c1 { stroke: #db6d28 } .trend { stroke: #3fb950 }"""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel."""

    name: str
    points: Sequence[Point]
    """(seconds, value), in the order of time."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity: up to two curves, and the straight line that was fitted to the first."""

    title: str
    unit: str
    curves: Sequence[Curve]
    trend: tuple[Point, Point] | None = None


def as_svg(title: str, subtitle: str, panels: Sequence[Panel], *, warm_up: float = 0.0) -> str:
    """The picture; the first ``warm_up`` seconds are shaded."""
    bottom = _TOP + len(panels) * (_PANEL + _GAP) - _GAP
    height = bottom + _BOTTOM
    last = max((point[0] for panel in panels for curve in panel.curves for point in curve.points), default=1.0)
    lines: list[str] = []
    for number, panel in enumerate(panels):
        lines += _panel(panel, _TOP + number * (_PANEL + _GAP), last, warm_up)
    lines += _time_axis(bottom + 20, last)
    return drawing(title, subtitle, lines, height=height, left=_LEFT, light=_LIGHT, dark=_DARK)


def _x(seconds: float, last: float) -> float:
    return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * seconds / last, 1)


def _panel(panel: Panel, top: float, last: float, warm_up: float) -> Iterator[str]:
    highest = max((value for curve in panel.curves for _, value in curve.points), default=1.0)
    step = _round_step(highest / 3)
    ceiling = step * max(1, math.ceil(highest / step))

    def y(value: float) -> float:
        return round(top + _PANEL * (1 - value / ceiling), 1)

    legend = " and ".join(curve.name for curve in panel.curves if curve.name)
    yield f'<text x="{_LEFT}" y="{top - 7}"><tspan class="name">{text_of(panel.title)}</tspan> {text_of(legend)}</text>'
    yield f'<rect class="early" x="{_LEFT}" y="{top}" width="{_x(warm_up, last) - _LEFT:.1f}" height="{_PANEL}"/>'
    for tick in range(round(ceiling / step) + 1):
        at = y(tick * step)
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>'
        label = f"{tick * step:g} {panel.unit}" if tick == round(ceiling / step) else f"{tick * step:g}"
        yield f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{text_of(label.strip())}</text>'
    for number, curve in enumerate(panel.curves):
        points = " ".join(f"{_x(when, last)},{y(value)}" for when, value in _thinned(curve.points))
        yield f'<polyline class="curve c{number}" points="{points}"/>'
    if panel.trend is not None:
        (x1, y1), (x2, y2) = panel.trend
        yield (
            f'<line class="trend" x1="{_x(x1, last)}" x2="{_x(x2, last)}" y1="{y(max(0.0, y1))}" '
            f'y2="{y(max(0.0, y2))}"/>'
        )


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and the highest of every few points, so that no peak is lost."""
    share = 2 * math.ceil(len(points) / _MOST_POINTS)
    if share < 4:
        return points
    thinned: list[Point] = []
    for at in range(0, len(points), share):
        some = sorted(points[at : at + share], key=lambda point: point[1])
        thinned += sorted((some[0], some[-1]))
    return thinned


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _time_axis(y: float, last: float) -> Iterator[str]:
    minutes = last > 180
    scale = 60.0 if minutes else 1.0
    step = _round_step(last / scale / 8)
    for tick in range(int(last / scale / step) + 1):
        label = f"{tick * step:g}{(' min' if minutes else ' s') if tick == 0 else ''}"
        yield f'<text x="{_x(tick * step * scale, last)}" y="{y}" text-anchor="middle">{label}</text>'
