"""A comparison for people: tables in plain text for the terminal, in Markdown for docs/benchmarks.md and the README.

A cell is the median of the rounds, with the lowest and the highest in brackets behind it. No rounding hides which
subject is ahead, and a subject that could not take part is named below the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from bench.comparison.claims import Verdict, judge
from bench.comparison.record import Key, Record, Spread
from bench.measuring.report import grid

__all__ = ["as_markdown", "as_rows", "as_summary", "as_text"]

# By case: its figures as (title, name, digits).
_Column = tuple[str, str, int]
_GBIT: Final[_Column] = ("Gbit/s", "gbit_per_second", 1)
_PER_GB: Final[_Column] = ("CPU ms/GB", "cpu_ms_per_gb", 0)
_ROUND_TRIPS: Final[_Column] = ("round trips/s", "round_trips_per_second", 0)
_P50: Final[_Column] = ("p50 us", "p50_us", 0)
_P99: Final[_Column] = ("p99 us", "p99_us", 0)
_PER_MESSAGE: Final[_Column] = ("CPU us/message", "cpu_us_per_message", 2)
_GENERATOR: Final[_Column] = ("generator's cores", "generator_cores", 2)
_SUBJECT: Final[_Column] = ("its cores", "subject_cores", 2)
_MESSAGES: Final = (_ROUND_TRIPS, _P50, _P99, _PER_MESSAGE, _SUBJECT, _GENERATOR)
_ADMISSION: Final[tuple[_Column, ...]] = (
    ("set up/s", "pairs_per_second", 0),
    ("CPU us/leg", "cpu_us_per_leg", 0),
    _SUBJECT,
    _GENERATOR,
)
_COLUMNS: Final[dict[str, tuple[_Column, ...]]] = {
    "bulk": (_GBIT, _PER_GB, _SUBJECT, _GENERATOR),
    "ping-pong 64 B": _MESSAGES,
    "ping-pong 1 KiB": _MESSAGES,
    "mixed": (*_MESSAGES, _GBIT),
    "beside bulk": (_ROUND_TRIPS, _P50, _P99, _GBIT, _SUBJECT, _GENERATOR),
    "tunnel bulk": (_GBIT, _PER_GB, _SUBJECT, _GENERATOR),
    "tunnel 64 B": _MESSAGES,
    "admission": _ADMISSION,
    "first byte": (("ms to the first byte", "first_byte_ms", 2),),
    "memory, paired": (("KiB each", "kib_each", 1),),
    "memory, waiting": (("KiB each", "kib_each", 1),),
    "idle": _MESSAGES,
    "at rest": (("cores", "subject_cores", 3), ("MiB of the whole relay", "mib", 1)),
    "routes": _MESSAGES,
    "admission, routes": _ADMISSION,
}
_TITLES: Final = {
    "bulk": "Bulk, one way, through {n} pairs",
    "ping-pong 64 B": "Ping-pong of 64 B, {n} pairs",
    "ping-pong 1 KiB": "Ping-pong of 1 KiB, {n} pairs",
    "mixed": "Ping-pong of all sizes from 100 B to 64 KiB, {n} pairs",
    "beside bulk": "Ping-pong of 64 B, {n} pairs, beside one of bulk (Gbit/s is that one's)",
    "tunnel bulk": "In TLS on both sides: bulk, {n} pairs",
    "tunnel 64 B": "In TLS on both sides: ping-pong of 64 B, {n} pairs",
    "admission": "Setting pairs up and giving them up again (a leg is a connection that it accepted)",
    "first byte": "From the last JOIN, or the one dial, to the first byte at the other end",
    "memory, paired": "Resident memory of a pair, {n} of them idle",
    "memory, waiting": "Resident memory of a leg that waits, {n} of them",
    "idle": "Ping-pong of 64 B with {n} idle pairings beside",
    "at rest": "With {n} idle pairings and nothing else",
    "routes": "Ping-pong of 64 B on a relay with {n} routes",
    "admission, routes": "Setting pairs up on a relay with {n} routes",
}
_WORDS: Final = {True: "met", False: "not met", None: "not measured"}


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    middle, low, high = (_number(value, digits) for value in spread[:3])
    return middle if low == high else f"{middle} ({low}..{high})"


def _named(record: Record, key: str) -> str:
    return record.names.get(key, key)


def _cases(record: Record) -> Iterator[tuple[str, int, list[Key]]]:
    for case, amount in dict.fromkeys((key.case, key.amount) for key in record.results):
        # In the order of the names, not in the order of measuring.
        keys = {key.subject: key for key in record.results if key[:2] == (case, amount)}
        yield case, amount, [keys[name] for name in [*record.names, *keys] if name in keys]


def as_text(record: Record) -> str:
    """All figures, then the claims, then the notes that a reader needs."""
    lines: list[str] = []
    for case, amount, keys in _cases(record):
        columns = _COLUMNS[case]
        title = _TITLES[case].format(n=f"{amount:,}")
        rows = [[title.replace("1 pairs", "1 pair") if amount == 1 else title, *(title for title, _, _ in columns)]]
        for key in dict.fromkeys(keys):
            cells = [_cell(record.spread(key, figure), digits) for _, figure, digits in columns]
            rows.append([f"  {_named(record, key.subject)}", *cells])
        lines += [*grid(rows), ""]
    rows = [["The claims", "goal", "measured", ""]]
    rows += [[v.claim.goal, v.claim.bound, _cell(v.found, 2), _WORDS[v.is_met]] for v in judge(record)]
    return "\n".join([*lines, *grid(rows), "", *about(record)])


def about(record: Record) -> list[str]:
    """Date, machine, versions, and all that was missing or failed."""
    machine = record.machine
    rounds = "one round" if record.rounds == 1 else f"median (lowest..highest) of {record.rounds} interleaved rounds"
    lines = [
        f"{record.date}: {rounds} of {record.seconds:g} s on {machine['cpus']} CPUs ({machine['cpu']}), "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}; TCP sends by "
        f"{machine['congestion_control']}.",
        f"{'; '.join(dict.fromkeys(record.versions.values()))}.",
        "CPU is the relay's user and system time as the kernel counted it, with all its processes. 1 GB = 10^9 bytes.",
        *generator(record),
    ]
    lines += [f"Missing: {_named(record, key)}: {reason}" for key, reason in record.missing.items()]
    return [*lines, *(f"Note: {note}" for note in record.notes)]


def generator(record: Record) -> list[str]:
    """Whether the load generator limited the figures: how much faster it is than the relays."""
    lines = []
    for case, figure, unit in (
        ("bulk", "gbit_per_second", "Gbit/s"),
        ("ping-pong 64 B", "round_trips_per_second", "round trips/s"),
    ):
        for amount in dict.fromkeys(key.amount for key in record.results if key.case == case):
            direct = record.spread(Key(case, amount, "direct"), figure)
            others = [
                (spread.median, key)
                for key in record.results
                if key[:2] == (case, amount) and key.subject != "direct" and (spread := record.spread(key, figure))
            ]
            if direct is None or not others:
                continue
            best, key = max(others)
            cores = record.spread(key, "generator_cores")
            lines.append(
                f"The generator, {case}, {amount}: {_number(direct.median, 0)} {unit} with no relay, "
                f"{direct.median / best:.1f} times the fastest relay ({_named(record, key.subject)}); "
                f"beside that one it used {cores.median if cores else 0:.1f} cores."
            )
    if any(key.case.startswith("tunnel") for key in record.results):
        lines.append(
            "The load in TLS is made in Python, and slower than the relays: there throughput is a lower bound, and CPU "
            "the figure to look at."
        )
    return lines


# --- Markdown ---------------------------------------------------------------------------------------------------------

_SUMMARY: Final[tuple[tuple[str, str, str, int], ...]] = (
    ("bulk", "bulk, Gbit/s", "gbit_per_second", 1),
    ("bulk", "CPU ms per GB", "cpu_ms_per_gb", 0),
    ("ping-pong 64 B", "64 B, round trips/s", "round_trips_per_second", 0),
    ("ping-pong 64 B", "CPU µs per message", "cpu_us_per_message", 1),
    ("admission", "CPU µs per leg set up", "cpu_us_per_leg", 0),
    ("memory, paired", "KiB per pair", "kib_each", 0),
)


def as_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its first row as the head."""
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in body]


def as_markdown(record: Record, pictures: Mapping[str, str]) -> str:
    """The section of docs/benchmarks.md: how fast each subject is and what it costs, and the claims.

    ``pictures`` holds the paths from that page, each with its text for readers who cannot see it.
    """
    some = {"bulk": record.sizes.bulk[1], "ping-pong 64 B": record.sizes.pingpong[1], "admission": 1}
    rows = [[f"{record.sizes.bulk[1]} pairs", *(title for _, title, _, _ in _SUMMARY)]]
    for name in record.names:
        found = [
            record.spread(Key(case, some.get(case, record.sizes.held), name), figure) for case, _, figure, _ in _SUMMARY
        ]
        if any(found):
            cells = [
                "-" if one is None else _number(one.median, column[3])
                for one, column in zip(found, _SUMMARY, strict=True)
            ]
            rows.append([_named(record, name), *cells])
    verdicts = judge(record)
    lines = [*as_rows(rows), "", *(f"![{alternative}]({path})" for path, alternative in pictures.items()), ""]
    lines += as_rows([["the claims", "goal", "measured (lowest..highest)", "met"], *(_claim_row(v) for v in verdicts)])
    return "\n".join([*lines, "", *about(record)])


_COMPARED: Final = {"direct": "no relay", "frelay": "frelay", "haproxy": "HAProxy", "nginx": "nginx stream"}
# Forwarders without TLS let everybody in. Here only HAProxy with mutual TLS does the same as frelay.
_LETTING_IN: Final = {"frelay": "frelay", "haproxy": "haproxy-mtls"}
_SUMMARY_ROWS: Final = (
    "Bulk, {bulk} pairs: Gbit/s",
    "Bulk, {bulk} pairs: CPU ms per GB",
    "Messages of 64 B, {pingpong} pairs: round trips a second",
    "Messages of 64 B, {pingpong} pairs: CPU µs per message",
    "Letting one function in by mutual TLS: CPU µs",
    "Memory of an idle pair: KiB",
)


def as_summary(record: Record, picture: str) -> str:
    """The README's section: one line for each figure of the big table, beside the best known forwarders."""
    sizes = {"bulk": record.sizes.bulk[1], "pingpong": record.sizes.pingpong[1]}
    amounts = {"bulk": sizes["bulk"], "ping-pong 64 B": sizes["pingpong"], "admission": 1}
    rows = [["", *_COMPARED.values()]]
    for title, (case, _, figure, digits) in zip(_SUMMARY_ROWS, _SUMMARY, strict=True):
        subjects = _LETTING_IN if case == "admission" else dict(zip(_COMPARED, _COMPARED, strict=True))
        found = [
            record.spread(Key(case, amounts.get(case, record.sizes.held), subjects.get(key, "")), figure)
            for key in _COMPARED
        ]
        rows.append([title.format(**sizes), *("-" if one is None else _number(one.median, digits) for one in found)])
    machine = record.machine
    rounds = "one round" if record.rounds == 1 else f"median of {record.rounds} rounds"
    measured = f"Measured on {record.date[:10]} with {machine['cpus']} cores ({machine['cpu']}): {rounds}."
    return "\n".join([*as_rows(rows), "", picture, "", measured])


def _claim_row(verdict: Verdict) -> list[str]:
    word = {True: "yes", False: "**no**", None: "not measured"}[verdict.is_met]
    return [verdict.claim.goal, verdict.claim.bound, _cell(verdict.found, 2), word]
