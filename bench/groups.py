"""How fast is a group? ``python bench/groups.py``; nothing has to be prepared.

It measures ``frelay.group`` beside OpenMPI (mpi4py, over TCP) and lists in one Redis, in one run on this machine:
set-up, barrier, ping-pong, bcast, allreduce and alltoall, at 8 B, 64 KiB and 8 MiB, with 2 to 16 ranks. OpenMPI and
Redis do not encrypt; each two ranks of frelay have mutual TLS through a relay. As root it installs what is missing from
Debian, and from PyPI into an environment of its own.

    python bench/groups.py --json groups.json --svg docs     # everything: 5 rounds, about 25 minutes on 2 cores
    python bench/groups.py --quick                           # one round with small sizes: does it run?
    python bench/groups.py --ranks 4 --rounds 1 --subjects frelay,redis
    python bench/groups.py --from groups.json                # show a saved run, measure nothing

Figures are milliseconds; a case takes as long as its slowest rank. The two processes of frelay's ping-pong have a wire
of ``frelay.connect``, too, and use the two in turn, since the scheduler may place them well or badly for seconds. Data
goes to stdout, progress to stderr. Only ratios within one run are the same on another machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

# A script finds only its own directory. It needs the bench and the frelay of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.collectives.claims import judge
from bench.collectives.record import NAMES, GroupRecord, as_text, write_picture
from bench.collectives.runs import SUBJECTS, Case, Plan, run_group
from bench.comparison.install import in_venv, install
from bench.comparison.record import about_machine, now
from bench.measuring.flags import output_directory, output_file, round_count, some_of
from bench.measuring.load import BenchError
from bench.measuring.script import parser_of, progress, run

_RANKS: Final = ("2", "4", "8", "16")
_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_PROGRAMS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "openmpi": ("mpirun", ("openmpi-bin", "libopenmpi-dev")),
    "redis": ("redis-server", ("redis-server",)),
}
# How often a size is repeated: enough for a median, and few enough for 16 ranks on 2 cores.
_SIZES: Final = {8: 40, 64 * _KIB: 20, 8 * _MIB: 3}


# The prefix of what a run of frelay measures on a bare wire beside the group.
_BARE: Final = "bare "


def _cases(ranks: int, *, quick: bool) -> list[Case]:
    sizes = {8: 5, 64 * _KIB: 2} if quick else _SIZES
    found: list[Case] = [("barrier", 0, 5 if quick else 40)]
    if ranks == 2:
        found.append(("ping-pong", 64, 50 if quick else 2000))
    for size, repetitions in sizes.items():
        found += [(case, size, repetitions) for case in ("bcast", "allreduce", "alltoall")]
    return found


def _plans(options: argparse.Namespace, subjects: Sequence[str]) -> Iterator[Plan]:
    """All runs of one round; those that are compared follow each other."""
    for ranks in map(int, options.ranks):
        for subject in subjects:
            yield Plan(subject, ranks, _cases(ranks, quick=options.quick))


def _installed(options: argparse.Namespace) -> tuple[list[str], Path]:
    """The subjects that can take part, and the Python that has their packages."""
    subjects = []
    for subject in options.subjects:
        program, packages = _PROGRAMS.get(subject, ("", ()))
        reason = install(program, packages, allowed=not options.no_install) if program else None
        if reason is None:
            subjects.append(subject)
        else:
            print(f"{NAMES[subject]}: left out: {reason}", file=sys.stderr)
    wanted = ["numpy"] + [name for subject, name in (("openmpi", "mpi4py"), ("redis", "redis")) if subject in subjects]
    return subjects, in_venv(*wanted, allowed=not options.no_install) / "python"


def _measure(options: argparse.Namespace) -> GroupRecord:
    subjects, python = _installed(options)
    rounds = 1 if options.quick else options.rounds
    record = GroupRecord(now(), about_machine(), rounds, {})
    plans = list(_plans(options, subjects))
    began = time.monotonic()
    for number in range(rounds):
        for at, plan in enumerate(plans):
            left = ""
            if done := number * len(plans) + at:
                seconds = (time.monotonic() - began) / done * (rounds * len(plans) - done)
                left = f", about {seconds / 60:.0f} min left" if seconds >= 60 else f", about {seconds:.0f} s left"
            progress(f"round {number + 1} of {rounds}: {NAMES[plan.subject]}, {plan.ranks} ranks{left}")
            for case, found in run_group(plan, python).items():
                is_bare = case.startswith(_BARE)
                record.add(plan.ranks, case.removeprefix(_BARE), "wire" if is_bare else plan.subject, found)
    progress("")
    return record


def _work(options: argparse.Namespace) -> None:
    if options.saved is not None:
        try:
            record = GroupRecord.from_json(json.loads(options.saved.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{options.saved}: this is no result of bench/groups.py: {error}") from None
    else:
        record = _measure(options)
    print(as_text(record))
    for claim in judge(record):
        print(claim)
    if options.json is not None:
        options.json.write_text(json.dumps(record.to_json(), indent=1) + "\n")
    if options.svg is not None:
        write_picture(record, options.svg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = parser_of("groups.py", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=some_of(_RANKS), default=_RANKS, help="how many ranks: 2,4,8,16")
    parser.add_argument("--subjects", type=some_of(SUBJECTS), default=SUBJECTS, help=f"some of {', '.join(SUBJECTS)}")
    parser.add_argument("--rounds", type=round_count, default=5, help="how often everything is measured (5)")
    parser.add_argument("--quick", action="store_true", help="one round, small sizes: does it run?")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--svg", type=output_directory, metavar="DIRECTORY", help="draw bench-groups.svg there")
    parser.add_argument("--from", dest="saved", type=Path, metavar="FILE", help="show a saved run, measure nothing")
    parser.add_argument("--no-install", action="store_true", help="install nothing; leave out what is missing")
    return run(parser, _work, arguments)


if __name__ == "__main__":
    sys.exit(main())
