"""Finds the line of each key in a TOML document.

``tomllib`` gives values without their lines, but a person needs the line of an error. So this module scans the document
a second time, for lines only. It checks nothing: it expects a document that tomllib has accepted. Where it finds
something else it continues with the next line, so that it never raises and always ends.

Lines are recorded by key path, the keys and indexes that lead to a value in tomllib's result:
``("route", 0, "listen")``. Three facts of TOML explain most of the code below:

1. ``[[route]]`` begins the next element of an array, and later headers that pass through ``route`` mean its last
   element. So the scanner counts the elements of each array, and puts the current index into the path of every header.
2. A header or dotted key ``a.b.c`` also creates ``a`` and ``a.b``. They get the line where they first appear, until a
   header of their own follows.
3. Strings may hold anything that looks like syntax, over several lines. The scanner skips each string as a whole, by
   the rules for its end: a multi-line string may have up to two more quotes directly before the three that close it.

Values nest, but the scanner keeps its own stack instead of recursing, and does not record paths deeper than
:data:`MAX_DEPTH`. So a deep document costs neither the interpreter's stack nor quadratic memory.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

__all__ = ["MAX_DEPTH", "KeyPath", "LineNumbers"]

KeyPath = tuple[str | int, ...]

# The deepest path of a valid route file has four steps, route[0].func1[0]. The rest is for files with mistakes.
MAX_DEPTH: Final = 32

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_NEWLINE: Final = re.compile(r"\n")
_SPACE: Final = re.compile(r"[ \t]*")
_BETWEEN_STATEMENTS: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BETWEEN_VALUES: Final = re.compile(r"(?:[ \t\r\n,]+|#[^\n]*)*")
_REST_OF_LINE: Final = re.compile(r"[^\n]*")
_SCALAR: Final = re.compile(r"[^\n#,\]}]*")
_BASIC_STOP: Final = re.compile(r'[\\"\n]')
_BASIC_LINES_STOP: Final = re.compile(r'\\|"""')
_LITERAL_STOP: Final = re.compile(r"['\n]")
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<short>[btnfre\"\\])|x(?P<x>[0-9A-Fa-f]{2})|u(?P<u>[0-9A-Fa-f]{4})|U(?P<U>[0-9A-Fa-f]{8}))"
)
_SHORT_ESCAPES: Final = {
    "b": "\b",
    "t": "\t",
    "n": "\n",
    "f": "\f",
    "r": "\r",
    "e": "\x1b",
    '"': '"',
    "\\": "\\",
}


class LineNumbers:
    """The lines (from 1) of all keys and array elements of a TOML document, down to :data:`MAX_DEPTH` steps."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._newlines = [found.start() for found in _NEWLINE.finditer(text)]
        self._lines: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}  # of arrays of tables, by the path of the array
        self._scan()

    def __contains__(self, path: KeyPath) -> bool:
        """Whether the document has exactly this key or element."""
        return path in self._lines

    def line(self, path: Sequence[str | int]) -> int | None:
        """The line of ``path``, or of the nearest table or list around it, or None."""
        wanted = tuple(path)
        for length in range(len(wanted), 0, -1):
            found = self._lines.get(wanted[:length])
            if found is not None:
                return found
        return None

    # --- recording ---

    def _line_at(self, position: int) -> int:
        return bisect_left(self._newlines, position) + 1

    def _record(self, path: KeyPath, position: int, *, implied: bool = False) -> None:
        if not path or len(path) > MAX_DEPTH:
            return
        line = self._line_at(position)
        if implied:
            self._lines.setdefault(path, line)
        else:
            self._lines[path] = line

    def _record_key(self, path: KeyPath, keys: list[str], position: int) -> KeyPath:
        """Record ``keys`` below ``path``; only the last one is written out, the others are implied."""
        last = len(keys) - 1
        for index, key in enumerate(keys):
            path = _below(path, key)
            self._record(path, position, implied=index < last)
        return path

    def _record_header(self, keys: list[str], position: int, *, is_array: bool) -> KeyPath:
        path: KeyPath = ()
        last = len(keys) - 1
        for index, key in enumerate(keys):
            path = _below(path, key)
            if index == last and is_array:
                self._record(path, position, implied=True)
                element = self._lengths.get(path, 0)
                self._lengths[path] = element + 1
                path = _below(path, element)
                self._record(path, position)
            else:
                self._record(path, position, implied=index < last)
                if path in self._lengths:
                    path = _below(path, self._lengths[path] - 1)
        return path

    # --- reading ---

    def _scan(self) -> None:
        text = self._text
        current: KeyPath = ()
        position = 0
        while True:
            position = _skip(_BETWEEN_STATEMENTS, text, position)
            if position >= len(text):
                return
            start = position
            if text[position] == "[":
                is_array = text.startswith("[[", position)
                keys, position = self._keys(position + (2 if is_array else 1))
                if keys:
                    current = self._record_header(keys, start, is_array=is_array)
                position = _skip(_REST_OF_LINE, text, position)
                continue
            keys, position = self._keys(position)
            if keys and text.startswith("=", position):
                path = self._record_key(current, keys, start)
                position = self._value(position + 1, path)
            # After a value a line can only have a comment. A line that is no statement is skipped as well.
            position = _skip(_REST_OF_LINE, text, position)

    def _keys(self, position: int) -> tuple[list[str], int]:
        """The parts of a dotted key, and the position after it and its spaces; no parts if there is no key."""
        text, keys = self._text, list[str]()
        while True:
            position = _skip(_SPACE, text, position)
            if text.startswith('"', position):
                end = self._string_end(position)
                keys.append(_unescaped(text[position + 1 : end - 1]))
            elif text.startswith("'", position):
                end = self._string_end(position)
                keys.append(text[position + 1 : end - 1])
            else:
                found = _BARE_KEY.match(text, position)
                if found is None:
                    return [], position
                keys.append(found[0])
                end = found.end()
            position = _skip(_SPACE, text, end)
            if not text.startswith(".", position):
                return keys, position
            position += 1

    def _value(self, position: int, path: KeyPath) -> int:
        """Skip the value of ``path``, which begins after ``position``; returns the position of its end.

        ``open_values`` are the arrays (with the index of their next element) and inline tables (with None) that
        have begun and not ended.
        """
        text = self._text
        open_values: list[tuple[KeyPath, int | None]] = []
        while True:
            position = _skip(_SPACE, text, position)
            character = text[position : position + 1]
            if character == "[":
                open_values.append((path, 0))
                position += 1
            elif character == "{":
                open_values.append((path, None))
                position += 1
            elif character in ('"', "'"):
                position = self._string_end(position)
            else:
                position = _skip(_SCALAR, text, position)
            # On to where the next value begins.
            while open_values:
                position = _skip(_BETWEEN_VALUES, text, position)
                if position >= len(text):
                    return position
                if text[position] in "]}":
                    open_values.pop()
                    position += 1
                    continue
                outer, index = open_values.pop()
                if index is not None:
                    path = _below(outer, index)
                    self._record(path, position)
                    open_values.append((outer, index + 1))
                    break
                start = position
                keys, position = self._keys(position)
                if not keys or not text.startswith("=", position):
                    return position  # this is no TOML; skip the rest of the line
                path = self._record_key(outer, keys, start)
                open_values.append((outer, None))
                position += 1
                break
            else:
                return position

    def _string_end(self, position: int) -> int:
        """The position after the string that begins at ``position``, which is of any of the four kinds."""
        text = self._text
        quote = text[position]
        if text.startswith(quote * 3, position):
            return self._lines_end(position + 3, quote)
        stop = _BASIC_STOP if quote == '"' else _LITERAL_STOP
        position += 1
        while True:
            found = stop.search(text, position)
            if found is None:
                return len(text)
            if found[0] == "\\":
                position = found.end() + 1
                continue
            return found.end() if found[0] == quote else found.start()

    def _lines_end(self, position: int, quote: str) -> int:
        text = self._text
        while True:
            if quote == '"':
                found = _BASIC_LINES_STOP.search(text, position)
                if found is not None and found[0] == "\\":
                    position = found.end() + 1
                    continue
                end = -1 if found is None else found.end()
            else:
                start = text.find("'''", position)
                end = -1 if start < 0 else start + 3
            if end < 0:
                return len(text)
            for _ in range(2):
                if text.startswith(quote, end):
                    end += 1
            return end


def _below(path: KeyPath, step: str | int) -> KeyPath:
    # One step beyond the limit is kept, so that the path of a deep value never equals that of its parent.
    return path if len(path) > MAX_DEPTH else (*path, step)


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    """The end of the match of ``pattern`` at ``position``; ``position`` itself if it does not match."""
    found = pattern.match(text, position)
    return position if found is None else found.end()


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_unescape, text) if "\\" in text else text


def _unescape(found: re.Match[str]) -> str:
    if found["short"]:
        return _SHORT_ESCAPES[found["short"]]
    code = int(found["x"] or found["u"] or found["U"], 16)
    return chr(code) if code <= 0x10FFFF else found[0]
