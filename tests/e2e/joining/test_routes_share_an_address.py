"""Several routes at one address: JOIN.route selects one, else the TLS server name ROUTE.anything, else none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.party import Party
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import Site

ROUTES = ("demo", "Other", "a", "a.b")


def table(name: str, port: int) -> str:
    return f"""
[[route]]
name = "{name}"
listen = "127.0.0.1:{port}"
func1 = ["dns:func1.demo", "dns:{name.lower()}.only"]
func2 = "dns:func2.demo"
"""


@asynccontextmanager
async def sharing(site: Site, *names: str) -> AsyncIterator[RelayInProcess]:
    with reserved_port() as port:
        async with site.relay("".join(table(name, port) for name in names)) as relay:
            yield relay


async def named(
    site: Site,
    relay: RelayInProcess,
    server_name: str | None,
    *,
    name: str = "func1",
    alpn: tuple[str, ...] = ("frelay/1",),
) -> Party:
    """A party that calls the relay by ``server_name`` (None: without the extension)."""
    context = site.context(name, alpn=alpn)
    context.check_hostname = False
    party = await site.connect(relay, context=context, server_hostname=server_name)
    await party.handshake()
    return party


@pytest.mark.parametrize("chosen", ROUTES)
async def test_join_route_chooses(site: Site, chosen: str) -> None:
    async with sharing(site, *ROUTES) as relay:
        party = await named(site, relay, "localhost")
        await party.join(route=chosen)
        assert (await party.expect("WAITING"))["route"] == chosen


@pytest.mark.parametrize(
    ("server_name", "chosen"),
    [
        ("demo.relay.test", "demo"),
        ("demo", "demo"),
        ("DEMO.Relay.Test", "demo"),
        ("other.relay.test", "Other"),
        ("a.relay.test", "a"),
        ("a.b.relay.test", "a.b"),
        ("a.bc.relay.test", "a"),
        # With a dot at its end it is the same name; not every client removes the dot.
        ("demo.relay.test.", "demo"),
        ("a.b.relay.test.", "a.b"),
        ("a.b.", "a.b"),
    ],
)
async def test_the_server_name_chooses(site: Site, server_name: str, chosen: str) -> None:
    """Case does not matter, and a route's name may have dots: the longest route name that it begins with counts."""
    async with sharing(site, *ROUTES) as relay:
        party = await named(site, relay, server_name)
        await party.join()
        assert (await party.expect("WAITING"))["route"] == chosen
        bare = await named(site, relay, server_name, name="func2", alpn=())
        paired = await party.expect("PAIRED")
        assert (paired["route"], paired["peer"]) == (chosen, "dns:func2.demo")
        bare.close()


async def test_join_route_wins_over_the_server_name(site: Site) -> None:
    async with sharing(site, *ROUTES) as relay:
        party = await named(site, relay, "demo.relay.test")
        await party.join(route="Other")
        assert (await party.expect("WAITING"))["route"] == "Other"


@pytest.mark.parametrize(
    ("server_name", "fields", "code"),
    [
        (None, {}, "protocol-error"),
        ("localhost", {}, "protocol-error"),
        ("relay.demo", {}, "protocol-error"),
        ("demos.relay.test", {}, "protocol-error"),
        ("xdemo.relay.test", {}, "protocol-error"),
        ("demo.relay.test", {"route": "nowhere"}, "unknown-route"),
        ("demo.relay.test", {"route": "DEMO"}, "unknown-route"),
        ("demo.relay.test", {"route": "demo.relay.test"}, "unknown-route"),
    ],
)
async def test_neither_chooses(site: Site, server_name: str | None, fields: dict[str, Any], code: str) -> None:
    """There is no default route: a function is told to say which. The server name corrects no wrong JOIN.route."""
    async with sharing(site, *ROUTES) as relay:
        party = await named(site, relay, server_name)
        await party.join(**fields)
        refusal = await party.refusal()
        assert refusal["code"] == code
        assert refusal["retry_after"] is None
        if code == "protocol-error":
            assert "JOIN.route" in refusal["reason"]
        bare = await named(site, relay, None if server_name == "demo.relay.test" else server_name, alpn=())
        assert await bare.receive() == b""
        assert all(relay.waiting(route) == (0, 0) for route in ROUTES)


async def test_routes_at_one_address_have_lobbies_of_their_own(site: Site) -> None:
    async with sharing(site, "demo", "Other") as relay:
        one = await site.party(relay, "func1")
        await one.join(route="demo")
        await one.expect("WAITING")
        two = await site.party(relay, "func2")
        await two.join(route="Other")
        assert (await two.expect("WAITING"))["peer_seen"] is None
        assert (relay.waiting("demo"), relay.waiting("Other")) == ((1, 0), (0, 1))


async def test_a_certificate_of_one_route_is_not_let_into_its_neighbour(site: Site) -> None:
    """TESTPLAN 7: neither by JOIN.route nor by the server name; it is refused, and not let in to its own route."""
    site.add("only", site.ca.party(dns=["demo.only"]))
    async with sharing(site, "demo", "Other") as relay:
        for server_name, fields in (("localhost", {"route": "Other"}), ("other.relay.test", {})):
            party = await named(site, relay, server_name, name="only")
            await party.join(**fields)
            await party.refusal()
        assert (relay.waiting("demo"), relay.waiting("Other")) == ((0, 0), (0, 0))
        party = await named(site, relay, "demo.relay.test", name="only")
        await party.join()
        assert (await party.expect("WAITING"))["route"] == "demo"


@pytest.mark.parametrize("asked", ["x" * 2000, "\\" * 2000, '"' * 2000, "\u00e9" * 600, "\U0001f600" * 300])
async def test_an_absurd_route_is_refused_in_a_sentence_that_fits_its_frame(site: Site, asked: str) -> None:
    async with sharing(site, "demo", "Other") as relay:
        party = await site.party(relay, "func1")
        await party.join(route=asked)
        refusal = await party.refusal()
        assert refusal["code"] == "unknown-route"
        assert len(refusal["reason"]) < 300


async def test_a_lone_route_needs_no_name(site: Site) -> None:
    """With one route at an address the server name is ignored; a JOIN.route must still be right."""
    async with sharing(site, "demo") as relay:
        party = await named(site, relay, "other.relay.test")
        await party.join()
        assert (await party.expect("WAITING"))["route"] == "demo"
        party = await named(site, relay, "demo.relay.test")
        await party.join(route="Other")
        assert (await party.refusal())["code"] == "unknown-route"
