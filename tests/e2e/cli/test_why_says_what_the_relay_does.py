"""``frelay why`` and a relay never differ: for every certificate, good or bad, both give the same answer and reason.

Each kind is shown to a running relay by a party that has its key, and examined offline. What the relay logs and what
the party sees are the yardstick: the code, the reason, and the alert or the sentence of REFUSED, word for word.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from frelay.config.load import load
from frelay.joining.explain import Verdict, examine
from frelay.pki.authority import Authority
from frelay.pki.files import certificates_pem, key_pem, read_certificates
from frelay.relay.prepare import prepare
from support.certs import Credential, TestAuthority, self_signed
from support.der import san_der
from support.odd_names import ODD_DNS, ODD_SPIFFE, SPIFFE_ID
from support.ports import reserved_port
from support.site import DEMO, Site

FUNC1: Final = ["func1.demo"]

Make = Callable[[Site], Credential]

SPIFFE_ROUTE: Final = DEMO.replace('"dns:func1.demo"', f'"uri:{SPIFFE_ID}"')
OTHER_ROUTE: Final = DEMO.replace('name = "demo"', 'name = "other"').replace("dns:func", "dns:other")


@dataclass(frozen=True)
class Kind:
    """One kind of certificate, and the relay that it is shown to."""

    make: Make
    code: str | None
    check: str | None = None
    routes: str = DEMO
    crl: bool = False


def below(site: Site, **constraints: list[x509.GeneralName]) -> TestAuthority:
    return site.ca.intermediate(permitted=constraints.get("permitted"), excluded=constraints.get("excluded"))


def with_names(site: Site, count: int) -> Credential:
    """The right name is among them, as the first."""
    return site.ca.party(dns=[*FUNC1, *(f"other{number}.demo" for number in range(count - 1))])


def signed_by_a_leaf(site: Site) -> Credential:
    leaf = site.credentials["func1"]
    forger = TestAuthority(authority=Authority(leaf.certificate, leaf.private_key, (site.ca.root,)))
    return forger.odd([x509.DNSName("func1.demo")])


def revoked(site: Site) -> Credential:
    bad = site.ca.party(dns=FUNC1)
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad]))
    return bad


def of_an_authority_without_list(site: Site) -> Credential:
    site.ca.write_crl(site.directory, site.ca.crl())
    return site.ca.intermediate().party(dns=FUNC1)


def of_a_revoked_authority(site: Site) -> Credential:
    intermediate = site.ca.intermediate()
    site.ca_path.write_bytes(site.ca.cert_pem + certificates_pem([intermediate.authority.certificate]))
    as_credential = Credential("x", intermediate.authority.certificate, site.credentials["func1"].private_key, ())
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[as_credential]) + intermediate.crl())
    return intermediate.party(dns=FUNC1)


def tampered(site: Site) -> Credential:
    """One bit of the signature is changed."""
    good = site.ca.party(dns=FUNC1)
    der = bytearray(good.certificate.public_bytes(Encoding.DER))
    der[-1] ^= 1
    certificate = x509.load_der_x509_certificate(bytes(der))
    return Credential("tampered", certificate, good.private_key, (certificate,))


def two_faults(site: Site, *, first: str) -> Credential:
    """Expired, and with another fault: OpenSSL reports the fault that it checks first."""
    past = datetime.now(UTC) - timedelta(hours=1)
    expired = partial(site.ca.odd, not_before=past - timedelta(days=1), not_after=past)
    if first == "purpose":
        return expired([x509.DNSName("func1.demo")], purposes=[ExtendedKeyUsageOID.SERVER_AUTH])
    if first == "issuer":
        return TestAuthority("other CA").expired(dns=FUNC1)
    bad = expired([x509.DNSName("func1.demo")])
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad]))
    return bad


KINDS: Final[dict[str, Kind]] = {
    "good": Kind(lambda site: site.ca.party(dns=FUNC1), None),
    "good, by SPIFFE ID": Kind(lambda site: site.ca.party(uris=[SPIFFE_ID]), None, routes=SPIFFE_ROUTE),
    "good, below an intermediate": Kind(lambda site: below(site).party(dns=FUNC1), None),
    "good, with a list": Kind(lambda site: site.credentials["func1"], None, crl=True),
    "no extended key usage": Kind(lambda site: site.ca.odd([x509.DNSName("func1.demo")], purposes=[]), None),
    "wrong CA": Kind(lambda site: TestAuthority("other CA").party(dns=FUNC1), "not-authorised", "issuer"),
    "another CA of the same name": Kind(
        lambda site: TestAuthority("test root CA").party(dns=FUNC1), "not-authorised", "issuer"
    ),
    "self-signed": Kind(lambda site: self_signed(dns=FUNC1), "not-authorised", "issuer"),
    "expired": Kind(lambda site: site.ca.expired(dns=FUNC1), "certificate-expired", "signature and dates"),
    "not yet valid": Kind(lambda site: site.ca.not_yet_valid(dns=FUNC1), "not-authorised", "signature and dates"),
    "tampered": Kind(tampered, "not-authorised", "signature and dates"),
    "serverAuth only": Kind(lambda site: site.ca.server_only(dns=FUNC1), "not-authorised", "purpose"),
    "a relay's": Kind(lambda site: site.ca.relay(dns=FUNC1), "not-authorised", "purpose"),
    "signed by a leaf": Kind(signed_by_a_leaf, "not-authorised", "purpose"),
    "revoked": Kind(revoked, "revoked", "revocation", crl=True),
    "of a revoked authority": Kind(of_a_revoked_authority, "revoked", "revocation", crl=True),
    "of an authority without list": Kind(of_an_authority_without_list, "not-authorised", "revocation", crl=True),
    "not permitted": Kind(
        lambda site: below(site, permitted=[x509.DNSName("acme")]).party(dns=FUNC1),
        "not-authorised",
        "name constraints",
    ),
    "excluded": Kind(
        lambda site: below(site, excluded=[x509.DNSName("demo")]).party(dns=FUNC1),
        "not-authorised",
        "name constraints",
    ),
    "URI not permitted": Kind(
        lambda site: below(site, permitted=[x509.UniformResourceIdentifier("other")]).party(uris=[SPIFFE_ID]),
        "not-authorised",
        "name constraints",
        SPIFFE_ROUTE,
    ),
    "wrong CA, and expired": Kind(partial(two_faults, first="issuer"), "not-authorised", "issuer"),
    "serverAuth only, and expired": Kind(partial(two_faults, first="purpose"), "not-authorised", "purpose"),
    "revoked, and expired": Kind(partial(two_faults, first="revocation"), "revoked", "revocation", crl=True),
    "good, with as many names as there may be": Kind(lambda site: with_names(site, 256), None),
    "with one name more": Kind(lambda site: with_names(site, 257), "not-authorised", "names"),
    "with thousands of names": Kind(lambda site: with_names(site, 3500), "not-authorised", "names"),
    "the name in the CN": Kind(lambda site: site.ca.cn_only("func1.demo"), "not-authorised", "route"),
    "the text elsewhere": Kind(lambda site: site.ca.text_elsewhere("func1.demo"), "not-authorised", "route"),
    "of another route": Kind(
        lambda site: site.ca.party(dns=["other1.demo"]), "not-authorised", "route", DEMO + OTHER_ROUTE
    ),
    **{
        f"odd DNS name: {name}": Kind(
            lambda site, text=text: site.ca.odd(san_der(dns=[text])),  # type: ignore[misc]
            "not-authorised",
            "route",
        )
        for name, text in ODD_DNS.items()
    },
    **{
        f"odd SPIFFE ID: {name}": Kind(
            lambda site, uris=uris: site.ca.odd(san_der(uris=[uri.encode() for uri in uris])),  # type: ignore[misc]
            "not-authorised",
            "route",
            SPIFFE_ROUTE,
        )
        for name, uris in ODD_SPIFFE.items()
    },
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    site.ca.write_crl(tmp_path, site.ca.crl())
    return site


def asked_offline(site: Site, name: str, route: str | None = "demo") -> Verdict:
    """What `why` says of a party's file, with the same files that the relay has."""
    config = load(site.config)
    return examine(config, prepare(config), read_certificates(site.paths[name][0]), route)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_both_say_the_same(site: Site, kind: Kind) -> None:
    """TESTPLAN 1 to 5, and 11."""
    site.add("it", kind.make(site))
    async with site.relay(kind.routes, crl=kind.crl) as relay:
        verdict = asked_offline(site, "it")
        party = await site.connect(relay, "it")
        await party.handshake()
        await party.join(route="demo")
        if kind.code is None:
            await party.expect("WAITING")
            assert verdict.refusal is None
            assert verdict.objection is None
            assert [fit.route for fit in verdict.fits] == ["demo"]
            return
        logged = await relay.log("refused")
        assert verdict.refusal is not None
        assert verdict.objection is not None
        assert (logged["code"], verdict.objection.name) == (kind.code, kind.check)
        assert (verdict.refusal.code, verdict.refusal.reason) == (logged["code"], logged["reason"])
        assert verdict.objection.remedy
        if verdict.refusal.alert is not None:
            assert (await party.alert()).endswith(f"ALERT_{verdict.refusal.alert.upper()}")
        else:
            told = {"code": kind.code, "reason": verdict.refusal.told, "retry_after": None}
            assert await party.refusal() == told


KEYS: Final[dict[str, tuple[Callable[[], Any], str | None]]] = {
    "P-384": (lambda: ec.generate_private_key(ec.SECP384R1()), None),
    "P-224, which TLS 1.3 does not know": (lambda: ec.generate_private_key(ec.SECP224R1()), "protocol-error"),
    "secp256k1, likewise": (lambda: ec.generate_private_key(ec.SECP256K1()), "protocol-error"),
    "RSA 2048": (lambda: rsa.generate_private_key(65537, 2048), None),
    "RSA 1024, which is too weak": (lambda: rsa.generate_private_key(65537, 1024), "not-authorised"),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate, None),
    "Ed448": (ed448.Ed448PrivateKey.generate, None),
}


def written_with_key(site: Site, key: Any) -> tuple[Path, Path]:
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "it")]))
        .issuer_name(site.ca.authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("func1.demo")]), critical=False)
        .sign(site.ca.authority.private_key, hashes.SHA256())
    )
    paths = site.directory / "it.pem", site.directory / "it.key"
    paths[0].write_bytes(certificates_pem([certificate]))
    paths[1].write_bytes(key_pem(key))
    return paths


@pytest.mark.parametrize(("make", "code"), KEYS.values(), ids=KEYS)
async def test_of_every_kind_of_key(site: Site, make: Callable[[], Any], code: str | None) -> None:
    site.paths["it"] = written_with_key(site, make())
    # The client accepts weak keys and those without a use in TLS 1.3, so that the relay refuses them.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.load_verify_locations(site.ca_path)
    context.load_cert_chain(*site.paths["it"])
    context.set_alpn_protocols(["frelay/1"])
    async with site.relay() as relay:
        verdict = asked_offline(site, "it")
        party = await site.connect(relay, context=context)
        await party.handshake()
        await party.join()
        if code is None:
            assert verdict.refusal is None
            await party.expect("WAITING")
            return
        assert verdict.refusal is not None
        assert verdict.refusal.alert is not None
        assert (await party.alert()).endswith(f"ALERT_{verdict.refusal.alert.upper()}")
        logged = await relay.log("refused")
        assert (verdict.refusal.code, verdict.refusal.reason) == (logged["code"], logged["reason"])
        assert logged["code"] == code
        assert [check.result for check in verdict.checks] == ["refuses", *["not reached"] * 8]


@pytest.mark.parametrize("asked", ["one", "two", "three"])
async def test_where_routes_share_an_address(site: Site, asked: str) -> None:
    """A function of one of the routes gets another answer for the others than a stranger does."""
    site.add("it", site.ca.party(dns=["two.demo"]))
    with reserved_port() as port:
        routes = "".join(
            DEMO.replace('"demo"', f'"{name}"').replace("func1.demo", f"{name}.demo").replace(":0", f":{at}")
            for name, at in (("one", port), ("two", port), ("three", 0))
        )
        async with site.relay(routes) as relay:
            verdict = asked_offline(site, "it", asked)
            party = await site.party(relay, "it", route=asked)
            await party.join(route=asked)
            if asked == "two":
                await party.expect("WAITING")
                (fit,) = verdict.fits
                assert fit.note is not None
                assert fit.note.startswith("2 routes share 127.0.0.1:")
                return
            assert verdict.refusal is not None
            logged = await relay.log("refused")
            assert (verdict.refusal.code, verdict.refusal.reason) == (logged["code"], logged["reason"])
            assert verdict.refusal.code == ("unknown-route" if asked == "one" else "not-authorised")
            assert (await party.refusal())["reason"] == verdict.refusal.told
