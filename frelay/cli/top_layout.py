"""The layout of ``frelay top``: a :class:`~frelay.cli.top_view.View` as lines that fit the window. Pure.

Four tables stand one below the other. Each shows a few rows, and the table with the focus gets all rows that are left.
So three routes and their two pairings are all on one screen, and three hundred can be scrolled. In a table that is too
wide the widest names are shortened first; keys lose their middle, because the keys of one job often differ only at
their end. Control characters are escaped, so no name can send commands to the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

from frelay.cli.routes import waiting_text
from frelay.cli.text import cut, cut_middle, duration, pad, size, width
from frelay.cli.top_view import Rate, Sort, View
from frelay.errors import printable

__all__ = ["TABLES", "Layout", "Line", "Screen", "Style", "lay_out", "plain_lines", "press"]

TABLES: Final = ("routes", "waiting", "pairings", "refusals")

_GAP: Final = 2
# A name shorter than this would say nothing, so the line is cut instead.
_NARROWEST: Final = 6
# Rows that a table shows without the focus, so that the user sees something new in it.
_ROWS_WITHOUT_FOCUS: Final = 3
# With fewer lines than this for the tables, only the one with the focus is shown.
_ROOM_FOR_ALL: Final = 9

_HELP: Final = (
    "q                quit",
    "tab, shift-tab   give the room to the next table, or to the one before",
    "up, down, j, k   scroll that table by a row; page up, page down by ten; g, G to its top, its end",
    "",
    "sort by          b  bytes a second         a  age, oldest first",
    "                 n  name                   r  route",
    "                 w  most waiting, and waiting longest",
    "",
    "1>2, 2>1         bytes a second from func1 to func2, and back",
    "?                show or leave this help",
)
_BY: Final = {
    Sort.BYTES: "bytes/s",
    Sort.AGE: "age",
    Sort.NAME: "name",
    Sort.ROUTE: "route",
    Sort.WAITING: "waiting",
}
_KEYS: Final = "q quit  ? help  tab next table  sort: b bytes/s a age n name r route w waiting"


class Style(Enum):
    """What a line is; the terminal gives each kind its colour."""

    TITLE = "title"
    ALARM = "alarm"
    HEADING = "heading"
    FOCUS = "focus"
    ROW = "row"
    FOOTER = "footer"


@dataclass(frozen=True, slots=True)
class Line:
    """One line, printable and no wider than asked for."""

    text: str
    style: Style = Style.ROW


@dataclass(frozen=True, slots=True)
class Layout:
    """A screen full of lines. ``last`` is, for each table, the furthest row that it makes sense to scroll to."""

    lines: tuple[Line, ...]
    last: Mapping[str, int]


# --- what the user has chosen -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Screen:
    """Which table has the focus, how far each is scrolled, and the rest of what keys change."""

    sort: Sort = Sort.BYTES
    focus: str = "routes"
    scrolled: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    shows_help: bool = False
    is_done: bool = False


_STEPS: Final = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10}
_TURNS: Final = {"tab": 1, "shift-tab": -1}
_ENDS: Final = {"g": 0, "home": 0, "G": 1, "end": 1}


def press(screen: Screen, key: str, last: Mapping[str, int]) -> Screen:
    """The screen after a key was pressed; other keys change nothing. ``last`` is that of the :class:`Layout`."""
    if key == "q":
        return replace(screen, is_done=True)
    if key == "?" or screen.shows_help:
        return replace(screen, shows_help=not screen.shows_help)
    if key in _TURNS:
        place = TABLES.index(screen.focus) + _TURNS[key]
        return replace(screen, focus=TABLES[place % len(TABLES)])
    if key in {sort.value for sort in Sort}:
        return replace(screen, sort=Sort(key), scrolled=MappingProxyType({}))
    furthest = last.get(screen.focus, 0)
    if key in _STEPS:
        # Some rows may have disappeared since the user scrolled that far.
        place = min(screen.scrolled.get(screen.focus, 0), furthest) + _STEPS[key]
    elif key in _ENDS:
        place = furthest * _ENDS[key]
    else:
        return screen
    moved = {**screen.scrolled, screen.focus: min(max(0, place), furthest)}
    return replace(screen, scrolled=MappingProxyType(moved))


# --- tables of text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """Cells of text. ``right`` are the columns of numbers, ``may_shrink`` those of names, ``keys`` those of keys."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int]
    may_shrink: frozenset[int]
    keys: frozenset[int] = frozenset()


def _rate(rate: Rate | None) -> tuple[str, str]:
    return ("-", "-") if rate is None else (size(rate.func1_to_func2), size(rate.func2_to_func1))


def _if(is_there: bool, cell: str) -> tuple[str, ...]:
    return (cell,) if is_there else ()


def _tables(view: View) -> tuple[_Table, ...]:
    # The column of keys takes room, so it is there only if some leg has one.
    waiting_keys = any(row.key for row in view.waiting)
    pairing_keys = any(row.key for row in view.pairings)
    refusal_keys = any(row.key for row in view.refusals)
    return (
        _Table(
            "routes",
            ("ROUTE", "LISTEN", "WAITING", "PAIRINGS", "1>2 /s", "2>1 /s", "BYTES"),
            tuple(
                (
                    row.name,
                    row.listen,
                    waiting_text(row.waiting),
                    str(row.pairings),
                    *_rate(row.rate),
                    size(row.moved),
                )
                for row in view.routes
            ),
            right=frozenset({2, 3, 4, 5, 6}),
            may_shrink=frozenset({0, 1}),
        ),
        _Table(
            "waiting",
            ("WAITING", "PARTY", "IDENTITY", "ADDRESS", "SINCE", *_if(waiting_keys, "KEY")),
            tuple(
                (row.route, row.party, row.identity, row.address, duration(row.age), *_if(waiting_keys, row.key))
                for row in view.waiting
            ),
            right=frozenset({4}),
            may_shrink=frozenset({0, 2, 3}),
            keys=frozenset({5} if waiting_keys else ()),
        ),
        _Table(
            "pairings",
            ("PAIRING", "FUNC1", "FUNC2", "AGE", "1>2 /s", "2>1 /s", "BYTES", *_if(pairing_keys, "KEY")),
            tuple(
                (
                    *(row.route, row.func1, row.func2, duration(row.age), *_rate(row.rate), size(row.moved)),
                    *_if(pairing_keys, row.key),
                )
                for row in view.pairings
            ),
            right=frozenset({3, 4, 5, 6}),
            may_shrink=frozenset({0, 1, 2}),
            keys=frozenset({7} if pairing_keys else ()),
        ),
        _Table(
            "refusals",
            ("REFUSED", "AGO", "WHO", "CODE", *_if(refusal_keys, "KEY"), "REASON"),
            tuple(
                (row.route, duration(row.age), row.who, row.code, *_if(refusal_keys, row.key), row.reason)
                for row in view.refusals
            ),
            right=frozenset({1}),
            may_shrink=frozenset({0, 2, 5 if refusal_keys else 4}),
            keys=frozenset({4} if refusal_keys else ()),
        ),
    )


def _table_lines(table: _Table, shown: int, offset: int, cells: int | None, *, has_focus: bool) -> list[Line]:
    """The heading and ``shown`` rows from ``offset`` on. The heading says which rows these are."""
    rows = [tuple(printable(cell) for cell in row) for row in table.rows[offset : offset + shown]]
    if not table.rows:
        which = "none"
    elif len(rows) == len(table.rows):
        which = str(len(rows))
    else:
        which = f"{offset + 1}-{offset + len(rows)} of {len(table.rows)}" if rows else f"{len(table.rows)}"
    header = (f"{table.header[0]} ({which})", *table.header[1:])
    widths = [max(width(row[index]) for row in (header, *rows)) for index in range(len(header))]
    if cells is not None:
        _shrink(widths, cells, table.may_shrink | table.keys)
    style = Style.FOCUS if has_focus else Style.HEADING
    return [_line(table, header, widths, cells, style), *(_line(table, row, widths, cells) for row in rows)]


def _shrink(widths: list[int], cells: int, may_shrink: frozenset[int]) -> None:
    """Make the widest name narrower until the line fits, or until no name can shrink further."""
    while sum(widths) + _GAP * (len(widths) - 1) > cells:
        widest = max(may_shrink, key=lambda index: widths[index])
        if widths[widest] <= _NARROWEST:
            return
        widths[widest] -= 1


def _line(
    table: _Table, row: Sequence[str], widths: Sequence[int], cells: int | None, style: Style = Style.ROW
) -> Line:
    parts = [
        pad((cut_middle if index in table.keys else cut)(cell, room), room, right=index in table.right)
        for index, (cell, room) in enumerate(zip(row, widths, strict=True))
    ]
    text = (" " * _GAP).join(parts).rstrip()
    return Line(text if cells is None else cut(text, cells), style)


# --- the whole --------------------------------------------------------------------------------------------------------


def _top(view: View) -> list[Line]:
    title = f"{view.name}: {view.state}, up {duration(view.uptime)}, frelay {view.version}"
    return [Line(printable(title), Style.TITLE), *(Line(printable(alarm), Style.ALARM) for alarm in view.alarms)]


def plain_lines(view: View) -> list[str]:
    """All rows in full width, for a pipe or a file."""
    lines = _top(view)
    for table in _tables(view):
        lines += _table_lines(table, len(table.rows), 0, None, has_focus=False)
    return [line.text for line in lines]


def lay_out(view: View, screen: Screen, cells: int, height: int) -> Layout:
    """At most ``height`` lines of at most ``cells`` cells."""
    if height < 1 or cells < 1:
        return Layout((), {})
    title, *alarms = _top(view)
    top = [replace(title, text=f"{title.text}, by {_BY[screen.sort]}"), *alarms][: max(1, height // 4)]
    lines = [replace(line, text=cut(line.text, cells)) for line in top]
    room = height - len(lines) - 1
    last: Mapping[str, int] = {}
    if screen.shows_help:
        lines += [Line(cut(text, cells)) for text in _HELP[: max(0, room)]]
    else:
        body, last = _body(view, screen, cells, room)
        lines += body
    if height > 1:
        lines += [Line("")] * (height - 1 - len(lines))
        lines.append(Line(cut(_KEYS, cells), Style.FOOTER))
    return Layout(tuple(lines), last)


def _body(view: View, screen: Screen, cells: int, room: int) -> tuple[list[Line], Mapping[str, int]]:
    tables = _tables(view)
    if room < _ROOM_FOR_ALL:
        tables = tuple(table for table in tables if table.name == screen.focus)
    shown = _shares({table.name: len(table.rows) for table in tables}, room - len(tables), screen.focus)
    last = {table.name: max(0, len(table.rows) - max(1, shown[table.name])) for table in tables}
    lines: list[Line] = []
    for table in tables:
        offset = min(screen.scrolled.get(table.name, 0), last[table.name])
        lines += _table_lines(table, shown[table.name], offset, cells, has_focus=table.name == screen.focus)
    return lines[: max(0, room)], last


def _shares(wanted: Mapping[str, int], room: int, focus: str) -> dict[str, int]:
    """How many rows each table shows: first a few of each, then all of the focus, then the others in order."""
    shares = dict.fromkeys(wanted, 0)
    for names, most in ((wanted, _ROWS_WITHOUT_FOCUS), ((focus,), room), (wanted, room)):
        for name in names:
            more = max(0, min(wanted[name], most) - shares[name])
            shares[name] += min(more, max(0, room))
            room -= min(more, max(0, room))
    return shares
