"""The plan of a reload: which routes stay, are added or are removed, as a pure function of two configurations."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frelay.config.model import (
    Address,
    Addresses,
    AdminSection,
    Config,
    Dial,
    Limits,
    MetricsSection,
    RelaySection,
    Route,
    RouteLimits,
    TcpSection,
    TlsSection,
    parse_address,
)
from frelay.config.plan import Add, Keep, ListenerKey, Plan, Remove, Replace, listener_keys, plan
from frelay.protocol.identity import parse_selector

A, B, C = (parse_selector(f"dns:{letter}.acme") for letter in "abc")
FILE = Path("/etc/frelay/relay.toml")


def route(name: str = "r", *listen: str, **keys: Any) -> Route:
    given: dict[str, Any] = {"func1": (A,), "func2": (B,), "source": FILE, **keys}
    return Route(name=name, listen=Addresses(map(parse_address, listen or ["127.0.0.1:9001"])), **given)


def config(*routes: Route, **sections: Any) -> Config:
    return Config(path=FILE, routes=routes, **sections)


def key(listen: str, name: str | None = None) -> ListenerKey:
    return ListenerKey(parse_address(listen), name)


def test_at_the_start_everything_is_new() -> None:
    one, two = route("one"), route("two", "127.0.0.1:9002")
    assert plan(None, config(one, two)) == Plan(
        add=(Add(one), Add(two)), bind=frozenset({key("127.0.0.1:9001"), key("127.0.0.1:9002")})
    )


def test_nothing_changed_is_an_empty_plan() -> None:
    found = plan(config(route()), config(route()))
    assert found == Plan(keep=(Keep(route()),))
    assert found.is_empty


def test_removing_one_route_leaves_the_other_alone() -> None:
    """TESTPLAN 44, its plan."""
    one, two = route("one"), route("two", "127.0.0.1:9002")
    found = plan(config(one, two), config(two))
    assert found == Plan(keep=(Keep(two),), remove=(Remove(one),), close=frozenset({key("127.0.0.1:9001")}))
    assert not found.is_empty


def test_a_shared_address_is_closed_with_its_last_route_only() -> None:
    one, two = route("one"), route("two")
    assert plan(config(one, two), config(two)).close == frozenset()
    assert plan(config(two), config(one, two)).bind == frozenset()
    assert plan(config(one, two), config()).close == frozenset({key("127.0.0.1:9001")})


@pytest.mark.parametrize("name", sorted(RouteLimits.model_fields))
def test_a_limit_that_differs_keeps_the_route(name: str) -> None:
    changed = route(limits=RouteLimits.model_validate({name: 7}))
    found = plan(config(route()), config(changed))
    assert found == Plan(keep=(Keep(changed, (name,)),))
    assert not found.is_empty


def test_the_timings_of_the_handoff_are_limits_too() -> None:
    changed = route(hello_settle=1.0, ticket_timeout=1.0)
    assert plan(config(route()), config(changed)).keep == (Keep(changed, ("hello_settle", "ticket_timeout")),)


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"func1": (C,)}, "func1"),
        ({"func1": (A, C)}, "func1"),
        ({"func2": Dial(Address("h", 1))}, "func2"),
        ({"outer": "none"}, "outer"),
        ({"allow_from": (ip_network("10.0.0.0/8"),)}, "allow_from"),
        ({"proxy_protocol": (ip_network("10.0.0.0/8"),)}, "proxy_protocol"),
        ({"handoff": "hello"}, "handoff"),
        ({"require_inner_tls": "always"}, "require_inner_tls"),
        ({"require_inner_tls": False}, "require_inner_tls"),
    ],
)
def test_other_wiring_at_the_same_address_replaces_the_route_and_keeps_the_socket(
    keys: dict[str, Any], changed: str
) -> None:
    old, new = route(), route(**keys)
    assert plan(config(old), config(new)) == Plan(replace=(Replace(old, new, (changed,)),))


def test_another_dial_target_replaces_the_route() -> None:
    old, new = (route(func2=Dial(Address("h", port))) for port in (1, 2))
    assert plan(config(old), config(new)).replace == (Replace(old, new, ("func2",)),)


def test_more_time_to_reach_a_service_keeps_the_route() -> None:
    old, new = (route(func2=Dial(Address("h", 1), seconds)) for seconds in (1, 2))
    assert plan(config(old), config(new)) == Plan(keep=(Keep(new, ("func2.connect_timeout",)),))


def test_a_replacement_names_its_limits_as_well() -> None:
    old, new = route(), route(func1=(C,), limits=RouteLimits(idle_timeout=7))
    assert plan(config(old), config(new)).replace == (Replace(old, new, ("func1", "idle_timeout")),)


def test_another_address_binds_the_new_and_closes_the_old() -> None:
    old, new = route(), route("r", "127.0.0.1:9002")
    found = plan(config(old), config(new))
    assert found.replace == (Replace(old, new, ("listen",)),)
    assert (found.bind, found.close) == (frozenset({key("127.0.0.1:9002")}), frozenset({key("127.0.0.1:9001")}))
    assert found.clashes == ()


def test_sockets_that_cannot_be_bound_beside_the_old_are_named() -> None:
    found = plan(config(route()), config(route("r", "0.0.0.0:9001")))
    assert found.clashes == ((key("0.0.0.0:9001"), key("127.0.0.1:9001")),)


def test_the_order_of_parties_and_networks_is_no_change() -> None:
    nets = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    old = route(func1=(A, C), allow_from=nets)
    new = route(func1=(C, A), allow_from=nets[::-1])
    assert plan(config(old), config(new)) == Plan(keep=(Keep(new),))


def test_a_route_that_moves_to_another_file_is_kept() -> None:
    moved = route(source=Path("/etc/frelay/routes.d/r.toml"))
    found = plan(config(route()), config(moved))
    assert found.keep == (Keep(moved),)
    assert found.is_empty


def test_each_route_on_port_0_has_a_socket_of_its_own_and_keeps_it() -> None:
    one, two = route("one", "127.0.0.1:0"), route("two", "127.0.0.1:0")
    assert listener_keys(one) == (key("127.0.0.1:0", "one"),)
    assert listener_keys(one) != listener_keys(two)
    assert listener_keys(route("one")) == listener_keys(route("two")) == (key("127.0.0.1:9001"),)
    assert plan(None, config(one, two)).bind == {*listener_keys(one), *listener_keys(two)}
    found = plan(config(one, two), config(route("one", "127.0.0.1:0", func1=(C,))))
    assert (found.bind, found.close) == (frozenset(), frozenset(listener_keys(two)))


def test_a_route_that_keeps_an_address_is_kept() -> None:
    """Functions still find it there. Only if all addresses change, the route is replaced."""
    four, six, other = "0.0.0.0:9001", "[::]:9001", "127.0.0.1:9002"
    found = plan(config(route("r", four)), config(route("r", four, six)))
    assert (found.keep, found.replace) == ((Keep(route("r", four, six), ("listen",)),), ())
    assert (found.bind, found.close) == (frozenset({key(six)}), frozenset())
    assert not found.is_empty
    found = plan(config(route("r", four, six)), config(route("r", six)))
    assert (found.keep, found.replace) == ((Keep(route("r", six), ("listen",)),), ())
    assert (found.bind, found.close) == (frozenset(), frozenset({key(four)}))
    assert plan(config(route("r", four, six)), config(route("r", six, four))).is_empty
    found = plan(config(route("r", four, six)), config(route("r", other)))
    assert found.replace == (Replace(route("r", four, six), route("r", other), ("listen",)),)
    found = plan(config(route("r", four)), config(route("r", four, six, func1=(C,))))
    assert [replaced.changed for replaced in found.replace] == [("listen", "func1")]


def test_a_default_limit_shows_at_the_routes_that_inherit_it_only() -> None:
    inheriting, overriding = route("one", limits=RouteLimits(idle_timeout=7)), route("two")
    found = plan(config(route("one"), overriding), config(inheriting, overriding, limits=Limits(idle_timeout=7)))
    assert found == Plan(keep=(Keep(inheriting, ("idle_timeout",)), Keep(overriding)))


TLS = TlsSection(certificate=Path("/c"), private_key=Path("/k"), client_ca=Path("/a"))


@pytest.mark.parametrize(
    ("old", "new", "settings", "restart_only"),
    [
        ({}, {"limits": Limits(handshake_timeout=1)}, ("limits.handshake_timeout",), ()),
        ({}, {"tcp": TcpSection(nodelay=False)}, ("tcp.nodelay",), ()),
        ({}, {"tcp": TcpSection(congestion_control="reno")}, ("tcp.congestion_control",), ()),
        ({}, {"relay": RelaySection(drain_timeout=1)}, ("relay.drain_timeout",), ()),
        ({}, {"relay": RelaySection(name="x")}, (), ("relay.name",)),
        ({}, {"relay": RelaySection(user="frelay")}, (), ("relay.user",)),
        ({"tls": TLS}, {"tls": TLS.model_copy(update={"crl": Path("/r")})}, ("tls.crl",), ()),
        ({"tls": TLS}, {}, ("tls",), ()),
        ({}, {"admin": AdminSection()}, (), ("admin",)),
        ({"admin": AdminSection()}, {"admin": AdminSection(listen="unix:x")}, (), ("admin.listen",)),
        ({"metrics": MetricsSection()}, {}, (), ("metrics",)),
        (
            {},
            {"tcp": TcpSection(user_timeout=200), "metrics": MetricsSection()},
            ("tcp.user_timeout",),
            ("metrics",),
        ),
    ],
)
def test_settings_beside_the_routes_are_named_by_when_they_take_effect(
    old: dict[str, Any], new: dict[str, Any], settings: tuple[str, ...], restart_only: tuple[str, ...]
) -> None:
    found = plan(config(**old), config(**new))
    assert (found.settings, found.restart_only) == (settings, restart_only)
    assert not found.is_empty


# --- any two configurations --------------------------------------------------------------------------------------

ADDRESSES = st.sampled_from(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:0", "0.0.0.0:1"])
ROUTES = st.builds(
    lambda name, listen, **keys: route(name, *listen, **keys),
    name=st.sampled_from("abcd"),
    listen=st.lists(ADDRESSES, min_size=1, max_size=3, unique=True),
    func1=st.sampled_from([(A,), (A, C), (C, A)]),
    limits=st.sampled_from([RouteLimits(), RouteLimits(idle_timeout=7)]),
)
CONFIGS = st.lists(ROUTES, unique_by=lambda route: route.name, max_size=4).map(lambda routes: config(*routes))


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_applying_a_plan_gives_the_new_configuration(old: Config, new: Config) -> None:
    found = plan(old, new)
    gone = {removed.route.name for removed in found.remove}
    routes = {name: route for name, route in old.routes_by_name.items() if name not in gone}
    routes |= {kept.route.name: kept.route for kept in found.keep}
    routes |= {added.route.name: added.route for added in found.add}
    routes |= {replaced.new.name: replaced.new for replaced in found.replace}
    assert routes == new.routes_by_name

    bound = {key for route in old.routes for key in listener_keys(route)}
    assert found.close <= bound
    assert not found.bind & bound
    assert (bound - found.close) | found.bind == {key for route in new.routes for key in listener_keys(route)}


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_a_kept_route_keeps_a_socket_and_a_plan_is_empty_exactly_when_nothing_differs(old: Config, new: Config) -> None:
    found = plan(old, new)
    for kept in found.keep:
        mine, before = set(listener_keys(kept.route)), set(listener_keys(old.routes_by_name[kept.route.name]))
        assert mine & before
        assert not mine & before & (found.bind | found.close)
        assert (mine == before) is ("listen" not in kept.changed)
    assert plan(new, new).is_empty

    def meaning(configuration: Config) -> object:
        return {
            name: (
                frozenset(route.listen),
                frozenset(route.func1) if isinstance(route.func1, tuple) else None,
                route.limits,
            )
            for name, route in configuration.routes_by_name.items()
        }

    assert found.is_empty is (meaning(old) == meaning(new))
