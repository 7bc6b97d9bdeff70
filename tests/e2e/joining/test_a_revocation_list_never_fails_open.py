"""TESTPLAN 12: whatever is wrong with the CRL, nobody gets in who might be on it.

Once `tls.crl` is set, a list that is missing, unreadable, of another CA or out of date lets nobody in, at start, at
reload and while the relay runs.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Final

import pytest
import trio

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.pki.files import certificates_pem
from frelay.relay.run import make_relay
from frelay.tls.loading import load_outer_tls
from support.certs import Credential, TestAuthority
from support.handoffs import relay_has_read
from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import before_it_expires, eventually

NO_LIST: Final = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"


async def knock(site: Site, relay: RelayInProcess, name: str = "func1") -> str:
    """Join and leave again: "admitted", or the alert that came instead."""
    party = await site.connect(relay, name)
    try:
        await party.handshake()
        await party.join(wait=30)
        found = await party.receive()
        assert found[:2] == b"\x11\x00"
    except OSError as error:  # an alert
        return str(error.args[-1])
    finally:
        party.close()
    return "admitted"


async def joined(site: Site, relay: RelayInProcess, name: str) -> Party:
    party = await site.party(relay, name)
    await party.join()
    await party.expect("WAITING")
    return party


def start_fails(site: Site) -> str:
    """The error with which the relay does not start."""
    config = load(site.write(crl=True))
    assert config.tls is not None
    with pytest.raises(ConfigError) as caught:
        load_outer_tls(config.tls, source=config.path)
    assert {problem.key for problem in caught.value.problems} == {"tls.crl"}
    return str(caught.value)


# --- at start ------------------------------------------------------------------------------------------------------


def test_a_missing_list_is_no_empty_list(site: Site) -> None:
    assert "crl.pem does not exist" in start_fails(site)


@pytest.mark.parametrize(
    "content", [b"", b"no PEM at all\n", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"]
)
def test_an_unreadable_list_is_no_empty_list(site: Site, content: bytes) -> None:
    site.ca.write_crl(site.directory, content)
    start_fails(site)


def test_a_list_cut_short_is_refused(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.crl()[:-40])
    start_fails(site)


def test_one_bad_list_among_good_ones_is_refused(site: Site) -> None:
    good = site.ca.crl()
    for content in (good + NO_LIST, NO_LIST + good):
        site.ca.write_crl(site.directory, content)
        start_fails(site)


def test_an_expired_list_is_refused(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.expired_crl())
    assert "expired on" in start_fails(site)


def test_a_list_of_tomorrow_is_refused(site: Site) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    crl = site.ca.crl(last_update=tomorrow, next_update=tomorrow + timedelta(days=1))
    site.ca.write_crl(site.directory, crl)
    assert "not valid before" in start_fails(site)


@pytest.mark.parametrize("name", ["other CA", "test CA"])
def test_a_list_of_another_authority_is_refused(site: Site, name: str) -> None:
    """Also one of the same name: replacing the file must not be enough to undo a revocation."""
    site.ca.write_crl(site.directory, TestAuthority(name).crl())
    assert "was not signed by any CA" in start_fails(site)


async def test_a_relay_with_a_bad_list_binds_nothing(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.expired_crl())
    relay = make_relay(load(site.write(crl=True)), watch_files=False)
    with pytest.raises(ConfigError):
        await relay.run()
    assert not relay.routes


# --- while it runs ---------------------------------------------------------------------------------------------------


async def test_the_newest_list_counts(site: Site) -> None:
    """After a reload it keeps those out that it names, and lets those in that it no longer names."""
    bad = site.add("bad", site.ca.party(dns=["func1.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        assert await knock(site, relay, "bad") == "admitted"
        for number in range(2, 8):
            is_revoked = number % 2 == 0
            site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad] if is_revoked else [], number=number))
            await relay.relay.reload()
            assert ("revoked" in await knock(site, relay, "bad")) is is_revoked
            assert await knock(site, relay, "func1") == "admitted"


@pytest.mark.parametrize("order", ["older first", "newer first"])
async def test_of_two_lists_of_one_authority_the_newer_counts(site: Site, order: str) -> None:
    bad = site.add("bad", site.ca.party(dns=["func1.demo"]))
    now = datetime.now(UTC)
    older = site.ca.crl(number=1, last_update=now - timedelta(hours=2))
    newer = site.ca.crl(revoked=[bad], number=2, last_update=now - timedelta(hours=1))
    lists = (older, newer) if order == "older first" else (newer, older)
    site.ca.write_crl(site.directory, b"".join(lists))
    async with site.relay(crl=True) as relay:
        assert "revoked" in await knock(site, relay, "bad")
        assert await knock(site, relay, "func1") == "admitted"


@pytest.mark.parametrize("fault", ["missing", "empty", "expired", "of another CA", "half written"])
async def test_a_bad_list_at_reload_leaves_the_old_one_in_force(site: Site, fault: str) -> None:
    """The reload is refused as a whole and says why; the old list still keeps out those that it names."""
    bad = site.add("bad", site.ca.party(dns=["func1.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad]))
    async with site.relay(crl=True) as relay:
        path = site.directory / "crl.pem"
        content = {
            "empty": b"",
            "expired": site.ca.expired_crl(),
            "of another CA": TestAuthority("other CA").crl(),
            "half written": site.ca.crl(number=2)[:200],
        }
        path.unlink()
        if fault in content:
            path.write_bytes(content[fault])
        with pytest.raises(ConfigError) as caught:
            await relay.relay.reload()
        assert [problem.key for problem in caught.value.problems] == ["tls.crl"]
        assert relay.relay.last_reload_error is caught.value
        assert "revoked" in await knock(site, relay, "bad")
        assert await knock(site, relay, "func1") == "admitted"


@pytest.mark.load
async def test_once_the_list_has_run_out_nobody_is_let_in(site: Site) -> None:
    """Handshakes fail, waiting legs are not paired, and a leg between handshake and JOIN is refused."""
    numbers = count(1)

    def running_out(seconds: float) -> datetime:
        ends = (datetime.now(UTC) + timedelta(seconds=seconds)).replace(microsecond=0)
        site.ca.write_crl(site.directory, site.ca.crl(next_update=ends, number=next(numbers)))
        return ends

    running_out(60)
    async with site.relay(crl=True, sections="[limits]\njoin_timeout = 60\n") as relay:

        async def come_in() -> tuple[Party, ...]:
            site.hang_up()
            await eventually(lambda: relay.legs == 0, "none of an earlier attempt")
            await relay.relay.reload()
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await pair(one, two)
            await one.hand_off()
            await two.hand_off()
            waiter, late = await joined(site, relay, "func1"), await site.party(relay, "func2")
            await relay_has_read(relay)  # a client's handshake is over before the relay has judged its certificate
            return one, two, waiter, late

        (paired1, paired2, waiter, late), ends = await before_it_expires(running_out, come_in)
        await trio.sleep(ends - time.time() + 1.1)  # OpenSSL accepts it until the end of its last second
        assert await knock(site, relay, "func1") != "admitted"
        refused = await relay.log("refused", code="not-authorised")
        assert refused["reason"].startswith("CRL has expired")
        await late.join()
        refusal = await late.refusal()
        assert refusal["code"] == "not-authorised"
        assert "revocation list" in refusal["reason"]
        assert relay.waiting() == (1, 0)
        await waiter.send_frame("LEAVE")
        # The pairing was made while a valid list was in force, and goes on.
        await paired1.send_raw(b"\x16\x03\x01still here")
        assert await paired2.receive_exactly(13) == b"\x16\x03\x01still here"
        # A new list lets functions in again.
        site.ca.write_crl(site.directory, site.ca.crl(number=next(numbers)))
        await relay.relay.reload()
        assert await knock(site, relay, "func1") == "admitted"


async def test_a_waiter_is_judged_by_the_list_at_pairing_time(site: Site) -> None:
    """A reload makes the waiting leg's list invalid; then the other party comes, whose list is good."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        waiter = await joined(site, relay, "func1")
        other = TestAuthority("new CA")
        other.write(site.directory, "ca")
        other.write_crl(site.directory, other.crl())
        await relay.relay.reload()
        site.paths["func2"] = other.party(dns=["func2.demo"]).write(site.directory, "func2")
        site.ca.write(site.directory, "relay-ca")
        site.ca_path = site.directory / "relay-ca.pem"
        await joined(site, relay, "func2")
        refusal = await waiter.refusal()
        assert refusal["code"] == "not-authorised"
        assert relay.waiting() == (0, 1)


# --- chains --------------------------------------------------------------------------------------------------------


def bundle(site: Site, *authorities: TestAuthority) -> None:
    """Trust the root and add the intermediates, without which their lists could not be checked."""
    site.ca_path.write_bytes(site.ca.cert_pem + certificates_pem([one.authority.certificate for one in authorities]))


async def test_every_authority_of_a_chain_needs_its_list(tmp_path: Path) -> None:
    """A leaf below an intermediate without a list cannot be checked, and is refused."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    below = site.ca.intermediate()
    site.add("below", below.party(dns=["func1.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        assert await knock(site, relay, "func1") == "admitted"
        assert "admitted" not in await knock(site, relay, "below")
        await relay.log("refused", code="not-authorised")
        bundle(site, below)
        site.ca.write_crl(site.directory, site.ca.crl(number=2) + below.crl())
        await relay.relay.reload()
        assert await knock(site, relay, "below") == "admitted"


async def test_a_revoked_intermediate_vouches_for_nobody(tmp_path: Path) -> None:
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    below = site.ca.intermediate()
    site.add("below", below.party(dns=["func1.demo"]))
    bundle(site, below)
    as_credential = Credential("below-ca", below.authority.certificate, site.credentials["func1"].private_key, ())
    site.ca.write_crl(site.directory, site.ca.crl() + below.crl())
    async with site.relay(crl=True) as relay:
        assert await knock(site, relay, "below") == "admitted"
        waiter = await joined(site, relay, "below")
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[as_credential], number=2) + below.crl())
        await relay.relay.reload()
        assert "revoked" in await knock(site, relay, "below")
        await joined(site, relay, "func2")
        assert (await waiter.refusal())["code"] == "revoked"
