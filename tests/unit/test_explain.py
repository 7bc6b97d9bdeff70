"""What a verdict adds to the relay's own answers: order, remedies, and hints about near misses.

``tests/e2e/cli/test_why_says_what_the_relay_does.py`` shows that the answers are the relay's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.config.load import load
from frelay.joining.explain import Verdict, examine
from frelay.relay.prepare import prepare
from frelay.tls.trust import ListDates
from support.certs import Credential, TestAuthority
from support.der import san_der
from support.site import DEMO, Site

PLAIN = """
[[route]]
name = "plain"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["127.0.0.0/8"]
"""


def routes(func1: str, count: int = 1) -> str:
    """Routes ``r0`` and so on, func1 with ``{}`` for their number."""
    return "".join(
        DEMO.replace('"demo"', f'"r{n}"').replace("dns:func1.demo", func1.replace("{}", str(n))) for n in range(count)
    )


def judged(site: Site, shown: Credential | Sequence[x509.Certificate], text: str = DEMO, **options: str) -> Verdict:
    config = load(site.write(text))
    chain = shown.chain if isinstance(shown, Credential) else shown
    return examine(config, prepare(config), chain, options.get("route"))


# --- order and remedies ----------------------------------------------------------------------------------------------

CHECKS = [
    *("key", "issuer", "purpose", "strength", "revocation", "signature and dates", "name constraints"),
    *("names", "route"),
]


def test_what_is_let_in_has_passed_every_check(site: Site) -> None:
    verdict = judged(site, site.credentials["func1"])
    assert [(check.name, check.result) for check in verdict.checks] == [(name, "ok") for name in CHECKS]
    text = {check.name: check.text for check in verdict.checks}
    assert text["key"] == "EC P-256"
    assert text["issuer"] == "CN=test CA"
    assert text["purpose"] == "clientAuth, serverAuth"
    assert text["revocation"] == "no tls.crl, so nobody is ever revoked"
    assert text["route"] == "demo as func1"


def test_after_a_refusal_nothing_is_claimed_but_what_would_fit(site: Site) -> None:
    verdict = judged(site, site.ca.server_only(dns=["func2.demo"]))
    assert [check.result for check in verdict.checks] == ["ok", "ok", "refuses", *["not reached"] * 6]
    assert [(fit.route, fit.parties[0].party) for fit in verdict.fits] == [("demo", "func2")]
    assert verdict.hints == ()


def test_the_way_up_is_shown(site: Site) -> None:
    root = TestAuthority.root_for_intermediates()
    site.ca_path.write_bytes(root.cert_pem)
    verdict = judged(site, root.intermediate().party(dns=["func1.demo"]))
    assert verdict.checks[1].text == "CN=test intermediate CA < CN=test root CA"


@pytest.mark.parametrize(
    ("shown", "check", "remedy"),
    [
        (lambda ca: TestAuthority("other CA").party(dns=["func1.demo"]), "issuer", "no authority of tls.client_ca"),
        (lambda ca: TestAuthority("test CA").party(dns=["func1.demo"]), "issuer", "the same name as one of"),
        (lambda ca: ca.server_only(dns=["func1.demo"]), "purpose", "the extended key usage clientAuth"),
        (lambda ca: ca.expired(dns=["func1.demo"]), "signature and dates", "issue a new one"),
        (lambda ca: ca.not_yet_valid(dns=["func1.demo"]), "signature and dates", "set the clock right"),
        (lambda ca: ca.party(dns=["x.demo"]), "route", "a name that the route wants"),
    ],
)
def test_each_refusal_has_its_remedy(site: Site, shown, check: str, remedy: str) -> None:  # type: ignore[no-untyped-def]
    objection = judged(site, shown(site.ca)).objection
    assert objection is not None
    assert objection.name == check
    assert remedy in (objection.remedy or "")


def test_missing_intermediates_are_the_remedy(site: Site) -> None:
    root = TestAuthority.root_for_intermediates()
    site.ca_path.write_bytes(root.cert_pem)
    party = root.intermediate().party(dns=["func1.demo"])
    objection = judged(site, party.chain[:1]).objection
    assert objection is not None
    assert objection.name == "issuer"
    assert "put the missing intermediates behind the certificate in its file" in (objection.remedy or "")


def test_a_file_in_the_wrong_order_is_told(site: Site) -> None:
    root = TestAuthority.root_for_intermediates()
    site.ca_path.write_bytes(root.cert_pem)
    verdict = judged(site, root.intermediate().party(dns=["func1.demo"]).chain[::-1])
    assert verdict.refusal is not None
    assert verdict.hints[0].startswith("the file begins with the certificate of an authority")


def test_what_cannot_be_parsed_says_so_in_its_remedy(site: Site) -> None:
    """OpenSSL itself only says that it finds no issuer for it."""
    objection = judged(site, site.ca.odd(b"\x30\x03\x82\x05x")).objection
    assert objection is not None
    assert objection.name == "issuer"
    assert "its extensions cannot be parsed" in (objection.remedy or "")


def test_a_key_that_is_not_for_signing_is_shown_by_nobody(site: Site) -> None:
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(site.ca.root.subject)
        .public_key(x25519.X25519PrivateKey.generate().public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(site.ca.authority.private_key, hashes.SHA256())
    )
    verdict = judged(site, [certificate])
    assert verdict.objection is not None
    assert verdict.objection.name == "key"
    assert "no function can show this certificate" in verdict.objection.text
    assert verdict.refusal is not None
    assert (verdict.refusal.code, verdict.refusal.alert) == ("protocol-error", "certificate_required")


def test_what_ran_out_since_the_handshake_refuses_too(site: Site) -> None:
    """The relay checks the clock again before it pairs."""
    config = load(site.write())
    trust = prepare(config)
    assert trust is not None
    verdict = examine(config, replace(trust, lists=(ListDates(1.0, math.inf),)), site.credentials["func1"].chain)
    assert verdict.refusal is not None
    assert (verdict.refusal.code, verdict.refusal.alert) == ("not-authorised", None)
    assert verdict.objection is not None
    assert verdict.objection.name == "revocation"
    assert "revocation list has expired" in verdict.objection.text


# --- routes ----------------------------------------------------------------------------------------------------------


def test_of_a_thousand_routes_those_that_fit(site: Site) -> None:
    verdict = judged(site, site.ca.party(dns=["func17.demo"]), routes("dns:func{}.demo", 1000))
    assert [fit.route for fit in verdict.fits] == ["r17"]
    assert verdict.routes_checked == 1000
    assert verdict.refusal is None


@pytest.mark.load
def test_a_thousand_routes_and_none_fits_in_time(site: Site) -> None:
    began = time.perf_counter()
    verdict = judged(site, site.ca.party(dns=["fnuc17.demo", "other.demo"]), routes("dns:func{}.demo", 1000))
    assert time.perf_counter() - began < 20  # it takes one second, most of it for reading the file
    assert verdict.refusal is not None
    assert (verdict.refusal.code, verdict.routes_checked) == ("not-authorised", 1000)
    assert 0 < len(verdict.hints) <= 8
    assert verdict.objection is not None
    assert verdict.objection.text == "fits none of 1000 routes"


def test_a_function_that_fits_both_parties_must_say_which(site: Site) -> None:
    (fit,) = judged(site, site.credentials["func1"], DEMO.replace("func2.demo", "*.demo")).fits
    assert [one.party for one in fit.parties] == ["func1", "func2"]
    assert fit.note == "it fits both parties: say which, by JOIN.party, or join with a key, by JOIN.meet"


def test_a_party_that_is_a_place_wants_no_certificate(site: Site) -> None:
    routes = DEMO.replace('"dns:func2.demo"', '{ dial = "127.0.0.1:5432" }')
    assert judged(site, site.credentials["func1"], routes).refusal is None
    objection = judged(site, site.ca.party(dns=["fucn1.demo"]), routes, route="demo").objection
    assert objection is not None
    assert objection.text.endswith("func1 is dns:func1.demo; func2 is no function (dial 127.0.0.1:5432)")


def test_plain_routes_look_at_no_certificate(site: Site) -> None:
    stranger = TestAuthority("other CA").party(dns=["x.demo"])
    verdict = judged(site, stranger, DEMO + PLAIN)
    assert verdict.refusal is not None
    assert verdict.plain_routes == ("plain",)
    only = judged(site, stranger, DEMO + PLAIN, route="plain")
    assert (only.refusal, only.checks, only.plain_routes) == (None, (), ("plain",))
    nothing_else = judged(site, stranger, PLAIN)
    assert (nothing_else.refusal, nothing_else.checks) == (None, ())


# --- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("func1", "shown", "hint"),
    [
        ("dns:func1.demo", lambda ca: ca.cn_only("func1.demo"), "as its common name, which is never an identity"),
        ("dns:*.demo.acme", lambda ca: ca.cn_only("x.demo.acme"), "as its common name, which is never an identity"),
        (
            "dns:func1.demo",
            lambda ca: ca.odd(san_der(uris=[b"func1.demo"])),
            "'func1.demo' as URI, and it must be a SAN DNS name",
        ),
        (
            "dns:func1.demo",
            lambda ca: ca.odd(san_der(uris=[b"dns:func1.demo"])),
            "'dns:func1.demo' as URI, and it must be a SAN DNS name",
        ),
        (
            "dns:func1.demo",
            lambda ca: ca.odd([x509.RFC822Name("func1.demo")]),
            "'func1.demo' as e-mail address, and it must be a SAN DNS name",
        ),
        (
            "uri:urn:x:one",
            lambda ca: ca.odd(san_der(dns=[b"urn:x:one"])),
            "'urn:x:one' as DNS name, and it must be a SAN URI",
        ),
        ("dns:func1.demo", lambda ca: ca.odd(san_der(dns=[b"func1.demo."])), "differs by a trailing dot"),
        (
            "uri:spiffe://acme/jobs/one",
            lambda ca: ca.party(uris=["spiffe://acme/jobs/One"]),
            "differs in case, and a URI is compared octet by octet",
        ),
        (
            "uri:spiffe://acme/jobs/*",
            lambda ca: ca.party(uris=["spiffe://evil/jobs/one"]),
            "is of another trust domain, 'evil'",
        ),
        (
            "uri:spiffe://acme/jobs/*",
            lambda ca: ca.party(uris=["spiffe://acme/jobs/one/two"]),
            "'*' stands for exactly one whole segment",
        ),
        ("dns:*.jobs.acme", lambda ca: ca.party(dns=["a.b.jobs.acme"]), "'*' stands for exactly one"),
        ("dns:func1.demo", lambda ca: ca.party(dns=["fucn1.demo"]), "'fucn1.demo' is similar, but not the same"),
        (f"spki:sha256:{'0' * 64}", lambda ca: ca.party(dns=["x.demo"]), "was the key renewed?"),
    ],
)
def test_a_name_that_comes_near_is_told_how_near(site: Site, func1: str, shown, hint: str) -> None:  # type: ignore[no-untyped-def]
    verdict = judged(site, shown(site.ca), routes(func1))
    assert verdict.refusal is not None
    assert any(hint in text for text in verdict.hints), verdict.hints


@pytest.mark.parametrize("name", ["func3.demo", "elsewhere.acme", "func10.demo"])
def test_brothers_and_strangers_get_no_hint(site: Site, name: str) -> None:
    assert judged(site, site.ca.party(dns=[name])).hints == ()


def test_a_hint_cannot_move_a_cursor(site: Site) -> None:
    verdict = judged(site, site.ca.odd(san_der(dns=[b"func1\x1b[2J.demo"]), common_name="func1.demo"))
    assert verdict.hints
    assert "\x1b" not in "".join([*verdict.hints, *verdict.facts.ignored, *(check.text for check in verdict.checks)])


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_the_shape_for_programs(site: Site) -> None:
    now = datetime.now(UTC)
    admitted = json.loads(json.dumps(judged(site, site.credentials["func1"]).as_json(now)))
    assert list(admitted) == [
        *(
            "admitted",
            "certificate",
            "checks",
            "routes",
            "routes_checked",
            "plain_routes",
            "refusal",
            "hints",
            "warnings",
        )
    ]
    assert admitted["admitted"] is True
    assert admitted["refusal"] is None
    assert admitted["routes"] == [{"route": "demo", "party": "func1", "identity": "dns:func1.demo", "note": None}]
    assert admitted["checks"][0] == {"name": "key", "result": "ok", "text": "EC P-256", "remedy": None}
    refused = judged(site, site.ca.expired(dns=["func1.demo"])).as_json(now)
    assert refused["admitted"] is False
    assert refused["refusal"] == {
        "code": "certificate-expired",
        "reason": "certificate has expired (at depth 0 of the chain)",
        "alert": "certificate_expired",
        "told": None,
    }
    assert refused["certificate"]["expired"] is True


# --- what the other function would refuse -----------------------------------------------------------------------------


def test_a_server_whose_certificate_is_for_clients_only(site: Site) -> None:
    """The relay lets it in, but every func1 will refuse it."""
    verdict = judged(site, site.ca.client_only(dns=["func2.demo"]))
    assert verdict.refusal is None
    (warning,) = verdict.warnings
    assert "func2 of route demo" in warning
    assert "lacks serverAuth" in warning
    assert "func1 will refuse it" in warning
    assert verdict.as_json(datetime.now(UTC))["warnings"] == [warning]


def test_a_client_needs_no_certificate_for_servers(site: Site) -> None:
    assert judged(site, site.ca.client_only(dns=["func1.demo"])).warnings == ()


def test_a_certificate_for_any_purpose_is_for_servers(site: Site) -> None:
    assert judged(site, site.ca.odd([x509.DNSName("func2.demo")], purposes=[])).warnings == ()


def test_an_authority_for_clients_only_makes_no_servers(site: Site) -> None:
    root = TestAuthority.root_for_intermediates()
    clients = root.intermediate("clients", purposes=[ExtendedKeyUsageOID.CLIENT_AUTH])
    site.client_ca = root.write(site.directory, "anchors")
    verdict = judged(site, clients.party(dns=["func2.demo"]))
    assert verdict.refusal is None
    (warning,) = verdict.warnings
    assert "its authority CN=clients is not for servers" in warning


def test_a_refused_certificate_gets_the_remedy_first(site: Site) -> None:
    """func1's certificate for servers only is refused by the relay itself, which asks for clientAuth."""
    verdict = judged(site, site.ca.server_only(dns=["func1.demo"]))
    assert verdict.objection is not None
    assert verdict.objection.name == "purpose"
    assert "clientAuth" in str(verdict.objection.remedy)
    assert verdict.warnings == ()


def test_where_the_missing_issuer_has_the_name_of_a_known_authority(site: Site) -> None:
    """The remedy is about the certificate whose issuer is missing, not about the function's own."""
    twin = TestAuthority.root_for_intermediates("test CA")
    below = twin.intermediate("below")
    verdict = judged(site, below.party(dns=["func1.demo"]))
    assert verdict.objection is not None
    assert "the authority that issued CN=below has the same name" in str(verdict.objection.remedy)
