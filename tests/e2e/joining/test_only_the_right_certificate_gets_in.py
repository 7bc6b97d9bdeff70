"""Only a certificate that shows a name of the route, of the right kind, now and by the right CA, gets in.

Every bad one is refused for its own fault only, learns nothing, and leaves nothing behind: no place in a queue, no slot
and no byte at the waiting function.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from frelay.pki.authority import Authority
from frelay.protocol.identity import spki_of_certificate
from support.certs import Credential, TestAuthority, self_signed
from support.der import san_der
from support.odd_names import ODD_DNS, ODD_SPIFFE, SPIFFE_ID
from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

FUNC1: Final = ["func1.demo"]
STRANGER: Final = {
    "code": "not-authorised",
    "reason": "this certificate is not admitted here",
    "retry_after": None,
}


def route(func1: str, name: str = "demo") -> str:
    return f"""
[[route]]
name = "{name}"
listen = "127.0.0.1:0"
func1 = "{func1}"
func2 = "dns:func2.demo"
"""


async def wait_as_func2(site: Site, relay: RelayInProcess) -> Party:
    waiter = await site.party(relay, "func2")
    await waiter.join()
    await waiter.expect("WAITING")
    await eventually(lambda: relay.waiting() == (0, 1), "func2's place")
    return waiter


async def check_that_only_the_waiter_is_left(site: Site, relay: RelayInProcess, waiter: Party) -> None:
    """The relay holds nothing of the refused ones, has forwarded nothing of theirs, and the good func1 is paired."""
    for party in site.parties:
        if party is not waiter:
            party.close()
    await eventually(lambda: relay.legs == 1, "the refused connections' slots free")
    assert relay.waiting() == (0, 1)
    assert not relay.relay.pairings
    good = await site.party(relay, "good")
    await good.join()
    await good.expect("WAITING")
    await good.expect("PAIRED")
    await waiter.expect("PAIRED")


# --- what OpenSSL refuses ------------------------------------------------------------------------------------------

UNVERIFIED: Final[dict[str, tuple[Callable[[Site], Credential | None], str, str]]] = {
    "none at all": (lambda site: None, "TLSV13_ALERT_CERTIFICATE_REQUIRED", "protocol-error"),
    "wrong CA": (
        lambda site: TestAuthority("other CA").party(dns=FUNC1),
        "TLSV1_ALERT_UNKNOWN_CA",
        "not-authorised",
    ),
    "another CA of the same name": (
        lambda site: TestAuthority("test CA").party(dns=FUNC1),
        "TLSV1_ALERT_UNKNOWN_CA",
        "not-authorised",
    ),
    "self-signed": (lambda site: self_signed(dns=FUNC1), "TLSV1_ALERT_UNKNOWN_CA", "not-authorised"),
    "expired": (
        lambda site: site.ca.expired(dns=FUNC1),
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "certificate-expired",
    ),
    "not yet valid": (
        lambda site: site.ca.not_yet_valid(dns=FUNC1),
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "not-authorised",
    ),
    "serverAuth only": (
        lambda site: site.ca.server_only(dns=FUNC1),
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "not-authorised",
    ),
}


@pytest.mark.parametrize("kind", [*UNVERIFIED, "revoked"])
async def test_a_certificate_that_does_not_verify_is_refused_by_an_alert(site: Site, kind: str) -> None:
    """TESTPLAN 1: the alert arrives although the party had already sent its JOIN, which is never read."""
    site.add("good", site.credentials["func1"])
    if kind == "revoked":
        bad: Credential | None = site.ca.party(dns=FUNC1)
        alert, code = "SSLV3_ALERT_CERTIFICATE_REVOKED", "revoked"
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[c for c in [bad] if c]))
    else:
        make, alert, code = UNVERIFIED[kind]
        bad = make(site)
    if bad is not None:
        site.add("bad", bad)
    async with site.relay(crl=kind == "revoked") as relay:
        waiter = await wait_as_func2(site, relay)
        for _ in range(3):
            party = await site.connect(relay, "bad" if bad is not None else None)
            await party.handshake()
            await party.join(route="demo", party="func1")
            assert await party.alert() == alert
        assert len(relay.logged("refused", code=code)) == 3
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_name_constraints_of_an_intermediate_hold(tmp_path: Path) -> None:
    """TESTPLAN 11: func1.demo does not get in by an authority that may only issue `acme`, or never `demo`."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    site.add("good", site.ca.intermediate(permitted=[x509.DNSName("demo")]).party(dns=FUNC1))
    site.add("permitted", site.ca.intermediate(permitted=[x509.DNSName("acme")]).party(dns=FUNC1))
    site.add("excluded", site.ca.intermediate(excluded=[x509.DNSName("demo")]).party(dns=FUNC1))
    site.add("uri", site.ca.intermediate(permitted=[x509.UniformResourceIdentifier("other")]).party(uris=[SPIFFE_ID]))
    async with site.relay() as relay:
        waiter = await wait_as_func2(site, relay)
        for name in ("permitted", "excluded", "uri"):
            party = await site.connect(relay, name)
            await party.handshake()
            await party.join()
            assert "ALERT" in await party.alert()
        reasons = [event["reason"] for event in relay.logged("refused", code="not-authorised")]
        assert [reason.partition(" (")[0] for reason in reasons] == [
            "permitted subtree violation",
            "excluded subtree violation",
            "permitted subtree violation",
        ]
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_a_leaf_makes_no_authority(tmp_path: Path) -> None:
    """A certificate that was signed with a party's key is not accepted."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    site.add("good", site.credentials["func1"])
    leaf = site.credentials["func1"]
    # The leaf is used as an authority.
    forged = TestAuthority(authority=Authority(leaf.certificate, leaf.private_key, (site.ca.root,))).odd(
        [x509.DNSName("func1.demo")]
    )
    site.add("forged", forged)
    async with site.relay() as relay:
        waiter = await wait_as_func2(site, relay)
        party = await site.connect(relay, "forged")
        await party.handshake()
        assert "ALERT" in await party.alert()
        await relay.log("refused", code="not-authorised")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


# --- what our policy refuses ---------------------------------------------------------------------------------------


async def refused_as_a_stranger(site: Site, relay: RelayInProcess, name: str) -> None:
    party = await site.connect(relay, name)
    try:
        await party.handshake()
        await party.join()
        assert await party.refusal() == STRANGER
    finally:
        party.close()


@pytest.mark.parametrize("text", ODD_DNS.values(), ids=ODD_DNS)
async def test_an_odd_dns_name_is_nobody(site: Site, text: bytes) -> None:
    """TESTPLAN 3."""
    site.add("good", site.credentials["func1"])
    site.add("odd", site.ca.odd(san_der(dns=[text]), common_name="func1.demo"))
    async with site.relay() as relay:
        waiter = await wait_as_func2(site, relay)
        await refused_as_a_stranger(site, relay, "odd")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


@pytest.mark.parametrize("uris", ODD_SPIFFE.values(), ids=ODD_SPIFFE)
async def test_an_odd_spiffe_id_is_nobody(site: Site, uris: tuple[str, ...]) -> None:
    """TESTPLAN 5."""
    site.add("good", site.ca.party(uris=[SPIFFE_ID]))
    site.add("odd", site.ca.odd(san_der(uris=[uri.encode() for uri in uris]), common_name=SPIFFE_ID[:64]))
    async with site.relay(route(f"uri:{SPIFFE_ID}")) as relay:
        waiter = await wait_as_func2(site, relay)
        await refused_as_a_stranger(site, relay, "odd")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_the_common_name_is_no_identity(site: Site) -> None:
    """TESTPLAN 2: neither alone nor beside another name in the SAN."""
    site.add("good", site.credentials["func1"])
    site.add("alone", site.ca.cn_only("func1.demo"))
    site.add("beside", site.ca.odd([x509.DNSName("other.demo")], common_name="func1.demo"))
    async with site.relay() as relay:
        waiter = await wait_as_func2(site, relay)
        await refused_as_a_stranger(site, relay, "alone")
        await refused_as_a_stranger(site, relay, "beside")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_the_same_text_of_another_kind_is_another_name(site: Site) -> None:
    """TESTPLAN 4: e-mail, otherName, directory name and URI are not the DNS name of the same text, nor the reverse."""
    site.add("good", site.credentials["func1"])
    site.add("elsewhere", site.ca.text_elsewhere("func1.demo"))
    site.add("uri that reads like a selector", site.ca.odd(san_der(uris=[b"dns:func1.demo"])))
    site.add("email only", site.ca.odd([x509.RFC822Name("func1.demo")]))
    async with site.relay() as relay:
        waiter = await wait_as_func2(site, relay)
        for name in ("elsewhere", "uri that reads like a selector", "email only"):
            await refused_as_a_stranger(site, relay, name)
        await check_that_only_the_waiter_is_left(site, relay, waiter)
    async with site.relay(route("uri:dns:func1.demo")) as relay:
        site.add("good", site.ca.odd(san_der(uris=[b"dns:func1.demo"])))
        waiter = await wait_as_func2(site, relay)
        await refused_as_a_stranger(site, relay, "func1")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_a_key_pin_is_matched_by_the_key_alone(site: Site) -> None:
    """TESTPLAN 4: a SAN with the text of another key's pin is not that key."""
    pinned = site.add("good", site.ca.party())
    pin = spki_of_certificate(pinned.certificate.public_bytes(Encoding.DER))
    site.add("spelled", site.ca.odd(san_der(uris=[str(pin).encode()], dns=[pin.value[:60].encode()])))
    async with site.relay(route(str(pin))) as relay:
        waiter = await wait_as_func2(site, relay)
        await refused_as_a_stranger(site, relay, "spelled")
        await refused_as_a_stranger(site, relay, "func1")
        await check_that_only_the_waiter_is_left(site, relay, waiter)


async def test_a_certificate_of_one_route_is_a_stranger_on_another(site: Site) -> None:
    """TESTPLAN 1 and 7: also when it asks for its own route there."""
    site.add("other", site.ca.party(dns=["func1.other"]))
    site.add("good", site.credentials["func1"])
    async with site.relay(DEMO + route("dns:func1.other", name="other")) as relay:
        waiter = await wait_as_func2(site, relay)
        for fields in ({}, {"route": "demo"}, {"route": "other"}, {"route": "demo", "party": "func1"}):
            party = await site.party(relay, "other", route="demo")
            await party.join(**fields)
            assert await party.refusal() == STRANGER
        await check_that_only_the_waiter_is_left(site, relay, waiter)
        # ... and its own route lets it in.
        party = await site.party(relay, "other", route="other")
        await party.join()
        assert (await party.expect("WAITING"))["identity"] == "dns:func1.other"


# --- what is let in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "credential", "identity"),
    [
        ("dns:func1.demo", lambda ca: ca.party(dns=["other.demo", "func1.demo"]), "dns:func1.demo"),
        ("dns:FUNC1.demo", lambda ca: ca.odd(san_der(dns=[b"Func1.DEMO"])), "dns:func1.demo"),
        ("dns:*.jobs.demo", lambda ca: ca.party(dns=["one.jobs.demo"]), "dns:one.jobs.demo"),
        (f"uri:{SPIFFE_ID}", lambda ca: ca.party(uris=[SPIFFE_ID]), f"uri:{SPIFFE_ID}"),
        ("uri:spiffe://acme/jobs/*", lambda ca: ca.party(uris=[SPIFFE_ID]), f"uri:{SPIFFE_ID}"),
        ("uri:spiffe://acme/jobs/*", lambda ca: ca.party(uris=[SPIFFE_ID], dns=["x.demo"]), f"uri:{SPIFFE_ID}"),
    ],
    ids=["second name", "case of DNS", "label", "uri", "segment", "uri beside dns"],
)
async def test_a_name_of_the_right_kind_is_admitted_under_its_own_text(
    site: Site, selector: str, credential: Callable[[TestAuthority], Credential], identity: str
) -> None:
    """The identity is the certificate's name with its type, never the pattern of the route."""
    site.add("func1", credential(site.ca))
    async with site.relay(route(selector)) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join()
        assert (await one.expect("WAITING"))["identity"] == identity
        await two.join()
        await two.expect("WAITING")
        assert (await two.expect("PAIRED"))["peer"] == identity


async def test_groups_stand_for_their_selectors(site: Site) -> None:
    group = """
[[group]]
name = "workers"
parties = ["uri:spiffe://acme/jobs/*", "dns:worker.demo"]
"""
    site.add("by uri", site.ca.party(uris=[SPIFFE_ID]))
    site.add("by dns", site.ca.party(dns=["worker.demo"]))
    site.add("neither", site.ca.party(uris=["spiffe://acme/jobs/a/b"], dns=["xworker.demo", "group:workers"[:5]]))
    async with site.relay(route("group:workers"), sections=group) as relay:
        for name, identity in (("by uri", f"uri:{SPIFFE_ID}"), ("by dns", "dns:worker.demo")):
            one, two = await site.party(relay, name), await site.party(relay, "func2")
            _, paired2 = await pair(one, two)
            assert paired2["peer"] == identity
            one.close()
            two.close()
        await refused_as_a_stranger(site, relay, "neither")


async def test_a_chain_with_an_intermediate_is_admitted(tmp_path: Path) -> None:
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    site.add("func1", site.ca.intermediate().party(dns=FUNC1))
    async with site.relay() as relay:
        paired1, paired2 = await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert (paired1["peer"], paired2["peer"]) == ("dns:func2.demo", "dns:func1.demo")


async def test_refusals_hold_no_slot(site: Site) -> None:
    """TESTPLAN 1: with room for three strangers, thirty are refused one after the other, and a function still joins."""
    site.add("wrong", TestAuthority("other CA").party(dns=FUNC1))
    site.add("other", site.ca.party(dns=["other.demo"]))
    limits = "[limits]\nmax_pre_auth = 3\nmax_pre_auth_per_ip = 3\n"
    async with site.relay(sections=limits) as relay:
        for _ in range(10):
            wrong = await site.connect(relay, "wrong")
            await wrong.handshake()
            assert await wrong.alert() == "TLSV1_ALERT_UNKNOWN_CA"
            wrong.close()
            await refused_as_a_stranger(site, relay, "other")
            garbage = await trio.open_tcp_stream("127.0.0.1", relay.port())
            await garbage.send_all(b"\x16\x03\x01\x00\x02hi")
            await garbage.aclose()
        await eventually(lambda: relay.legs == 0, "all slots free")
        assert relay.waiting() == (0, 0)
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
