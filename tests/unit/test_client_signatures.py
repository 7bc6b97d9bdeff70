"""What ``connect`` takes is shown by ``help()``, the same in all three clients, and as docs/functions.md has it."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import frelay
from frelay.client.options import Options
from frelay.client.retry import Retry

FUNCTIONS: Final = Path(__file__).parents[2] / "docs" / "functions.md"
CONNECTS: Final[dict[str, Callable[..., Any]]] = {
    "blocking": frelay.connect,
    "trio": frelay.client.trio.connect,
    "asyncio": frelay.client.asyncio.connect,
}


def arguments(connect: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(connect).parameters.items() if name != "limit"}


@pytest.mark.parametrize("client", CONNECTS)
def test_all_clients_take_the_same(client: str) -> None:
    """Names, order, defaults and types; asyncio's ``limit`` is its reader's."""
    found = arguments(CONNECTS[client])
    assert list(found.values()) == list(arguments(frelay.connect).values())
    assert set(found) == {"address", *Options.__annotations__}
    required = {name for name, one in found.items() if one.default is inspect.Parameter.empty}
    assert required == {"address", "cert", "ca", "peer"}
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for name, one in found.items() if name != "address")


@pytest.mark.parametrize("client", CONNECTS)
def test_help_shows_them(client: str) -> None:
    text = pydoc.plain(pydoc.render_doc(CONNECTS[client]))
    head = text.partition("Join a route")[0]
    for name in Options.__annotations__:
        assert re.search(rf"\b{name}: ", head), name
    assert "options" not in head


def table_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a line of docs/functions.md, without its head."""
    lines = FUNCTIONS.read_text().partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_docs_name_them_all() -> None:
    named = [name for row in table_below("answer = wire.recv(65536)\n```") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(Options.__annotations__)


def test_each_error_of_the_docs_can_be_caught_by_its_name() -> None:
    names = {re.match(r"`(\w+)", row[0]) for row in table_below("## What each error means")}
    found = {match[1] for match in names if match}
    assert {"Refused", "CertificateError", "CertificateRefused", "ValueError"} <= found
    for name in found - {"ValueError"}:
        assert issubclass(getattr(frelay, name), frelay.FrelayError)
        assert name in frelay.__all__


def test_each_name_of_the_docs_is_there() -> None:
    """``frelay.client.trio.connect`` and all else that is written with its module."""
    text = FUNCTIONS.read_text()
    # As code: called, or between backticks. A host's name may begin so, too.
    names = set(re.findall(r"(?<![\w./])frelay((?:\.[A-Za-z_]+)+)(?=[(`])", text))
    assert {".connect", ".client.trio.connect", ".client.asyncio.connect", ".Retry", ".FrelayError"} <= names
    for name in names:
        found: object = frelay
        for part in name[1:].split("."):
            found = getattr(found, part)
    assert frelay.Retry is Retry


@pytest.mark.parametrize("name", ["trio", "asyncio"])
def test_a_client_is_an_attribute_without_an_import_of_its_own(name: str) -> None:
    """In a fresh interpreter, where nobody has imported it before."""
    code = f"import frelay, sys; assert 'trio' not in sys.modules; print(frelay.client.{name}.connect.__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("connect\n", "")
