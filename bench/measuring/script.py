"""How a script that measures runs: its flags, signals, progress and exit code.

A script has a parser made by :func:`parser_of` and one function that does the work with the options; its ``main`` calls
:func:`run` with these two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bench.measuring.interrupt import Interrupted, raise_on_signals
from bench.measuring.load import BenchError, UsageError

__all__ = ["parser_of", "progress", "run"]


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """A parser without flags yet; its help tells the exit codes of :func:`run`."""
    return argparse.ArgumentParser(
        prog=script,
        description=description,
        epilog="Exit codes: 0 done, 1 failed, 2 usage, 130 or 143 interrupted.",
        allow_abbrev=False,
    )


def run(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None
) -> int:
    """Do the work for ``arguments`` (None: those of the command line); returns the exit code.

    If that is not 0, it has written the reason to stderr: a sentence for BenchError and OSError, which ``work`` may
    raise. Any other exception is a bug and is not caught. Raises SystemExit for wrong flags and for ``--help``.
    """
    options = parser.parse_args(arguments)
    raise_on_signals()
    try:
        work(options)
    except Interrupted as interruption:
        print(f"{parser.prog}: interrupted; everything that was started has been ended", file=sys.stderr)
        return interruption.exit_code
    except (BenchError, OSError) as error:
        print(f"{parser.prog}: {_said(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _said(error: BenchError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        # str() begins with the number of the error, which tells a reader nothing.
        return f"{error.filename}: {error.strerror}"
    return str(error)


def progress(text: str) -> None:
    """Show the progress on stderr, if that is a terminal, in place of the last message; "" removes it."""
    if sys.stderr.isatty():
        # Cut to the width: a line that wraps could not be removed.
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)
