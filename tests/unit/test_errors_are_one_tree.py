"""Every exception that leaves its room derives from FrelayError; :mod:`frelay.errors` says which ones stay outside."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import frelay

PACKAGE: Final = Path(frelay.__file__).parent
# Each is always caught in the room that raises it.
SIGNALS: Final = frozenset({"client/blocking.py Interrupted", "client/deadline.py OutOfTime", "pairing/pump.py Cut"})


def outside_of_the_tree() -> set[str]:
    """The exceptions with a public name that derive directly from Exception or BaseException."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {ast.unparse(base) for base in node.bases}
                if bases & {"Exception", "BaseException"}:
                    found.add(f"{path.relative_to(PACKAGE)} {node.name}")
    return found


def test_only_signals_stand_outside_of_the_tree() -> None:
    assert outside_of_the_tree() == SIGNALS | {"errors.py FrelayError"}
