"""Each case of the test plan has a test that names it in its docstring: ``TESTPLAN 14`` or ``TESTPLAN 14, 18``.

This fails for a case that no test names. The phrases here only say what a case is about; the tests say what they show.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]

CASES: Final[dict[int, str]] = {
    # Who gets in.
    1: "a certificate that does not verify, or is another route's",
    2: "the common name",
    3: "DNS names that only look like the right one",
    4: "the right text under the wrong type",
    5: "odd SPIFFE IDs",
    6: "one function twice with one attempt",
    7: "one route's certificate on another",
    8: "resumption",
    9: "a callback that raises",
    10: "what is no handshake of frelay's",
    11: "name constraints",
    12: "revocation lists that are bad, old or absent",
    13: "policy that changes in mid-pairing",
    # Framing and hand-off.
    14: "close_notify and raw bytes in one segment",
    15: "raw bytes too early",
    16: "FIN or RST instead of close_notify",
    17: "a forged alert",
    18: "one leg raw and the other not yet",
    19: "floods around the border of TLS",
    20: "plaintext where inner TLS is required",
    21: "frames of any content",
    22: "any order of events, against a model",
    # Bytes and half-close.
    23: "bulk both ways, whole",
    24: "odd sizes and ping-pongs",
    25: "half-close, and an answer after it",
    26: "a reader that pauses",
    27: "half-closed and silent",
    28: "splice at its edges",
    29: "a pipe with bytes in it at a cancellation",
    30: "early data",
    # Time and load.
    31: "slow handshakes",
    32: "the end of a wait",
    33: "idle and slow pairings live",
    34: "a flood of handshakes",
    35: "few descriptors",
    36: "one identity over its quota",
    37: "a storm of connections",
    38: "readers that never read",
    39: "churn leaves nothing",
    # Reload and end.
    40: "a reload that is refused",
    41: "every way to change a file",
    42: "a storm of SIGHUPs",
    43: "a key swapped in mid-read",
    44: "one route removed, another untouched",
    45: "SIGTERM in mid-transfer",
    46: "signals during the drain",
    47: "a network that drops everything",
    48: "resets in mid-stream",
    49: "a relay killed and started again",
    50: "clock jumps",
    51: "logs and resolvers that fail",
    52: "a route added on a full disk, or in a crash",
    # Admin and supply chain.
    53: "browsers that are steered",
    54: "hostile names and documents",
    55: "dependencies pinned, audited and told",
}

STRUCK: Final[dict[int, str]] = {}
"""Cases that make no sense any more, with the reason."""

PENDING: Final[frozenset[int]] = frozenset()
"""Cases whose tests are not merged yet. This set may only shrink."""

_NAMED: Final = re.compile(r"TESTPLAN (\d+(?:(?:, | and )\d+)*)")


def numbers(text: str) -> set[int]:
    """The numbers that a docstring names."""
    return {int(number) for found in _NAMED.finditer(text) for number in re.findall(r"\d+", found[1])}


def docstrings_of(tree: ast.Module) -> Iterator[str]:
    """The docstrings of the tests in a file, of the file itself, and of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test_"):
                yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Module | ast.ClassDef):
            yield ast.get_docstring(node) or ""


@cache
def named_by() -> dict[int, list[str]]:
    """By number, the files whose tests name it."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for docstring in docstrings_of(ast.parse(text)) if "TESTPLAN" in text else ():
            for number in numbers(docstring):
                found[number].append(str(path.relative_to(TESTS)))
    return found


def test_the_list_is_whole() -> None:
    assert list(CASES) == list(range(1, 56))
    assert set(CASES) >= PENDING | STRUCK.keys()
    assert not PENDING & STRUCK.keys()


def test_every_case_is_named_by_a_test() -> None:
    found = named_by()
    missing = {number: what for number, what in CASES.items() if number not in found}
    assert missing.keys() <= PENDING | STRUCK.keys(), {n: missing[n] for n in missing.keys() - PENDING - STRUCK.keys()}


def test_no_case_is_pending_once_a_test_names_it() -> None:
    """Nor may a test name a case that was struck: then the reason is wrong, or the test."""
    done = named_by().keys()
    assert not PENDING & done
    assert not STRUCK.keys() & done


def test_no_test_names_a_case_that_there_is_not() -> None:
    found = named_by()
    assert not {number: files for number, files in found.items() if number not in CASES}


def test_the_ways_to_name_numbers() -> None:
    """Otherwise a typing error in a docstring would count as a case that has its test."""
    assert numbers("TESTPLAN 14.") == {14}
    assert numbers("TESTPLAN 1, 12: and so on.\n\nTESTPLAN 3 and 9, for TLS 1.3") == {1, 12, 3, 9}
    assert numbers("TESTPLAN 40, a second time") == {40}
    assert numbers("TESTPLAN") == numbers("14") == set()
