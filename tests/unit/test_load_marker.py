"""Tests that count descriptors or tasks, or that read a clock, carry the marker ``load``, and count only their own.

``pytest -m load`` beside other work shows whether these tests pass on a busy machine too, so all of them must be in it.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.descriptors import open_descriptors, opened_since

TESTS: Final = Path(__file__).parents[1]

COUNTS_OR_CLOCKS: Final = frozenset(
    {
        # tests/support/descriptors.py, holdings.py and waiting.py
        *("open_descriptors", "opened_since", "holdings", "as_before", "despite_stalls", "before_it_expires"),
        # Trio and the standard library
        *("tasks_living", "current_time", "monotonic", "perf_counter", "process_time", "get_objects"),
        # tests/support/kernel.py
        *("resident", "rests"),
    }
)


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def _is_marked(decorators: list[ast.expr]) -> bool:
    return any("load" in _names(decorator) for decorator in decorators)


def unmarked(source: str) -> list[str]:
    """The tests of a file that count or read a clock, themselves or by a helper beside them, without the marker."""
    if not any(name in source for name in COUNTS_OR_CLOCKS):
        return []
    tree = ast.parse(source)
    definitions = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    uses = {name: set(_names(node)) for name, node in definitions.items()}

    def concerned(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if uses[name] & COUNTS_OR_CLOCKS:
            return True
        helpers = (uses[name] & definitions.keys()) - seen - {name}
        return any(concerned(helper, seen | {name}) for helper in helpers)

    for node in tree.body:
        if isinstance(node, ast.Assign) and "pytestmark" in _names(node) and "load" in _names(node.value):
            return []
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id[:4] == "Test":
            # The test case of a state machine is given a name, and may be given a marker in the same line.
            uses[node.targets[0].id] = set(_names(node.value))
    marked = {name for name, node in definitions.items() if _is_marked(node.decorator_list)}
    marked |= {name for name in uses.keys() - definitions.keys() if "load" in uses[name]}
    tests = [name for name in uses if name.lower().startswith("test")]
    return [name for name in tests if name not in marked and concerned(name)]


def test_what_counts_or_reads_a_clock_is_marked() -> None:
    found = [
        f"{path.relative_to(TESTS)}::{name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in unmarked(path.read_text())
    ]
    assert found == [], "decorate them with @pytest.mark.load"


def test_a_helper_in_between_hides_nothing() -> None:
    source = "def took(): return monotonic()\ndef test_x(): assert took() < 1\ndef test_y(): pass\n"
    assert unmarked(source) == ["test_x"]
    assert unmarked(source.replace("def test_x", "@pytest.mark.load\ndef test_x")) == []
    assert unmarked("pytestmark = pytest.mark.load\n" + source) == []


def test_a_state_machine_is_a_test_too() -> None:
    source = "class M:\n    def teardown(self): assert not opened_since(self.before)\n\nTestM = MARK(M.TestCase)\n"
    assert unmarked(source.replace("MARK", "")) == ["TestM"]
    assert unmarked(source.replace("MARK", "pytest.mark.load")) == []


@pytest.mark.load
def test_what_an_earlier_test_has_left_may_go_at_any_moment() -> None:
    """``opened_since`` is right although an old descriptor closes and a new one gets its number. A count is not."""
    theirs = os.pipe()
    before = open_descriptors()
    os.close(theirs[0])
    os.close(theirs[1])
    assert opened_since(before) == {}
    ours = os.pipe()
    try:
        assert opened_since(before).keys() == set(ours)
        assert all(what.startswith("pipe:") for what in opened_since(before).values())
    finally:
        os.close(ours[0])
        os.close(ours[1])
    assert opened_since(before) == {}
