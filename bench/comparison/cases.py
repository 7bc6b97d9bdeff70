"""What compare.py measures: stages, each with its subjects, and the cases that each of them goes through.

A stage starts the subjects that are compared with each other and measures its rounds: every case with every subject,
and in the next round in the opposite order. Stages run one after the other, since relays with 5,000 idle pairings must
not run while others are measured. Nothing is compared across stages.

Each case gives one round's figures by name; the names say the unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

from bench.comparison.admission import measure_admission
from bench.comparison.meetings import TransitRelay
from bench.comparison.record import Key, Record, Round, Sizes
from bench.measuring.cpu import read_cpu
from bench.measuring.load import BenchError, Generator, Load, PythonGenerator
from bench.measuring.measure import measure_load
from bench.measuring.parties import Frelay
from bench.measuring.subjects import Subject

__all__ = ["Case", "Stage", "run_stage", "stages"]

_MESSAGE: Final = 64
_KIB: Final = 1024
_LARGEST: Final = 64 * _KIB
# How many pairs come and go before memory is counted, so that what is loaded late is loaded.
_SETTLING: Final = 8
_SETTLE: Final = 0.3

Measure = Callable[[Subject], Round]
Make = Callable[[], Subject]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure, and its subject."""

    name: str
    amount: int
    subjects: Mapping[str, Subject | Make]
    """A running subject, or how to make a new one in each round."""
    measure: Measure


@dataclass(frozen=True, slots=True)
class Stage:
    """Subjects that run at the same time, and their cases."""

    name: str
    subjects: Mapping[str, Subject]
    cases: Sequence[Case]
    idle: Mapping[str, int]
    """How many idle pairings each subject holds during the stage."""


class Makers(dict[str, Make]):
    """How to make each subject that takes part, by its key."""

    def some(self, *keys: str) -> dict[str, Subject]:
        """New subjects of these keys, if they take part."""
        return {key: self[key]() for key in keys if key in self}


# --- what is measured -----------------------------------------------------------------------------------------------


def _load(load: Load, pairs: int, size: int, seconds: float, plain: Generator) -> Measure:
    def measure(subject: Subject) -> Round:
        generator: Generator = PythonGenerator() if subject.in_tls else plain
        found = asdict(measure_load(subject, pairs, load, generator, seconds=seconds, size=size))
        return {name: value for name, value in found.items() if value is not None}

    return measure


def _first_byte(ways: int) -> Measure:
    def measure(subject: Subject) -> Round:
        times = []
        for _ in range(ways):
            complete = subject.arrive()
            began = time.perf_counter()
            pair = complete()
            pair.client.sendall(b"x")
            arrived = pair.server.recv(1)
            times.append((time.perf_counter() - began) * 1e3)
            pair.close()
            if not arrived:
                raise BenchError(f"{subject.name}: a pair was closed before its first byte")
        return {"first_byte_ms": median(times)}

    return measure


def _at_rest(seconds: float) -> Measure:
    def measure(subject: Subject) -> Round:
        before = read_cpu(subject.pids)
        time.sleep(seconds)
        used = read_cpu(subject.pids).subject - before.subject
        return {"subject_cores": used / seconds, "mib": subject.memory / _KIB**2}

    return measure


def _memory_of_pairs(count: int) -> Measure:
    return _memory_of_each(count, lambda subject: subject.pairs(count))


def _memory_of_waiting(count: int) -> Measure:
    def waiting(subject: Subject) -> AbstractContextManager[None]:
        assert isinstance(subject, Frelay | TransitRelay)
        return subject.waiting(count)

    return _memory_of_each(count, waiting)


def _memory_of_each(count: int, hold: Callable[[Subject], AbstractContextManager[object]]) -> Measure:
    """KiB of resident memory for each of the ``count`` items that the subject holds inside ``hold``."""

    def measure(subject: Subject) -> Round:
        with subject.pairs(_SETTLING):
            pass
        time.sleep(_SETTLE)
        before = subject.memory
        with hold(subject):
            time.sleep(_SETTLE)
            return {"kib_each": (subject.memory - before) / count / _KIB}

    return measure


# --- the stages -------------------------------------------------------------------------------------------------------

_FORWARDERS: Final = ("haproxy", "haproxy-splice", "nginx", "socat")
_PLAIN: Final = ("direct", "frelay", *_FORWARDERS, "strelaysrv", "transit-relay")
_IN_TLS: Final = ("direct-tls", "frelay-tunnel", "haproxy-tls")
_ADMITTING: Final = ("frelay", "frelay-tunnel", "haproxy-accept", "haproxy-mtls", *_FORWARDERS, *_PLAIN[-2:])


def stages(
    sizes: Sizes, seconds: float, make: Makers, frelay: Callable[[int, str], Frelay], plain: Generator
) -> dict[str, Callable[[], Stage]]:
    """How to make each stage, by its name. ``frelay`` makes another relay with so many routes and this label."""

    def load(load: Load, pairs: int, size: int) -> Measure:
        return _load(load, pairs, size, seconds, plain)

    def through_plain() -> Stage:
        subjects = make.some(*_PLAIN)
        cases = [Case("bulk", pairs, subjects, load("bulk", pairs, 1)) for pairs in sizes.bulk]
        for name, size in (("ping-pong 64 B", _MESSAGE), ("ping-pong 1 KiB", _KIB)):
            cases += [Case(name, pairs, subjects, load("pingpong", pairs, size)) for pairs in sizes.pingpong]
        cases.append(Case("mixed", sizes.mixed, subjects, load("mixed", sizes.mixed, _LARGEST)))
        cases.append(Case("beside bulk", sizes.greedy, subjects, load("greedy", sizes.greedy + 1, _MESSAGE)))
        return Stage("plain", subjects, cases, {})

    def through_tls() -> Stage:
        subjects = make.some(*_IN_TLS)
        cases = [Case("tunnel bulk", pairs, subjects, load("bulk", pairs, 1)) for pairs in sizes.tls]
        cases += [Case("tunnel 64 B", pairs, subjects, load("pingpong", pairs, _MESSAGE)) for pairs in sizes.tls]
        return Stage("tunnel", subjects, cases, {})

    def admission() -> Stage:
        subjects = make.some(*_ADMITTING)
        case = Case("admission", 1, subjects, lambda subject: measure_admission(subject, seconds))
        some = {key: subject for key, subject in subjects.items() if key in (*_PLAIN, "frelay-tunnel")}
        return Stage("admission", subjects, [case, Case("first byte", 1, some, _first_byte(sizes.ways))], {})

    def memory() -> Stage:
        def new(*keys: str) -> dict[str, Make]:
            return {key: make[key] for key in keys if key in make}

        paired = new("frelay", "frelay-tunnel", "haproxy", "haproxy-tls", "nginx", "strelaysrv", "transit-relay")
        cases = [
            Case("memory, paired", sizes.held, paired, _memory_of_pairs(sizes.held)),
            Case("memory, waiting", sizes.held, new("frelay", "transit-relay"), _memory_of_waiting(sizes.held)),
            # socat needs a process for each pair: a tenth is enough.
            Case("memory, paired", sizes.held, new("socat"), _memory_of_pairs(max(1, sizes.held // 10))),
        ]
        return Stage("memory", {}, cases, {})

    def of_frelay(name: str, amounts: Sequence[int], label: str, routes: bool) -> Stage:
        relays = {n: frelay(n if routes else 1, f"{n:,} {label}") for n in amounts} if "frelay" in make else {}
        cases = [
            Case(name, amount, {"frelay": relay}, load("pingpong", sizes.beside, _MESSAGE))
            for amount, relay in relays.items()
        ]
        if not routes:
            # A tick of the kernel's clock is 1 % of a second, and an idle relay uses little more.
            cases += [
                Case("at rest", amount, {"frelay": relay}, _at_rest(2 * seconds)) for amount, relay in relays.items()
            ]
        else:
            cases += [
                Case(
                    "admission, routes", amount, {"frelay": relay}, lambda subject: measure_admission(subject, seconds)
                )
                for amount, relay in relays.items()
            ]
        subjects: dict[str, Subject] = {f"{name} {amount}": relay for amount, relay in relays.items()}
        idle = {} if routes else {f"{name} {amount}": amount for amount in relays}
        return Stage(name, subjects, cases, idle)

    return {
        "plain": through_plain,
        "tunnel": through_tls,
        "admission": admission,
        "memory": memory,
        "idle": lambda: of_frelay("idle", sizes.idle, "idle", routes=False),
        "routes": lambda: of_frelay("routes", sizes.routes, "routes", routes=True),
    }


# --- running them -----------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, record: Record, say: Callable[[str], None]) -> None:
    """Start the stage's subjects, write all its rounds into ``record``, and end them; raises BenchError."""
    with ExitStack() as stack:
        running: set[int] = set()
        for key, subject in stage.subjects.items():
            say(f"starting {subject.name}")
            try:
                stack.enter_context(subject)
                if stage.idle.get(key):
                    stack.enter_context(subject.pairs(stage.idle[key]))
            except (BenchError, OSError) as error:
                record.missing[key] = f"did not start: {error}"
                continue
            running.add(id(subject))
            if subject.version:
                record.versions[key] = subject.version
        for number in range(record.rounds):
            for case in stage.cases:
                items = list(case.subjects.items())
                for key, item in items if number % 2 == 0 else reversed(items):
                    if isinstance(item, Subject) and id(item) not in running:
                        continue
                    say(f"{stage.name}: round {number + 1} of {record.rounds}, {case.name} {case.amount}, {key}")
                    found = _measured(case, key, item, record)
                    rounds = record.results.setdefault(Key(case.name, case.amount, key), [])
                    rounds.append(found)


def _measured(case: Case, key: str, item: Subject | Make, record: Record) -> Round:
    # A failure of one subject must not lose the figures of the others.
    try:
        if isinstance(item, Subject):
            return case.measure(item)
        with item() as subject:
            return case.measure(subject)
    except (BenchError, OSError) as error:
        record.notes.append(f"{case.name} {case.amount}, {key}: {error}")
        return {}
