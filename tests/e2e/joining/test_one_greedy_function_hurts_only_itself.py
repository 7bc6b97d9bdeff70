"""A function that opens connections without end evicts only its own: the others of its party get their places.

A party may be several functions (a list, a group, a wildcard), and its queue is shared among those who come.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

import frelay.net.sockets
from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.streams import tcp_pair
from support.waiting import TIMEOUT, eventually

PLACES = 4
WORKERS = DEMO.replace('"dns:func1.demo"', '"dns:*.workers.demo"')
LIMITS = f"[limits]\nmax_waiting_per_party = {PLACES}\nmax_pre_auth_per_ip = 256\n"


def add_workers(site: Site, *names: str) -> None:
    for name in names:
        site.add(name, site.ca.party(dns=[f"{name}.workers.demo"]))


async def answer(site: Site, relay: RelayInProcess, name: str, **fields: Any) -> tuple[Party, str]:
    """Join as ``name``; gives the party, and WAITING or the code of its refusal."""
    party = await site.party(relay, name)
    await party.join(**fields)
    with trio.fail_after(TIMEOUT):
        found = await party.next_frame()
    assert found is not None
    return party, found[1].get("code", found[0])


async def wait_in_line(site: Site, relay: RelayInProcess, name: str) -> Party:
    party, told = await answer(site, relay, name)
    assert told == "WAITING"
    return party


def holders(relay: RelayInProcess) -> list[str]:
    """The functions that wait as func1, longest wait first, by the first label of the name."""
    lobby = relay.relay.routes["demo"].lobby
    return [place.leg.identity.removeprefix("dns:").partition(".")[0] for place in lobby.waiting("func1")]


async def test_ten_times_its_quota_is_its_own_affair(site: Site) -> None:
    """TESTPLAN 36: it has every place and is refused nine times as many; another one comes, waits and is paired."""
    add_workers(site, "greedy", "polite")
    async with site.relay(WORKERS, sections=LIMITS) as relay:
        told = [await answer(site, relay, "greedy") for _ in range(10 * PLACES)]
        assert [code for _, code in told] == ["WAITING"] * PLACES + ["queue-full"] * 9 * PLACES
        polite = await wait_in_line(site, relay, "polite")
        await eventually(lambda: holders(relay) == ["greedy"] * (PLACES - 1) + ["polite"], "the latest gave way")
        assert await told[PLACES - 1][0].refusal() == {
            "code": "queue-full",
            "reason": "the queue is full, and a function with fewer places in it came",
            "retry_after": 5.0,
        }
        # The longest wait is still paired first.
        for waiter in (*(party for party, _ in told[: PLACES - 1]), polite):
            two = await site.party(relay, "func2")
            await two.join()
            await waiter.expect("PAIRED")
        assert not relay.logged("refused", identity="dns:polite.workers.demo")


async def test_a_full_queue_is_shared_equally(site: Site) -> None:
    """It stays so: a function never evicts one with as many as itself, or the two would evict each other for ever."""
    add_workers(site, "one", "two", "three", "four", "five")
    async with site.relay(WORKERS, sections=LIMITS) as relay:
        for expected in (["one"] * 4, ["one"] * 3 + ["two"], ["one", "one", "two", "two"]):
            while holders(relay) != expected:
                await wait_in_line(site, relay, expected[-1])
                await eventually(lambda: len(holders(relay)) <= PLACES, "the displaced one has gone")
        assert (await answer(site, relay, "one"))[1] == "queue-full"
        assert (await answer(site, relay, "two"))[1] == "queue-full"
        await wait_in_line(site, relay, "three")
        await wait_in_line(site, relay, "four")
        await eventually(lambda: sorted(holders(relay)) == ["four", "one", "three", "two"], "a place each")
        assert (await answer(site, relay, "five"))[1] == "queue-full"


async def test_one_function_alone_may_have_every_place(site: Site) -> None:
    add_workers(site, "one")
    async with site.relay(WORKERS, sections=LIMITS) as relay:
        for _ in range(PLACES):
            await wait_in_line(site, relay, "one")
        assert (await answer(site, relay, "one"))[1] == "queue-full"


async def test_a_retry_needs_no_room_and_takes_none(site: Site) -> None:
    """It replaces its own stale leg; no other function is evicted for it."""
    add_workers(site, "one", "two")
    async with site.relay(WORKERS, sections=LIMITS) as relay:
        for _ in range(PLACES - 1):
            await wait_in_line(site, relay, "one")
        stale = await wait_in_line(site, relay, "two")
        _, told = await answer(site, relay, "two", attempt=stale.attempt)
        assert told == "WAITING"
        await eventually(lambda: holders(relay) == ["one"] * (PLACES - 1) + ["two"], "only the stale one went")
        assert (await stale.refusal())["code"] == "replaced"


async def test_a_refused_leg_stays_a_stranger(site: Site) -> None:
    """A function may read its refusal slowly, but it counts as a stranger until then, and holds no turn."""
    limits = "[limits]\nmax_waiting_per_party = 1\nmax_pre_auth = 3\nmax_pre_auth_per_ip = 3\n"
    async with site.relay(sections=limits) as relay:
        await wait_in_line(site, relay, "func1")
        refused = [await answer(site, relay, "func1") for _ in range(3)]
        assert [code for _, code in refused] == ["queue-full"] * 3
        assert relay.legs == 4
        assert relay.relay.admission.strangers.running == 0
        assert len(relay.relay.admission.strangers) == 3
        for party, _ in refused:
            party.close()
        await eventually(lambda: relay.legs == 1, "they have gone")


async def test_those_who_are_being_refused_are_not_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting leg that is evicted has no slot any more; the number of those that are being told is bounded, too."""
    monkeypatch.setattr(frelay.net.sockets, "_MOST_LINGER", 3)
    pairs = [tcp_pair() for _ in range(5)]
    async with trio.open_nursery() as nursery:
        for inner, _ in pairs:
            nursery.start_soon(frelay.net.sockets.close_after_linger, inner, 60.0)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(inner.fileno() == -1 for inner, _ in pairs) == [False] * 3 + [True] * 2
        for _, outer in pairs:
            outer.close()
    assert not frelay.net.sockets._lingering


async def test_pairings_in_all_have_a_limit_beside_each_routes_own(site: Site) -> None:
    """Whatever the number of routes; a pairing that ends makes room for one on any route."""
    other = DEMO.replace('"demo"', '"other"')
    async with site.relay(DEMO + other, sections="[limits]\nmax_pairings_in_all = 2\n") as relay:

        async def parties(route: str) -> list[Party]:
            return [await site.party(relay, name, route=route) for name in ("func1", "func2")]

        first = await parties("demo")
        await pair(*first)
        await pair(*await parties("other"))
        one, two = await parties("other")
        await one.join()
        await one.expect("WAITING")
        await two.join()
        await two.expect("WAITING")
        assert await two.refusal() == {
            "code": "limit",
            "reason": "this relay already has 2 pairings",
            "retry_after": 10.0,
        }
        first[0].reset()
        await eventually(lambda: len(relay.relay.pairings) == 1, "one has ended")
        # There is room for one pairing of the route that has none, not for two.
        two = await site.party(relay, "func2", route="other")
        await two.join()
        await two.expect("WAITING")
        told = await two.refusal()
        assert (told["code"], "this route has 1 of the 2 pairings of this relay" in told["reason"]) == ("limit", True)
        await pair(*await parties("demo"))
        one, two = await parties("demo")
        await one.join()
        await one.expect("WAITING")
        await two.join()
        await two.expect("WAITING")
        assert (await two.refusal())["code"] == "limit"
        # After all have ended, no place is still held.
        site.hang_up()
        await eventually(lambda: relay.legs == 0, "all have ended")
        await pair(*await parties("demo"))
        await pair(*await parties("other"))
