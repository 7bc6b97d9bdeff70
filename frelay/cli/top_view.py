"""What ``frelay top`` shows, without a terminal: sorted tables, with the rates between two snapshots of a relay.

A :class:`Snapshot` holds the API's answers at one moment. :func:`view` makes a :class:`View` of the last snapshot and
the one before it, in the order that the user chose; ``top_layout`` lays it out in lines. All of it is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar

from frelay.cli.admin_client import problem_line
from frelay.cli.routes import party_text, waiting_counts

__all__ = ["PairingRow", "Rate", "RefusalRow", "RouteRow", "Snapshot", "Sort", "View", "WaitingRow", "rates", "view"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The API's answers at one moment: ``at`` in seconds on any clock that only goes forward."""

    at: float
    status: Mapping[str, Any]
    routes: tuple[Mapping[str, Any], ...]
    pairings: tuple[Mapping[str, Any], ...]


class Rate(NamedTuple):
    """Bytes a second, each way."""

    func1_to_func2: float
    func2_to_func1: float


class Sort(Enum):
    """What the tables are sorted by; the value is the key to press. A table without that column takes its first."""

    BYTES = "b"
    AGE = "a"
    NAME = "n"
    ROUTE = "r"
    WAITING = "w"


# --- rates ------------------------------------------------------------------------------------------------------------


def rates(before: Snapshot | None, now: Snapshot) -> dict[str, dict[str, Rate]]:
    """``{"routes": {name: Rate}, "pairings": {id: Rate}}`` of what is in both snapshots."""
    return {
        "routes": _rates(before, now, lambda snapshot: snapshot.routes, "name"),
        "pairings": _rates(before, now, lambda snapshot: snapshot.pairings, "id"),
    }


def _rates(
    before: Snapshot | None, now: Snapshot, of: Callable[[Snapshot], Iterable[Mapping[str, Any]]], key: str
) -> dict[str, Rate]:
    if before is None or now.at <= before.at:
        return {}
    seconds = now.at - before.at
    old = {one[key]: one for one in of(before)}

    def rate(one: Mapping[str, Any], way: str) -> float:
        # A route that was deleted and added again counts from 0.
        more: int = one[way] - old[one[key]][way]
        return max(0.0, more / seconds)

    return {
        one[key]: Rate(rate(one, "bytes_func1_to_func2"), rate(one, "bytes_func2_to_func1"))
        for one in of(now)
        if one[key] in old
    }


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A route; ``age`` is that of the oldest leg or pairing on it, 0 without any."""

    name: str
    listen: str
    func1: str
    func2: str
    waiting: tuple[int, int, int]
    """Of func1, of func2, and of legs that may be either."""
    pairings: int
    rate: Rate | None
    moved: int
    age: float


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A leg that waits."""

    route: str
    party: str
    identity: str
    address: str
    mode: str
    age: float
    key: str = ""
    """The key by which it meets its partner; "" for none."""


@dataclass(frozen=True, slots=True)
class PairingRow:
    """A pairing that runs."""

    route: str
    func1: str
    func2: str
    is_handed_off: bool
    rate: Rate | None
    moved: int
    age: float
    key: str = ""


@dataclass(frozen=True, slots=True)
class RefusalRow:
    """A connection that the relay refused."""

    route: str
    who: str
    code: str
    reason: str
    age: float
    key: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What is shown. ``alarms`` are lines that need attention, the newest first."""

    name: str
    version: str
    state: str
    uptime: float
    alarms: tuple[str, ...]
    routes: tuple[RouteRow, ...]
    waiting: tuple[WaitingRow, ...]
    pairings: tuple[PairingRow, ...]
    refusals: tuple[RefusalRow, ...]


def view(now: Snapshot, before: Snapshot | None = None, sort: Sort = Sort.BYTES, alarms: Iterable[str] = ()) -> View:
    """The tables of ``now``, with rates since ``before``; ``alarms`` come before those of the relay itself."""
    found = rates(before, now)
    moment = float(now.status["now"])
    waiting = [
        WaitingRow(
            route["name"],
            party,
            leg["identity"],
            leg["address"],
            leg["mode"],
            max(0.0, moment - leg["since"]),
            leg.get("meet") or "",
        )
        for route in now.routes
        for party, legs in route["waiting"].items()
        for leg in legs
    ]
    pairings = [
        PairingRow(
            one["route"],
            one["func1"]["identity"],
            one["func2"]["identity"],
            one["is_handed_off"],
            found["pairings"].get(one["id"]),
            one["bytes_func1_to_func2"] + one["bytes_func2_to_func1"],
            one["age"],
            one.get("meet") or "",
        )
        for one in now.pairings
    ]
    oldest: dict[str, float] = {}
    for name, age in [(leg.route, leg.age) for leg in waiting] + [(pair.route, pair.age) for pair in pairings]:
        oldest[name] = max(age, oldest.get(name, 0.0))
    routes = [_route_row(one, found["routes"].get(one["name"]), oldest.get(one["name"], 0.0)) for one in now.routes]
    return View(
        name=now.status["name"],
        version=now.status["version"],
        state=now.status["state"],
        uptime=max(0.0, moment - now.status["started_at"]),
        alarms=(*alarms, *_own_alarms(now.status)),
        routes=_sorted(routes, sort, _ROUTE_ORDER),
        waiting=_sorted(waiting, sort, _WAITING_ORDER),
        pairings=_sorted(pairings, sort, _PAIRING_ORDER),
        refusals=tuple(
            RefusalRow(
                one["route"] or "-",
                one["identity"] or one["certificate"] or one["address"],
                one["code"],
                one["reason"],
                max(0.0, moment - one["at"]),
                one.get("meet") or "",
            )
            for one in now.status["refusals"]
        ),
    )


def _own_alarms(status: Mapping[str, Any]) -> list[str]:
    last = status["last_reload"]
    if last["ok"]:
        return []
    first, *others = [problem_line(problem) for problem in last["problems"]] or ["the relay gave no reason"]
    more = f" (and {len(others)} more: frelay status)" if others else ""
    return [f"last reload refused: {first}{more}"]


def _route_row(route: Mapping[str, Any], rate: Rate | None, age: float) -> RouteRow:
    return RouteRow(
        name=route["name"],
        listen=", ".join(route["bound"]),
        func1=party_text(route["func1"]),
        func2=party_text(route["func2"]),
        waiting=waiting_counts(route["waiting"]),
        pairings=route["pairings"],
        rate=rate,
        moved=route["bytes_func1_to_func2"] + route["bytes_func2_to_func1"],
        age=age,
    )


Row = TypeVar("Row", RouteRow, WaitingRow, PairingRow)
_Order = Mapping[Sort, Callable[[Any], Any]]

# Quantities descend, names ascend. Every table has Sort.ROUTE, the default where a table lacks an order.
_ROUTE_ORDER: Final[_Order] = {
    Sort.BYTES: lambda row: (-sum(row.rate or (0, 0)), -row.moved, row.name),
    Sort.AGE: lambda row: (-row.age, row.name),
    Sort.WAITING: lambda row: (-sum(row.waiting), row.name),
    Sort.ROUTE: lambda row: row.name,
}
_WAITING_ORDER: Final[_Order] = {
    Sort.NAME: lambda row: (row.identity, -row.age),
    Sort.ROUTE: lambda row: (row.route, row.party, -row.age),
    Sort.WAITING: lambda row: -row.age,
    Sort.AGE: lambda row: -row.age,
}
_PAIRING_ORDER: Final[_Order] = {
    Sort.BYTES: lambda row: (-sum(row.rate or (0, 0)), -row.moved, row.route),
    Sort.AGE: lambda row: -row.age,
    Sort.NAME: lambda row: (row.func1, row.func2),
    Sort.ROUTE: lambda row: (row.route, -row.age),
}


def _sorted(rows: list[Row], sort: Sort, order: _Order) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=order.get(sort, order[Sort.ROUTE])))
