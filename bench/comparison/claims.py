"""What frelay claims, and whether this run shows it: each goal with its measured ratio, met or missed.

A claim is about the median over the rounds; the spread beside it says how far to trust it. If a claim was not measured,
because a program is not installed here or a case was left out, it is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.comparison.record import Key, Record, Sizes, Spread

__all__ = ["Claim", "Verdict", "claims", "judge"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One goal."""

    goal: str
    figure: str
    ours: Key
    theirs: Key | None
    """The key by which ours is divided; None if the figure itself is meant."""
    sense: Literal["at most", "at least"]
    limit: float
    unit: str = "x"

    @property
    def bound(self) -> str:
        """The limit, for people."""
        return f"{'≤' if self.sense == 'at most' else '≥'} {self.limit:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, and what was measured."""

    claim: Claim
    found: Spread | None

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured."""
        if self.found is None:
            return None
        value = self.found.median
        return value <= self.claim.limit if self.claim.sense == "at most" else value >= self.claim.limit


def judge(record: Record) -> list[Verdict]:
    """All claims, judged by one run."""
    return [
        Verdict(
            claim,
            record.spread(claim.ours, claim.figure)
            if claim.theirs is None
            else record.ratio(claim.ours, claim.theirs, claim.figure),
        )
        for claim in claims(record.sizes)
    ]


def claims(sizes: Sizes) -> list[Claim]:
    """All of them, at the sizes of a run."""
    return [*_bulk(sizes), *_messages(sizes), *_tunnels(sizes), *_admission(), *_memory(sizes), *_many(sizes)]


def _pairs(count: int) -> str:
    return f"{count:,} {'pair' if count == 1 else 'pairs'}"


def _bulk(sizes: Sizes) -> Iterator[Claim]:
    def claim(
        text: str, figure: str, pairs: int, other: str, sense: Literal["at most", "at least"], limit: float
    ) -> Claim:
        return Claim(
            f"Bulk, {_pairs(pairs)}: {text}",
            figure,
            Key("bulk", pairs, "frelay"),
            Key("bulk", pairs, other),
            sense,
            limit,
        )

    for pairs in sizes.bulk:
        yield claim("CPU per GB to HAProxy's", "cpu_ms_per_gb", pairs, "haproxy", "at most", 0.30)
        yield claim("CPU per GB to nginx's", "cpu_ms_per_gb", pairs, "nginx", "at most", 0.55)
    some = sizes.bulk[1]
    yield claim("throughput to HAProxy's", "gbit_per_second", some, "haproxy", "at least", 1.8)
    yield claim("throughput to nginx's", "gbit_per_second", some, "nginx", "at least", 1.1)
    yield claim("throughput to no relay at all", "gbit_per_second", sizes.bulk[0], "direct", "at least", 0.85)
    for pairs in sizes.bulk:
        for key, name in (("socat", "socat"), ("strelaysrv", "strelaysrv"), ("transit-relay", "transit relay")):
            yield claim(f"CPU per GB to {name}'s", "cpu_ms_per_gb", pairs, key, "at most", 0.5)


def _messages(sizes: Sizes) -> Iterator[Claim]:
    one, some = sizes.pingpong[:2]
    case = "ping-pong 64 B"
    ours, theirs = Key(case, some, "frelay"), Key(case, some, "haproxy")
    what = f"64 B, {_pairs(some)}"
    yield Claim(f"{what}: CPU per message to HAProxy's", "cpu_us_per_message", ours, theirs, "at most", 1.0)
    yield Claim(f"{what}: round trips/s to HAProxy's", "round_trips_per_second", ours, theirs, "at least", 1.0)
    ours, theirs = Key(case, one, "frelay"), Key(case, one, "haproxy")
    yield Claim(f"64 B, {_pairs(one)}: median round trip to HAProxy's", "p50_us", ours, theirs, "at most", 1.1)
    case = "beside bulk"
    ours, theirs = Key(case, sizes.greedy, "frelay"), Key(case, sizes.greedy, "haproxy")
    what = f"64 B, {_pairs(sizes.greedy)} beside one of bulk: p99 to HAProxy's"
    yield Claim(what, "p99_us", ours, theirs, "at most", 2.0)


def _tunnels(sizes: Sizes) -> Iterator[Claim]:
    for pairs in sizes.tls:
        ours, theirs = Key("tunnel bulk", pairs, "frelay-tunnel"), Key("tunnel bulk", pairs, "haproxy-tls")
        what = f"Tunnel, {_pairs(pairs)}: CPU per GB to HAProxy's TLS to TLS (0.8 of its throughput per CPU second)"
        yield Claim(what, "cpu_ms_per_gb", ours, theirs, "at most", 1 / 0.8)


def _admission() -> Iterator[Claim]:
    for key, name in (("haproxy-accept", "bare mTLS accept"), ("haproxy-mtls", "mTLS accept in front of a connection")):
        what = f"CPU per admitted, paired, handed-off leg to HAProxy's {name}"
        yield Claim(what, "cpu_us_per_leg", Key("admission", 1, "frelay"), Key("admission", 1, key), "at most", 0.8)


def _memory(sizes: Sizes) -> Iterator[Claim]:
    paired, waiting = (Key(f"memory, {what}", sizes.held, "frelay") for what in ("paired", "waiting"))
    yield Claim("RSS per idle handed-off pairing", "kib_each", paired, None, "at most", 16, "KiB")
    yield Claim("RSS per waiting leg", "kib_each", waiting, None, "at most", 64, "KiB")


def _many(sizes: Sizes) -> Iterator[Claim]:
    none, most = sizes.idle[0], sizes.idle[-1]
    yield Claim(
        f"CPU per message with {most:,} idle pairings beside, to without",
        "cpu_us_per_message",
        Key("idle", most, "frelay"),
        Key("idle", none, "frelay"),
        "at most",
        1.1,
    )
