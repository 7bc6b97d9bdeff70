"""What commands print for a person: it fits, it is aligned, and it cannot control a terminal."""

from __future__ import annotations

import io

import pytest

from frelay.cli.text import ago, bold, columns, count, cut, cut_middle, date, duration, pad, size, width


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (999.4, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (1023, "1.02 kB")),
        *((97_600_000, "97.6 MB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (9_996, "10.0 kB"), (99_960, "100 kB")),
        *((10**12, "1.00 TB"), (10**19, "10000 PB")),
    ],
)
def test_bytes_in_three_digits(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (-3, "0 s"), (59.9, "59 s"), (60, "1 min"), (303, "5 min 3 s"), (3600, "1 h")),
        *((12_000, "3 h 20 min"), (86_400, "1 d"), (86_405, "1 d"), (100_000_000, "1157 d 9 h")),
    ],
)
def test_durations_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moments() -> None:
    assert date(0) == "1970-01-01 00:00:00 UTC"
    assert ago(100, 165) == "1 min 5 s ago"
    assert (count(1, "route"), count(0, "route")) == ("1 route", "0 routes")


def test_wide_characters_take_two_cells() -> None:
    assert [width(text) for text in ("abc", "日本", "e\u0301")] == [3, 4, 1]
    assert cut("日本語", 4) == "日~"
    assert cut("日本語", 6) == "日本語"
    assert (cut("abcdef", 4), cut("abcdef", 1), cut("abcdef", 0)) == ("abc~", "~", "")
    assert (pad("日", 4), pad("ab", 4, right=True)) == ("日  ", "  ab")


def test_what_loses_its_middle_keeps_both_ends() -> None:
    assert cut_middle("run-2026/3-15", 13) == "run-2026/3-15"
    assert cut_middle("run-2026/3-15", 10) == "run-~/3-15"
    assert [cut_middle("abcdef", cells) for cells in range(7)] == ["", "~", "~f", "a~f", "a~ef", "ab~ef", "abcdef"]
    # Half of a wide character is none.
    assert [cut_middle("日本語語", cells) for cells in (3, 5, 7)] == ["~語", "日~語", "日~語語"]


def test_columns_are_aligned_and_escaped() -> None:
    lines = columns(("NAME", "N", "LAST"), [("a", "1", "x"), ("日本", "1000", "\x1b")], right=("N",))
    assert lines == ["NAME     N  LAST", "a        1  x", "日本  1000  \\x1b"]
    assert columns(("NAME", "N"), []) == ["NAME  N"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bold_on_a_terminal_only_and_never_against_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert bold("x", io.StringIO()) == "x"
    assert bold("x", Terminal()) == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("x", Terminal()) == "x"
