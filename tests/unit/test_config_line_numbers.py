"""The line of every key of any TOML document is found."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frelay.config.line_numbers import MAX_DEPTH, LineNumbers

DOCUMENT = '''\
# a comment with [brackets] and = signs
top = 1
dotted.a.b = 2
dotted."quo.ted".'c' = 3

[plain]  # a comment
text = "with # [no] comment and \\" a quote"
"key \\u0041\\n" = 'literal \\'
lines = """
[not.a.table]
not = "a key"
\\""" still in ""\\
"""
literal = \'\'\'
x = 1
''\'\'\'
after = true
array = [
  1, # ] not the end
  [ 2,
    "]" ],
  { x = 1, y.z = [
     7 ] },
]
inline = { a = 1, b = { c = "}" }, "d]" = 3 }
date = 1979-05-27 07:32:00

[[route]]
name = "one"
  [route.sub]
  deep = 1
[[route]]
name = "two"
func1 = ["dns:a",
         "dns:b"]
[[route.leg]]
n = 1
[[route.leg]]
n = 2
[route.sub]
[a.b.c]
[a]
x = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 2),
        (("dotted",), 3),
        (("dotted", "a"), 3),
        (("dotted", "a", "b"), 3),
        (("dotted", "quo.ted", "c"), 4),
        (("plain",), 6),
        (("plain", "text"), 7),
        (("plain", "key A\n"), 8),
        (("plain", "lines"), 9),
        (("plain", "literal"), 14),
        (("plain", "after"), 17),
        (("plain", "array"), 18),
        (("plain", "array", 0), 19),
        (("plain", "array", 1), 20),
        (("plain", "array", 1, 0), 20),
        (("plain", "array", 1, 1), 21),
        (("plain", "array", 2), 22),
        (("plain", "array", 2, "x"), 22),
        (("plain", "array", 2, "y", "z"), 22),
        (("plain", "array", 2, "y", "z", 0), 23),
        (("plain", "inline", "b", "c"), 25),
        (("plain", "inline", "d]"), 25),
        (("plain", "date"), 26),
        (("route",), 28),
        (("route", 0), 28),
        (("route", 0, "name"), 29),
        (("route", 0, "sub"), 30),
        (("route", 0, "sub", "deep"), 31),
        (("route", 1), 32),
        (("route", 1, "func1", 1), 35),
        (("route", 1, "leg", 0, "n"), 37),
        (("route", 1, "leg", 1), 38),
        (("route", 1, "sub"), 40),
        (("a", "b", "c"), 41),
        (("a", "b"), 41),
        (("a",), 42),  # its own header, not the one that created it
        (("a", "x"), 43),
    ],
)
def test_each_kind_of_key_is_found_on_its_line(path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(DOCUMENT)
    lines = LineNumbers(DOCUMENT)
    assert path in lines
    assert lines.line(path) == line


def test_a_key_that_is_not_there_has_the_line_of_the_nearest_above_it() -> None:
    lines = LineNumbers(DOCUMENT)
    assert ("route", 1, "listen") not in lines
    assert lines.line(("route", 1, "listen")) == 32
    assert lines.line(("nowhere", "at", "all")) is None
    assert lines.line(()) is None


def test_line_ends_of_both_kinds_count_once() -> None:
    assert LineNumbers("a = 1\r\n\r\nb = 2\r\n").line(("b",)) == 3


def test_depth_costs_no_recursion_and_no_memory() -> None:
    depth = 200_000
    lines = LineNumbers("a = " + "[" * depth + "]" * depth + "\n" + "b." * depth + "b = 1\nc = 2\n")
    assert lines.line(("a",)) == 1
    assert lines.line(("b",)) == 2
    assert lines.line(("c",)) == 3
    assert ("a", *(0,) * (MAX_DEPTH - 1)) in lines
    assert lines.line(("a", *(0,) * 1000)) == 1


# --- compared with tomllib, on any document that tomllib accepts -------------------------------------------------


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


FRAGMENTS = st.sampled_from(
    [
        *"abc=[]{},.#\"'\\ \t0",
        "\n",
        "\r\n",
        "[[",
        "]]",
        '"""',
        "'''",
        '""""',
        "a = 1\n",
        "b.c = 2\n",
        "[a]\n",
        "[a.b]\n",
        "[[a]]\n",
        "[[a.b]]\n",
        "[[ a . b ]] # c\n",
        'x = """\n[q]\n"""\n',
        "x = '''\ny = 1\n''''\n",
        'k = "a\\"b" # c = 1\n',
        '"q\\u0061" = 1\n',
        "'l' = 2\n",
        "l = [ 1, [2], {a = 1, b.c = '}'} ]\n",
        "l = [\n # ] \n 1,\n [2]\n,]\n",
        "i = { a = [1,\n2], b = {} }\n",
        "d = 2020-01-01 10:00:00 # d\n",
        "f = -1.5e3",
        "\ufeff",
        "\x00",
        "\u2028",
        "\u00e9",
    ]
)


@settings(deadline=None)
@given(st.lists(FRAGMENTS, max_size=30).map("".join))
def test_every_key_of_what_tomllib_accepts_is_found_and_nothing_ever_raises(text: str) -> None:
    lines = LineNumbers(text)
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    count = text.count("\n") + 1
    for path in places(document):
        assert path in lines, path
        line = lines.line(path)
        assert line is not None
        assert 1 <= line <= count


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_at_all_makes_it_raise(text: str) -> None:
    LineNumbers(text)


# --- on generated documents whose lines are known ----------------------------------------------------------------

KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True),
    st.text(st.sampled_from("a.b[]=#{} \"'\\\n\u00e9"), max_size=5),
)


@dataclass
class Writer:
    """Writes a TOML document in many styles, and notes the line on which each key begins."""

    draw: st.DrawFn
    text: str = ""
    expected: dict[tuple[str | int, ...], int] = field(default_factory=dict)

    def note(self, path: tuple[str | int, ...]) -> None:
        self.expected[path] = self.text.count("\n") + 1

    def noise(self) -> None:
        self.text += self.draw(st.sampled_from(["", "", "\n", "  ", "# [x] = 1\n", "\t# '''\n\n"]))

    def space(self) -> None:
        self.text += self.draw(st.sampled_from(["", " ", "\t "]))

    def key(self, key: str) -> None:
        bare = key != "" and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
        literal = "'" not in key and "\n" not in key
        style = self.draw(st.sampled_from(["basic"] + ["bare"] * bare + ["literal"] * literal))
        if style == "bare":
            self.text += key
        elif style == "literal":
            self.text += f"'{key}'"
        else:
            escaped = key.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\u00e9", "\\u00e9")
            self.text += f'"{escaped}"'

    def value(self, path: tuple[str | int, ...], value: Any, *, one_line: bool) -> None:
        if isinstance(value, list):
            self.text += "["
            for index, inner in enumerate(value):
                if not one_line:
                    self.noise()
                self.note((*path, index))
                self.value((*path, index), inner, one_line=one_line)
                if not one_line:
                    self.noise()
                self.text += ","
            if not one_line:
                self.noise()
            self.text += "]"
        elif isinstance(value, dict):
            self.text += "{"
            for index, (key, inner) in enumerate(value.items()):
                self.text += "," if index else ""
                self.space()
                self.note((*path, key))
                self.key(key)
                self.space()
                self.text += "="
                self.space()
                self.value((*path, key), inner, one_line=True)
                self.space()
            self.text += "}"
        else:
            self.text += value

    def table(self, path: tuple[str | int, ...], table: dict[str, Any]) -> None:
        for key, value in table.items():
            self.noise()
            self.note((*path, key))
            self.key(key)
            self.space()
            self.text += "="
            self.space()
            self.value((*path, key), value, one_line=False)
            self.space()
            self.text += self.draw(st.sampled_from(["\n", " # c\n"]))


SCALARS = st.sampled_from(
    [
        "1",
        "-0.5",
        "true",
        "1979-05-27 07:32:00",
        '"text # [x]"',
        "'literal \\'",
        '"""\n[x]\ny = 1\\""" ""\n"""',
        "'''\n[[z]]\n'''''",
        '""',
        "''",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


@st.composite
def documents(draw: st.DrawFn) -> Writer:
    writer = Writer(draw)
    top: dict[str, Any] = draw(TABLES)
    writer.table((), top)
    for name in draw(st.lists(KEYS.filter(lambda key: key not in top), unique=True, max_size=3)):
        elements = draw(st.integers(0, 3))
        for index in range(max(1, elements)):
            writer.noise()
            path: tuple[str | int, ...] = (name,) if elements == 0 else (name, index)
            if index == 0:
                writer.note((name,))
            writer.note(path)
            writer.text += "[" if elements == 0 else "[["
            writer.space()
            writer.key(name)
            writer.space()
            writer.text += "]\n" if elements == 0 else "]] # x\n"
            writer.table(path, draw(TABLES))
    return writer


@settings(deadline=None)
@given(documents())
def test_generated_documents_have_their_keys_where_they_were_written(writer: Writer) -> None:
    lines = LineNumbers(writer.text)
    assert set(places(tomllib.loads(writer.text))) == set(writer.expected)
    assert {path: lines.line(path) for path in writer.expected} == writer.expected
