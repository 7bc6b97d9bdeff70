"""A function that fits no route of an address cannot find out which routes or parties exist there.

Whatever it asks for, the answer is the same frames with the same bytes; without a certificate there is no answer in
frames at all.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import Site

ASKS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a route that exists": {"route": "demo"},
    "a route that does not": {"route": "nowhere"},
    "a route in other letters": {"route": "DEMO"},
    "a party": {"party": "func1"},
    "a route and a party": {"route": "demo", "party": "func2"},
    "a mode that is not here": {"route": "demo", "modes": ["pigeon"]},
    "no time to wait": {"route": "demo", "wait": 0},
}


def two_routes(port: int) -> str:
    return f"""
[[route]]
name = "demo"
listen = "127.0.0.1:{port}"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"

[[route]]
name = "other"
listen = "127.0.0.1:{port}"
func1 = "dns:func1.other"
func2 = "dns:func2.other"
"""


async def everything_told(site: Site, relay: RelayInProcess, server_hostname: str, ask: dict[str, Any]) -> bytes:
    """All that a stranger reads inside TLS after its JOIN, to the end."""
    context = site.context("stranger")
    context.check_hostname = False  # the server name chooses a route; it need not be in the relay's certificate
    party = await site.connect(relay, context=context, server_hostname=server_hostname)
    await party.handshake()
    await party.join(**ask)
    told = b""
    while data := await party.receive():
        told += data
    party.close()
    return told


@pytest.mark.parametrize("is_shared", [False, True], ids=["one route", "two routes"])
async def test_every_answer_to_a_stranger_is_the_same(site: Site, is_shared: bool) -> None:
    """TESTPLAN 7: same code, same sentence, same bytes, whether both parties wait inside or nobody does."""
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    with reserved_port() as port:
        routes = two_routes(port) if is_shared else two_routes(port).partition("\n\n")[0]
        async with site.relay(routes) as relay:
            told = {await everything_told(site, relay, "localhost", ask) for ask in ASKS.values()}
            waiter = await site.party(relay, "func1")
            await waiter.join(route="demo")
            await waiter.expect("WAITING")
            told |= {await everything_told(site, relay, "localhost", ask) for ask in ASKS.values()}
            for name in ("demo.relay.test", "nowhere.relay.test", "other"):
                told |= {await everything_told(site, relay, name, ask) for ask in ASKS.values()}
            assert len(told) == 1
            (answer,) = told
            assert answer[:2] == b"\x14\x00"
            assert b'"not-authorised"' in answer
            for secret in (b"demo", b"other", b"func1", b"func2", b"nowhere", b"DEMO"):
                assert secret not in answer
            assert relay.waiting() == (1, 0)
            # The log tells the operator what the stranger is not told.
            assert all("stranger.demo" in str(event["certificate"]) for event in relay.logged("refused"))


async def test_a_stranger_without_frames_sees_an_orderly_end_and_no_byte(site: Site) -> None:
    """TESTPLAN 7."""
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    async with site.relay() as relay:
        party = await site.party(relay, "stranger", alpn=())
        await party.send(b"is anybody there?")
        assert await party.receive() == b""
        await relay.log("refused", code="not-authorised")


async def test_the_wrong_party_is_a_stranger(site: Site) -> None:
    """A function that may be func1 learns nothing about func2's side by asking for it."""
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.join(party="func2")
        assert (await party.refusal())["code"] == "not-authorised"
        assert relay.waiting() == (0, 0)
        party = await site.party(relay, "func1")
        await party.join(party="func1")
        assert (await party.expect("WAITING"))["party"] == "func1"


async def test_a_function_of_one_route_cannot_probe_for_others_by_its_refusals(site: Site) -> None:
    """A function of one route gets the same answer for another route and for a route that does not exist."""
    with reserved_port() as port:
        async with site.relay(two_routes(port)) as relay:
            answers = []
            for asked in ("other", "nowhere"):
                party = await site.party(relay, "func1")
                await party.join(route=asked)
                refusal = await party.refusal()
                answers.append((refusal["code"], refusal["reason"].replace(asked, "ROUTE"), refusal["retry_after"]))
            assert answers[0] == answers[1]


@pytest.mark.parametrize("code", ["party", "mode", "frames"])
async def test_a_refusal_names_nobody_else(site: Site, code: str) -> None:
    """No refusal names a party or an identity other than the function's own."""
    site.add("both", site.ca.party(dns=["func1.demo", "func2.demo"]))
    async with site.relay() as relay:
        waiter = await site.party(relay, "func2")
        await waiter.join()
        await waiter.expect("WAITING")
        party = await site.party(relay, "both" if code == "party" else "func1")
        if code == "frames":
            await party.send(b"\x01\x01\x00\x00")
        else:
            await party.join(**({"modes": ["pigeon"]} if code == "mode" else {}))
        refusal = await party.refusal()
        assert refusal["code"] == "protocol-error"
        assert "func2.demo" not in refusal["reason"]
