"""Functions that name a key meet by it, whatever else waits on the route (docs/protocol.md, 3)."""

from __future__ import annotations

import ssl
from functools import partial
from itertools import permutations
from typing import Any, NoReturn

import pytest
import trio

import frelay
from frelay.joining.legs import FramedLeg
from frelay.protocol.identity import spki_of_certificate
from frelay.protocol.messages import Message, Mode, Paired
from support.odd_names import SPIFFE_ID
from support.party import Party, frame
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

# func1.demo is only func1, func2.demo only func2; both.demo is either.
MESH = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo", "dns:both.demo", "dns:*.job.demo"]
func2 = ["dns:func2.demo", "dns:both.demo", "dns:*.job.demo"]
"""
# One certificate with two names: with one it may be func1, with the other func2.
TWO_NAMES = f"""
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo", "dns:both.demo"]
func2 = ["dns:func2.demo", "uri:{SPIFFE_ID}"]
"""


@pytest.fixture(autouse=True)
def parties(site: Site) -> None:
    site.add("both", site.ca.party(dns=["both.demo"]))
    site.add("two names", site.ca.party(dns=["both.demo"], uris=[SPIFFE_ID]))
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    site.add("member", site.ca.party(dns=["a.job.demo"]))


async def waits(relay: RelayInProcess, leg: Party, **fields: Any) -> dict[str, Any]:
    """Join, and wait until the relay has queued the leg."""
    before = len(relay.relay.routes["demo"].lobby.everyone())
    await leg.join(**fields)
    waiting = await leg.expect("WAITING")
    await eventually(lambda: len(relay.relay.routes["demo"].lobby.everyone()) == before + 1, "its place")
    return waiting


async def test_a_key_is_repeated_in_both_answers(site: Site) -> None:
    async with site.relay() as relay:
        one, two, without = [await site.party(relay, name) for name in ("func1", "func2", "func1")]
        said = await waits(relay, without)
        assert "meet" not in said
        waiting = await waits(relay, one, meet="job42/0-1", partner=["dns:func2.demo"])
        assert (waiting["meet"], waiting["partner"], waiting["peer_seen"]) == ("job42/0-1", True, None)
        await two.join(meet="job42/0-1")
        waiting = await two.expect("WAITING")
        assert (waiting["meet"], waiting["peer_seen"], "partner" in waiting) == ("job42/0-1", 0, False)
        paired1, paired2 = await one.expect("PAIRED"), await two.expect("PAIRED")
        assert (paired1["meet"], paired1["partner"], paired1["role"]) == ("job42/0-1", True, "client")
        assert (paired2["meet"], "partner" in paired2, paired2["role"]) == ("job42/0-1", False, "server")
        assert relay.waiting() == (1, 0), "the leg without a key waits on"
        three = await site.party(relay, "func2")
        await three.join()
        await three.expect("WAITING")
        assert "meet" not in await three.expect("PAIRED")
        assert "meet" not in await without.expect("PAIRED")


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
async def test_eight_legs_with_four_keys_meet_in_any_order(site: Site, order: tuple[int, ...]) -> None:
    async with site.relay() as relay:
        firsts = {key: await site.party(relay, "func1") for key in range(4)}
        for key, leg in firsts.items():
            await waits(relay, leg, meet=f"job/{key}")
        pairings = {}
        for key in order:
            leg = await site.party(relay, "func2")
            await leg.join(meet=f"job/{key}")
            await leg.expect("WAITING")
            pairings[key] = (await leg.expect("PAIRED"))["pairing"]
        for key, leg in firsts.items():
            assert (await leg.expect("PAIRED"))["pairing"] == pairings[key]
        assert relay.relay.routes["demo"].lobby.keys == 0


@pytest.mark.parametrize("waiting", ["func1", "func2", "both"])
async def test_a_certificate_that_fits_both_parties_needs_no_party_with_a_key(site: Site, waiting: str) -> None:
    async with site.relay(MESH) as relay:
        nameless = await site.party(relay, "both")
        await nameless.join()
        refusal = await nameless.refusal()
        assert (refusal["code"], "both parties" in refusal["reason"]) == ("protocol-error", True)

        first, second = await site.party(relay, waiting), await site.party(relay, "both")
        said = await waits(relay, first, meet="job")
        assert said["party"] == (None if waiting == "both" else waiting)
        await second.join(meet="job")
        said = await second.expect("WAITING")
        assert (said["party"], said["identity"], said["peer_seen"]) == (None, "dns:both.demo", 0)
        one, two = await first.expect("PAIRED"), await second.expect("PAIRED")
        # Of two that may be either, the one that waited is func1, the client.
        assert (one["role"], two["role"]) == (("server", "client") if waiting == "func2" else ("client", "server"))
        assert two["peer"] == f"dns:{waiting}.demo"


async def test_two_that_may_be_either_join_at_the_very_same_moment(site: Site) -> None:
    """If each decided its party when it joined, both would become func1 and never meet."""
    async with site.relay(MESH) as relay:
        for number in range(10):
            both = [await site.party(relay, "both") for _ in range(2)]
            for party in both:
                party.tls.write(frame("JOIN", {"attempt": party.attempt, "meet": f"job/{number}"}))
            # Both are in the kernel before the relay's tasks run again.
            for party, records in [(party, party.take_outgoing()) for party in both]:
                party.send_now(records)
            for party in both:
                assert (await party.expect("WAITING"))["party"] is None
            roles = [(await party.expect("PAIRED"))["role"] for party in both]
            assert sorted(roles) == ["client", "server"]


async def test_a_dead_leg_is_passed_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first with the key has gone, and its task has not noticed yet: the match looks itself."""

    async def attend(*_: object, **__: object) -> NoReturn:
        await trio.sleep_forever()

    monkeypatch.setattr(FramedLeg, "attend", attend)
    async with site.relay(MESH) as relay:
        gone, alive = await site.party(relay, "func1"), await site.party(relay, "both")
        await waits(relay, gone, meet="job")
        await waits(relay, alive, meet="job", party="func1")
        first = relay.relay.routes["demo"].lobby.waiting("func1")[0].leg
        gone.reset()
        await eventually(first.is_gone, "its end has arrived")
        two = await site.party(relay, "func2")
        await two.join(meet="job")
        await two.expect("WAITING")
        assert (await two.expect("PAIRED"))["peer"] == "dns:both.demo"


async def test_a_greedy_function_takes_no_place_of_another(site: Site) -> None:
    """With one key, and with ever new ones: when the pool is full, its newest leg is evicted for another function."""
    limits = "max_waiting_per_meet = 4\nmax_waiting_by_meet = 6\n"
    async with site.relay(MESH + limits) as relay:
        greedy = [await site.party(relay, "func1") for _ in range(4)]
        for leg in greedy:
            await waits(relay, leg, meet="job")
        modest = await site.party(relay, "member")
        await modest.join(meet="job", party="func1")
        await modest.expect("WAITING")
        assert (await greedy[3].refusal())["code"] == "queue-full"
        more = [await site.party(relay, "func1") for _ in range(2)]
        for number, leg in enumerate(more):
            await waits(relay, leg, meet=f"job/{number}")
        another = await site.party(relay, "both")
        await another.join(meet="job/9")
        await another.expect("WAITING")
        assert (await more[1].refusal())["code"] == "queue-full"
        assert len(relay.relay.routes["demo"].lobby.everyone()) == 6


async def test_the_name_is_that_of_the_party_that_it_became(site: Site) -> None:
    """The certificate is func1 by one name and func2 by another; WAITING can name only one of them."""
    async with site.relay(TWO_NAMES) as relay:
        either, func1 = await site.party(relay, "two names"), await site.party(relay, "func1")
        assert (await waits(relay, either, meet="job"))["party"] is None
        await func1.join(meet="job")
        await func1.expect("WAITING")
        assert (await func1.expect("PAIRED"))["peer"] == f"uri:{SPIFFE_ID}"
        assert (await either.expect("PAIRED"))["role"] == "server"


async def test_a_retry_by_a_new_certificate_replaces_it_by_any_of_its_names(site: Site) -> None:
    """While the party is not decided, the leg goes by both names; the new certificate has only one of them."""
    site.add("renewed", site.ca.party(uris=[SPIFFE_ID]))
    async with site.relay(TWO_NAMES) as relay:
        stale, retry = await site.party(relay, "two names"), await site.party(relay, "renewed")
        retry.attempt = stale.attempt
        assert (await waits(relay, stale, meet="job"))["party"] is None
        await retry.join(meet="job")
        await retry.expect("WAITING")
        assert (await stale.refusal())["code"] == "replaced"


async def test_a_leg_without_a_key_hears_nothing_of_those_with_one(site: Site) -> None:
    """When was the other party last here? Only one without a key could have met this leg."""
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await waits(relay, one, meet="job")
        await two.join(meet="job", modes=["tunnel"])
        await two.expect("WAITING")
        await one.expect("PAIRED")
        one.reset()
        await relay.outcome()
        await eventually(lambda: not relay.relay.pairings, "the pairing is over")
        assert (await waits(relay, await site.party(relay, "func1")))["peer_seen"] is None
        assert (await waits(relay, await site.party(relay, "func2"), meet="job"))["peer_seen"] is None


async def test_a_leg_that_a_list_excludes_is_passed_over(site: Site) -> None:
    """A squatter with the same key holds nobody up, and is told why nobody came, without a name."""
    async with site.relay(MESH) as relay:
        squatter = await site.party(relay, "func2")
        await waits(relay, squatter, meet="job", wait=3)
        one = await site.party(relay, "func1")
        waiting = await waits(relay, one, meet="job", partner=["dns:*.other.demo", "dns:both.demo"])
        assert waiting["peer_seen"] == 0
        wanted = await site.party(relay, "both")
        await wanted.join(meet="job", partner=["dns:func1.demo"])
        await wanted.expect("WAITING")
        assert (await one.expect("PAIRED"))["peer"] == "dns:both.demo"
        await wanted.expect("PAIRED")
        another = await site.party(relay, "func1")
        await waits(relay, another, meet="job", partner=["dns:nobody.demo"])
        assert await squatter.refusal() == {
            "code": "wait-timeout",
            "reason": "nobody came within 3 s; 1 leg with this key was excluded by a partner list",
            "retry_after": 0,
        }


async def test_the_two_sides_of_a_misspelt_key_are_told_that_it_was_the_key(site: Site) -> None:
    """Both were there, so "nobody came" alone would be wrong. The reason names no key, not even the function's own."""
    async with site.relay(MESH) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await waits(relay, two, meet="job/01")
        await waits(relay, one, meet="job/1", wait=0.3)
        assert await one.refusal() == {
            "code": "wait-timeout",
            "reason": "nobody came with this key within 0.3 s",
            "retry_after": 0,
        }
        logged = await relay.log("refused")
        assert (logged["meet"], logged["route"], logged["party"]) == ("job/1", "demo", "func1")
        assert (await relay.log("waiting"))["meet"] == "job/01"


def pin(site: Site, name: str) -> str:
    return str(spki_of_certificate(ssl.PEM_cert_to_DER_cert(site.paths[name][0].read_text())))


async def test_a_key_pin_is_a_name_too(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await waits(relay, one, meet="job", partner=[pin(site, "func2")])
        await two.join(meet="job", partner=[pin(site, "func1")])
        await two.expect("WAITING")
        await two.expect("PAIRED")


async def test_a_retry_with_another_key_replaces_its_stale_leg(site: Site) -> None:
    async with site.relay(MESH) as relay:
        stale, retry = await site.party(relay, "both"), await site.party(relay, "both")
        retry.attempt = stale.attempt
        await waits(relay, stale, meet="one")
        await retry.join(meet="two", party="func2")
        await retry.expect("WAITING")
        assert (await stale.refusal())["code"] == "replaced"
        lobby = relay.relay.routes["demo"].lobby
        await eventually(lambda: [waiter.meet for waiter in lobby.everyone()] == ["two"], "the retry alone")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"meet": "two words"}, "JOIN.meet"),
        ({"meet": ""}, "JOIN.meet"),
        ({"meet": "caf\u00e9"}, "JOIN.meet"),
        ({"meet": "x" * 129}, "JOIN.meet"),
        ({"meet": None}, "JOIN.meet"),
        ({"meet": "job", "partner": []}, "JOIN.partner"),
        ({"meet": "job", "partner": ["dns:a.demo"] * 17}, "JOIN.partner"),
        ({"meet": "job", "partner": ["a.demo"]}, "JOIN.partner"),
        ({"meet": "job", "partner": "dns:a.demo"}, "JOIN.partner"),
        ({"partner": ["dns:a.demo"]}, "JOIN.partner"),
    ],
)
async def test_what_is_no_key_is_a_protocol_error(site: Site, fields: dict[str, Any], said: str) -> None:
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.join(**fields)
        refusal = await party.refusal()
        assert refusal["code"] == "protocol-error"
        assert said in refusal["reason"]


async def test_a_route_that_dials_has_no_keys(site: Site) -> None:
    route = DIALS.format(port=1)
    async with site.relay(route) as relay:
        party = await site.party(relay, "func1")
        await party.join(meet="job")
        refusal = await party.refusal()
        assert refusal["code"] == "protocol-error"
        assert "JOIN.meet" in refusal["reason"]


DIALS = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo"]
func2 = {{ dial = "127.0.0.1:{port}" }}
"""


async def test_a_stranger_gets_the_same_bytes_with_a_key_and_without(site: Site) -> None:
    """Whether a key is in use or not, and whether it is well chosen or not, a stranger learns nothing."""
    async with site.relay() as relay:
        member = await site.party(relay, "func1")
        await waits(relay, member, meet="job")
        answers = []
        for fields in ({}, {"meet": "job"}, {"meet": "none"}, {"meet": "job", "partner": ["dns:func1.demo"]}):
            stranger = await site.party(relay, "stranger")
            await stranger.join(**fields)
            answers.append(await stranger.refusal())
        assert answers == [answers[0]] * 4
        assert "job" not in answers[0]["reason"]


async def test_places_with_a_key_are_limited_apart_from_those_without(site: Site) -> None:
    limits = "max_waiting_per_party = 1\nmax_waiting_per_meet = 1\nmax_waiting_by_meet = 2\n"
    async with site.relay(MESH + limits) as relay:
        for meet in ("one", "two"):
            await waits(relay, await site.party(relay, "func1"), meet=meet)
        for meet, text in (("one", "1 legs of this party with this key"), ("three", "2 legs with keys")):
            refused = await site.party(relay, "func1")
            await refused.join(meet=meet)
            refusal = await refused.refusal()
            assert (refusal["code"], refusal["retry_after"]) == ("queue-full", 5)
            assert text in refusal["reason"]
        await waits(relay, await site.party(relay, "func1"))


async def test_a_reload_and_the_end_of_the_relay_reach_legs_that_may_be_either(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(MESH, crl=True) as relay:
        leg = await site.party(relay, "both")
        await waits(relay, leg, meet="job")
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["both"]], number=2))
        await relay.relay.reload()
        assert (await leg.refusal())["code"] == "revoked"
        leg = await site.party(relay, "member")
        await waits(relay, leg, meet="job")
        site.write(MESH.replace('"demo"', '"other"'), crl=True)
        await relay.relay.reload()
        assert (await leg.refusal())["code"] == "route-removed"
    async with site.relay(MESH) as relay:
        leg = await site.party(relay, "both")
        await waits(relay, leg, meet="job")
        relay.relay.drain(reason="the test wants it")
        await leg.expect("DRAINING")
        assert (await leg.refusal())["code"] == "draining"


@pytest.mark.parametrize("mode", ["handoff", "ticket", "tunnel"])
async def test_two_functions_with_one_certificate_meet_by_key(site: Site, mode: Mode) -> None:
    """Neither says which party it is: the relay decides."""
    cert, key = site.paths["both"]
    async with site.relay(MESH) as relay:
        connect = partial(
            frelay.connect,
            f"localhost:{relay.port()}",
            cert=cert,
            key=key,
            ca=site.ca_path,
            peer="dns:both.demo",
            partner="dns:both.demo",
            mode=mode,
            wait=20,
        )
        # Others on the route, which an older relay would pair with.
        await waits(relay, await site.party(relay, "func1"))
        await waits(relay, await site.party(relay, "func2"), meet="another")

        heard: dict[bytes, bytes] = {}
        paired: list[Message] = []

        def talk(word: bytes) -> bytes:
            with connect(meet="job", on_status=paired.append) as wire:
                wire.sendall(word)
                wire.send_eof()
                return wire.recv(100)

        async def run(word: bytes) -> None:
            heard[word] = await trio.to_thread.run_sync(talk, word)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, b"one")
            nursery.start_soon(run, b"two")
        assert heard == {b"one": b"two", b"two": b"one"}
        seen = {(message.role, message.meet) for message in paired if isinstance(message, Paired)}
        assert seen == {("client", "job"), ("server", "job")}


async def test_the_log_tells_the_key_of_a_leg_and_of_a_pairing(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await waits(relay, one, meet="<script>&")
        await two.join(meet="<script>&", modes=["tunnel"])
        await two.expect("WAITING")
        await one.expect("PAIRED")
        one.reset()
        assert (await relay.log("waiting"))["meet"] == "<script>&"
        assert (await relay.outcome())["meet"] == "<script>&"
