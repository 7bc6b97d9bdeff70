"""Runs a fuzz target under atheris, with libFuzzer's own options::

    pip install -e '.[fuzz]'
    python tests/fuzz/fuzz_frames.py -max_total_time=60
    python tests/fuzz/fuzz_frames.py .fuzz/frames/crash-...        # one input again

The committed corpus is where it begins. What it finds on the way goes to ``.fuzz/``, so that a campaign goes on where
the last one stopped; what found a bug becomes a file of the corpus, and is from then on a test.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Final

__all__ = ["corpus", "run"]

_HERE: Final = Path(__file__).parent
# A little more than two frames of the largest size: no target has a larger limit to reach.
_MAX_LENGTH: Final = 8300


def corpus(target: str) -> list[Path]:
    """The committed inputs of a target."""
    return sorted((_HERE / "corpus" / target).iterdir())


def run(one_input: Callable[[bytes], None], *, instrument: tuple[str, ...]) -> None:
    """Fuzz as long as libFuzzer's options say, guided by the coverage of modules with the prefixes ``instrument``."""
    # Not at the top of the module: a test that only calls a target needs no atheris.
    atheris = importlib.import_module("atheris")
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and (thing.__module__ or "").startswith(instrument):
            atheris.instrument_func(thing)
    target = Path(sys.argv[0]).stem.removeprefix("fuzz_")
    scratch = _HERE.parents[1] / ".fuzz" / target
    scratch.mkdir(parents=True, exist_ok=True)
    options = [f"-artifact_prefix={scratch}/", f"-max_len={_MAX_LENGTH}", *sys.argv[1:]]
    if all(option.startswith("-") for option in sys.argv[1:]):
        options += [str(scratch), str(_HERE / "corpus" / target)]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()
