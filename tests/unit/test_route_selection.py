"""The routes of one address together give the answer that each would give alone, and it costs no more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.config.model import Address, Addresses, Route
from frelay.joining.route_selection import NotAdmitted, Parties, PartyTable, select_route
from frelay.protocol.identity import Name, dns_name, parse_selector
from frelay.protocol.messages import Join


def table(*routes: tuple[str, str, str]) -> PartyTable:
    """Routes as (name, func1, func2)."""
    return PartyTable(
        {
            name: Parties(
                Route(
                    name=name,
                    listen=Addresses([Address("127.0.0.1", 9001)]),
                    func1=(parse_selector(func1),),
                    func2=(parse_selector(func2),),
                    source=Path("relay.toml"),
                )
            )
            for name, func1, func2 in routes
        }
    )


labels = st.sampled_from(["a", "B", "b", "cd"])
names = st.lists(labels, min_size=1, max_size=3).map(".".join)


@given(routes=st.sets(names, max_size=6), server_name=st.lists(labels, max_size=5).map(".".join))
def test_a_server_name_calls_the_route_with_the_longest_name(routes: set[str], server_name: str) -> None:
    by_folded = {name.lower(): name for name in sorted(routes)}
    called = f"{server_name}.".lower()
    fitting = [folded for folded in by_folded if called.startswith(f"{folded}.")]
    found = table(*((name, "dns:x.demo", "dns:y.demo") for name in by_folded.values())).called_by(server_name)
    assert found == (by_folded[max(fitting, key=len)] if fitting else None)


def test_a_stranger_is_told_the_same_whatever_it_asks_for() -> None:
    routes = table(("one", "dns:a.demo", "dns:b.demo"), ("two", "dns:*.two.demo", "dns:c.demo"))
    said = set()
    for asked in ("one", "two", "three", None):
        with pytest.raises(NotAdmitted) as caught:
            select_route(routes, (dns_name("stranger.demo"),), Join(attempt="1", route=asked), "")
        said.add((caught.value.refusal.code, caught.value.refusal.reason))
    assert said == {("not-authorised", "this certificate is not admitted here")}
    with pytest.raises(NotAdmitted) as caught:
        select_route(routes, (dns_name("x.two.demo"),), Join(attempt="1", route="one"), "")
    assert caught.value.refusal.code == "unknown-route"


@pytest.mark.load
def test_a_certificate_of_many_names_costs_the_same_among_many_routes() -> None:
    """256 names that fit nothing, at an address with 2 and with 2,000 routes: at most three times as much."""
    stranger: tuple[Name, ...] = tuple(dns_name(f"f{number}.elsewhere.demo") for number in range(256))

    def cost(count: int) -> float:
        routes = table(*((f"r{i}", f"dns:a{i}.demo", f"dns:*.b{i}.demo") for i in range(count)))
        times = []
        for _ in range(15):
            began = time.perf_counter()
            with pytest.raises(NotAdmitted):
                select_route(routes, stranger, Join(attempt="1", route="none"), "")
            times.append(time.perf_counter() - began)
        return min(times)

    few, many = cost(2), cost(2000)
    assert many <= 3 * few, (few, many)
