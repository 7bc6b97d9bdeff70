"""``certificate_grace``: only a running pairing may go on after a certificate expires, for at most this time.

A function with certificates of minutes renews them while it works; its pairings need not end with the old one.
"""

from __future__ import annotations

import time
from typing import Final

import trio
import trio.testing

from support.certs import Credential
from support.ends import OPEN, End, join_ends
from support.site import Site
from support.waiting import TIMEOUT, eventually

GRACE: Final = "certificate_grace = 3600\n"
LIFE: Final = 3.0
"""Seconds that a certificate is valid; the tests have to wait for it."""


def short_lived(site: Site, name: str = "func2", seconds: float = LIFE) -> Credential:
    return site.add(name, site.ca.ending(seconds, dns=["func2.demo"]))


async def expired(credential: Credential) -> None:
    """Wait until ``credential`` is past its notAfter, as OpenSSL counts, in whole seconds."""
    end = credential.certificate.not_valid_after_utc.timestamp() + 1
    await eventually(lambda: time.time() > end, "it expires")


async def talk(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"


async def are_cut(*ends: End) -> None:
    with trio.fail_after(TIMEOUT):
        for end in ends:
            assert await end.ended() in ("reset", "truncated")


async def test_a_running_pairing_goes_on_and_no_leg_is_admitted(site: Site) -> None:
    credential = short_lived(site)
    async with site.relay(OPEN, sections=f"[limits]\n{GRACE}") as relay:
        ends = await join_ends(site, relay)
        await expired(credential)
        await talk(*ends)
        assert "EXPIRED" in await (await site.connect(relay, "func2")).alert()
        assert not relay.logged("pairing ended")
        await talk(*ends)


async def test_a_waiting_leg_has_no_grace(site: Site) -> None:
    credential = short_lived(site)
    async with site.relay(OPEN, sections=f"[limits]\n{GRACE}") as relay:
        party = await site.party(relay, "func2")
        await party.join()
        await party.expect("WAITING")
        assert (await party.refusal())["code"] == "certificate-expired"
        assert time.time() >= credential.certificate.not_valid_after_utc.timestamp()


async def test_the_grace_ends(site: Site) -> None:
    credential = short_lived(site)
    async with site.relay(OPEN + "certificate_grace = 4\n") as relay:
        ends = await join_ends(site, relay)
        await expired(credential)
        await talk(*ends)
        await are_cut(*ends)
        assert time.time() >= credential.certificate.not_valid_after_utc.timestamp() + 4
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("certificate-expired", "relay")
        assert record["detail"] == "the certificate of func2 has expired, 4 s ago"


async def test_a_route_may_have_a_grace_of_its_own(site: Site) -> None:
    short_lived(site)
    async with site.relay(OPEN + "certificate_grace = 0\n", sections=f"[limits]\n{GRACE}") as relay:
        await are_cut(*await join_ends(site, relay))
        assert (await relay.outcome())["detail"] == "the certificate of func2 has expired"


async def test_a_revocation_ends_it_without_grace(site: Site) -> None:
    credential = short_lived(site)
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(OPEN, sections=f"[limits]\n{GRACE}", crl=True) as relay:
        ends = await join_ends(site, relay)
        await expired(credential)
        await talk(*ends)
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[credential], number=2))
        await relay.relay.reload()
        await are_cut(*ends)
        assert (await relay.outcome())["outcome"] == "revoked"


async def test_the_removal_of_the_route_ends_it_without_grace(site: Site) -> None:
    credential = short_lived(site)
    sections = f"[relay]\ndrain_timeout = 0.2\n[limits]\n{GRACE}"
    other = OPEN.replace('"demo"', '"other"')
    async with site.relay(OPEN + other, sections=sections) as relay:
        ends = await join_ends(site, relay)
        await expired(credential)
        site.write(other, sections=sections)
        await relay.relay.reload()
        await are_cut(*ends)
        assert (await relay.outcome())["outcome"] == "route-removed"


async def test_max_lifetime_ends_it_without_grace(site: Site) -> None:
    credential = short_lived(site)
    async with site.relay(OPEN + "max_lifetime = 8\n", sections=f"[limits]\n{GRACE}") as relay:
        ends = await join_ends(site, relay)
        await expired(credential)
        await are_cut(*ends)
        assert (await relay.outcome())["outcome"] == "max-lifetime"


async def test_a_reload_changes_it_for_new_pairings(site: Site) -> None:
    credential = short_lived(site, seconds=6)
    site.add("func1b", site.ca.party(dns=["func1.demo"]))
    async with site.relay(OPEN, sections=f"[limits]\n{GRACE}") as relay:
        old = await join_ends(site, relay)
        site.write(OPEN)
        await relay.relay.reload()
        await eventually(lambda: not relay.relay.parts.recheck.is_requested, "the recheck begins")
        await trio.testing.wait_all_tasks_blocked()
        new = await join_ends(site, relay, names=("func1b", "func2"))
        await expired(credential)
        await are_cut(*new)
        await talk(*old)
        assert len(relay.logged("pairing ended")) == 1
