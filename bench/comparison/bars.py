"""Bars as an SVG: a group for each number of pairs, a bar for each subject, and a line for its spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.comparison.record import Key, Record, Spread
from bench.measuring.svg import WIDTH, drawing, text_of

__all__ = ["Bar", "Group", "as_bars", "write_pictures"]

# Where the titles begin, and where the bars begin; the names are between.
_MARGIN: Final = 20
_LEFT: Final = 210
_RIGHT: Final = 90
_TOP: Final = 62
_BAR: Final = 15
_STEP: Final = 20
_GROUP: Final = 34

_LIGHT: Final = """.bar { fill: #afb8c1 } .ours { fill: #0969da }
.spread { stroke: #1f2328; stroke-width: 1.2 }"""
_DARK: Final = """.bar { fill: #484f58 }
  .ours { fill: #4493f8 } .spread { stroke: #f0f6fc }"""


@dataclass(frozen=True, slots=True)
class Bar:
    """The bar of one subject."""

    name: str
    spread: Spread
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that are compared with each other."""

    title: str
    bars: Sequence[Bar]


def as_bars(title: str, subtitle: str, groups: Sequence[Group], digits: int) -> str:
    """The picture; all groups have one scale, from zero."""
    highest = max((bar.spread.highest for group in groups for bar in group.bars), default=1.0) or 1.0
    height = _TOP + sum(_GROUP + _STEP * len(group.bars) for group in groups) + 16
    lines: list[str] = []
    top = float(_TOP)
    for group in groups:
        lines.append(f'<text class="name" x="{_MARGIN}" y="{top + 16}">{text_of(group.title)}</text>')
        top += _GROUP - 8
        for bar in group.bars:
            lines += _bar(bar, top, highest, digits)
            top += _STEP
        top += 8
    return drawing(title, subtitle, lines, height=height, left=_MARGIN, light=_LIGHT, dark=_DARK)


def _bar(bar: Bar, top: float, highest: float, digits: int) -> Iterator[str]:
    def x(value: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * value / highest, 1)

    middle = top + _BAR / 2
    low, high = x(bar.spread.lowest), x(bar.spread.highest)
    kind = "ours" if bar.is_ours else "bar"
    yield f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{text_of(bar.name)}</text>'
    yield f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{x(bar.spread.median) - _LEFT:.1f}" height="{_BAR}"/>'
    yield f'<line class="spread" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
    yield f'<text x="{high + 6}" y="{middle + 4}">{bar.spread.median:,.{digits}f}</text>'


# --- of a comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Picture:
    """One figure of one case, for each subject that has it."""

    name: str
    """The name of its file, without the suffix."""
    title: str
    shows: str
    """The figure in words, for people who cannot see the picture."""
    case: str
    figure: str
    digits: int
    better: str


_PICTURES: Final = (
    _Picture("bench-bulk-cpu", "CPU ms per GB, bulk", "CPU time per GB relayed in bulk",
             "bulk", "cpu_ms_per_gb", 0, "less"),
    _Picture("bench-bulk", "Gbit/s, bulk", "Throughput in bulk",
             "bulk", "gbit_per_second", 1, "more"),
    _Picture("bench-messages-cpu", "CPU µs per message of 64 B", "CPU time per message of 64 bytes",
             "ping-pong 64 B", "cpu_us_per_message", 1, "less"),
    _Picture("bench-messages", "Round trips of 64 B a second", "Round trips a second of messages of 64 bytes",
             "ping-pong 64 B", "round_trips_per_second", 0, "more"),
    _Picture("bench-admission", "CPU µs per leg: set up, and given up again", "CPU time to set a leg up and give it up",
             "admission", "cpu_us_per_leg", 0, "less"),
)  # fmt: skip


def write_pictures(record: Record, directory: Path) -> dict[Path, str]:
    """Draw all pictures for which there are figures; returns the files, each with a sentence that describes it.

    Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for picture in _PICTURES:
        groups = []
        for amount in dict.fromkeys(key.amount for key in record.results if key.case == picture.case):
            bars = [
                Bar(record.names[subject], spread, subject.startswith("frelay"))
                for subject in record.names
                if (spread := record.spread(Key(picture.case, amount, subject), picture.figure)) is not None
            ]
            what = "" if picture.case == "admission" else f"{amount} {'pair' if amount == 1 else 'pairs'}"
            groups += [Group(what, bars)] if bars else []
        if groups:
            rounds = "one round" if record.rounds == 1 else f"median and range of {record.rounds} rounds"
            subtitle = f"{picture.better} is better; {rounds}; {record.date}"
            path = directory / f"{picture.name}.svg"
            path.write_text(as_bars(picture.title, subtitle, groups, picture.digits), "utf-8")
            written[path] = f"{picture.shows}: {_compared(groups)}"
    return written


def _compared(groups: Sequence[Group]) -> str:
    """The subjects in words: frelay, and two others by name; the tables have all of them.

    A subject with several variants, which the name has after a comma, is named once.
    """
    bars = [bar for group in groups for bar in group.bars]
    ours, theirs = (
        list(dict.fromkeys(bar.name.partition(",")[0] for bar in bars if bar.is_ours is own)) for own in (True, False)
    )
    others = f"{theirs[0]}, {theirs[1]} and others" if len(theirs) > 2 else " and ".join(theirs)
    return " beside ".join(part for part in (*ours, others) if part)
