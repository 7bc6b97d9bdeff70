"""TESTPLAN 13: once a certificate is no longer accepted, its function is put out, whether it waits or is paired."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from frelay.pki.files import certificates_pem
from support.certs import Credential, TestAuthority
from support.ends import MODES, OPEN, PLAIN, End, Mode, join_ends
from support.party import Party
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

LENIENT = "[relay]\npolicy_ends_pairings = false\ndrain_timeout = 0.2\n"
SOON = 10.0
"""Seconds within which a pairing must have ended; a minute is promised, and it takes milliseconds."""


@asynccontextmanager
async def with_list(site: Site, *, routes: str = OPEN, sections: str = "") -> AsyncIterator[RelayInProcess]:
    """A relay with a revocation list on which nobody stands yet, and two more functions: func1 and func2 by name."""
    for name in ("func1", "func2"):
        site.add(f"other {name}", site.ca.party(dns=[f"{name}.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(routes, sections=sections, crl=True) as relay:
        yield relay


async def revoke(site: Site, relay: RelayInProcess, *names: str, number: int = 2) -> None:
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials[name] for name in names], number=number))
    await relay.relay.reload()


async def waits(site: Site, relay: RelayInProcess, name: str = "func1") -> Party:
    party = await site.party(relay, name)
    await party.join()
    await party.expect("WAITING")
    return party


async def talk(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"still here")
        assert await sink.receive_exactly(10) == b"still here"


async def are_cut(*ends: End) -> None:
    with trio.fail_after(SOON):
        for end in ends:
            assert await end.ended() in ("reset", "truncated")


async def rechecked(relay: RelayInProcess) -> None:
    """Wait until the recheck after the last reload is over."""
    await eventually(lambda: not relay.relay.parts.recheck.is_requested, "the recheck begins")
    await trio.testing.wait_all_tasks_blocked()


# --- revoked --------------------------------------------------------------------------------------------------------


async def test_revoked_while_it_waits(site: Site) -> None:
    """It is told at once and not only when a partner comes; the others that wait keep their places."""
    async with with_list(site) as relay:
        bad = await waits(site, relay)
        good = await waits(site, relay, "other func1")
        await revoke(site, relay, "func1")
        assert (await bad.refusal())["code"] == "revoked"
        await rechecked(relay)
        assert relay.waiting() == (1, 0)
        two = await waits(site, relay, "func2")
        await two.expect("PAIRED")
        await good.expect("PAIRED")


async def test_a_bare_leg_revoked_while_it_waits(site: Site) -> None:
    """It has no frames to be told with, and is closed in order."""
    async with with_list(site) as relay:
        party = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (1, 0), "it waits")
        await revoke(site, relay, "func1")
        assert await End(party, "bare").ended() == "eof"
        assert (await relay.log("refused", code="revoked"))["party"] == "func1"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["func1", "func2"])
async def test_revoked_while_paired(site: Site, which: str, mode: Mode) -> None:
    """The pairing is cut on both sides, its record names the party, and the others run on."""
    async with with_list(site) as relay:
        one, two = await join_ends(site, relay, mode, mode)
        others = await join_ends(site, relay, mode, mode, names=("other func1", "other func2"))
        await talk(one, two)
        await revoke(site, relay, which)
        await are_cut(one, two)
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("revoked", "relay")
        assert f"the certificate of {which} is no longer accepted" in record["detail"]
        assert record["bytes_func1_to_func2"] == 10
        await rechecked(relay)
        await talk(*others)
        assert len(relay.logged("pairing ended")) == 1


async def test_revoked_in_the_middle_of_the_hand_off(site: Site) -> None:
    """It is a pairing already, and ends like any other."""
    async with with_list(site) as relay:
        one, two = await waits(site, relay), await waits(site, relay, "func2")
        for party in (one, two):
            await party.expect("PAIRED")
        await revoke(site, relay, "func2")
        record = await relay.outcome()
        assert (record["outcome"], record["bytes_func1_to_func2"]) == ("revoked", 0)


async def test_revoked_with_a_ticket_brought(site: Site) -> None:
    """The leg is another connection by now, but the certificate that got the ticket counts."""
    async with with_list(site) as relay:
        one = await site.party(relay, "func1")
        await one.join(modes=["ticket"])
        await one.expect("WAITING")
        two = await waits(site, relay, "func2")
        ticket = (await one.expect("PAIRED"))["ticket"]
        await two.expect("PAIRED")
        await two.hand_off()
        second = await site.connect(relay, None)
        await second.send_raw(f"FRELAY/1 {ticket}\n".encode())
        await talk(End(second, "raw"), End(two, "raw"))
        await revoke(site, relay, "func1")
        await are_cut(End(second, "raw"), End(two, "raw"))
        assert (await relay.outcome())["outcome"] == "revoked"


async def test_half_closed_pairings_end_too(site: Site) -> None:
    async with with_list(site) as relay:
        one, two = await join_ends(site, relay)
        await one.send_eof()
        assert await two.receive() == b""
        await revoke(site, relay, "func1")
        assert (await relay.outcome())["outcome"] == "revoked"


# --- no longer signed by anybody ------------------------------------------------------------------------------------


async def test_a_ca_that_is_removed(site: Site) -> None:
    """Functions of the removed CA are put out, waiting or paired; those of the CA that stays are not touched."""
    second = TestAuthority("second CA")
    for name in ("func1", "func2"):
        site.add(f"second {name}", second.party(dns=[f"{name}.demo"]))
    root = site.ca_path.read_bytes()
    site.ca_path.write_bytes(root + second.cert_pem)
    async with site.relay(OPEN) as relay:
        stay = await join_ends(site, relay)
        out = await join_ends(site, relay, names=("second func1", "func2"))
        waiting = await waits(site, relay, "second func1")
        site.ca_path.write_bytes(root)
        await relay.relay.reload()
        assert (await waiting.refusal())["code"] == "not-authorised"
        await are_cut(*out)
        record = await relay.outcome()
        assert record["outcome"] == "revoked"
        assert "the certificate of func1 is no longer accepted" in record["detail"]
        await rechecked(relay)
        await talk(*stay)
        assert len(relay.logged("pairing ended")) == 1


async def test_an_intermediate_that_is_revoked(tmp_path: Path) -> None:
    """All functions whose chain needs the intermediate are put out with it."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    below = site.ca.intermediate()
    site.add("below", below.party(dns=["func1.demo"]))
    site.ca_path.write_bytes(site.ca.cert_pem + certificates_pem([below.authority.certificate]))
    as_credential = Credential("below-ca", below.authority.certificate, site.credentials["func1"].private_key, ())
    site.ca.write_crl(site.directory, site.ca.crl() + below.crl())
    async with site.relay(OPEN, crl=True) as relay:
        stay = await join_ends(site, relay)
        out = await join_ends(site, relay, names=("below", "func2"))
        site.ca.write_crl(site.directory, site.ca.crl(number=2) + below.crl(number=2))
        await relay.relay.reload()
        await rechecked(relay)
        await talk(*out)
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[as_credential], number=3) + below.crl(number=2))
        await relay.relay.reload()
        await are_cut(*out)
        await rechecked(relay)
        await talk(*stay)


async def test_an_intermediate_that_only_the_function_showed(tmp_path: Path) -> None:
    """No file of the relay has it, so it is kept with the leaf; otherwise a reload would end a good pairing."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    site.add("below", site.ca.intermediate().party(dns=["func1.demo"]))
    async with site.relay(OPEN) as relay:
        ends = await join_ends(site, relay, names=("below", "func2"))
        waiting = await waits(site, relay, "below")
        await relay.relay.reload()
        await rechecked(relay)
        await talk(*ends)
        assert relay.waiting() == (1, 0)
        waiting.close()


# --- expired --------------------------------------------------------------------------------------------------------


async def test_expired_while_it_waits(site: Site) -> None:
    """It is told at that moment and not before, even if no partner has come."""
    credential = site.add("func1", site.ca.ending(2.5, dns=["func1.demo"]))
    async with site.relay() as relay:
        party = await waits(site, relay)
        assert (await party.refusal())["code"] == "certificate-expired"
        assert time.time() >= credential.certificate.not_valid_after_utc.timestamp()
        assert (await relay.log("refused", code="certificate-expired"))["party"] == "func1"
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot is free")


async def test_a_wait_that_ends_before_the_certificate_does(site: Site) -> None:
    site.add("func1", site.ca.ending(60, dns=["func1.demo"]))
    async with site.relay(DEMO + "wait_timeout = 0.2\n") as relay:
        assert (await (await waits(site, relay)).refusal())["code"] == "wait-timeout"


@pytest.mark.parametrize("is_inspected", [False, True])
async def test_expired_while_paired(site: Site, is_inspected: bool) -> None:
    """It ends by itself, without a reload, and a recheck in between does not give another reason."""
    credential = site.add("func1", site.ca.ending(3, dns=["func1.demo"]))
    async with site.relay(OPEN) as relay:
        ends = await join_ends(site, relay)
        if is_inspected:
            await relay.relay.reload()
            await rechecked(relay)
        await talk(*ends)
        await are_cut(*ends)
        assert time.time() >= credential.certificate.not_valid_after_utc.timestamp()
        assert (await relay.outcome())["outcome"] == "certificate-expired"


# --- policy_ends_pairings = false -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_revocation_may_leave_pairings_alone(site: Site, mode: Mode) -> None:
    """It still sends waiting legs away, and lets nobody in."""
    async with with_list(site, sections=LENIENT) as relay:
        ends = await join_ends(site, relay, mode, mode)
        waiting = await waits(site, relay)
        await revoke(site, relay, "func1")
        assert (await waiting.refusal())["code"] == "revoked"
        await rechecked(relay)
        await talk(*ends)
        assert not relay.logged("pairing ended")


async def test_expiry_may_leave_pairings_alone(site: Site) -> None:
    credential = site.add("func1", site.ca.ending(2, dns=["func1.demo"]))
    async with site.relay(OPEN, sections=LENIENT) as relay:
        ends = await join_ends(site, relay)
        waiting = await waits(site, relay)
        assert (await waiting.refusal())["code"] == "certificate-expired"
        await trio.sleep(credential.certificate.not_valid_after_utc.timestamp() + 0.3 - time.time())
        await talk(*ends)
        # A reload checks it, too.
        await relay.relay.reload()
        await rechecked(relay)
        await talk(*ends)


async def test_a_removed_route_may_leave_pairings_alone(site: Site) -> None:
    """They run on after drain_timeout; but the end of the relay ends them, as it is no policy."""
    other = OPEN.replace('"demo"', '"other"')
    async with site.relay(OPEN + other, sections=LENIENT) as relay:
        ends = await join_ends(site, relay)
        site.write(other, sections=LENIENT)
        await relay.relay.reload()
        await trio.sleep(0.5)
        await talk(*ends)
        relay.relay.drain(reason="a test")
        await are_cut(*ends)
        assert (await relay.outcome())["outcome"] == "drained"


async def test_max_lifetime_holds_all_the_same(site: Site) -> None:
    async with site.relay(OPEN, sections=LENIENT + "[limits]\nmax_lifetime = 0.3\n") as relay:
        await are_cut(*await join_ends(site, relay))
        assert (await relay.outcome())["outcome"] == "max-lifetime"


async def test_the_option_may_be_turned_on_later(site: Site) -> None:
    """From then on it also holds for pairings that run: those revoked before, and those that expire later."""
    credential = site.add("func2", site.ca.ending(4, dns=["func2.demo"]))
    async with with_list(site, sections=LENIENT) as relay:
        revoked = await join_ends(site, relay, names=("func1", "other func2"))
        expiring = await join_ends(site, relay, names=("other func1", "func2"))
        await revoke(site, relay, "func1")
        await rechecked(relay)
        await talk(*revoked)
        site.write(OPEN, crl=True)
        await relay.relay.reload()
        await are_cut(*revoked)
        await are_cut(*expiring)
        assert time.time() >= credential.certificate.not_valid_after_utc.timestamp()
        assert [e["outcome"] for e in relay.logged("pairing ended")] == ["revoked", "certificate-expired"]


# --- rotation -------------------------------------------------------------------------------------------------------


async def test_twenty_pairings_run_through_a_rotation(site: Site) -> None:
    """A new relay certificate, one more CA in the bundle and a new list: only the revoked function notices."""
    async with with_list(site) as relay:
        modes = [MODES[number % 3] for number in range(20)]
        names = (("func1", "func2"), ("other func1", "func2"))
        running = [await join_ends(site, relay, mode, "raw", names=names[mode == "bare"]) for mode in modes]
        waiting = await waits(site, relay)
        # The last in line, so that its end shows that all the others have been judged.
        site.add("bad", site.ca.party(dns=["func1.demo"]))
        site.ca.relay(common_name="the next one").write(site.directory, "relay")
        await relay.relay.reload()
        second = TestAuthority("second CA")
        site.ca_path.write_bytes(site.ca.cert_pem + second.cert_pem)
        await relay.relay.reload()
        await rechecked(relay)
        assert relay.waiting() == (1, 0)
        waiting.close()
        await eventually(lambda: relay.waiting() == (0, 0), "it has left")
        bad = await join_ends(site, relay, names=("bad", "func2"))
        lists = site.ca.crl(revoked=[site.credentials["bad"]], number=2) + second.crl()
        site.ca.write_crl(site.directory, lists)
        await relay.relay.reload()
        await are_cut(*bad)
        await rechecked(relay)
        for ends in running:
            await talk(*ends)
        assert len(relay.logged("pairing ended")) == 1
        assert len(relay.relay.pairings) == 20
        site.add("newcomer", second.party(dns=["func1.demo"]))
        await waits(site, relay, "newcomer")


async def test_pairings_without_a_certificate_are_nobodys_business(site: Site) -> None:
    """Pairings of a plain route beside one with TLS have no certificate that could be judged."""
    async with site.relay(PLAIN + OPEN.replace('"demo"', '"other"')) as relay:
        ends = await join_ends(site, relay, "plain", "plain")
        await relay.relay.reload()
        await rechecked(relay)
        await talk(*ends)
