"""One TOML file of a configuration: it is read and parsed, and its problems are reported with key and line.

A value in a file is named by its key path, the keys and indexes that lead to it: ``("route", 0, "func1", 2)``.
pydantic's errors, tomllib's result, :class:`~frelay.config.line_numbers.LineNumbers` and our own rules all use this
form. Only :meth:`Document.report` turns it into the key and the line that a person reads.

A path may name the wrong thing by mistake: a directory, a FIFO that never ends, a file of gigabytes. Reading refuses
each of them. Messages quote the file, and end up in logs and terminals: so quotes are shortened, and control characters
are escaped.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from frelay.config.line_numbers import KeyPath, LineNumbers
from frelay.config.model import (
    AdminSection,
    GroupTable,
    Limits,
    MetricsSection,
    RelaySection,
    RouteLimits,
    RouteTable,
    Section,
    TcpSection,
    TlsSection,
    is_name,
)
from frelay.errors import Problem, without_pem

__all__ = [
    "ARRAYS",
    "MAX_FILE_SIZE",
    "SECTIONS",
    "Document",
    "KeyPath",
    "explain",
    "parse_document",
    "read_document",
    "shown",
    "unknown_key",
]

# 10,000 routes take about 1.5 MB. A larger file is no route file, or its routes should be in routes_dir.
MAX_FILE_SIZE: Final = 1024 * 1024
_MAX_MESSAGE: Final = 600  # characters; a selector may have 2,048, and nobody reads all of that
_MAX_SHOWN: Final = 60

SECTIONS: Final[Mapping[str, type[Section]]] = {
    "relay": RelaySection,
    "tls": TlsSection,
    "limits": Limits,
    "tcp": TcpSection,
    "admin": AdminSection,
    "metrics": MetricsSection,
}
ARRAYS: Final[Mapping[str, type[Section]]] = {"group": GroupTable, "route": RouteTable}

# --- one file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A parsed TOML file, and the list to which its problems are added."""

    path: Path
    text: str
    table: dict[str, Any]
    problems: list[Problem]

    @cached_property
    def _lines(self) -> LineNumbers:
        return LineNumbers(self.text)  # made only if the file has a problem

    def line(self, key_path: KeyPath) -> int | None:
        """The line of ``key_path``, or of the nearest table or list around it."""
        return self._lines.line(key_path)

    def report(
        self, key_path: KeyPath, message: str, *, line_of: KeyPath | None = None, is_conflict: bool = False
    ) -> None:
        """Add a problem with the key at ``key_path``. ``line_of`` is another key whose line is shown instead."""
        self.problems.append(
            Problem(
                file=self.path,
                message=_printable(message),
                key=_printable(self._key(key_path)) or None,
                line=self.line(key_path if line_of is None else line_of),
                is_conflict=is_conflict,
            )
        )

    def where(self, key_path: KeyPath) -> str:
        """File and line of ``key_path``, for a message about another key."""
        line = self.line(key_path)
        return _printable(str(self.path) if line is None else f"{self.path}:{line}")

    def _key(self, key_path: KeyPath) -> str:
        """``route[shuffle].func1[0]``: a table with a valid name is shown by it, another one by its index from 0."""
        written = ""
        for index, step in enumerate(key_path):
            if isinstance(step, str):
                key = step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else json.dumps(step)
                written += f".{key}" if written else key
            else:
                written += f"[{self._name_at(key_path[: index + 1]) or step}]"
        return written

    def _name_at(self, key_path: KeyPath) -> str | None:
        if len(key_path) != 2 or key_path[0] not in ARRAYS:
            return None
        table = self.table[str(key_path[0])][key_path[1]]
        name = table.get("name") if isinstance(table, dict) else None
        return name if is_name(name) else None


def read_document(path: Path, problems: list[Problem], *, may_be_gone: bool = False) -> Document | None:
    """Read and parse ``path``; None after a problem, or if it ``may_be_gone`` and does not exist."""

    def refuse(message: str) -> None:
        problems.append(Problem(file=path, message=_printable(message)))

    try:
        content = _read(path)
    except FileNotFoundError:
        if os.path.lexists(path):
            refuse("is a symbolic link to a file that does not exist")
        elif not may_be_gone:
            refuse('there is no such file: "frelay init DIR" writes a working one')
    except IsADirectoryError:
        refuse("is a directory: name the file in it")
    except PermissionError:
        refuse(f"may not be read by user {os.geteuid()}: change its owner or mode, or the directory's")
    except (OSError, ValueError) as error:
        refuse(f"cannot be read: {(isinstance(error, OSError) and error.strerror) or error}")
    else:
        return parse_document(path, content, problems)
    return None


def parse_document(path: Path, content: bytes, problems: list[Problem]) -> Document | None:
    """Parse the ``content`` of ``path``, which may not be written yet; None after a problem."""

    def refuse(message: str, line: int | None = None) -> None:
        problems.append(Problem(file=path, message=_printable(message), line=line))

    if len(content) > MAX_FILE_SIZE:
        refuse("has more than 1 MiB, which no route file needs; put many routes into relay.routes_dir, one file each")
        return None
    try:
        # utf-8-sig skips the byte order mark of some editors, which tomllib would call an invalid statement.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        refuse(f"is not UTF-8 (byte 0x{content[error.start]:02x}): save it as UTF-8", line)
        return None
    try:
        return Document(path, text, tomllib.loads(text), problems)
    except tomllib.TOMLDecodeError as error:
        refuse(*_syntax(str(error), text))
    except RecursionError:
        refuse("is not usable TOML: its values nest too deeply")
    except ValueError as error:  # tomllib does not catch this: an int with more digits than sys.set_int_max_str_digits
        refuse(f"is not usable TOML: {error}")
    return None


def _read(path: Path) -> bytes:
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        return file.read(MAX_FILE_SIZE + 1)


def _without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, open(2) of a FIFO would hang the relay; so it is an error.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


_SYNTAX_PLACE: Final = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)\Z")


def _syntax(error: str, text: str) -> tuple[str, int]:
    """The message for a TOML syntax error, and its line, which tomllib gives only in the text of the error."""
    found = _SYNTAX_PLACE.search(error)
    what = error[: found.start()] if found else error
    if found is None or found["line"] is None:
        return f"is not valid TOML: {what}, up to the end of the file", text.count("\n") + 1
    return f"is not valid TOML: {what} (column {found['column']})", int(found["line"])


# --- messages --------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """``text`` without private keys, shortened, and escaped: it can neither forge a log line nor control a terminal."""
    text = without_pem(text)
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]}..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode()
        for character in text
    )


def shown(value: object) -> str:
    """A value of a file in short, as TOML would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = json.dumps(value[: _MAX_SHOWN + 1], ensure_ascii=False)
    elif isinstance(value, (int, float)):
        try:
            text = str(value)
        except ValueError:  # more than 4,300 digits; tomllib accepts that many in hexadecimal
            return "a very large number"
    elif isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    elif isinstance(value, dict):
        return "a table"
    elif isinstance(value, (datetime.date, datetime.time)):
        return "a date or time"
    else:
        return "something else"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _homes() -> dict[str, str]:
    """For each key that only one table has: the header of that table, such as ``[tcp]``."""
    homes: dict[str, set[str]] = defaultdict(set)
    for name, model in (*SECTIONS.items(), *ARRAYS.items()):
        for key in model.model_fields:
            if not (name == "route" and key in RouteLimits.model_fields):
                homes[key].add(f"[[{name}]]" if name in ARRAYS else f"[{name}]")
    return {key: next(iter(tables)) for key, tables in homes.items() if len(tables) == 1}


_HOMES: Final = _homes()


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that is not among ``known``: the key that was probably meant, or its right table."""
    choices = sorted(known)
    if key in _HOMES and key not in choices:
        return f"is no key of this table: it belongs into {_HOMES[key]}"
    near = get_close_matches(key, choices, 1) if len(key) <= _MAX_SHOWN else []
    if near:
        return f'is not a known key: did you mean "{near[0]}"?'
    return f"is not a known key; known here: {', '.join(choices)}"


_TYPES: Final[Mapping[str, str]] = {
    "bool_type": "true or false",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "model_type": "a table",
    "string_type": "text",
}
_BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: Mapping[str, Any], model: type[Section]) -> str:
    """An error of pydantic in a table of ``model``, as a message for the author of the file."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        # The only table inside a table is { dial = "HOST:PORT" }.
        known = model.model_fields if len(error["loc"]) == 1 else ("dial", "connect_timeout")
        return unknown_key(str(error["loc"][-1]), known)
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {shown(value)}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]:.15g}, not {shown(value)}"
    if kind == "literal_error":
        return f"must be {context['expected']}, not {shown(value)}".replace("'", '"')
    return f"{error['msg']}, not {shown(value)}"
