"""How does frelay compare? ``python bench/compare.py``; nothing has to be prepared.

It measures frelay, handed off and tunnelled, beside a direct connection, HAProxy (TCP mode, splice, mutual TLS, TLS on
both sides), nginx, socat, syncthing's strelaysrv and the transit relay of magic-wormhole. As root it installs what is
missing from Debian and PyPI. All of them run on loopback and are measured in one run, round by round and side by side,
since only ratios within one round are the same on another machine. At the end it says whether frelay's claims hold.

    python bench/compare.py --json all.json --svg docs      # everything, about 20 minutes
    python bench/compare.py --quick                         # small sizes and one round: does it run?
    python bench/compare.py --cases plain,admission --subjects frelay,haproxy,direct
    python bench/compare.py --from all.json --update-readme # show a saved run, measure nothing

Data goes to stdout, progress to stderr. Exit codes: 0 done (also if a claim is missed), 1 failed, 2 usage, 130 or 143
interrupted. Unless it is killed by SIGKILL, it ends all its processes and removes its files. Installed programs stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

# A script finds only its own directory. It needs the bench and the frelay of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison.bars import write_pictures
from bench.comparison.cases import Makers, run_stage, stages
from bench.comparison.install import in_venv, install
from bench.comparison.meetings import Strelaysrv, TransitRelay
from bench.comparison.own_network import enter_own_network
from bench.comparison.pages import write_section
from bench.comparison.record import QUICK, Record, Sizes, about_machine, now, read_record
from bench.comparison.tables import as_markdown, as_summary, as_text
from bench.measuring.flags import duration, output_directory, output_file, round_count, some_of
from bench.measuring.forwarders import HAProxy, HAProxyAccept, HAProxyFront, HAProxyTunnel, Nginx, Socat
from bench.measuring.load import BenchError, CompiledGenerator
from bench.measuring.parties import Frelay
from bench.measuring.script import parser_of, progress, run
from bench.measuring.subjects import Direct, Subject, checkout_root

_STAGES: Final = ("plain", "tunnel", "admission", "memory", "idle", "routes")
_README: Final = checkout_root() / "README.md"
_PAGE: Final = checkout_root() / "docs/benchmarks.md"
_PICTURE_OF_README: Final = "bench-bulk-cpu.svg"
# Descriptors that a relay keeps for each pairing, idle or not: two sockets, and the two ends of a pipe for bulk.
_OF_A_PAIRING: Final = 4
_DESCRIPTORS_BESIDE: Final = 128


@dataclass(frozen=True, slots=True)
class Entrant:
    """A subject that can take part."""

    name: str
    make: Callable[[Path], Subject]
    program: str = ""
    packages: tuple[str, ...] = ()
    """Debian's packages of the program."""


ENTRANTS: Final[dict[str, Entrant]] = {
    "direct": Entrant("no relay", Direct),
    "direct-tls": Entrant("no relay, TLS", partial(Direct, in_tls=True)),
    "frelay": Entrant("frelay, handed off", partial(Frelay, mode="handoff")),
    "frelay-tunnel": Entrant("frelay, tunnelled", partial(Frelay, mode="tunnel")),
    "haproxy": Entrant("HAProxy", HAProxy, "haproxy", ("haproxy",)),
    "haproxy-splice": Entrant("HAProxy, splice", partial(HAProxy, splices=True), "haproxy", ("haproxy",)),
    "haproxy-tls": Entrant("HAProxy, TLS to TLS", HAProxyTunnel, "haproxy", ("haproxy",)),
    "haproxy-mtls": Entrant("HAProxy, mTLS in front", HAProxyFront, "haproxy", ("haproxy",)),
    "haproxy-accept": Entrant("HAProxy, mTLS accept alone", HAProxyAccept, "haproxy", ("haproxy",)),
    "nginx": Entrant("nginx stream", Nginx, "nginx", ("nginx", "libnginx-mod-stream")),
    "socat": Entrant("socat", Socat, "socat", ("socat",)),
    "strelaysrv": Entrant("strelaysrv", Strelaysrv, "strelaysrv", ("syncthing-relaysrv",)),
    "transit-relay": Entrant("magic-wormhole-transit-relay", lambda directory: TransitRelay(directory, Path())),
}


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("compare.py", "Compare frelay with other relays and forwarders, in one run, over loopback.")
    add = parser.add_argument
    add("--quick", action="store_true", help="small, short, one round: shows that it runs, not how fast anything is")
    add("--cases", type=some_of(_STAGES), default=_STAGES, metavar="C[,C]", help=f"of {', '.join(_STAGES)}")
    add("--subjects", type=some_of(tuple(ENTRANTS)), default=tuple(ENTRANTS), metavar="S[,S]",
        help=f"of {', '.join(ENTRANTS)} (default: all)")  # fmt: skip
    add("--rounds", type=round_count, metavar="N", help="how often all is measured; the median is shown (default: 5)")
    add("--seconds", type=duration, metavar="S", help="how long each measurement counts, from 0.2 (default: 1)")
    add("--congestion-control", metavar="NAME",
        help="measure in a network of its own with this TCP congestion control, such as cubic (root)")  # fmt: skip
    add("--no-install", action="store_true", help="leave out what is not installed here")
    add("--json", type=output_file, metavar="FILE", help="save every figure of every round")
    add("--svg", type=output_directory, metavar="DIR", help="draw bench-*.svg in there")
    add("--from", dest="saved", type=Path, metavar="FILE", help="measure nothing, and show what --json has saved")
    add(
        "--update-readme",
        action="store_true",
        help="write docs/benchmarks.md with its pictures, and the README's table",
    )
    return parser


def _fitting(sizes: Sizes, notes: list[str]) -> Sizes:
    """Raise the descriptor limit as far as possible; if it stays low, take fewer idle pairings."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sizes.idle[-1]
    # A relay reserves four for a pairing; this process holds both ends of all idle pairings at once.
    wanted = max(_OF_A_PAIRING * (most + sizes.beside), 2 * sum(sizes.idle)) + _DESCRIPTORS_BESIDE
    granted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and granted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    if granted == wanted:
        return sizes
    carried = (granted - _DESCRIPTORS_BESIDE) // _OF_A_PAIRING - sizes.beside
    fewer = min(carried, (granted - _DESCRIPTORS_BESIDE) // 2 - sum(sizes.idle[:-1])) // 100 * 100
    if fewer <= sizes.idle[-2]:
        raise BenchError(f"{wanted} descriptors are needed and the limit is {hard}: raise it with ulimit -n")
    notes.append(
        f"{fewer:,} idle pairings instead of {most:,}: these need {wanted} descriptors, and the limit is {hard}."
    )
    return replace(sizes, idle=(*sizes.idle[:-1], fewer))


def _makers(record: Record, keys: Sequence[str], scratch: Path, *, allowed: bool) -> Makers:
    """How to make each subject that can take part; the record names the others, and why not."""
    numbers = itertools.count(1)
    makers = Makers()
    for key in ENTRANTS:
        if key not in keys:
            continue
        entrant = ENTRANTS[key]
        record.names[key] = entrant.name
        make = entrant.make
        if key == "transit-relay":
            try:
                twist = in_venv("magic-wormhole-transit-relay", allowed=allowed) / "twist"
            except BenchError as error:
                record.missing[key] = str(error)
                continue
            make = partial(TransitRelay, twist=twist)
        elif entrant.program and (reason := install(entrant.program, entrant.packages, allowed=allowed)):
            record.missing[key] = reason
            continue
        makers[key] = lambda make=make: make(scratch / f"subject-{next(numbers)}")  # type: ignore[misc]
    return makers


def measure(options: argparse.Namespace) -> Record:
    """Install, start, measure and end everything; raises BenchError."""
    notes: list[str] = []
    sizes = _fitting(QUICK if options.quick else Sizes(), notes)
    seconds = options.seconds or (0.2 if options.quick else 1.0)
    record = Record(now(), about_machine(), seconds, options.rounds or (1 if options.quick else 5), sizes, notes=notes)
    with ExitStack() as stack:
        stack.callback(progress, "")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frelay-bench-")))
        if reason := install(os.environ.get("CC") or "cc", ("gcc", "libc6-dev"), allowed=not options.no_install):
            raise BenchError(f"the load generator must be compiled: {reason}")
        plain = CompiledGenerator(scratch)
        makers = _makers(record, options.subjects, scratch, allowed=not options.no_install)
        if options.congestion_control:
            # Last, because from inside that network nothing can be installed.
            enter_own_network(options.congestion_control, allowed=not options.no_install)
            record.machine = about_machine()
        more = itertools.count(1)

        def frelay(routes: int, label: str) -> Frelay:
            return Frelay(scratch / f"frelay-{next(more)}", "handoff", routes=routes, label=label)

        known = stages(sizes, seconds, makers, frelay, plain)
        for name in options.cases:
            run_stage(known[name](), record, progress)
    if not any(any(rounds) for rounds in record.results.values()):
        raise BenchError("\n".join(["nothing could be measured", *record.missing.values(), *record.notes]))
    return record


def compare(options: argparse.Namespace) -> None:
    """Measure, or read a saved run, and show it in each way asked for; raises BenchError and OSError."""
    record = read_record(options.saved) if options.saved else measure(options)
    # Save before drawing: an error in a picture must not lose a run of twenty minutes.
    if options.json:
        options.json.write_text(json.dumps(record.as_json(), indent=1) + "\n", encoding="utf-8")
    print(as_text(record))
    if options.svg:
        write_pictures(record, options.svg)
    if options.update_readme:
        pictures = {path.name: text for path, text in write_pictures(record, _PAGE.parent).items()}
        write_section(_PAGE, "compare.py", as_markdown(record, pictures))
        picture = f"![{pictures.get(_PICTURE_OF_README, '')}](docs/{_PICTURE_OF_README})"
        write_section(_README, "compare.py", as_summary(record, picture))


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run(_parser(), compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
