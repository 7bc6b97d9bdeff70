"""A leg waits min(its own `wait`, the route's wait_timeout), is then told wait-timeout, and its place is free."""

from __future__ import annotations

import pytest
import trio

from support.site import Site
from support.waiting import eventually

ROUTES = """
[[route]]
name = "short"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
wait_timeout = 0.4
max_waiting_per_party = 1

[[route]]
name = "long"
listen = "127.0.0.1:0"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
wait_timeout = 500
"""


@pytest.mark.load
@pytest.mark.parametrize(
    ("route", "wait", "seconds"),
    [
        ("short", None, 0.4),
        ("short", 1000, 0.4),
        ("short", 1e300, 0.4),
        ("short", 0.2, 0.2),
        ("long", 0.3, 0.3),
        ("long", 0, 0.0),
        ("long", 5e-324, 0.0),
    ],
)
async def test_a_leg_waits_as_long_as_both_sides_can(
    site: Site, route: str, wait: float | None, seconds: float
) -> None:
    """TESTPLAN 32."""
    async with site.relay(ROUTES) as relay:
        party = await site.party(relay, "func1", route=route)
        began = trio.current_time()
        await party.join(**({} if wait is None else {"wait": wait}))
        deadline = (await party.expect("WAITING"))["deadline"]
        assert deadline == pytest.approx(seconds, abs=1e-9)
        refusal = await party.refusal()
        assert trio.current_time() - began >= seconds
        assert refusal["code"] == "wait-timeout"
        assert refusal["reason"].startswith("nobody came within ")
        assert refusal["retry_after"] == 0.0
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot free")
        assert relay.waiting(route) == (0, 0)


async def test_the_place_of_one_that_waited_too_long_is_free(site: Site) -> None:
    """TESTPLAN 32: with room for one, the next one waits after it, and is paired."""
    async with site.relay(ROUTES) as relay:
        for _ in range(3):
            party = await site.party(relay, "func1", route="short")
            await party.join(wait=0.1)
            await party.expect("WAITING")
            assert (await party.refusal())["code"] == "wait-timeout"
        last = await site.party(relay, "func1", route="short")
        await last.join()
        await last.expect("WAITING")
        two = await site.party(relay, "func2", route="short")
        await two.join()
        await two.expect("WAITING")
        paired, paired2 = await last.expect("PAIRED"), await two.expect("PAIRED")
        assert paired["pairing"] == paired2["pairing"]


async def test_no_time_to_wait_is_enough_when_the_peer_is_there(site: Site) -> None:
    """`wait = 0` asks whether the peer is there right now."""
    async with site.relay(ROUTES) as relay:
        one = await site.party(relay, "func1", route="long")
        await one.join()
        await one.expect("WAITING")
        await eventually(lambda: relay.waiting("long") == (1, 0), "func1's place")
        two = await site.party(relay, "func2", route="long")
        await two.join(wait=0)
        await two.expect("WAITING")
        assert (await two.expect("PAIRED"))["peer"] == "dns:func1.demo"
        await one.expect("PAIRED")


@pytest.mark.load
async def test_a_bare_leg_waits_the_routes_time_and_is_closed_in_order(site: Site) -> None:
    """TESTPLAN 32: without frames the relay cannot say why; it sends close_notify, so that it is no truncation."""
    async with site.relay(ROUTES) as relay:
        began = trio.current_time()
        party = await site.party(relay, "func1", route="short", alpn=())
        with trio.fail_after(20):
            assert await party.receive() == b""
        assert trio.current_time() - began >= 0.4
        await relay.log("refused", code="wait-timeout")
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot free")


async def test_being_paired_stops_the_clock(site: Site) -> None:
    async with site.relay(ROUTES) as relay:
        one, two = await site.party(relay, "func1", route="short"), await site.party(relay, "func2", route="short")
        await one.join()
        await one.expect("WAITING")
        await two.join()
        await two.expect("WAITING")
        await one.expect("PAIRED")
        await two.expect("PAIRED")
        await one.hand_off()
        await two.hand_off()
        with trio.move_on_after(0.8) as silence:
            raise AssertionError(await one.receive_raw())
        assert silence.cancelled_caught
        assert not relay.logged("refused")
        assert len(relay.relay.pairings) == 1


async def test_pings_do_not_prolong_the_wait(site: Site) -> None:
    """TESTPLAN 32: the deadline is absolute, whatever is sent meanwhile."""
    limits = "[limits]\nping_interval = 0.05\n"
    async with site.relay(ROUTES, sections=limits) as relay:
        party = await site.party(relay, "func1", route="short")
        await party.join()
        await party.expect("WAITING")
        for _ in range(3):
            await party.send_frame("PONG", await party.expect("PING"))
            await party.send_frame(0x90, b"")
        assert (await party.refusal())["code"] == "wait-timeout"
