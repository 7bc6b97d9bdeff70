"""A certificate with thousands of names is refused at once for their number, and the log says the number.

Each JOIN compares the names of the certificate with the selectors of the routes. With many of both, a member whose
authority signs anything could use up two seconds of the relay's time.
"""

from __future__ import annotations

import time

import pytest

from support.party import pair
from support.ports import reserved_port
from support.site import Site
from support.waiting import eventually

ROUTES = 200
STRANGER = {"code": "not-authorised", "reason": "this certificate is not admitted here", "retry_after": None}


def crowded(port: int) -> str:
    """This many routes at one address."""
    return "".join(
        f"""
[[route]]
name = "r{number}"
listen = "127.0.0.1:{port}"
func1 = "dns:f{number}.demo"
func2 = "dns:*.g{number}.demo"
"""
        for number in range(ROUTES)
    )


@pytest.mark.parametrize("how", ["framed", "bare"])
async def test_it_is_refused_for_their_number(site: Site, how: str) -> None:
    """Although the right name is among them: the relay does not ignore the other names."""
    names = ["func1.demo", *(f"f{number}.elsewhere.demo" for number in range(3499))]
    site.add("crowd", site.ca.party(dns=names))
    async with site.relay() as relay:
        if how == "framed":
            party = await site.party(relay, "crowd")
            await party.join()
            assert await party.refusal() == STRANGER
        else:
            party = await site.party(relay, "crowd", alpn=())
            assert await party.receive() == b""
        entry = await relay.log("refused")
        assert (entry["code"], entry["reason"]) == (
            "not-authorised",
            "the certificate has 3500 names, and at most 256 are allowed",
        )
        assert "ignored all names, because there are 3500" in entry["certificate"]
        assert len(entry["certificate"]) < 2000
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


@pytest.mark.load
async def test_two_hundred_routes_and_as_many_names_as_there_may_be(site: Site) -> None:
    """A join with such a certificate, which fits nothing, costs at most three times a join with one name."""
    site.add("crowd", site.ca.party(dns=[f"f{number}.elsewhere.demo" for number in range(256)]))
    site.add("single", site.ca.party(dns=["elsewhere.demo"]))
    with reserved_port() as port:
        async with site.relay(crowded(port)) as relay:

            async def cost(name: str) -> float:
                """The least CPU time of this process, relay and party, for one join."""
                times = []
                for _ in range(10):
                    before = time.process_time()
                    party = await site.party(relay, name, route="r0")
                    await party.join(route="nowhere")
                    assert await party.refusal() == STRANGER
                    times.append(time.process_time() - before)
                    party.close()
                return min(times)

            single, crowd = await cost("single"), await cost("crowd")
            assert crowd <= 3 * single, (single, crowd)
            site.hang_up()
            await eventually(lambda: relay.legs == 0, "all have gone")
