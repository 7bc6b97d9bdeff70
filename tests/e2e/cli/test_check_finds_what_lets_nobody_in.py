"""``frelay check`` finds authorities, lists and names that let nobody in, before a relay refuses a function.

It says so with exit code 1 where nobody at all can come in, and by a warning where some can. The relay logs the same,
and `frelay why` names the same remedy.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.pki.files import certificates_pem
from support.certs import TestAuthority
from support.commands import Said, frelay_command
from support.party import pair
from support.site import DEMO, Site

DELTA: Final = x509.DeltaCRLIndicator(1)


def point(**options: object) -> x509.IssuingDistributionPoint:
    """An issuingDistributionPoint with one thing in it."""
    given = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
        **options,
    }
    return x509.IssuingDistributionPoint(**given)  # type: ignore[arg-type]


def trust(site: Site, *authorities: TestAuthority) -> None:
    site.client_ca = site.directory / "anchors.pem"
    site.client_ca.write_bytes(certificates_pem([one.authority.certificate for one in authorities]))


def lists(site: Site, *content: bytes) -> None:
    site.ca.write_crl(site.directory, b"".join(content))


def check(site: Site, routes: str = DEMO, *, crl: bool = False) -> Said:
    return frelay_command("check", "-c", site.write(routes, crl=crl))


def remedy(site: Site, name: str = "func1", *, crl: bool = True) -> str:
    """The remedy that `frelay why` prints for ``name``."""
    said = frelay_command("why", "--json", "-c", site.write(crl=crl), "--cert", site.paths[name][0])
    return next(str(one["remedy"]) for one in json.loads(said.stdout)["checks"] if one["result"] == "refuses")


class Below:
    """A root and the issuing authority below it, which has issued both functions."""

    def __init__(self, site: Site) -> None:
        self.root = TestAuthority.root_for_intermediates("lab root")
        self.issuing = self.root.intermediate("lab issuing")
        for name in ("func1", "func2"):
            site.add(name, self.issuing.party(dns=[f"{name}.demo"]))
        trust(site, self.root, self.issuing)


# --- lists ----------------------------------------------------------------------------------------------------------


def test_the_list_of_the_root_is_missing(site: Site) -> None:
    below = Below(site)
    lists(site, below.issuing.crl())
    said = check(site, crl=True)
    assert (said.code, said.stdout) == (1, "")
    assert "nobody is let in" in said.messages[0]
    assert "CN=lab root, which is in" in said.stderr
    assert "has no revocation list there, so it admits nobody; add that list" in said.stderr
    assert "CN=lab issuing, which is in" in said.stderr
    assert "was issued by CN=lab root, which has no list" in said.stderr
    assert remedy(site).endswith("add that of CN=lab root")
    found = json.loads(frelay_command("check", "--json", "-c", site.config).stdout)
    assert found["ok"] is False
    assert {one["key"] for one in found["problems"]} == {"tls.client_ca", "tls.crl"}


def test_the_list_of_the_issuing_authority_is_missing(site: Site) -> None:
    """The list of the root is there, so a function with a certificate from the root itself could be let in."""
    below = Below(site)
    lists(site, below.root.crl())
    said = check(site, crl=True)
    assert said.code == 0
    assert "CN=lab issuing, which is in" in said.messages[0]
    assert "has no revocation list there" in said.messages[0]
    assert remedy(site).endswith("add that of CN=lab issuing")


async def test_of_two_authorities_one_has_no_list(site: Site) -> None:
    other = TestAuthority("other CA")
    site.add("stranger", other.party(dns=["func1.demo"]))
    trust(site, site.ca, other)
    lists(site, site.ca.crl())
    said = check(site, crl=True)
    assert said.code == 0
    (warning,) = said.messages
    assert warning.startswith(f"warning: {site.config}: tls.crl: ")
    assert "CN=other CA, which is in" in warning
    found = json.loads(frelay_command("check", "--json", "-c", site.config).stdout)
    assert [one["key"] for one in found["warnings"]] == ["tls.crl"]
    assert remedy(site, "stranger").endswith("add that of CN=other CA")
    async with site.relay(crl=True) as relay:
        assert "CN=other CA" in relay.logged("configuration warning")[0]["problem"]
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        lists(site, site.ca.crl(), other.crl())
        await relay.relay.reload()
        await pair(await site.party(relay, "stranger"), await site.party(relay, "func2"))
        assert len(relay.logged("configuration warning")) == 1


async def test_a_relay_that_lets_nobody_in_says_so(site: Site) -> None:
    below = Below(site)
    lists(site, below.issuing.crl())
    async with site.relay(crl=True) as relay:
        assert relay.logged("the certificates in force let nobody in")
        await (await site.connect(relay, "func1")).alert()
        await relay.relay.reload()
        assert len(relay.logged("the certificates in force let nobody in")) == 2


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        (DELTA, "is a delta list"),
        (point(indirect_crl=True), "is an indirect list"),
        (point(only_some_reasons=frozenset({x509.ReasonFlags.key_compromise})), "is a list for some reasons only"),
        (point(only_contains_attribute_certs=True), "is a list of attribute certificates"),
        (
            x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"),
            "that frelay does not know",
        ),
    ],
    ids=["delta", "indirect", "reasons", "attributes", "unknown"],
)
def test_a_list_in_which_nobody_is_looked_up(site: Site, extension: x509.ExtensionType, words: str) -> None:
    lists(site, site.ca.crl(critical=[extension]))
    said = check(site, crl=True)
    assert said.code == 1
    assert words in said.stderr
    why = frelay_command("why", "-c", site.config, "--cert", site.paths["func1"][0])
    assert why.code == 1
    assert words in why.stdout.replace("\n", " ")


def test_a_root_that_lists_leaves_only(site: Site) -> None:
    """No list says whether the authority below it is revoked."""
    below = Below(site)
    lists(site, below.root.crl(critical=[point(only_contains_user_certs=True)]), below.issuing.crl())
    said = check(site, crl=True)
    assert said.code == 0
    assert "CN=lab issuing" in said.messages[0]
    assert "was issued by CN=lab root, which has no list of authorities there" in said.messages[0]
    assert "the list of CN=lab root in" in remedy(site)
    assert "publish a complete one" in remedy(site)


def test_a_delta_list_beside_the_whole_one(site: Site) -> None:
    """Nobody would notice what it revokes."""
    lists(site, site.ca.crl(), site.ca.crl(critical=[DELTA], number=2))
    said = check(site, crl=True)
    assert said.code == 0
    assert "is a delta list, but only complete lists are used" in said.stderr


def test_a_list_in_date_and_a_lapsed_one_of_another(site: Site) -> None:
    other = TestAuthority("other CA")
    trust(site, site.ca, other)
    lists(site, site.ca.crl(), other.expired_crl())
    said = check(site, crl=True)
    assert said.code == 1
    assert "the list of CN=other CA expired on" in said.messages[0]


def test_a_lapsed_list_beside_the_newer_one_of_the_same(site: Site) -> None:
    lists(site, site.ca.expired_crl(), site.ca.crl(number=2))
    said = check(site, crl=True)
    assert said.code == 0
    assert "expired on" in said.messages[0]
    assert "the file has a newer one; remove it" in said.messages[0]


def test_a_list_signed_by_another_key(site: Site) -> None:
    lists(site, site.ca.crl(), TestAuthority("test CA").crl())
    said = check(site, crl=True)
    assert said.code == 1
    assert "the list of CN=test CA was not signed by any CA of" in said.messages[0]


# --- authorities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_an_authority_for_servers_only(site: Site, beside: bool) -> None:
    servers = TestAuthority.root_for_intermediates("servers", purposes=[ExtendedKeyUsageOID.SERVER_AUTH])
    site.add("func1", servers.party(dns=["func1.demo"]))
    trust(site, servers, *([site.ca] if beside else []))
    said = check(site)
    assert said.code == (0 if beside else 1)
    assert "CN=servers may not vouch for clients (its extended key usage lacks clientAuth)" in said.stderr
    assert "CN=servers may not vouch for clients" in remedy(site, crl=False)


def test_an_authority_that_begins_tomorrow(site: Site) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=2)
    trust(site, TestAuthority.root_for_intermediates("tomorrow's CA", not_after=tomorrow))
    said = check(site)
    assert said.code == 1
    assert "CN=tomorrow's CA is not valid before" in said.stderr


# --- routes ---------------------------------------------------------------------------------------------------------

ONLY_DEMO: Final = x509.NameConstraints([x509.DNSName("demo")], None)
ONLY_ACME: Final = x509.NameConstraints([x509.DNSName("acme"), x509.UniformResourceIdentifier("acme")], None)


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ("dns:func1.demo", False),
        ("dns:*.demo", False),
        ("dns:func1.acme", True),
        ("dns:*.acme", True),
        ("dns:func1.*", True),
        ("dns:acme.demo", False),
        ("dns:func1.notacme", False),
        ("uri:spiffe://acme/jobs/*", True),
        ("uri:spiffe://demo/jobs/1", False),
        ("uri:urn:x:y", False),
        ("spki:sha256:" + "0" * 64, True),
    ],
)
def test_a_name_that_no_authority_may_give(site: Site, selector: str, fits: bool) -> None:
    trust(site, TestAuthority.root_for_intermediates("acme CA", critical=[ONLY_ACME]))
    routes = DEMO.replace("dns:func1.demo", selector).replace("dns:func2.demo", "dns:func2.acme")
    said = check(site, routes)
    assert said.code == 0
    assert said.stderr == "" if fits else f"route[demo].func1: no certificate can fit {selector}: " in said.stderr


def test_an_operator_whom_no_authority_may_name(site: Site) -> None:
    trust(site, TestAuthority.root_for_intermediates("acme CA", critical=[ONLY_ACME]))
    admin = '[admin]\nlisten = "127.0.0.1:0"\nallow = ["dns:operator.demo"]\n'
    routes = DEMO.replace(".demo", ".acme")
    said = frelay_command("check", "-c", site.write(routes, sections=admin))
    assert said.code == 0
    assert "admin.allow: no certificate can fit dns:operator.demo" in said.stderr


def test_a_name_that_is_excluded(site: Site) -> None:
    excluded = x509.NameConstraints(None, [x509.DNSName("func1.demo")])
    trust(site, TestAuthority.root_for_intermediates("strict CA", critical=[excluded]))
    assert "no certificate can fit dns:func1.demo" in check(site).stderr
    # Some of these are not excluded.
    assert check(site, DEMO.replace("dns:func1.demo", "dns:*.demo")).stderr == ""


def test_one_authority_that_may_give_it_is_enough(site: Site) -> None:
    acme, demo = (
        TestAuthority.root_for_intermediates(name, critical=[limits])
        for name, limits in (("acme CA", ONLY_ACME), ("demo CA", ONLY_DEMO))
    )
    trust(site, acme, demo)
    assert check(site).stderr == ""
    # Unless it has no list.
    lists(site, acme.crl())
    assert "no certificate can fit dns:func1.demo" in check(site, crl=True).stderr


def test_the_constraints_of_the_root_hold_below_it(site: Site) -> None:
    root = TestAuthority.root_for_intermediates("acme CA", critical=[ONLY_ACME])
    trust(site, root, root.intermediate("issuing CA"))
    assert "no certificate can fit dns:func1.demo" in check(site).stderr


# --- files ----------------------------------------------------------------------------------------------------------


def test_missing_files_are_named_with_all_else(site: Site) -> None:
    for path in (*site.relay_paths, site.ca_path):
        path.unlink()
    sections = '[relay]\nuser = "nobody-at-all"\n[tcp]\ncongestion_control = "none-such"\n'
    bad = DEMO.replace('"dns:func1.demo"', '"func1.demo"') + "wait_timeot = 5\n"
    config = site.write(bad, sections=sections, crl=True)
    for command in ("check", "run"):
        said = frelay_command(command, "-c", config)
        assert said.code == 1
        for words in (
            "'func1.demo' is not a selector",
            "wait_timeot: is not a known key",
            f"{site.relay_paths[0]} does not exist",
            f"{site.relay_paths[1]} does not exist",
            f"{site.ca_path} does not exist",
            "crl.pem does not exist",
            'there is no user "nobody-at-all"',
            '"none-such" is not known to this kernel',
        ):
            assert words in said.stderr
    site.write(DEMO, sections=sections, crl=True)
    said = frelay_command("check", "-c", config)
    assert said.messages[-1] == f"{config}: 6 problems"
