"""What the flags of the scripts here have in common: numbers within limits, and lists of words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

__all__ = ["duration", "number", "round_count", "some_of", "whole"]


def number(text: str, lowest: float, highest: float, what: str) -> float:
    """A number of ``what``; raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {lowest:g} to {highest:g}")
    return value


def whole(text: str, highest: int, what: str) -> int:
    """A whole number, from 1; raises ArgumentTypeError."""
    value = number(text, 1, highest, what)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return int(value)


def round_count(text: str) -> int:
    """How often all is measured; raises ArgumentTypeError."""
    return whole(text, 1000, "a number of rounds")


def duration(text: str) -> float:
    """How long one measurement counts, in seconds; raises ArgumentTypeError."""
    return number(text, 0.2, 3600, "a number of seconds")


def some_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads a list of words with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
        for item in chosen:
            if item not in allowed:
                raise argparse.ArgumentTypeError(f"{item!r} is none of {', '.join(allowed)}")
        return chosen

    return read
