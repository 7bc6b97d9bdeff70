"""How fast does the relay forward, and what does it cost? ``python bench/throughput.py``

It starts a relay with temporary certificates and pairs functions by the real protocol (outer mTLS, JOIN, PAIRED, and
for ``handoff`` both close_notify). Then it measures two loads over these pairs: bulk bytes one way, and ping-pong
messages of 64 bytes. Beside them it shows the same load without a relay and, if asked, through another relay in the
same run, since only ratios within one run are the same on another machine.

    python bench/throughput.py --pairs 1,16 --against haproxy
    python bench/throughput.py --modes handoff --against ../before --loads pingpong     # did my change help?

Data goes to stdout, progress to stderr if that is a terminal. Exit codes: 0 done, 1 failed, 2 usage, 130 or
143 interrupted. Unless it is killed by SIGKILL, it ends its processes and removes its files.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

# A script finds only its own directory. It needs the bench and the frelay of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measuring.flags import duration, round_count, some_of, whole
from bench.measuring.forwarders import HAProxy
from bench.measuring.load import BenchError, CompiledGenerator, Generator, Load, NoCompiler, PythonGenerator
from bench.measuring.measure import Case, Plan, run_rounds
from bench.measuring.parties import Frelay
from bench.measuring.report import Run, as_json, as_table
from bench.measuring.script import parser_of, progress, run
from bench.measuring.subjects import Direct, Subject

MODES: Final = ("direct", "handoff", "tunnel", "direct-tls")
LOADS: Final[tuple[Load, ...]] = ("bulk", "pingpong")
_MOST_PAIRS: Final = 10_000
# The most descriptors that a pair costs one process: two sockets, and in a relay that splices two pipes.
_DESCRIPTORS_A_PAIR: Final = 6
_DESCRIPTORS_BESIDE: Final = 128


# --- flags --------------------------------------------------------------------------------------------------------


def _pairs(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(whole(item, _MOST_PAIRS, "a number of pairs") for item in text.split(",")))


def _rival(text: str) -> str:
    if text in ("haproxy", "haproxy-splice"):
        return text
    if not (Path(text) / "frelay" / "__main__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither haproxy, nor haproxy-splice, nor a directory with a frelay package in it"
        )
    return str(Path(text).resolve())


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("throughput.py", "Measure what the relay forwards over loopback, and the CPU time it costs.")
    add = parser.add_argument
    add("--pairs", type=_pairs, default=(1, 16), metavar="N[,N]", help="how many pairs at a time (default: 1,16)")
    add("--seconds", type=duration, default=2.0, metavar="S",
        help="how long each measurement counts, from 0.2 (default: 2)")  # fmt: skip
    add("--rounds", type=round_count, default=3, metavar="N",
        help="how often everything is measured; the median is shown (default: 3)")  # fmt: skip
    add("--modes", type=some_of(MODES), default=MODES, metavar="M[,M]",
        help=f"of {', '.join(MODES)}; the direct ones have no relay (default: all)")  # fmt: skip
    add("--loads", type=some_of(LOADS), default=LOADS, metavar="L[,L]", help="of bulk, pingpong (default: both)")
    add("--against", type=_rival, action="append", default=[], metavar="WHAT",
        help="compare in the same run with haproxy, haproxy-splice, or a checkout's directory; repeatable")  # fmt: skip
    add("--workers", type=lambda text: whole(text, 256, "a number of workers"), default=1, metavar="N",
        help="compare in the same run with a relay of so many workers, and as many routes (default: none)")  # fmt: skip
    add("--size", type=lambda text: whole(text, 16384, "a number of bytes"), default=64, metavar="B",
        help="bytes in a ping-pong message (default: 64)")  # fmt: skip
    add("--generator", choices=("auto", "c", "python"), default="auto",
        help="what makes the load on plain sockets; auto takes Python only without a C compiler")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object with every round instead of the table")
    return parser


# --- subjects and generators --------------------------------------------------------------------------------------

_FRELAY_MODES: Final[tuple[Literal["handoff", "tunnel"], ...]] = ("handoff", "tunnel")


def _subjects(
    modes: Sequence[str], rivals: Sequence[str], workers: int, scratch: Path
) -> tuple[list[Subject], list[tuple[Subject, Subject]]]:
    """The rows of the table, and which of them to compare as (ours, theirs)."""
    directories = (scratch / f"subject-{number}" for number in range(1, 1000))
    subjects: list[Subject] = []
    compared: list[tuple[Subject, Subject]] = []
    if "direct" in modes:
        subjects.append(Direct(next(directories)))
    ours = {mode: Frelay(next(directories), mode) for mode in _FRELAY_MODES if mode in modes}
    subjects += ours.values()
    if "direct-tls" in modes:
        subjects.append(Direct(next(directories), in_tls=True))
    for rival in dict.fromkeys(rivals):
        theirs: dict[Literal["handoff", "tunnel"], Subject]
        if rival.startswith("haproxy"):
            theirs = {"handoff": HAProxy(next(directories), splices=rival == "haproxy-splice")}
        else:
            theirs = {mode: Frelay(next(directories), mode, checkout=Path(rival)) for mode in ours}
        subjects += theirs.values()
        compared += [(ours[mode], other) for mode, other in theirs.items() if mode in ours]
    if workers > 1:
        several = {mode: Frelay(next(directories), mode, workers=workers) for mode in ours}
        subjects += several.values()
        compared += [(several[mode], one) for mode, one in ours.items()]
    return subjects, compared


def _plain_generator(wanted: str, scratch: Path, notes: list[str]) -> Generator:
    if wanted == "python":
        reason = "as asked for"
    else:
        try:
            return CompiledGenerator(scratch)
        except NoCompiler as error:
            if wanted == "c":
                raise
            reason = str(error)
    notes.append(
        f"The load was made in Python ({reason}). It is slower than the relay, so throughput, round trips and "
        "latencies are those of the load, and only the CPU figures are the relay's own."
    )
    return PythonGenerator()


def _raise_descriptor_limit(pairs: int) -> None:
    needed = pairs * _DESCRIPTORS_A_PAIR + _DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise BenchError(f"{pairs} pairs need {needed} descriptors and the limit is {hard}: raise it with ulimit -n")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _show_progress(number: int, total: int, case: Case) -> None:
    progress(f"{number}/{total}  {case.subject}, {case.pairs} {'pair' if case.pairs == 1 else 'pairs'}, {case.load}")


def measure(options: argparse.Namespace) -> Run:
    """Start everything, measure it, and end it; raises BenchError."""
    plan = Plan(options.pairs, options.loads, options.seconds, options.rounds, options.size)
    notes: list[str] = []
    with ExitStack() as stack:
        stack.callback(progress, "")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frelay-bench-")))
        subjects, compared = _subjects(options.modes, options.against, options.workers, scratch)
        if not subjects:
            raise BenchError("there is nothing to measure")
        _raise_descriptor_limit(max(plan.pairs))
        generators: dict[str, Generator] = {s.name: PythonGenerator() for s in subjects if s.in_tls}
        if len(generators) < len(subjects):
            plain = _plain_generator(options.generator, scratch, notes)
            generators |= {s.name: plain for s in subjects if not s.in_tls}
        for subject in subjects:
            stack.enter_context(subject)
        versions = {subject.name: version for subject in subjects if (version := subject.version) is not None}
        results = run_rounds(plan, subjects, lambda subject: generators[subject.name], _show_progress)
        return Run(plan, subjects, generators, versions, results, notes, compared)


def report(options: argparse.Namespace) -> None:
    """Measure, and print the figures; raises BenchError."""
    found = measure(options)
    print(json.dumps(as_json(found), indent=2) if options.json else as_table(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run(_parser(), report, arguments)


if __name__ == "__main__":
    sys.exit(main())
