"""What does a machine carry, and which limit comes first? ``python bench/model.py all.json --cores 8 --memory 16``

``all.json`` is what ``compare.py --json`` has measured. The model adds up: CPU for each join, message and gigabyte,
memory and descriptors for each pairing. It divides the machine's cores, memory and descriptors by these sums. It does
not compute queues, so it keeps a share of each core free for bursts.

    python bench/model.py all.json --check                 # also measure 1 and 2 workers here, beside the prediction
    python bench/model.py all.json --check --update-docs   # ... and write that into docs/capacity.md

Data goes to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 usage, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

# A script finds only its own directory. It needs the bench and the frelay of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison.own_network import congestion_control, enter_own_network
from bench.comparison.pages import write_section
from bench.comparison.record import Key, Record, read_record
from bench.comparison.tables import as_rows
from bench.measuring.flags import duration, number, round_count, whole
from bench.measuring.load import CompiledGenerator, Load, UsageError
from bench.measuring.measure import Figures, measure_load
from bench.measuring.parties import Frelay
from bench.measuring.script import parser_of, run
from bench.measuring.subjects import checkout_root

__all__ = ["Costs", "Machine", "Work", "carried", "costs_of", "needed"]

_PAGE: Final = checkout_root() / "docs" / "capacity.md"

# The share of a core to plan for. Above it bursts must wait, and the model does not compute waiting.
_USABLE: Final = 0.7
# Kernel memory of a TCP socket with its file and inode, beside the relay's. Buffers exist only with bytes in them.
_KERNEL_KIB_A_SOCKET: Final = 4.0
# The share of the memory to plan for; the rest is for buffers and for everything else on the machine.
_MEMORY_SHARE: Final = 0.7
# limits.fd_budget, and the default hard limit of a service under systemd.
_FD_BUDGET: Final = 0.8
_DESCRIPTORS: Final = 524_288
_SOCKETS: Final = 2
# Each with one more reserved for its share of the pipes, as the relay reserves them.
_SET_ASIDE: Final = 2


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured costs, each with its unit."""

    join_us: float
    """CPU for a pairing: both legs admitted, paired, handed off, and closed in the end."""
    message_us: float
    gigabyte_ms: float
    rest_us: float
    """CPU a second for a pairing that is idle."""
    pairing_kib: float
    waiting_kib: float
    relay_mib: float
    """A relay process without connections."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine's resources."""

    cores: int
    memory_gib: float
    descriptors: int = _DESCRIPTORS
    """RLIMIT_NOFILE of each worker; there is one worker a core."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work to carry."""

    pairings: float
    joins: float
    """A second."""
    messages: float
    """A second, of all pairings, each way counted."""
    gbit: float
    """A second, in bulk."""
    waiting: float = 0.0


def costs_of(record: Record) -> Costs:
    """The costs in a record; raises UsageError if one is missing."""
    sizes = record.sizes

    def found(case: str, amount: int, figure: str) -> float:
        return _median(record, Key(case, amount, "frelay"), figure)

    none, most = sizes.idle[0], sizes.idle[-1]
    at_rest = found("at rest", most, "subject_cores") - found("at rest", none, "subject_cores")
    return Costs(
        join_us=2 * found("admission", 1, "cpu_us_per_leg"),
        message_us=found("ping-pong 64 B", sizes.pingpong[-1], "cpu_us_per_message"),
        gigabyte_ms=found("bulk", sizes.bulk[-1], "cpu_ms_per_gb"),
        rest_us=max(0.0, at_rest) * 1e6 / most,
        pairing_kib=found("memory, paired", sizes.held, "kib_each"),
        waiting_kib=found("memory, waiting", sizes.held, "kib_each"),
        relay_mib=found("at rest", none, "mib"),
    )


def _median(record: Record, key: Key, figure: str) -> float:
    """The median of one figure over the rounds; raises UsageError if the record lacks it."""
    spread = record.spread(key, figure)
    if spread is None:
        raise UsageError(
            f"the record has no {figure} of {key.subject} in {key.case!r}, {key.amount}; "
            "run bench/compare.py --json FILE with all cases first, and give that file"
        )
    return spread.median


def needed(costs: Costs, work: Work) -> dict[str, float]:
    """Cores, GiB and descriptors for ``work``, without the processes themselves."""
    micros = work.pairings * costs.rest_us + work.joins * costs.join_us + work.messages * costs.message_us
    kib = work.pairings * (costs.pairing_kib + _SOCKETS * _KERNEL_KIB_A_SOCKET)
    kib += work.waiting * (costs.waiting_kib + _KERNEL_KIB_A_SOCKET)
    return {
        "cores": micros / 1e6 + work.gbit / 8 * costs.gigabyte_ms / 1e3,
        "memory": kib / 2**20,
        "descriptors": _SET_ASIDE * (_SOCKETS * work.pairings + work.waiting),
    }


def _there(costs: Costs, machine: Machine) -> dict[str, float]:
    processes = machine.cores * costs.relay_mib / 2**10
    return {
        "cores": machine.cores * _USABLE,
        "memory": max(0.0, machine.memory_gib * _MEMORY_SHARE - processes),
        "descriptors": machine.cores * machine.descriptors * _FD_BUDGET,
    }


def carried(costs: Costs, machine: Machine, work: Work) -> tuple[float, str]:
    """How many times the machine carries ``work``, and which resource runs out first."""
    there, wanted = _there(costs, machine), needed(costs, work)
    return min((there[what] / wanted[what] if wanted[what] else math.inf, what) for what in there)


# --- checking itself --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One prediction, and the measurement beside it."""

    what: str
    workers: int
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured to predicted."""
        return self.measured / self.predicted


def predict(cores: int, workers: int, relay: float, generator: float) -> float:
    """Units a second on one machine with its own load generator, from the CPU seconds of both for a unit.

    A worker uses one core at most, and all together no more than there are.
    """
    return min(workers / relay, cores / (relay + generator))


_CHECKS: Final[tuple[tuple[Load, str, str, float], ...]] = (
    ("pingpong", "ping-pong 64 B", "round_trips_per_second", 2.0),
    ("bulk", "bulk", "gbit_per_second", 1 / 8),
)


def check(record: Record, rounds: int, seconds: float) -> list[Check]:
    """Measure 1 and 2 workers, round by round; raises BenchError, and UsageError if the record lacks a figure."""
    # Read the record first, so that a missing figure is told before anything is measured.
    costs = {case: _seconds_a_unit(record, _key(record, case), figure) for _, case, figure, _ in _CHECKS}
    cores = record.machine["cpus"]
    if (wanted := record.machine["congestion_control"]) != congestion_control():
        # The record's figures hold for its own congestion control only.
        enter_own_network(wanted, allowed=False)
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="frelay-bench-") as scratch:
        generator = CompiledGenerator(Path(scratch))
        with (
            Frelay(Path(scratch) / "one", "handoff") as one,
            Frelay(Path(scratch) / "two", "handoff", workers=2) as two,
        ):
            for _ in range(rounds):
                for load, case, figure, _ in _CHECKS:
                    pairs = _key(record, case).amount
                    for workers, relay in ((1, one), (2, two)):
                        figures: Figures = measure_load(relay, pairs, load, generator, seconds=seconds, size=64)
                        found.setdefault((case, workers), []).append(getattr(figures, figure))
    checks = []
    for _, case, figure, _ in _CHECKS:
        for workers in (1, 2):
            predicted = predict(cores, workers, *costs[case])
            checks.append(Check(f"{case}, {figure}", workers, predicted, median(found[case, workers])))
    return checks


def _key(record: Record, case: str) -> Key:
    return Key(case, (record.sizes.bulk if case == "bulk" else record.sizes.pingpong)[1], "frelay")


def _seconds_a_unit(record: Record, key: Key, figure: str) -> tuple[float, float]:
    """CPU seconds of the relay, and of the load generator, for each unit of ``figure``, a rate; raises UsageError."""
    rate, used, load_used = (_median(record, key, name) for name in (figure, "subject_cores", "generator_cores"))
    return used / rate, load_used / rate


# --- showing it -------------------------------------------------------------------------------------------------------

_EXAMPLES: Final = (
    ("idle: a pairing lives for a day and says something each minute", Work(1, 1 / 86_400, 2 / 60, 0)),
    ("chatty: lives for an hour, ten messages a second", Work(1, 1 / 3600, 10, 0)),
    ("brief: lives for ten seconds, twenty messages in it", Work(1, 1 / 10, 2, 0, waiting=0.1)),
    ("bulk: lives for a minute, 10 Mbit/s", Work(1, 1 / 60, 0, 0.01)),
)
_MILLION: Final = 1_000_000
_MACHINE_OF_THE_PLAN: Final = Machine(16, 64)


def _said(value: float) -> str:
    if not math.isfinite(value):
        return "any number"
    digits = max(0, 2 - math.floor(math.log10(value))) if 0 < value < 100 else 0
    rounded = value if value < 1000 else float(f"{value:.3g}")
    return f"{rounded:,.{digits}f}"


def rates(costs: Costs, machine: Machine) -> list[list[str]]:
    """The most of each kind of work alone that the machine carries."""
    one = {
        "idle pairings": Work(1, 0, 0, 0),
        "waiting legs": Work(0, 0, 0, 0, waiting=1),
        "joins a second (pairings set up)": Work(0, 1, 0, 0),
        "messages of 64 B a second": Work(0, 0, 1, 0),
        "Gbit/s in bulk": Work(0, 0, 0, 1),
    }
    return [[what, *(_said(part) if isinstance(part, float) else part for part in carried(costs, machine, work))]
        for what, work in one.items()]  # fmt: skip


def as_page(record: Record, costs: Costs, machines: Sequence[Machine], checks: Sequence[Check]) -> str:
    """The section of docs/capacity.md."""
    lines = [
        f"Measured {record.date} on {record.machine['cpus']} cores ({record.machine['cpu']}), Linux "
        f"{record.machine['kernel']}; TCP sends by {record.machine['congestion_control']}; "
        f"{record.versions.get('frelay', 'frelay')}.",
        "",
        *as_rows([
            ["what costs", "how much"],
            ["a join: both legs admitted, paired, handed off, closed in the end", f"{costs.join_us:,.0f} µs of CPU"],
            ["a message of 64 B, one way", f"{costs.message_us:.1f} µs"],
            ["a gigabyte in bulk", f"{costs.gigabyte_ms:,.0f} ms"],
            ["an idle pairing", f"{costs.rest_us:.2f} µs a second, {costs.pairing_kib:.1f} KiB, 4 descriptors"],
            ["a waiting leg", f"{costs.waiting_kib:.1f} KiB, 2 descriptors"],
            ["a relay process", f"{costs.relay_mib:.0f} MiB"],
        ]),
    ]  # fmt: skip
    for machine in machines:
        lines += ["", f"**{machine.cores} cores, {machine.memory_gib:g} GiB**, of one thing alone:", ""]
        lines += as_rows([["what", "at most", "gives out first"], *rates(costs, machine)])
        rows = [["pairings of a kind", "at most", "gives out first"]]
        for text, work in _EXAMPLES:
            times, first = carried(costs, machine, work)
            rows.append([text, _said(times), first])
        lines += ["", *as_rows(rows)]
    if checks:
        rows = [["checked here", "workers", "predicted", "measured", "measured : predicted"]]
        rows += [[c.what, str(c.workers), _said(c.predicted), _said(c.measured), f"{c.ratio:.2f}"] for c in checks]
        lines += ["", *as_rows(rows)]
    lines += ["", *_plan(costs)]
    return "\n".join(lines)


def _plan(costs: Costs) -> list[str]:
    machine = _MACHINE_OF_THE_PLAN
    rows = [["a million pairings of a kind", "cores", "GiB", "machines", "... and one to spare"]]
    for text, work in _EXAMPLES:
        times, _ = carried(costs, machine, work)
        wanted = needed(costs, work)
        count = math.ceil(_MILLION / times)
        cells = [_said(wanted["cores"] * _MILLION), _said(wanted["memory"] * _MILLION), f"{count:,}", f"{count + 1:,}"]
        rows.append([text, *cells])
    joins = carried(costs, machine, Work(0, 1, 0, 0))[0]
    return [
        f"**A million pairings** on machines of {machine.cores} cores and {machine.memory_gib:g} GiB:",
        "",
        *as_rows(rows),
        "",
        f"One such machine sets up {_said(joins)} pairings a second. If one of ten machines fails, its "
        f"{_said(_MILLION / 10)} pairings are on the other nine after {_said(_MILLION / 10 / joins / 9)} s at the "
        "earliest.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("model.py", "Compute what a machine carries from what compare.py has measured.")
    add = parser.add_argument
    add("record", type=Path, metavar="FILE", help="what compare.py --json has saved")
    add("--cores", type=lambda text: whole(text, 1024, "a number of cores"), metavar="N", help="of another machine")
    add("--memory", type=lambda text: number(text, 0.5, 65536, "GiB"), metavar="GIB", help="of that machine")
    add("--descriptors", type=lambda text: whole(text, 2**30, "a number of descriptors"), default=_DESCRIPTORS,
        metavar="N", help=f"RLIMIT_NOFILE of each worker (default: {_DESCRIPTORS})")  # fmt: skip
    add("--check", action="store_true", help="measure 1 and 2 workers here, beside what is predicted")
    add("--rounds", type=round_count, default=5, metavar="N", help="of --check (default: 5)")
    add("--seconds", type=duration, default=1.0, metavar="S", help="of each measurement of --check (default: 1)")
    add("--update-docs", action="store_true", help="write it into docs/capacity.md")
    return parser


def answer(options: argparse.Namespace) -> None:
    """Compute, check if asked to, and show it; raises BenchError and OSError."""
    record = read_record(options.record)
    try:
        costs = costs_of(record)
        checks = check(record, options.rounds, options.seconds) if options.check else []
    except UsageError as error:
        # Only here the file's name is known.
        raise UsageError(f"{options.record}: {error}") from None
    cores = options.cores or record.machine["cpus"]
    memory = options.memory or record.machine["memory_gib"]
    machines = [Machine(cores, memory, options.descriptors)]
    page = as_page(record, costs, machines, checks)
    print(page)
    if options.update_docs:
        write_section(_PAGE, "model.py", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    return run(_parser(), answer, arguments)


if __name__ == "__main__":
    sys.exit(main())
