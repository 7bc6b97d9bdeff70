"""A function that comes back with the same `attempt` replaces its own stale leg, and is never paired with it.

The hardest case is a certificate that fits both parties of a route: a retry as the other party would find its own
stale leg waiting as its partner.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import trio

from support.odd_names import SPIFFE_ID
from support.party import Party, frame, pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

BOTH = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo", "dns:both.demo"]
func2 = ["dns:func2.demo", "dns:both.demo"]
"""
# One certificate with two names: with one it may be func1, with the other func2.
TWO_NAMES = f"""
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo", "dns:both.demo"]
func2 = ["dns:func2.demo", "uri:{SPIFFE_ID}"]
"""


async def waits(relay: RelayInProcess, leg: Party, count: tuple[int, int], **fields: object) -> None:
    await leg.join(**fields)
    await leg.expect("WAITING")
    await eventually(lambda: relay.waiting() == count, f"queues of {count}")


@pytest.mark.parametrize("name", ["func1", "func2"])
async def test_a_retry_replaces_its_own_stale_leg(site: Site, name: str) -> None:
    """TESTPLAN 6."""
    async with site.relay() as relay:
        stale, retry = await site.party(relay, name), await site.party(relay, name)
        retry.attempt = stale.attempt.upper()  # a UUID has no case
        one_place = (1, 0) if name == "func1" else (0, 1)
        await waits(relay, stale, one_place)
        await retry.join()
        await retry.expect("WAITING")
        assert await stale.refusal() == {
            "code": "replaced",
            "reason": "the same attempt came in on a newer connection",
            "retry_after": None,
        }
        await eventually(lambda: relay.waiting() == one_place, "one place for both")
        peer = await site.party(relay, "func2" if name == "func1" else "func1")
        await peer.join()
        await peer.expect("WAITING")
        paired, peer_paired = await retry.expect("PAIRED"), await peer.expect("PAIRED")
        assert paired["pairing"] == peer_paired["pairing"]


@pytest.mark.parametrize("parties", [("func1", "func2"), ("func2", "func1")])
@pytest.mark.parametrize("routes", [BOTH, TWO_NAMES], ids=["one name for both", "two names"])
async def test_a_retry_as_the_other_party_is_not_its_own_partner(
    site: Site, parties: tuple[str, str], routes: str
) -> None:
    """TESTPLAN 6: one certificate that fits both parties, one attempt, one connection as each."""
    site.add("both", site.ca.party(dns=["both.demo"], uris=[SPIFFE_ID]))
    async with site.relay(routes) as relay:
        first, second = await site.party(relay, "both"), await site.party(relay, "both")
        second.attempt = first.attempt
        queue = {"func1": (1, 0), "func2": (0, 1)}
        await waits(relay, first, queue[parties[0]], party=parties[0])
        await waits(relay, second, queue[parties[1]], party=parties[1])
        assert (await first.refusal())["code"] == "replaced"
        assert not relay.relay.pairings


async def first_answer(party: Party, answers: list[Any], enough: trio.CancelScope) -> None:
    answers.append(await party.next_frame())
    enough.cancel()


@pytest.mark.parametrize("routes", [BOTH, TWO_NAMES], ids=["one name for both", "two names"])
async def test_two_legs_of_one_attempt_at_the_very_same_moment(site: Site, routes: str) -> None:
    """TESTPLAN 6: neither is in the queue yet when the other one looks, and still they are not paired."""
    site.add("both", site.ca.party(dns=["both.demo"], uris=[SPIFFE_ID]))
    async with site.relay(routes) as relay:
        for _ in range(10):
            first, second = await site.party(relay, "both"), await site.party(relay, "both")
            attempt = str(uuid.uuid4())
            for party, name in ((first, "func1"), (second, "func2")):
                party.tls.write(frame("JOIN", {"attempt": attempt, "party": name}))
            records = first.take_outgoing(), second.take_outgoing()
            # Both are in the kernel before the relay's tasks run again.
            first.send_now(records[0])
            second.send_now(records[1])
            for party in (first, second):
                await party.expect("WAITING")
            answers: list[Any] = []
            with trio.fail_after(20):
                # One of them is told that it was replaced; the other waits on.
                async with trio.open_nursery() as nursery:
                    for party in (first, second):
                        nursery.start_soon(first_answer, party, answers, nursery.cancel_scope)
            assert [answer and (answer[0], answer[1].get("code")) for answer in answers] == [("REFUSED", "replaced")]
            assert not relay.relay.pairings
            first.close()
            second.close()
            await eventually(lambda: relay.waiting() == (0, 0), "both gone")


async def test_five_legs_of_one_attempt_share_one_place(site: Site) -> None:
    """All come at one moment: one keeps the place, and four are told why they lose it."""
    async with site.relay() as relay:
        parties = [await site.party(relay, "func1") for _ in range(5)]
        for party in parties:
            party.tls.write(frame("JOIN", {"attempt": parties[0].attempt}))
        for party in parties:
            party.send_now(party.take_outgoing())
        for party in parties:
            await party.expect("WAITING")
        await eventually(lambda: len(relay.logged("refused", code="replaced")) == 4, "four replaced")
        assert relay.waiting() == (1, 0)


async def test_an_attempt_belongs_to_its_identity(site: Site) -> None:
    """A function that knows another function's attempt cannot use it to push that one out of the queue."""
    routes = BOTH.replace('"dns:func1.demo", "dns:both.demo"', '"dns:func1.demo", "dns:neighbour.demo"')
    site.add("neighbour", site.ca.party(dns=["neighbour.demo"]))
    async with site.relay(routes) as relay:
        victim, thief = await site.party(relay, "func1"), await site.party(relay, "neighbour")
        thief.attempt = victim.attempt
        await waits(relay, victim, (1, 0))
        await waits(relay, thief, (2, 0))
        two = await site.party(relay, "func2")
        await two.join()
        await two.expect("WAITING")
        await two.expect("PAIRED")
        assert (await victim.expect("PAIRED"))["peer"] == "dns:func2.demo"


async def test_another_attempt_of_the_same_function_is_another_leg(site: Site) -> None:
    async with site.relay() as relay:
        for count in (1, 2, 3):
            await waits(relay, await site.party(relay, "func1"), (count, 0))


async def test_a_replacement_needs_no_room(site: Site) -> None:
    """With a full queue a retry still takes over its own place, and all others are still told queue-full."""
    async with site.relay(sections="[limits]\nmax_waiting_per_party = 1\n") as relay:
        stale, retry, other = [await site.party(relay, "func1") for _ in range(3)]
        retry.attempt = stale.attempt
        await waits(relay, stale, (1, 0))
        await retry.join()
        await retry.expect("WAITING")
        assert (await stale.refusal())["code"] == "replaced"
        await other.join()
        assert (await other.refusal())["code"] == "queue-full"
        await pair_with(site, relay, retry)


async def pair_with(site: Site, relay: RelayInProcess, waiter: Party) -> None:
    two = await site.party(relay, "func2")
    await two.join()
    await two.expect("WAITING")
    await two.expect("PAIRED")
    await waiter.expect("PAIRED")


async def test_a_paired_attempt_is_not_replaced(site: Site) -> None:
    """`replaced` is for stale *waiting* legs; a pairing that runs is not torn down by a second JOIN."""
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        again = await site.party(relay, "func1")
        again.attempt = one.attempt
        await waits(relay, again, (1, 0))
        assert len(relay.relay.pairings) == 1
        await one.hand_off()
        await two.hand_off()


async def test_a_leg_without_frames_has_no_attempt(site: Site) -> None:
    """Two bare legs of one function are two legs."""
    async with site.relay() as relay:
        for count in (1, 2):
            bare = await site.party(relay, "func1", alpn=())
            assert bare.tls.selected_alpn_protocol() is None
            await eventually(lambda count=count: relay.waiting() == (count, 0), f"{count} bare legs")  # type: ignore[misc]


async def test_a_certificate_that_fits_both_must_say_which(site: Site) -> None:
    """PROTOCOL 2: `party` is needed where the certificate fits both, and only there."""
    site.add("both", site.ca.party(dns=["both.demo"]))
    async with site.relay(BOTH) as relay:
        unsure = await site.party(relay, "both")
        await unsure.join()
        refusal = await unsure.refusal()
        assert refusal["code"] == "protocol-error"
        assert "JOIN.party" in refusal["reason"]
        bare = await site.party(relay, "both", alpn=())
        assert await bare.receive() == b""
        for name in ("func1", "func2"):
            sure = await site.party(relay, "both")
            await sure.join(party=name, wait=30)
            assert (await sure.expect("WAITING"))["party"] == name
            await sure.send_frame("LEAVE")
            await eventually(lambda: relay.waiting() == (0, 0), "left")
        # Two attempts are two functions, even with one certificate. That is why a certificate may fit both parties.
        one, two = await site.party(relay, "both"), await site.party(relay, "both")
        await waits(relay, one, (1, 0), party="func1")
        await two.join(party="func2")
        await two.expect("WAITING")
        assert (await one.expect("PAIRED"))["peer"] == (await two.expect("PAIRED"))["peer"] == "dns:both.demo"


async def test_two_attempts_of_one_certificate_are_two_functions(site: Site) -> None:
    """As docs/security.md says under "No promises": members of a job may share a certificate, so they may meet."""
    site.add("both", site.ca.party(dns=["both.demo"]))
    async with site.relay(BOTH) as relay:
        one, two = await site.party(relay, "both"), await site.party(relay, "both")
        await waits(relay, one, (1, 0), party="func1")
        await two.join(party="func2")
        await two.expect("WAITING")
        assert (await two.expect("PAIRED"))["peer"] == (await one.expect("PAIRED"))["peer"] == "dns:both.demo"
