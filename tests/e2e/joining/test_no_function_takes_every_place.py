"""One function cannot take every pairing or every descriptor: the last ones go to those who hold few.

For each pool (a route's ``max_pairings``, the relay's ``max_pairings_in_all``, its descriptors) and each kind of route:
"greedy" takes what it gets, and then it and the operator are told the limit; "polite", which comes later and holds
nothing, is paired. No running pairing is cut for that.
"""

from __future__ import annotations

import resource

import pytest
import trio

from support.party import Party
from support.relay import RelayInProcess
from support.services import CALLERS, Caller, call, dialling, echo, serving
from support.site import Site
from support.waiting import TIMEOUT, eventually

MOST = 8
BOTH = '["dns:greedy.demo", "dns:polite.demo"]'
OPEN = "require_inner_tls = false"


@pytest.fixture
def site(site: Site) -> Site:
    for name in ("greedy", "polite"):
        site.add(name, site.ca.party(dns=[f"{name}.demo"]))
    return site


def route(func1: str, func2: str, *, most: int = MOST, name: str = "demo") -> str:
    return f"""
[[route]]
name = "{name}"
listen = "127.0.0.1:0"
func1 = {func1}
func2 = {func2}
max_pairings = {most}
{OPEN}
"""


async def joined(site: Site, relay: RelayInProcess, name: str, on: str = "demo", party: str | None = None) -> Party:
    one = await site.party(relay, name, route=on)
    await one.join(modes=["tunnel"], **({} if party is None else {"party": party}))
    await one.expect("WAITING")
    return one


async def is_paired(relay: RelayInProcess, before: tuple[int, int]) -> bool:
    """Whether there was a new pairing since ``before``, which :func:`so_far` gave, and no new refusal."""
    await eventually(lambda: so_far(relay) != before, "a pairing or a refusal")
    return so_far(relay)[0] > before[0]


def so_far(relay: RelayInProcess) -> tuple[int, int]:
    return len(relay.relay.pairings), len(relay.logged("refused"))


async def meet(site: Site, relay: RelayInProcess, one: str, two: str, on: str = "demo") -> bool:
    """Whether ``one``, which waits as func1, and ``two`` are paired."""
    await joined(site, relay, one, on, "func1")
    before = so_far(relay)
    await joined(site, relay, two, on, "func2")
    return await is_paired(relay, before)


def reason_for(relay: RelayInProcess, name: str) -> str:
    """Why ``name`` was refused last, as the log says; the code must be "limit"."""
    entry = relay.logged("refused", identity=f"dns:{name}.demo")[-1]
    assert entry["code"] == "limit"
    return str(entry["reason"])


# --- a route's pairings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS)
async def test_on_a_route_that_dials(site: Site, caller: Caller) -> None:
    more = f"{OPEN}\nmax_pairings = {MOST}\n" + (
        'handoff = "hello"\nhello_settle = 0.01\n' if caller == "hello" else ""
    )
    async with serving(echo) as service:
        text = dialling(service, more=more).replace('"dns:func1.demo"', BOTH)
        async with site.relay(text) as relay:
            for _ in range(MOST - 1):
                await call(site, relay, caller, name="greedy")
            before = so_far(relay)
            if caller == "hello":
                late = await site.party(relay, "greedy", alpn=())
                await late.send(b"Hello\n")
            else:
                late = await site.party(relay, "greedy", alpn=() if caller == "bare" else ("frelay/1",))
                if caller != "bare":
                    await late.join()
            assert not await is_paired(relay, before)
            assert reason_for(relay, "greedy") == (
                "this function has 7 of the 8 pairings of the route (max_pairings), and the rest is kept for others"
            )
            assert service.connections == MOST - 1, "the relay has dialled the service for a caller that it refused"
            end = await call(site, relay, caller, name="polite")
            await end.send(b"at last")
            with trio.fail_after(TIMEOUT):
                assert await end.receive_exactly(7) == b"at last"
            assert not relay.logged("pairing ended")


async def test_callers_of_one_moment_get_no_more(site: Site) -> None:
    """The relay dials for all before the first is paired, and checks each again when its service answers."""
    async with serving(echo) as service:
        text = dialling(service, more=f"{OPEN}\nmax_pairings = {MOST}\n").replace('"dns:func1.demo"', BOTH)
        async with site.relay(text) as relay:
            callers = [await site.party(relay, "greedy") for _ in range(2 * MOST)]
            for caller in callers:
                await caller.join(modes=["tunnel"])
            told = []
            for caller in callers:
                await caller.expect("WAITING")
                with trio.fail_after(TIMEOUT):
                    found = await caller.next_frame()
                assert found is not None
                told.append(found[1].get("code", found[0]))
            assert sorted(told) == sorted(["PAIRED"] * (MOST - 1) + ["limit"] * (MOST + 1))
            await call(site, relay, "tunnel", name="polite")


@pytest.mark.parametrize("many_partners", [False, True], ids=["one side is several", "both sides are"])
@pytest.mark.parametrize("greedy_waits", [True, False], ids=["it waits", "it comes last"])
async def test_on_a_route_of_functions(site: Site, many_partners: bool, greedy_waits: bool) -> None:
    """Only the greedy function is refused, whether it waits or comes; its partner waits on."""
    partners = [f"partner{number}" if many_partners else "func2" for number in range(MOST)]
    if many_partners:
        for name in partners:
            site.add(name, site.ca.party(dns=[f"{name}.partners.demo"]))
    func2 = '"dns:*.partners.demo"' if many_partners else '"dns:func2.demo"'
    async with site.relay(route('"dns:*.demo"', func2)) as relay:
        for name in partners[:-1]:
            assert await meet(site, relay, "greedy", name)
        if greedy_waits:
            greedy = await joined(site, relay, "greedy", party="func1")
            await joined(site, relay, partners[-1], party="func2")
        else:
            await joined(site, relay, partners[-1], party="func2")
            greedy = await joined(site, relay, "greedy", party="func1")
        told = await greedy.refusal()
        assert (told["code"], told["retry_after"]) == ("limit", 10.0)
        assert "7 of the 8 pairings of the route (max_pairings), and the rest is kept for others" in told["reason"]
        assert reason_for(relay, "greedy") == told["reason"]
        await eventually(lambda: relay.waiting() == (0, 1), "only the partner waits")
        before = so_far(relay)
        await joined(site, relay, "polite", party="func1")
        assert await is_paired(relay, before)
        assert not relay.logged("pairing ended")


async def test_many_who_wait_and_hold_too_much_hold_nobody_up(site: Site) -> None:
    """They are refused in batches, and the one behind them is paired."""
    most_waiting = 100
    routes = route(BOTH, '"dns:func2.demo"') + f"max_waiting_per_party = {most_waiting}\n"
    limits = "[limits]\nmax_pre_auth_per_ip = 256\n"
    async with site.relay(routes, sections=limits) as relay:
        for _ in range(MOST - 1):
            assert await meet(site, relay, "greedy", "func2")
        for _ in range(most_waiting - 1):
            await joined(site, relay, "greedy")
        await joined(site, relay, "polite")
        two = await joined(site, relay, "func2")
        assert (await two.expect("PAIRED"))["peer"] == "dns:polite.demo"
        await eventually(lambda: len(relay.logged("refused", code="limit")) == most_waiting - 1, "the others know")


async def test_on_a_plain_route(site: Site) -> None:
    """Without names, the holder is the address."""
    text = f"""
[[route]]
name = "demo"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["127.0.0.0/8"]
max_pairings = {MOST}
{OPEN}
"""
    async with site.relay(text) as relay:

        async def dial(source: str) -> None:
            streams.append(await trio.open_tcp_stream("127.0.0.1", relay.port(), local_address=source))

        streams: list[trio.SocketStream] = []
        for _ in range(MOST - 1):
            before = so_far(relay)
            await dial("127.0.0.1")
            await eventually(lambda: relay.waiting() == (1, 0), "the first waits")
            await dial("127.0.0.1")
            assert await is_paired(relay, before)
        await dial("127.0.0.2")
        await eventually(lambda: relay.waiting() == (1, 0), "polite waits")
        before = so_far(relay)
        await dial("127.0.0.1")
        assert not await is_paired(relay, before)
        (entry,) = relay.logged("refused")
        assert (entry["code"], entry["reason"]) == (
            "limit",
            "this address has 7 of the 8 pairings of the route (max_pairings), and the rest is kept for others",
        )
        await dial("127.0.0.3")
        assert await is_paired(relay, (MOST - 1, 1))
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def test_a_route_does_not_starve_itself(site: Site) -> None:
    """If only one function can be each party, no place is kept for others: both may use all of max_pairings."""
    async with site.relay(route('"dns:func1.demo"', '"dns:func2.demo"', most=2)) as relay:
        assert await meet(site, relay, "func1", "func2")
        assert await meet(site, relay, "func1", "func2")
        assert not await meet(site, relay, "func1", "func2")
        assert relay.logged("refused")[0]["reason"] == "the route already has 2 pairings"


async def test_what_ends_is_counted_no_more(site: Site) -> None:
    async with site.relay(route(BOTH, '"dns:func2.demo"')) as relay:
        for _ in range(3):
            for _ in range(MOST - 1):
                assert await meet(site, relay, "greedy", "func2")
            site.hang_up()
            await eventually(lambda: relay.legs == 0, "all have ended")
        admission = relay.relay.admission
        assert (len(admission.charged), admission.charged.held("dns:greedy.demo")) == (0, 0)


# --- the relay's pairings -------------------------------------------------------------------------------------------


async def test_the_relays_pairings_are_shared_by_its_routes(site: Site) -> None:
    """Routes that several functions may use are shared by these functions, too."""
    routes = (
        route('"dns:func1.demo"', '"dns:func2.demo"')
        + route('"dns:func1.demo"', '"dns:func2.demo"', name="other")
        + route(BOTH, '"dns:func2.demo"', most=100, name="shared")
    )
    async with site.relay(routes, sections="[limits]\nmax_pairings_in_all = 8\n") as relay:
        for _ in range(MOST - 1):
            assert await meet(site, relay, "func1", "func2")
        assert not await meet(site, relay, "func1", "func2")
        assert relay.logged("refused")[-1]["reason"] == (
            "this route has 7 of the 8 pairings of this relay (max_pairings_in_all), and the rest is kept for others"
        )
        assert await meet(site, relay, "func1", "func2", "other")
        site.hang_up()
        await eventually(lambda: relay.legs == 0, "all have ended")
        for _ in range(MOST - 1):
            assert await meet(site, relay, "greedy", "func2", "shared")
        assert not await meet(site, relay, "greedy", "func2", "shared")
        assert "of this relay (max_pairings_in_all)" in reason_for(relay, "greedy")
        before = so_far(relay)
        await joined(site, relay, "polite", "shared")  # func2 still waits there
        assert await is_paired(relay, before)


async def test_a_route_without_others_may_have_all_of_the_relay(site: Site) -> None:
    """If another route comes, the rest is kept for that one."""
    alone = route('"dns:func1.demo"', '"dns:func2.demo"')
    other = route('"dns:func1.demo"', '"dns:func2.demo"', name="other")
    async with site.relay(alone, sections="[limits]\nmax_pairings_in_all = 3\n") as relay:
        for _ in range(3):
            assert await meet(site, relay, "func1", "func2")
        assert not await meet(site, relay, "func1", "func2")
        assert relay.logged("refused")[-1]["reason"] == "this relay already has 3 pairings"
        site.hang_up()
        await eventually(lambda: relay.legs == 0, "all have ended")
        site.write(alone + other, sections="[limits]\nmax_pairings_in_all = 3\n")
        await relay.relay.reload()
        for _ in range(2):
            assert await meet(site, relay, "func1", "func2")
        assert not await meet(site, relay, "func1", "func2")
        assert await meet(site, relay, "func1", "func2", "other")


# --- descriptors ----------------------------------------------------------------------------------------------------

BUDGET = 24
KEPT = 4


def budget() -> str:
    """Limits with which a relay in this process may have BUDGET legs, and many of one function may wait.

    A quarter of the budget is for strangers, and a leg takes two of the rest.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"[limits]\nfd_budget = {(32 + 2 * BUDGET * 4 // 3 + 0.5) / hard}\nmax_waiting_per_party = 1000\n"


async def takes_all_it_gets(site: Site, relay: RelayInProcess, name: str, expected: str) -> int:
    """Join as ``name`` until it is refused; gives the number of joins before."""
    for number in range(2 * BUDGET):
        party = await site.party(relay, name)
        await party.join(modes=["tunnel"])
        with trio.fail_after(TIMEOUT):
            found = await party.next_frame()
            while found is not None and found[0] == "WAITING" and expected == "PAIRED":
                found = await party.next_frame()
        assert found is not None
        if found[0] == "REFUSED":
            assert found[1]["code"] == "limit"
            party.close()
            return number
        assert found[0] == expected
    raise AssertionError("never refused")


async def test_waiting_legs_leave_descriptors_for_others(site: Site) -> None:
    text = route(BOTH, '"dns:func2.demo"')
    async with site.relay(text, sections=budget()) as relay:
        taken = await takes_all_it_gets(site, relay, "greedy", "WAITING")
        assert taken == BUDGET - KEPT
        assert reason_for(relay, "greedy") == (
            f"this function has {taken} of the {BUDGET} connections of this relay (limits.fd_budget), and the rest is "
            "kept for others"
        )
        await joined(site, relay, "polite")
        before = so_far(relay)
        await joined(site, relay, "func2")
        assert await is_paired(relay, before)


async def test_a_retry_needs_no_descriptor_of_others(site: Site) -> None:
    """A function that holds too much may still replace a connection that it has lost."""
    async with site.relay(route(BOTH, '"dns:func2.demo"'), sections=budget()) as relay:
        stale = await joined(site, relay, "greedy")
        await takes_all_it_gets(site, relay, "greedy", "WAITING")
        fresh = await site.party(relay, "greedy")
        fresh.attempt = stale.attempt
        await fresh.join()
        await fresh.expect("WAITING")
        assert (await stale.refusal())["code"] == "replaced"


async def test_paired_legs_leave_descriptors_for_others(site: Site) -> None:
    """Both legs of a pairing count for its function, also the leg to the service."""
    async with serving(echo) as service:
        text = dialling(service, more=OPEN).replace('"dns:func1.demo"', BOTH)
        other = route('"dns:func1.demo"', '"dns:func2.demo"', name="other")
        async with site.relay(text + other, sections=budget()) as relay:
            taken = await takes_all_it_gets(site, relay, "greedy", "PAIRED")
            assert taken == (BUDGET - KEPT) // 2
            assert relay.relay.admission.charged.held("dns:greedy.demo") == 2 * taken
            end = await call(site, relay, "tunnel", name="polite")
            await end.send(b"at last")
            with trio.fail_after(TIMEOUT):
                assert await end.receive_exactly(7) == b"at last"
            assert await meet(site, relay, "func1", "func2", "other")


async def test_both_legs_of_a_pairing_are_its_holders(site: Site) -> None:
    """If only one function can be a party, its leg is charged to its partner's function, or to the route."""
    routes = route(BOTH, '"dns:func2.demo"') + route('"dns:func1.demo"', '"dns:func2.demo"', name="exact")
    async with site.relay(routes) as relay:
        charged = relay.relay.admission.charged
        await joined(site, relay, "func2")
        assert charged.held("route demo, func2") == 1
        await joined(site, relay, "greedy")
        await eventually(lambda: len(relay.relay.pairings) == 1, "they are paired")
        assert (charged.held("dns:greedy.demo"), charged.held("route demo, func2")) == (2, 0)
        assert await meet(site, relay, "func1", "func2", "exact")
        assert (charged.held("route exact"), len(charged)) == (2, 4)


async def test_a_ticket_connection_is_charged_like_the_leg_that_it_continues(site: Site) -> None:
    async with serving(echo) as service:
        text = dialling(service, more=OPEN).replace('"dns:func1.demo"', BOTH)
        async with site.relay(text) as relay:
            end = await call(site, relay, "ticket", name="greedy")
            await end.send(b"on")
            with trio.fail_after(TIMEOUT):
                assert await end.receive_exactly(2) == b"on"
            assert relay.relay.admission.charged.held("dns:greedy.demo") == 2
            assert relay.legs == 2
