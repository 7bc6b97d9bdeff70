"""Flags that several scripts here have: numbers within limits, lists of words, and files to write."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["duration", "number", "output_directory", "output_file", "round_count", "some_of", "whole"]


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
    """How often everything is measured; raises ArgumentTypeError."""
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


# Results are written at the end. If that is not possible, say so before minutes of measuring.


def output_file(text: str) -> Path:
    """A file to write, new or not; raises ArgumentTypeError if it cannot be written."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!r} is a directory: give a file in it")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"{text!r}: {str(path.parent)!r} is no directory; make it first")
    return _writable(path if os.path.exists(path) else path.parent, path)


def output_directory(text: str) -> Path:
    """A directory to write into, new or not; raises ArgumentTypeError if that is not possible."""
    path = Path(text)
    nearest = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not os.path.isdir(nearest):
        raise argparse.ArgumentTypeError(f"{text!r} can be no directory: {str(nearest)!r} is a file")
    return _writable(nearest, path)


def _writable(place: Path, path: Path) -> Path:
    """``path``, if this user may write to ``place``, on which it depends."""
    if not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{str(place)!r} may not be written by this user: give another place")
    return path
