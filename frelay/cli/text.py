"""Text for people at a terminal: escaped, aligned, in units that are easy to read. Standard library only."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Final, TextIO

from frelay.errors import printable

__all__ = [
    "ago",
    "bold",
    "columns",
    "count",
    "cut",
    "cut_middle",
    "date",
    "duration",
    "loose_output",
    "pad",
    "size",
    "width",
]

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_GAP: Final = "  "


def loose_output() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def bold(text: str, stream: TextIO) -> str:
    """``text`` in bold if ``stream`` is a terminal and NO_COLOR is not set (https://no-color.org)."""
    return f"\x1b[1m{text}\x1b[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


# --- cells ------------------------------------------------------------------------------------------------------------


def width(text: str) -> int:
    """How many cells of a terminal a printable ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, cells: int, mark: str = "~") -> str:
    """``text`` in at most ``cells`` cells; if it was cut, it ends in ``mark``, which takes one cell."""
    if width(text) <= cells:
        return text
    if cells < 1:
        return ""
    taken, kept = 0, 0
    for character in text:
        taken += _cells(character)
        if taken > cells - 1:
            break
        kept += 1
    return text[:kept] + mark


def cut_middle(text: str, cells: int, mark: str = "~") -> str:
    """As :func:`cut`, but of a text that is too long both ends are kept, and ``mark`` stands between them."""
    if width(text) <= cells:
        return text
    start = cut(text, cells - cells // 2, mark)
    # Counted from the end: a character may take two cells, or none.
    end, left = len(text), cells - width(start)
    while left >= _cells(text[end - 1]):
        end -= 1
        left -= _cells(text[end])
    return start + text[end:]


def pad(text: str, cells: int, *, right: bool = False) -> str:
    """``text`` with spaces up to ``cells`` cells; they stand on its left if it is aligned to the ``right``."""
    space = " " * (cells - width(text))
    return space + text if right else text + space


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> list[str]:
    """Lines of aligned columns, header first; those named in ``right`` hold numbers."""
    table = [tuple(header), *(tuple(printable(cell) for cell in row) for row in rows)]
    widths = [max(width(row[index]) for row in table) for index in range(len(header))]
    return [
        _GAP.join(
            pad(cell, cells, right=name in right) for name, cell, cells in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in table
    ]


# --- quantities -------------------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in three digits: ``0 B``, ``999 B``, ``1.02 kB``, ``97.6 MB``. Powers of 1000, as networks count."""
    value, unit = float(count), 0
    # 999.5 and more would be rounded to 1000, which is four digits.
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1000
        unit += 1
    if unit == 0:
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """The two largest units: ``45 s``, ``5 min 3 s``, ``3 h 20 min``, ``12 d 4 h``."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, length)
        if number or (unit == "s" and not parts):
            parts.append(f"{number} {unit}")
        elif parts:
            break  # not "1 d 5 s": only neighbouring units go together
    return " ".join(parts[:2])


def ago(moment: float, now: float | None = None) -> str:
    """``5 min 3 s ago``."""
    return f"{duration((time.time() if now is None else now) - moment)} ago"


def date(moment: float) -> str:
    """Seconds since the epoch as ``2027-01-31 12:00:00 UTC``."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def count(number: int, what: str) -> str:
    """``1 route``, ``2 routes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
