"""Routes come, change and go by reload, and what happens to one does not affect another."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from support.ends import End, join_ends
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

DRAIN = "[relay]\ndrain_timeout = {}\n"


def route(name: str, port: int = 0, extra: str = "") -> str:
    return DEMO.replace('"demo"', f'"{name}"').replace(":0", f":{port}") + "require_inner_tls = false\n" + extra


A, B = route("a"), route("b")


async def talks(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"


async def waiting(site: Site, relay: RelayInProcess, route: str) -> End:
    party = await site.party(relay, "func1", route=route)
    await party.join()
    await party.expect("WAITING")
    return End(party, "tunnel")


async def reload(site: Site, relay: RelayInProcess, routes: str, drain_timeout: float = 30) -> None:
    site.write(routes, sections=DRAIN.format(drain_timeout))
    await relay.relay.reload()


def can_bind(port: int) -> bool:
    with socket.socket() as sock:
        try:
            # With SO_REUSEADDR, as a connection of this port in TIME_WAIT would otherwise prevent it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            return False
        return True


async def test_the_other_route_notices_nothing(site: Site) -> None:
    """TESTPLAN 44: B keeps its socket, its pairings, its waiting legs and its place in memory."""
    async with site.relay(A + B) as relay:
        one, two = await join_ends(site, relay, route="b")
        waiter = await waiting(site, relay, "b")
        live, port = relay.relay.routes["b"], relay.port("b")
        listener = relay.relay.parts.active.listeners[
            next(key for key in relay.relay.parts.active.listeners if "route b" in str(key))
        ]
        await reload(site, relay, B)
        assert list(relay.relay.routes) == ["b"]
        assert relay.relay.routes["b"] is live
        assert relay.port("b") == port
        assert listener in relay.relay.parts.active.listeners.values()
        await talks(one, two)
        func2 = await site.party(relay, "func2", route="b")
        await func2.join()
        await func2.expect("WAITING")
        await func2.expect("PAIRED")
        await waiter.party.expect("PAIRED")
        assert not relay.logged("pairing ended")


@pytest.mark.parametrize("bare", [False, True])
async def test_who_waits_on_it_is_told(site: Site, bare: bool) -> None:
    """TESTPLAN 44: waiting legs get REFUSED route-removed; one without frames an orderly end."""
    async with site.relay(A + B) as relay:
        if bare:
            party = await site.party(relay, "func1", route="a", alpn=())
            await eventually(lambda: relay.waiting("a") == (1, 0), "it waits")
            await reload(site, relay, B)
            assert await End(party, "bare").ended() == "eof"
        else:
            waiter = await waiting(site, relay, "a")
            await reload(site, relay, B)
            refusal = await waiter.party.refusal()
            assert refusal["code"] == "route-removed"
            assert refusal["retry_after"] is not None
        assert (await relay.log("refused", code="route-removed"))["route"] == "a"
        site.hang_up()
        await eventually(lambda: relay.legs == 0, "nobody is left")


async def test_its_port_is_free_at_once(site: Site) -> None:
    """TESTPLAN 44: the address is given back with the reload, though a pairing and a waiting leg are still there."""
    with reserved_port() as port:
        async with site.relay(route("a", port) + B) as relay:
            one, two = await join_ends(site, relay, route="a")
            await waiting(site, relay, "a")
            assert not can_bind(port)
            await reload(site, relay, B)
            assert can_bind(port)
            with socket.socket() as sock:
                assert sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
            await talks(one, two)
            # The relay itself can bind it again.
            await reload(site, relay, B + route("c", port))
            assert relay.own_port("c") == port
            await talks(*await join_ends(site, relay, route="c"))
            await talks(one, two)


async def test_its_pairings_may_end_within_drain_timeout(site: Site) -> None:
    """TESTPLAN 44: a pairing that ends in time ends in order; none is cut early."""
    async with site.relay(A + B) as relay:
        one, two = await join_ends(site, relay, route="a")
        await reload(site, relay, B)
        assert len(relay.relay.pairings) == 1, "a removed route's pairing still shows"
        await talks(one, two)
        await one.send_eof()
        assert await two.receive() == b""
        await two.send_eof()
        assert await one.receive() == b""
        assert (await relay.outcome())["outcome"] == "closed"
        assert not relay.relay.pairings
        await eventually(lambda: not relay.relay.parts.registry.retired, "the route is forgotten")


@pytest.mark.load
async def test_its_pairings_end_at_drain_timeout(site: Site) -> None:
    """TESTPLAN 13, 44: outcome route-removed by the relay, cut on both sides, and not before the time."""
    limit = 0.8
    async with site.relay(A + B) as relay:
        one, two = await join_ends(site, relay, route="a")
        three, four = await join_ends(site, relay, route="b")
        began = time.monotonic()
        await reload(site, relay, B, drain_timeout=limit)
        assert await one.ended() == "reset"
        assert time.monotonic() - began >= limit
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"], ended["route"]) == ("route-removed", "relay", "a")
        assert ended["detail"] == "the route 'a' was removed or replaced"
        await talks(three, four)
        await eventually(lambda: not relay.relay.parts.registry.retired, "the route is forgotten")
        assert len(relay.logged("pairing ended")) == 1


async def test_a_pairing_in_the_middle_of_its_hand_off(site: Site) -> None:
    """TESTPLAN 44: it is a pairing of the removed route like any other: it may finish its hand-off, and go on."""
    async with site.relay(A + B) as relay:
        one = await site.party(relay, "func1", route="a")
        two = await site.party(relay, "func2", route="a")
        for party in (one, two):
            await party.join()
            await party.expect("WAITING")
        for party in (one, two):
            await party.expect("PAIRED")
        await one.hand_off()
        await reload(site, relay, B)
        await two.hand_off()
        await talks(End(one, "raw"), End(two, "raw"))


async def test_a_replaced_route(site: Site) -> None:
    """A route with other parties is a new one: its old pairings drain, its waiting legs are told, its socket stays."""
    for name in ("func3", "func4"):
        site.add(name, site.ca.party(dns=[f"{name}.demo"]))
    with reserved_port() as port:
        async with site.relay(route("a", port)) as relay:
            one, two = await join_ends(site, relay, route="a")
            waiter = await waiting(site, relay, "a")
            old = relay.relay.routes["a"]
            listeners = dict(relay.relay.parts.active.listeners)
            other = route("a", port).replace("func1.demo", "func3.demo").replace("func2.demo", "func4.demo")
            await reload(site, relay, other, drain_timeout=1.0)
            assert (await waiter.party.refusal())["code"] == "route-removed"
            assert relay.relay.routes["a"] is not old
            assert relay.relay.parts.active.listeners == listeners, "the same address: the same socket, and no gap"
            stranger = await site.party(relay, "func1", route="a")
            await stranger.join()
            assert (await stranger.refusal())["code"] == "not-authorised"
            three, four = await join_ends(site, relay, route="a", names=("func3", "func4"))
            await talks(three, four)
            await talks(one, two)
            assert await one.ended() == "reset"
            assert (await relay.outcome())["outcome"] == "route-removed"
            await talks(three, four)


async def test_a_route_that_moves_to_another_port(site: Site) -> None:
    """The new address is there before the old one is given up, and the old pairings go on."""
    with reserved_port() as first, reserved_port() as second:
        async with site.relay(route("a", first)) as relay:
            one, two = await join_ends(site, relay, route="a")
            await reload(site, relay, route("a", second))
            assert relay.own_port("a") == second
            assert can_bind(first)
            await talks(*await join_ends(site, relay, route="a"))
            await talks(one, two)


async def test_a_kept_route_with_new_limits(site: Site) -> None:
    """Its socket and its pairings stay with the old limits; legs that come from now on have the new ones."""
    async with site.relay(route("a", extra="idle_timeout = 500\nmax_waiting_per_party = 2\n")) as relay:
        one, two = await join_ends(site, relay, route="a")
        first = await waiting(site, relay, "a")
        port, live = relay.port("a"), relay.relay.routes["a"]
        changes = route("a", extra="idle_timeout = 0.5\nmax_waiting_per_party = 1\n")
        await reload(site, relay, changes)
        assert relay.port("a") == port
        assert relay.relay.routes["a"] is live
        second = await site.party(relay, "func1", route="a")
        await second.join()
        assert (await second.refusal())["code"] == "queue-full"
        # The leg that waited before is still there, and its pairing is new, so it has the new limits.
        func2 = await site.party(relay, "func2", route="a")
        await func2.join()
        await func2.expect("WAITING")
        paired = await first.party.expect("PAIRED")
        assert paired["limits"]["idle_timeout"] == 0.5
        await func2.expect("PAIRED")
        await first.party.hand_off()
        await func2.hand_off()
        assert (await relay.log("pairing ended"))["outcome"] == "idle-timeout"
        await talks(one, two)
        assert len(relay.logged("pairing ended")) == 1


async def test_a_reload_takes_no_certificates_end_off_later_pairings(site: Site) -> None:
    """New limits come with the policy in force: by default a pairing ends with the certificates of its parties."""
    async with site.relay(DEMO) as relay:
        site.write(DEMO + "idle_timeout = 500\n")
        await relay.relay.reload()
        await join_ends(site, relay)
        (pairing,) = relay.relay.pairings
        assert pairing.limits.idle_timeout == 500
        assert pairing.limits.ends_with_certificates


async def test_a_shared_address_outlives_one_of_its_routes(site: Site) -> None:
    """TESTPLAN 44: where two routes share an address, removing one keeps the socket for the other."""
    with reserved_port() as port:
        a, b = route("a", port), route("b", port)
        async with site.relay(a + b) as relay:
            listeners = dict(relay.relay.parts.active.listeners)
            waiter = await site.party(relay, "func1", route="a")
            await waiter.join(route="a")
            await waiter.expect("WAITING")
            await reload(site, relay, b)
            assert relay.relay.parts.active.listeners == listeners
            assert (await waiter.refusal())["code"] == "route-removed"
            one = await site.party(relay, "func1", route="b")
            await one.join(route="a")
            assert (await one.refusal())["code"] == "unknown-route"
            await talks(*await join_ends(site, relay, route="b"))


async def test_a_route_that_is_removed_and_comes_back(site: Site) -> None:
    """The new route of the same name does not touch the pairings of the old one."""
    async with site.relay(A + B) as relay:
        one, two = await join_ends(site, relay, route="a")
        await reload(site, relay, B)
        await reload(site, relay, A + B)
        three, four = await join_ends(site, relay, route="a")
        assert len(relay.relay.pairings) == 2
        await talks(one, two)
        await talks(three, four)
        assert len(relay.relay.routes["a"].pairings) == 1
