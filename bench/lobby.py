"""What a join costs at the lobby, in microseconds, with few and with many legs waiting.

    .venv/bin/python bench/lobby.py
    .venv/bin/python bench/lobby.py --waiting 10,100000

Without a key: there is room; the queue is full and the leg displaces another; the queue is full and the leg is refused.
With keys: each leg has its own; the pool of all keys is full and the leg displaces another. Each figure is the median
of many joins. It should not grow with the number of legs that wait.

The last line is the worst case: all legs have one key, and lists that exclude each other. There a join is compared with
each of them, and ``max_waiting_per_meet`` (64) is the limit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from frelay.config.model import RouteLimits
from frelay.joining.lobby import Lobby, Unfinished, Waiter
from frelay.pairing.leg import Leg
from frelay.protocol.acceptance import Acceptance
from frelay.protocol.identity import dns_name
from frelay.protocol.messages import PartyName

__all__ = ["CASES", "WORST", "Queue", "join_cost", "main"]

_JOINS: Final = 4000
_NUMBERS: Final = itertools.count()


class StandIn:
    """As much of a leg as a lobby asks of it."""

    credential = None

    def __init__(
        self,
        identity: str,
        party: PartyName = "func1",
        *,
        meet: str | None = None,
        acceptance: Acceptance | None = None,
    ) -> None:
        self.identity, self.party, self.attempt = identity, party, str(next(_NUMBERS))
        self.meet, self.acceptance = meet, acceptance

    @property
    def holder(self) -> str:
        """See :attr:`frelay.pairing.leg.Leg.holder`."""
        return self.identity

    def marks(self) -> tuple[tuple[str, str], ...]:
        """See :meth:`frelay.pairing.leg.Leg.marks`."""
        return ((self.attempt, self.identity),)


@dataclass(frozen=True)
class Queue:
    """A lobby with legs that wait, the leg that joins it, and how to bring it back to what it was."""

    lobby: Lobby
    newcomer: Callable[[], Leg]
    undo: Callable[[Waiter | None], None]


def _nothing() -> None:
    pass


def _lobby(most: int) -> Lobby:
    limits = RouteLimits(max_waiting_per_party=most, max_waiting_per_meet=most, max_waiting_by_meet=most)
    return Lobby(limits=limits, clock=time.monotonic)


def _enter(lobby: Lobby, identity: str, meet: str | None = None) -> Waiter:
    return lobby.enter(_keyed(identity, meet), _nothing, recompute_expiry=_nothing)


def _keyed(identity: str, meet: str | None) -> Leg:
    accepts = None if meet is None else Acceptance((dns_name(identity.removeprefix("dns:")),), None)
    return cast(Leg, StandIn(identity, meet=meet, acceptance=accepts))


def _join(lobby: Lobby, leg: Leg) -> Waiter | None:
    """What the relay does with a leg that joins; gives its waiter, or None if the lobby refuses it."""
    if lobby.objection(leg) is not None:
        return None
    lobby.replace_stale(leg)
    found = lobby.search(leg)
    while isinstance(found, Unfinished):
        found = lobby.search(leg, after=found.after)
    if found is not None:
        raise AssertionError("there is no partner in this lobby")
    return lobby.enter(leg, _nothing, recompute_expiry=_nothing)


def _in_a_queue_with_room(waiting: int) -> Queue:
    lobby = _lobby(waiting + 1)
    for number in range(waiting):
        _enter(lobby, f"dns:function{number}.demo")

    def undo(waiter: Waiter | None) -> None:
        assert waiter is not None
        lobby.leave(waiter)

    return Queue(lobby, lambda: cast(Leg, StandIn("dns:newcomer.demo")), undo)


def _in_a_full_queue(waiting: int) -> Queue:
    """One function has half of the places, and each of the others one."""
    lobby = _lobby(waiting)
    for number in range(waiting):
        _enter(lobby, "dns:greedy.demo" if number % 2 else f"dns:function{number}.demo")

    def undo(waiter: Waiter | None) -> None:
        assert waiter is not None
        lobby.leave(waiter)
        _enter(lobby, "dns:greedy.demo")

    return Queue(lobby, lambda: cast(Leg, StandIn("dns:newcomer.demo")), undo)


def _refused(waiting: int) -> Queue:
    lobby = _in_a_full_queue(waiting).lobby

    def undo(waiter: Waiter | None) -> None:
        assert waiter is None

    return Queue(lobby, lambda: cast(Leg, StandIn("dns:greedy.demo")), undo)


def _each_with_its_key(waiting: int) -> Queue:
    lobby = _lobby(waiting + 1)
    for number in range(waiting):
        _enter(lobby, f"dns:function{number}.demo", f"job/{number}")

    def undo(waiter: Waiter | None) -> None:
        assert waiter is not None
        lobby.leave(waiter)

    return Queue(lobby, lambda: _keyed("dns:newcomer.demo", "job/new"), undo)


def _full_of_keys(waiting: int) -> Queue:
    """One function has half of the places of all keys, and each of the others one."""
    lobby = _lobby(waiting)
    for number in range(waiting):
        _enter(lobby, "dns:greedy.demo" if number % 2 else f"dns:function{number}.demo", f"job/{number}")

    def undo(waiter: Waiter | None) -> None:
        assert waiter is not None
        lobby.leave(waiter)
        _enter(lobby, "dns:greedy.demo", f"job/{next(_NUMBERS)}")

    return Queue(lobby, lambda: _keyed("dns:newcomer.demo", "job/new"), undo)


def _all_exclude_each_other(waiting: int) -> Queue:
    """All have one key; each accepts one function, which never comes."""
    lobby = _lobby(waiting + 1)

    def leg(party: PartyName, identity: str) -> Leg:
        acceptance = Acceptance((dns_name(identity),), ["dns:nobody.demo"])
        return cast(Leg, StandIn(f"dns:{identity}", party, meet="job", acceptance=acceptance))

    for number in range(waiting):
        lobby.enter(leg("func2", f"function{number}.demo"), _nothing, recompute_expiry=_nothing)

    def undo(waiter: Waiter | None) -> None:
        assert waiter is not None
        lobby.leave(waiter)

    return Queue(lobby, lambda: leg("func1", "newcomer.demo"), undo)


CASES: Final = {
    "room": _in_a_queue_with_room,
    "full, displaces": _in_a_full_queue,
    "full, refused": _refused,
    "keys": _each_with_its_key,
    "keys, full, displaces": _full_of_keys,
}
"""By name, how a queue with so many waiting legs is made, where a join costs the same however many wait."""
WORST: Final = {"one key, all exclude": _all_exclude_each_other}
"""The same, where a join costs more with each leg that waits."""


def join_cost(queue: Queue, joins: int = _JOINS) -> float:
    """The median of ``joins`` joins, in microseconds; the queue is the same afterwards."""
    costs = []
    for _ in range(joins):
        leg = queue.newcomer()
        began = time.perf_counter_ns()
        waiter = _join(queue.lobby, leg)
        costs.append(time.perf_counter_ns() - began)
        queue.undo(waiter)
    return statistics.median(costs) / 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each case; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--waiting", default="10,1000,10000", help="numbers of legs, with commas between them")
    counts = [int(text) for text in parser.parse_args(arguments).waiting.split(",")]
    print("µs a join, waiting:".ljust(24), *(f"{count:>8,}" for count in counts))
    for case, make in (CASES | WORST).items():
        print(case.ljust(24), *(f"{join_cost(make(count)):8.1f}" for count in counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
