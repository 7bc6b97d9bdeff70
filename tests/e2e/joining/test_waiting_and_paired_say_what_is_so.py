"""WAITING and PAIRED hold what docs/protocol.md says, key by key, and the values are right."""

from __future__ import annotations

import re

import pytest
import trio

from support.party import pair
from support.site import Site
from support.waiting import eventually

ROUTE = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = "dns:*.one.demo"
func2 = "dns:func2.demo"
wait_timeout = 40
half_close_timeout = 41.5
idle_timeout = 42
stall_timeout = 43
"""
LIMITS = """
[limits]
max_lifetime = 44
handoff_timeout = 20
"""


async def test_waiting_and_paired_to_the_letter(site: Site) -> None:
    site.add("func1", site.ca.party(dns=["a.one.demo"]))
    async with site.relay(ROUTE, sections=LIMITS) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join(wait=7.25, modes=["handoff"])
        assert await one.expect("WAITING") == {
            "route": "demo",
            "party": "func1",
            "identity": "dns:a.one.demo",
            "deadline": 7.25,
            "peer_seen": None,
        }
        await eventually(lambda: relay.waiting() == (1, 0), "func1's place")
        await two.join(modes=["tunnel"])
        assert await two.expect("WAITING") == {
            "route": "demo",
            "party": "func2",
            "identity": "dns:func2.demo",
            "deadline": 40.0,
            "peer_seen": 0.0,
        }
        paired1, paired2 = await one.expect("PAIRED"), await two.expect("PAIRED")
        limits = {"half_close_timeout": 41.5, "idle_timeout": 42.0, "stall_timeout": 43.0, "max_lifetime": 44.0}
        pairing = paired1["pairing"]
        assert re.fullmatch(r"[0-9a-f]{16}", pairing)
        assert paired1 == {
            "pairing": pairing,
            "route": "demo",
            "peer": "dns:func2.demo",
            "role": "client",
            "mode": "handoff",
            "limits": limits,
        }
        assert paired2 == {
            "pairing": pairing,
            "route": "demo",
            "peer": "dns:a.one.demo",
            "role": "server",
            "mode": "tunnel",
            "limits": limits,
        }
        assert [p.id for p in relay.relay.pairings] == [pairing]


@pytest.mark.parametrize("first", ["func1", "func2"])
async def test_roles_do_not_depend_on_who_came_first(site: Site, first: str) -> None:
    async with site.relay() as relay:
        second = "func2" if first == "func1" else "func1"
        both = await pair(await site.party(relay, first), await site.party(relay, second))
        paired = dict(zip((first, second), both, strict=True))
        assert paired["func1"]["role"] == "client"
        assert paired["func2"]["role"] == "server"


async def test_two_pairings_have_two_ids(site: Site) -> None:
    async with site.relay() as relay:
        ids = set()
        for _ in range(3):
            paired1, paired2 = await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
            assert paired1["pairing"] == paired2["pairing"]
            ids.add(paired1["pairing"])
        assert len(ids) == 3


@pytest.mark.load
async def test_peer_seen_counts_from_when_the_other_party_was_last_here(site: Site) -> None:
    """null before it ever came, 0 while it waits, then the seconds since it left, by leaving or by being paired."""
    async with site.relay() as relay:
        one = await site.party(relay, "func1")
        await one.join()
        assert (await one.expect("WAITING"))["peer_seen"] is None
        # A leg of the same party does not count as its peer.
        again = await site.party(relay, "func1")
        await again.join()
        assert (await again.expect("WAITING"))["peer_seen"] is None
        await again.send_frame("LEAVE")
        await one.send_frame("LEAVE")
        left_after = trio.current_time()
        await eventually(lambda: relay.waiting() == (0, 0), "both left")
        left_before = trio.current_time()
        await trio.sleep(0.2)
        two = await site.party(relay, "func2")
        asked_after = trio.current_time()
        await two.join()
        seen = (await two.expect("WAITING"))["peer_seen"]
        assert asked_after - left_before <= seen <= trio.current_time() - left_after
        # Two legs of one party at a time: it was last seen when the last of them left, not the first.
        one = await site.party(relay, "func1")
        await one.join()
        assert (await one.expect("WAITING"))["peer_seen"] == 0.0


@pytest.mark.load
async def test_who_was_paired_at_once_was_here_too(site: Site) -> None:
    """func2 found func1 waiting and was never in a queue; the next func1 is told all the same that it was here."""
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        before = trio.current_time()
        await pair(one, two)
        third = await site.party(relay, "func1")
        await third.join()
        assert 0 <= (await third.expect("WAITING"))["peer_seen"] <= trio.current_time() - before


@pytest.mark.load
async def test_peer_seen_counts_from_the_end_of_a_pairing(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        await trio.sleep(0.3)
        one.reset()
        two.reset()
        cut_after = trio.current_time()
        await relay.outcome()
        third = await site.party(relay, "func1")
        await third.join()
        assert (await third.expect("WAITING"))["peer_seen"] <= trio.current_time() - cut_after


async def test_unknown_keys_are_ignored(site: Site) -> None:
    """A later version may say more in its JOIN."""
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.join(hurry=True, route_hint={"a": [1, 2]}, modes=["carrier-pigeon", "handoff"])
        assert (await party.expect("WAITING"))["party"] == "func1"


async def test_advisory_frames_are_skipped(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.send_frame(0x80, b"\xff not even JSON")
        await one.join()
        await one.send_frame(0xFF)
        await one.expect("WAITING")
        await two.join()
        await two.expect("WAITING")
        await two.expect("PAIRED")
        await one.expect("PAIRED")


async def test_a_relay_prefers_the_raw_hand_off(site: Site) -> None:
    """PROTOCOL 2: `modes` says what the function can do; its order means nothing."""
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join(modes=["tunnel", "ticket", "handoff"])
        await one.expect("WAITING")
        await two.join(modes=["ticket", "tunnel"])
        await two.expect("WAITING")
        assert (await one.expect("PAIRED"))["mode"] == "handoff"
        assert (await two.expect("PAIRED"))["mode"] == "ticket"


async def test_the_mode_without_a_word_is_handoff(site: Site) -> None:
    async with site.relay() as relay:
        paired1, paired2 = await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert (paired1["mode"], paired2["mode"]) == ("handoff", "handoff")
        assert "ticket" not in paired1
