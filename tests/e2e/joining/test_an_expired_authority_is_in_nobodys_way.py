"""An expired certificate authority lets nobody in and keeps nobody out; the relay only reports it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.pki.files import certificates_pem
from frelay.relay.prepare import prepare
from frelay.tls.trust import OuterTls
from support.admin import ADMIN, ROUTE, admin
from support.certs import TestAuthority
from support.commands import frelay_command
from support.party import pair
from support.relay import RelayInProcess
from support.site import Site
from support.tools import skip_or_fail
from support.waiting import TIMEOUT, eventually

HOUR: Final = timedelta(hours=1)
BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")


def ago(hours: int = 1) -> datetime:
    return datetime.now(UTC) - hours * HOUR


def trust(site: Site, *certificates: x509.Certificate) -> None:
    site.client_ca = site.directory / "anchors.pem"
    site.client_ca.write_bytes(certificates_pem(certificates))


def certificate(authority: TestAuthority) -> x509.Certificate:
    return authority.authority.certificate


def prepared(site: Site, *, crl: bool = False) -> OuterTls:
    trust = prepare(load(site.write(crl=crl)))
    assert trust is not None
    return trust


async def meet(site: Site, relay: RelayInProcess) -> None:
    await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


SECTIONS: Final = ADMIN + '[metrics]\nlisten = "127.0.0.1:0"\n'


async def readyz(relay: RelayInProcess) -> int:
    (place,) = relay.relay.served["metrics"]
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:
        return (await http.get(f"http://{place}/readyz")).status_code


# --- in client_ca ---------------------------------------------------------------------------------------------------


async def test_a_relay_starts_and_reloads_with_it(site: Site) -> None:
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    trust(site, site.ca.root, certificate(old))
    async with site.relay() as relay:
        assert "CN=old root expired on " in relay.logged("configuration warning")[0]["problem"]
        await meet(site, relay)
        await relay.relay.reload()
        await meet(site, relay)
        assert len(relay.logged("configuration warning")) == 2


async def test_the_api_and_readyz_do_not_mind_it(site: Site) -> None:
    """It expires while the relay runs."""
    soon = TestAuthority.root_for_intermediates("old root", not_after=datetime.now(UTC) + timedelta(seconds=3))
    trust(site, site.ca.root, certificate(soon))
    async with site.relay(sections=SECTIONS) as relay, admin(site) as api:
        end = certificate(soon).not_valid_after_utc
        await eventually(lambda: datetime.now(UTC) > end + timedelta(seconds=1), "it expires")
        assert await readyz(relay) == 200
        assert (await api.put("/v1/routes/more", json=ROUTE)).is_success
        assert (await api.post("/v1/reload")).is_success
        assert await readyz(relay) == 200
        await meet(site, relay)


def test_check_warns_of_it_and_is_content(site: Site) -> None:
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    trust(site, certificate(old), site.ca.root)
    said = frelay_command("check", "-c", site.write())
    assert said.code == 0
    assert said.messages[0].startswith(
        f"warning: {site.config}: tls.client_ca: {site.client_ca}: CN=old root expired on"
    )
    assert "1 warning" in said.stdout


def test_where_all_have_expired_there_is_none(site: Site) -> None:
    trust(site, *(certificate(TestAuthority.root_for_intermediates(f"old {n}", not_after=ago())) for n in range(2)))
    with pytest.raises(ConfigError) as caught:
        prepared(site)
    text = str(caught.value)
    assert "CN=old 0 expired on" in text
    assert "CN=old 1 expired on" in text
    assert "holds no authority that has not expired" in text


async def test_the_old_certificate_of_an_authority_beside_its_new_one(site: Site) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    old = TestAuthority.root_for_intermediates("renewed CA", key=key, not_after=ago())
    new = TestAuthority.root_for_intermediates("renewed CA", key=key)
    for name in ("func1", "func2"):
        site.add(name, new.party(dns=[f"{name}.demo"]))
    for order in ((old, new), (new, old)):
        trust(site, *map(certificate, order))
        async with site.relay() as relay:
            await meet(site, relay)


async def test_a_root_that_has_expired_above_an_issuing_authority_that_has_not(site: Site) -> None:
    """The issuing authority stands in the file too, and is trusted by itself."""
    root = TestAuthority.root_for_intermediates("old root", not_after=ago())
    issuing = root.intermediate("issuing CA")
    for name in ("func1", "func2"):
        site.add(name, issuing.party(dns=[f"{name}.demo"]))
    trust(site, certificate(root), certificate(issuing))
    async with site.relay() as relay:
        await meet(site, relay)


async def test_a_root_that_expires_while_the_relay_runs(site: Site) -> None:
    """Until the relay has reloaded without that root, it would refuse all certificates below it."""
    root = TestAuthority.root_for_intermediates("old root", not_after=datetime.now(UTC) + timedelta(seconds=4))
    issuing = root.intermediate("issuing CA")
    for name in ("func1", "func2"):
        site.add(name, issuing.party(dns=[f"{name}.demo"]))
    trust(site, certificate(root), certificate(issuing))
    async with site.relay(watch=True) as relay:
        assert not relay.logged("configuration warning")
        await relay.log("reloaded")
        assert "CN=old root expired on" in (await relay.log("configuration warning"))["problem"]
        await meet(site, relay)


async def test_workers_leave_the_warning_to_their_supervisor(site: Site) -> None:
    trust(site, site.ca.root, certificate(TestAuthority.root_for_intermediates("old root", not_after=ago())))
    async with site.process(workers=2) as relay:
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert len(relay.logged("configuration warning")) == 1


async def test_an_expired_cross_sign_beside_the_root_itself(site: Site) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    root = TestAuthority.root_for_intermediates("new root", key=key)
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    cross = old.intermediate("new root", key=key, not_after=ago())
    for name in ("func1", "func2"):
        credential = root.intermediate("issuing CA").party(dns=[f"{name}.demo"])
        site.add(name, credential)
        # The function shows the cross-signed certificate, too, as many do.
        site.paths[name][0].write_bytes(credential.chain_pem + certificates_pem([certificate(cross)]))
    trust(site, certificate(cross), certificate(root), certificate(old))
    async with site.relay() as relay:
        await meet(site, relay)


async def test_nobody_misses_its_list(site: Site) -> None:
    """An expired authority publishes no lists any more, so its expired list keeps nobody out."""
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    trust(site, site.ca.root, certificate(old))
    site.ca.write_crl(site.directory, site.ca.crl() + old.expired_crl())
    async with site.relay(crl=True) as relay:
        await meet(site, relay)


def test_a_list_that_ends_after_its_authority_is_needed_no_more(site: Site) -> None:
    end = datetime.now(UTC) + 2 * HOUR
    old = TestAuthority.root_for_intermediates("old root", not_after=end)
    trust(site, site.ca.root, certificate(old))
    site.ca.write_crl(site.directory, site.ca.crl() + old.crl(next_update=end + HOUR))
    found = prepared(site, crl=True)
    assert not found.has_expired_list((end + 2 * HOUR).timestamp())
    site.ca.write_crl(site.directory, site.ca.crl() + old.crl(next_update=end - HOUR))
    found = prepared(site, crl=True)
    assert found.has_expired_list((end - HOUR / 2).timestamp())


def test_the_gauge_tells_of_those_in_use(site: Site) -> None:
    """The gauge serves an alert before the expiry, so an authority that has expired does not count in it."""
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    trust(site, site.ca.root, certificate(old))
    assert prepared(site).authorities_not_after == site.ca.root.not_valid_after_utc.timestamp()


async def test_who_comes_by_it_is_told_so(site: Site) -> None:
    """The log and `frelay why` say so."""
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    site.add("late", old.odd([x509.DNSName("func1.demo")]))
    trust(site, site.ca.root, certificate(old))
    async with site.relay() as relay:
        await (await site.connect(relay, "late")).alert()
        refused = await relay.log("refused")
        assert refused["code"] == "certificate-expired"
        assert "CN=old root of tls.client_ca has expired" in refused["reason"]
    said = frelay_command("why", "-c", site.write(), "--cert", site.paths["late"][0])
    assert said.code == 1
    assert f"CN=old root of tls.client_ca ({site.client_ca}) has expired" in said.stdout


async def test_the_whole_bundle_of_a_distribution(site: Site) -> None:
    """Hundreds of roots with all their oddities, twice, beside our own."""
    if not BUNDLE.exists():
        skip_or_fail(f"{BUNDLE} is not there; on Debian: apt-get install ca-certificates")
    content = BUNDLE.read_bytes()
    site.client_ca = site.directory / "anchors.pem"
    site.client_ca.write_bytes(content + content)
    assert frelay_command("check", "-c", site.write()).code == 0
    site.client_ca.write_bytes(content + certificates_pem([site.ca.root]))
    async with site.relay() as relay:
        await meet(site, relay)
    # With tls.crl, all but one lack their list: the log says that in a few lines.
    site.ca.write_crl(site.directory, site.ca.crl())
    said = frelay_command("check", "-c", site.write(crl=True))
    assert said.code == 0
    assert 2 < len(said.messages) < 12
    assert "more like these" in said.stderr
    async with site.relay(crl=True) as relay:
        await meet(site, relay)


# --- behind the relay's own certificate -----------------------------------------------------------------------------


async def test_an_expired_cross_sign_behind_the_relays_own(site: Site) -> None:
    """Functions that know the new root do not need it, so the relay is ready, and warns."""
    key = ec.generate_private_key(ec.SECP256R1())
    root = TestAuthority.root_for_intermediates("new root", key=key)
    old = TestAuthority.root_for_intermediates("old root", not_after=ago())
    cross = old.intermediate("new root", key=key, not_after=ago())
    relays = root.intermediate("issuing CA").relay()
    relays.write(site.directory, "relay")
    site.relay_paths[0].write_bytes(relays.chain_pem + certificates_pem([certificate(cross)]))
    site.ca_path.write_bytes(root.cert_pem)
    trust(site, site.ca.root)
    async with site.relay(sections=SECTIONS) as relay:
        assert await readyz(relay) == 200
        assert "which follows the relay's own, expired on" in relay.logged("configuration warning")[0]["problem"]
        await meet(site, relay)


def test_the_last_that_vouches_for_the_relay_counts(site: Site) -> None:
    """Of two certificates of the issuing authority the later end counts; if both are over, nobody trusts the relay."""
    root, key = TestAuthority.root_for_intermediates(), ec.generate_private_key(ec.SECP256R1())
    good = root.intermediate("issuing CA", key=key)
    late = root.intermediate("issuing CA", key=key, not_after=ago())
    relays = good.relay()
    relays.write(site.directory, "relay")
    leaf = certificates_pem([relays.certificate])
    for chain in ((late, good), (good, late)):
        site.relay_paths[0].write_bytes(leaf + certificates_pem(map(certificate, chain)))
        ends = relays.certificate.not_valid_after_utc, certificate(good).not_valid_after_utc
        assert prepared(site).not_after == min(ends).timestamp()
    site.relay_paths[0].write_bytes(leaf + certificates_pem([certificate(late)]))
    assert prepared(site).not_after == certificate(late).not_valid_after_utc.timestamp()
