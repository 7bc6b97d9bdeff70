"""Documents with promises name the tests that show them, and have every word of the vocabulary."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from frelay.protocol.messages import REFUSAL_CODES
from frelay.protocol.outcome import Outcome

ROOT: Final = Path(__file__).parents[2]
# A file, a test in it, or (`::test_x` after another one) a test in the last named file.
_NAMED: Final = re.compile(r"`(?P<file>test_\w+\.py)?(?:::(?P<test>test_\w+))?`")


@cache
def functions_of(file: str) -> frozenset[str]:
    """The tests in the file of this name anywhere under ``tests/``; none if there is no such file."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name == file]
    return frozenset(
        node.name
        for path in found
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def named(text: str) -> list[tuple[str, str | None]]:
    """The tests that a document names, as file and function, in their order."""
    found: list[tuple[str, str | None]] = []
    for match in _NAMED.finditer(text):
        if match["file"] or match["test"]:
            found.append((match["file"] or found[-1][0], match["test"]))
    return found


@pytest.mark.parametrize("name", ["security.md", "closing.md"])
def test_each_test_that_is_named_exists(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    found = named(text)
    assert len(found) > 20
    missing = [
        f"{file}::{test}" for file, test in found if not functions_of(file) or (test and test not in functions_of(file))
    ]
    assert missing == []
    # None was missed because of the way it is written.
    assert len(re.findall(r"test_\w+\.py", text)) == sum(1 for match in _NAMED.finditer(text) if match["file"])


def test_every_promise_names_one() -> None:
    text = (ROOT / "docs/security.md").read_text()
    promises = text.partition("\n## Promises\n")[2].partition("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("|") and "---" not in line]
    rows = [row for row in rows if row != "| promise | shown by |"]
    assert len(rows) > 20
    assert [row for row in rows if not named(row)] == []


@pytest.mark.parametrize("word", sorted({outcome.value for outcome in Outcome} | REFUSAL_CODES))
def test_every_way_to_end_is_described(word: str) -> None:
    assert f"`{word}`" in (ROOT / "docs/closing.md").read_text()


def test_each_outcome_and_each_code_has_its_row() -> None:
    """The table of codes has codes only; every outcome stands alone in a cell of a table."""
    text = (ROOT / "docs/closing.md").read_text()
    waiting = text.partition("\n## 2. ")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", waiting, re.MULTILINE)) == REFUSAL_CODES
    cells = {cell for line in text.splitlines() if line.startswith("|") for cell in re.findall(r"`([a-z-]+)`", line)}
    assert {outcome.value for outcome in Outcome} <= cells
