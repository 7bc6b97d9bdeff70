"""What ``frelay top`` shows, without a terminal: rates, order, and lines that fit into any window."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from frelay.cli.text import width
from frelay.cli.top_layout import TABLES, Screen, Style, lay_out, plain_lines, press
from frelay.cli.top_view import Rate, Snapshot, Sort, rates, view

NOW = 1_000_000.0


def leg(identity: str = "dns:func1.demo", since: float = NOW - 5) -> dict[str, Any]:
    return {"identity": identity, "address": "127.0.0.1:5000", "mode": "handoff", "since": since}


def route(name: str, moved: int = 0, func1: int = 0, func2: int = 0, pairings: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "bound": ["127.0.0.1:9001"],
        "func1": ["dns:func1.demo"],
        "func2": {"dial": "10.0.0.7:5432"},
        "waiting": {"func1": [leg()] * func1, "func2": [leg()] * func2},
        "pairings": pairings,
        "bytes_func1_to_func2": moved,
        "bytes_func2_to_func1": 0,
    }


def pairing(key: str, on: str, moved: int = 0, age: float = 1, func1: str = "dns:func1.demo") -> dict[str, Any]:
    return {
        "id": key,
        "route": on,
        "func1": leg(func1),
        "func2": leg("dns:func2.demo"),
        "is_handed_off": True,
        "age": age,
        "bytes_func1_to_func2": 0,
        "bytes_func2_to_func1": moved,
    }


def refusal(reason: str = "unknown CA") -> dict[str, Any]:
    return {
        "at": NOW - 60,
        "code": "not-authorised",
        "reason": reason,
        "address": "127.0.0.1:6000",
        "route": None,
        "party": None,
        "identity": None,
        "certificate": None,
    }


def snapshot(at: float, routes: list[Any], pairings: list[Any] | None = None, **status: Any) -> Snapshot:
    known = {
        "name": "relay-1",
        "version": "0.1.0",
        "state": "running",
        "now": NOW,
        "started_at": NOW - 3700,
        "last_reload": {"at": NOW, "ok": True, "problems": []},
        "refusals": [],
    }
    return Snapshot(at, known | status, tuple(routes), tuple(pairings or ()))


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_rate_needs_two_snapshots_of_the_same_thing() -> None:
    before = snapshot(10, [route("a", 1000), route("gone", 5)], [pairing("p", "a", 500)])
    now = snapshot(12, [route("a", 5000), route("new", 7)], [pairing("p", "a", 700), pairing("q", "a", 9)])
    assert rates(None, now) == {"routes": {}, "pairings": {}}
    assert rates(before, now) == {"routes": {"a": Rate(2000, 0)}, "pairings": {"p": Rate(0, 100)}}


def test_a_route_that_came_again_has_no_negative_rate() -> None:
    assert rates(snapshot(1, [route("a", 9000)]), snapshot(2, [route("a", 1)]))["routes"] == {"a": Rate(0, 0)}
    assert rates(snapshot(2, [route("a")]), snapshot(2, [route("a", 1)]))["routes"] == {}


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (Sort.BYTES, ["c", "a", "b"]),
        (Sort.AGE, ["b", "a", "c"]),
        (Sort.NAME, ["a", "b", "c"]),
        (Sort.ROUTE, ["a", "b", "c"]),
        (Sort.WAITING, ["a", "b", "c"]),
    ],
)
def test_routes_in_each_order(sort: Sort, expected: list[str]) -> None:
    before = snapshot(1, [route(name) for name in "bca"])
    now = snapshot(2, [route("b", 0), route("c", 9), route("a", 5, func1=2)], [pairing("p", "b", age=50)])
    assert [row.name for row in view(now, before, sort).routes] == expected


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (Sort.BYTES, ["y", "z", "x"]),
        (Sort.AGE, ["x", "z", "y"]),
        (Sort.NAME, ["x", "y", "z"]),
        (Sort.ROUTE, ["z", "x", "y"]),
    ],
)
def test_pairings_in_each_order(sort: Sort, expected: list[str]) -> None:
    def pairings(*moved: int) -> list[Any]:
        return [
            pairing("1", "b", moved[0], age=30, func1="x"),
            pairing("2", "b", moved[1], age=10, func1="y"),
            pairing("3", "a", moved[2], age=20, func1="z"),
        ]

    found = view(snapshot(2, [], pairings(1, 9, 5)), snapshot(1, [], pairings(0, 0, 0)), sort)
    assert [row.func1 for row in found.pairings] == expected


# --- what it looks like -----------------------------------------------------------------------------------------------

SMALL = view(
    snapshot(
        2,
        [route("demo", 3_000_000, func1=1, pairings=1), route("two"), route("three")],
        [pairing("p", "demo", 5_000, age=125)],
        refusals=[refusal()],
    ),
    snapshot(1, [route("demo", 1_000_000)], [pairing("p", "demo", 3_000)]),
)

SMALL_SCREEN = """\
relay-1: running, up 1 h 1 min, frelay 0.1.0, by bytes/s
ROUTE (3)  LISTEN          WAITING  PAIRINGS   1>2 /s  2>1 /s    BYTES
demo       127.0.0.1:9001      1/0         1  2.00 MB     0 B  3.00 MB
three      127.0.0.1:9001      0/0         0        -       -      0 B
two        127.0.0.1:9001      0/0         0        -       -      0 B
WAITING (1)  PARTY  IDENTITY        ADDRESS         SINCE
demo         func1  dns:func1.demo  127.0.0.1:5000    5 s
PAIRING (1)  FUNC1           FUNC2                 AGE  1>2 /s   2>1 /s    BYTES
demo         dns:func1.demo  dns:func2.demo  2 min 5 s     0 B  2.00 kB  5.00 kB
REFUSED (1)    AGO  WHO             CODE            REASON
-            1 min  127.0.0.1:6000  not-authorised  unknown CA"""


def test_a_small_relay_is_seen_as_a_whole() -> None:
    lines = [line.text for line in lay_out(SMALL, Screen(), 80, 24).lines]
    assert len(lines) == 24
    assert "\n".join(lines[:11]) == SMALL_SCREEN
    assert lines[11:23] == [""] * 12
    assert lines[23].startswith("q quit  ? help")


def test_plain_lines_are_all_of_it() -> None:
    assert plain_lines(SMALL) == [
        SMALL_SCREEN.splitlines()[0].removesuffix(", by bytes/s"),
        *SMALL_SCREEN.splitlines()[1:],
    ]


LARGE = view(
    snapshot(
        2,
        [route(f"route-{number:03}-with-quite-a-long-name-for-a-table", func1=1) for number in range(300)],
        [
            pairing(str(number), f"route-{number:03}", number, func1="uri:spiffe://acme/" + "j" * 90)
            for number in range(50)
        ],
        refusals=[refusal("no " * 50)] * 20,
        last_reload={"at": NOW, "ok": False, "problems": [{"key": "limits", "message": "x" * 200}, {"message": "y"}]},
    )
)


# Two ranks of two runs that wait, a pairing and a refusal; all keys begin alike.
JOB = "shuffle-of-the-whole-night-2026-12-01T02:00:00Z"
KEYED = view(
    snapshot(
        2,
        [
            route("demo")
            | {
                "waiting": {
                    "func1": [leg() | {"meet": f"{JOB}/3-15"}, leg()],
                    "func2": [],
                    "either": [leg("dns:rank14.demo") | {"meet": f"{JOB}/3-14"}],
                }
            }
        ],
        [pairing("p", "demo", func1="dns:rank2.demo") | {"meet": f"{JOB}/2-9"}],
        refusals=[refusal(), refusal("nobody came within 5 s") | {"meet": f"{JOB}/7-8", "code": "wait-timeout"}],
    )
)


KEYED_SCREEN = """\
WAITING (3)  PARTY   IDENTITY         ADDRESS         SINCE  KEY
demo         either  dns:rank14.demo  127.0.0.1:5000    5 s  shuffle-o~:00Z/3-14
demo         func1   dns:func1.demo   127.0.0.1:5000    5 s  shuffle-o~:00Z/3-15
demo         func1   dns:func1.demo   127.0.0.1:5000    5 s
PAIRING (1)  FUNC1        FUNC2         AGE  1>2 /s  2>1 /s  BYTES  KEY
demo         dns:rank2.~  dns:func2.d~  1 s       -       -    0 B  shuff~0Z/2-9
REFUSED (2)    AGO  WHO            CODE            KEY            REASON
-            1 min  127.0.0.1:60~  not-authorised                 unknown CA
-            1 min  127.0.0.1:60~  wait-timeout    shuffl~0Z/7-8  nobody came w~"""


def test_keys_lose_their_middle_and_names_their_end() -> None:
    lines = [line.text for line in lay_out(KEYED, Screen(focus="waiting"), 80, 24).lines]
    assert "\n".join(lines[3:12]) == KEYED_SCREEN


@pytest.mark.parametrize("cells", [70, 100, 200])
def test_ranks_can_be_told_apart_in_a_narrow_window(cells: int) -> None:
    text = "\n".join(line.text for line in lay_out(KEYED, Screen(), cells, 24).lines)
    assert all(end in text for end in ("3-15", "3-14", "2-9", "7-8"))


def test_a_pipe_gets_whole_keys() -> None:
    text = "\n".join(plain_lines(KEYED))
    assert all(f"  {JOB}/{end}" in text for end in ("3-15", "3-14", "2-9", "7-8"))


def test_without_keys_there_is_no_column_for_them() -> None:
    assert not any("KEY" in line for line in plain_lines(SMALL))
    assert sum("KEY" in line for line in plain_lines(KEYED)) == 3


@pytest.mark.parametrize("cells", [1, 10, 40, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 10, 24, 60])
@pytest.mark.parametrize("focus", TABLES)
@pytest.mark.parametrize("found", [SMALL, LARGE, KEYED], ids=["small", "large", "keyed"])
def test_it_fits_into_every_window(cells: int, height: int, focus: str, found: Any) -> None:
    for screen in (Screen(focus=focus), Screen(focus=focus, shows_help=True)):
        lines = lay_out(found, screen, cells, height).lines
        assert len(lines) == height
        assert all(width(line.text) <= cells for line in lines)
    assert lay_out(found, Screen(), cells, 0).lines == ()


def test_the_table_with_the_focus_gets_the_room() -> None:
    for focus, name in zip(TABLES, ("ROUTE", "WAITING", "PAIRING", "REFUSED"), strict=True):
        lines = lay_out(LARGE, Screen(focus=focus), 120, 30).lines
        headings = [index for index, line in enumerate(lines) if line.style in (Style.HEADING, Style.FOCUS)]
        (focused,) = [index for index in headings if lines[index].style is Style.FOCUS]
        assert lines[focused].text.startswith(f"{name} (1-")
        rows = {start: end - start - 1 for start, end in zip(headings, [*headings[1:], 29], strict=True)}
        assert rows.pop(focused) > 9
        assert set(rows.values()) == {3}


def test_a_refused_reload_is_an_alarm() -> None:
    lines = lay_out(LARGE, Screen(), 300, 30).lines
    assert lines[1].style is Style.ALARM
    assert lines[1].text == f"last reload refused: limits: {'x' * 200} (and 1 more: frelay status)"


def test_nothing_shown_can_steer_the_terminal() -> None:
    evil = view(
        snapshot(2, [], [pairing("p", "a", func1="dns:\x1b[2J\n日本")], name="r\x07", refusals=[refusal("\x9b1m")])
    )
    for text in [*plain_lines(evil), *(line.text for line in lay_out(evil, Screen(), 80, 24).lines)]:
        assert text.isprintable()


# --- keys -------------------------------------------------------------------------------------------------------------


def pressed(keys: str | list[str], screen: Screen | None = None, height: int = 24) -> Screen:
    screen = screen or Screen()
    for key in keys:
        screen = press(screen, key, lay_out(LARGE, screen, 80, height).last)
    return screen


def first_row(screen: Screen) -> str:
    lines = lay_out(LARGE, screen, 120, 24).lines
    return lines[next(index for index, line in enumerate(lines) if line.style is Style.FOCUS) + 1].text[:9]


def test_every_row_can_be_reached_and_the_way_back_is_at_once() -> None:
    assert first_row(pressed("jj")) == "route-002"
    assert first_row(pressed(["j", "j", "k"])) == "route-001"
    assert first_row(pressed("kkkj")) == "route-001"
    assert first_row(pressed(["page down", "down", "up"])) == "route-010"
    at_end = pressed("G")
    assert lay_out(LARGE, at_end, 120, 24).lines[2].text.startswith("ROUTE (")
    assert "of 300)" in lay_out(LARGE, at_end, 120, 24).lines[2].text
    shown = [line.text for line in lay_out(LARGE, at_end, 120, 24).lines]
    assert any(text.startswith("route-299") for text in shown)
    # One step back from the end moves at once, even after many steps beyond the end.
    assert first_row(pressed("GjjjK" + "k")) == f"route-{int(first_row(at_end)[6:]) - 1:03}"
    assert first_row(pressed("Gg")) == "route-000"


def test_a_window_made_larger_shows_the_rows_that_fit() -> None:
    screen = pressed("G", height=12)
    rows = [line for line in lay_out(LARGE, screen, 80, 60).lines if line.text.startswith("route-299")]
    assert len(rows) >= 1


def test_the_other_keys() -> None:
    assert pressed(["tab"]).focus == "waiting"
    assert pressed(["tab"] * 4).focus == "routes"
    assert pressed(["shift-tab"]).focus == "refusals"
    for sort in Sort:
        assert pressed(sort.value).sort is sort
    assert pressed("jja") == replace(Screen(), sort=Sort.AGE)
    assert pressed("?").shows_help
    assert pressed("?j") == Screen()
    assert pressed("q").is_done
    assert pressed("?q").is_done
    assert pressed(["x", "", "\x1b"]) == Screen()


def test_rates_are_finite_whatever_the_clock_does() -> None:
    found = rates(snapshot(1, [route("a")]), snapshot(1 + 1e-9, [route("a", 2**62)]))["routes"]["a"]
    assert math.isfinite(found.func1_to_func2)
