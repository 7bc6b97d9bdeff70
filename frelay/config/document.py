"""One TOML file of a configuration: read, parsed, and able to say where in it something is wrong.

A place in a file is a path of keys and indexes, ``("route", 0, "func1", 2)``. pydantic's errors, tomllib's result,
:class:`~frelay.config.line_numbers.Lines` and our own rules all speak of places in this way; :meth:`Document.report`
alone turns one into the key path and the line that a person reads.

Reading is guarded against what a path can be by mistake: a directory, a FIFO that never ends, a file of gigabytes.
And what comes back to the reader out of a file is shortened and has its control characters escaped, since these
messages end up in logs and terminals.
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

from frelay.config.line_numbers import Lines
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
    "Place",
    "explain",
    "parse_document",
    "read_document",
    "shown",
    "unknown_key",
]

# 10,000 routes take about 1.5 MB: beyond this it is some other file, or routes_dir is the place for them.
MAX_FILE_SIZE: Final = 1024 * 1024
_MAX_MESSAGE: Final = 600  # characters; a selector may have 2,048, and one that long explains nothing in full
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

Place = tuple[str | int, ...]


# --- one file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A TOML file that could be parsed, and the list that its problems go to."""

    path: Path
    text: str
    table: dict[str, Any]
    problems: list[Problem]

    @cached_property
    def _lines(self) -> Lines:
        return Lines(self.text)  # only a file with a problem in it is read for its lines

    def line(self, place: Place) -> int | None:
        """The line of ``place``, or of what is next above it in the file."""
        return self._lines.line(place)

    def report(self, place: Place, message: str, *, line_of: Place | None = None, is_conflict: bool = False) -> None:
        """Add a problem with the key at ``place``; ``line_of`` where the line to show is another key's."""
        self.problems.append(
            Problem(
                file=self.path,
                message=_printable(message),
                key=_printable(self._key(place)) or None,
                line=self.line(place if line_of is None else line_of),
                is_conflict=is_conflict,
            )
        )

    def where(self, place: Place) -> str:
        """File and line of ``place``, for the message of a problem elsewhere that has to do with it."""
        line = self.line(place)
        return _printable(str(self.path) if line is None else f"{self.path}:{line}")

    def _key(self, place: Place) -> str:
        """``route[shuffle].func1[0]``: tables with a usable name are shown by it, others by their index from 0."""
        written = ""
        for index, step in enumerate(place):
            if isinstance(step, str):
                key = step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else json.dumps(step)
                written += f".{key}" if written else key
            else:
                written += f"[{self._name_at(place[: index + 1]) or step}]"
        return written

    def _name_at(self, place: Place) -> str | None:
        if len(place) != 2 or place[0] not in ARRAYS:
            return None
        table = self.table[str(place[0])][place[1]]
        name = table.get("name") if isinstance(table, dict) else None
        return name if is_name(name) else None


def read_document(path: Path, problems: list[Problem], *, may_be_gone: bool = False) -> Document | None:
    """Read and parse ``path``; None after a problem, or if it ``may_be_gone`` and is."""

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
    """Parse what stands in ``path``, or is to stand there; None after a problem."""

    def refuse(message: str, line: int | None = None) -> None:
        problems.append(Problem(file=path, message=_printable(message), line=line))

    if len(content) > MAX_FILE_SIZE:
        refuse("has more than 1 MiB, which no route file needs; many routes belong into relay.routes_dir")
        return None
    try:
        # With the mark that some editors put first; tomllib would call it an invalid statement.
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
    except ValueError as error:  # an int beyond sys.set_int_max_str_digits, of which tomllib knows nothing
        refuse(f"is not usable TOML: {error}")
    return None


def _read(path: Path) -> bytes:
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        return file.read(MAX_FILE_SIZE + 1)


def _without_waiting(path: str, flags: int) -> int:
    # A FIFO put there by mistake must be an error, not a relay that hangs in open(2).
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


_SYNTAX_PLACE: Final = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)\Z")


def _syntax(error: str, text: str) -> tuple[str, int]:
    """The message for a TOML syntax error, and its line; tomllib has it in the text of its error only."""
    found = _SYNTAX_PLACE.search(error)
    what = error[: found.start()] if found else error
    if found is None or found["line"] is None:
        return f"is not valid TOML: {what}, up to the end of the file", text.count("\n") + 1
    return f"is not valid TOML: {what} (column {found['column']})", int(found["line"])


# --- what the reader is told -----------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """``text`` without what could forge a log line, steer a terminal, or be a key, and not longer than needed."""
    text = without_pem(text)
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]}..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode()
        for character in text
    )


def shown(value: object) -> str:
    """A value of a file in TOML's words, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = json.dumps(value[: _MAX_SHOWN + 1], ensure_ascii=False)
    elif isinstance(value, (int, float)):
        try:
            text = str(value)
        except ValueError:  # more than 4,300 digits, which hexadecimal can bring past tomllib
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
    """For each key that only one table has, that table as it is written."""
    homes: dict[str, set[str]] = defaultdict(set)
    for name, model in (*SECTIONS.items(), *ARRAYS.items()):
        for key in model.model_fields:
            if not (name == "route" and key in RouteLimits.model_fields):
                homes[key].add(f"[[{name}]]" if name in ARRAYS else f"[{name}]")
    return {key: next(iter(tables)) for key, tables in homes.items() if len(tables) == 1}


_HOMES: Final = _homes()


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that is not among ``known``: what was meant, or where it belongs."""
    choices = sorted(known)
    if key in _HOMES and key not in choices:
        return f"is not known here: it belongs into {_HOMES[key]}"
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
    """What pydantic found in a table of ``model``, in words for whoever wrote the file."""
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
