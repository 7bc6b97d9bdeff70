"""However strange a certificate is, it is let in for what it rightly says, or refused for its one fault.

It never causes a bug or a hang, and never gets the wrong function into a queue.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.config.load import load
from frelay.pki.authority import Authority
from frelay.pki.files import certificates_pem
from frelay.tls.loading import load_outer_tls
from frelay.tls.trust import Credential as Judged
from support.certs import Credential, TestAuthority
from support.der import content, der, elements, pem, san_der
from support.odd_names import ODD_URIS
from support.party import Party
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

FUNC1: Final = [x509.DNSName("func1.demo")]
UNHEARD_OF: Final = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\0")
STRANGER: Final = "this certificate is not admitted here"

Make = Callable[[TestAuthority], Credential]
Edit = Callable[[list[bytes]], None]


def route(func1: str) -> str:
    return f"""
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = "{func1}"
func2 = "dns:func2.demo"
"""


def add_reworked(site: Site, edit: Edit, digest: hashes.HashAlgorithm | None = None) -> None:
    """Make "odd" a certificate of func1.demo that was edited under its signature."""
    credential = site.add("odd", site.ca.odd(FUNC1))
    site.paths["odd"][0].write_bytes(pem(site.ca.rework(credential, edit, digest=digest)))


def lenient(site: Site, name: str = "odd") -> ssl.SSLContext:
    """A client that shows certificates that OpenSSL would normally not show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.load_verify_locations(site.ca_path)
    context.load_cert_chain(*site.paths[name])
    context.set_alpn_protocols(["frelay/1"])
    return context


async def come(site: Site, relay: RelayInProcess, name: str = "odd") -> Party:
    party = await site.connect(relay, context=lenient(site, name))
    await party.handshake()
    await party.join(wait=60)
    return party


async def waits_as(party: Party) -> str:
    identity = (await party.expect("WAITING"))["identity"]
    assert isinstance(identity, str)
    return identity


async def is_nobody(site: Site, relay: RelayInProcess, name: str = "odd") -> None:
    """It is verified and fits no route: it is told no more than that, and holds nothing."""
    party = await come(site, relay, name)
    refusal = await party.refusal()
    assert (refusal["code"], refusal["reason"]) == ("not-authorised", STRANGER)
    party.close()
    await eventually(lambda: relay.legs == 0, "nothing is held")
    assert relay.waiting() == (0, 0)


# --- let in --------------------------------------------------------------------------------------------------------

GOOD: Final[dict[str, Make]] = {
    "RSA 2048": lambda ca: ca.odd(FUNC1, key=rsa.generate_private_key(65537, 2048)),
    "P-384": lambda ca: ca.odd(FUNC1, key=ec.generate_private_key(ec.SECP384R1())),
    "P-521": lambda ca: ca.odd(FUNC1, key=ec.generate_private_key(ec.SECP521R1())),
    "Ed25519": lambda ca: ca.odd(FUNC1, key=ed25519.Ed25519PrivateKey.generate()),
    "Ed448": lambda ca: ca.odd(FUNC1, key=ed448.Ed448PrivateKey.generate()),
    "an extension unheard of": lambda ca: ca.odd(FUNC1, extra=[UNHEARD_OF]),
    "no purposes, so any": lambda ca: ca.odd(FUNC1, purposes=()),
    "100 names, the last one counts": lambda ca: ca.odd([*(x509.DNSName(f"f{n}.demo") for n in range(2, 101)), *FUNC1]),
    "other kinds of names beside": lambda ca: ca.odd(
        san_der(dns=[b"func1.demo"], emails=[b"a@b"], raw=der(0x87, b"\x7f\0\0\1") + der(0x88, b"\x2a\x03"))
    ),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
async def test_a_strange_one_that_is_right_is_let_in(site: Site, make: Make) -> None:
    """TESTPLAN 4: under the one name that counts."""
    site.add("odd", make(site.ca))
    async with site.relay() as relay:
        assert await waits_as(await come(site, relay)) == "dns:func1.demo"


def never_ends(parts: list[bytes]) -> None:
    begin, _ = elements(content(parts[4]))
    parts[4] = der(0x30, begin + der(0x18, b"99991231235959Z"))


def negative_serial(parts: list[bytes]) -> None:
    parts[1] = der(0x02, b"\x81")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("edit", [never_ends, negative_serial])
async def test_what_no_authority_should_sign_and_some_do(site: Site, edit: Edit) -> None:
    add_reworked(site, edit)
    async with site.relay() as relay:
        assert await waits_as(await come(site, relay)) == "dns:func1.demo"


async def test_an_authority_that_two_have_signed(tmp_path: Path) -> None:
    """Cross-signed: the party shows both certificates of its authority; only one leads to a CA that is known here.

    OpenSSL follows the first one that fits and does not try the other. If the operator's bundle holds the authority
    itself, OpenSSL finds that first, and the order does not matter.
    """
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    key = ec.generate_private_key(ec.SECP256R1())
    ours = site.ca.intermediate("cross CA", key=key)
    theirs = TestAuthority.root_for_intermediates("unknown root").intermediate("cross CA", key=key)
    leaf = ours.odd(FUNC1)
    ways = [one.authority.certificate for one in (ours, theirs)]
    for name, ups in {"home first": ways, "home last": ways[::-1], "not home": ways[1:]}.items():
        site.add(name, Credential(name, leaf.certificate, leaf.private_key, (leaf.certificate, *ups)))
    async with site.relay() as relay:
        assert await waits_as(await come(site, relay, "home first")) == "dns:func1.demo"
        for name in ("home last", "not home"):
            assert await (await site.connect(relay, context=lenient(site, name))).alert() == "TLSV1_ALERT_UNKNOWN_CA"
        site.ca_path.write_bytes(site.ca.cert_pem + certificates_pem(ways[:1]))
        await relay.relay.reload()
        for name in ("home first", "home last", "not home"):
            assert await waits_as(await come(site, relay, name)) == "dns:func1.demo"


# --- refused by OpenSSL, as it is set ---------------------------------------------------------------------------------


def as_a_leaf(authority: TestAuthority) -> Credential:
    """The certificate of the authority itself."""
    own = authority.authority
    return Credential("ca itself", own.certificate, own.private_key, (own.certificate,))


def below_one_that_may_have_none(ca: TestAuthority) -> Credential:
    return ca.intermediate("pathlen 0", path_length=0).intermediate("one too many").odd(FUNC1)


REFUSED: Final[dict[str, tuple[Make, str]]] = {
    "RSA 1024": (
        lambda ca: ca.odd(FUNC1, key=rsa.generate_private_key(65537, 1024)),
        "EE certificate key too weak",
    ),
    "a critical extension unheard of": (
        lambda ca: ca.odd(FUNC1, critical=[UNHEARD_OF]),
        "unhandled critical extension",
    ),
    "an authority as a leaf": (lambda ca: ca.odd(FUNC1, ca=True), "unsuitable certificate purpose"),
    "the trusted CA itself as a leaf": (as_a_leaf, "unsuitable certificate purpose"),
    "path length": (below_one_that_may_have_none, "path length constraint exceeded"),
    "any purpose, which is not this one": (
        lambda ca: ca.odd(FUNC1, purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
        "unsuitable certificate purpose",
    ),
    "for e-mail": (
        lambda ca: ca.odd(FUNC1, purposes=[ExtendedKeyUsageOID.EMAIL_PROTECTION]),
        "unsuitable certificate purpose",
    ),
    "signed by a leaf": (
        lambda ca: TestAuthority(
            authority=Authority((leaf := ca.odd(FUNC1)).certificate, leaf.private_key, (ca.root,))
        ).odd(FUNC1),
        "invalid CA certificate",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_one_fault_is_enough(tmp_path: Path, kind: str) -> None:
    """TESTPLAN 1, 11: the log names the fault."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    make, reason = REFUSED[kind]
    site.add("odd", make(site.ca))
    async with site.relay() as relay:
        party = await site.connect(relay, context=lenient(site))
        await party.alert()
        refused = await relay.log("refused")
        assert refused["reason"].startswith(reason)
        assert refused["code"] == "not-authorised"
        party.close()
        await eventually(lambda: relay.legs == 0, "nothing is held")
        assert relay.waiting() == (0, 0)


def by_sha1(parts: list[bytes]) -> None:
    parts[2] = der(0x30, bytes.fromhex("06072a8648ce3d0401"))


def ends_in_another_time_zone(parts: list[bytes]) -> None:
    begin, _ = elements(content(parts[4]))
    parts[4] = der(0x30, begin + der(0x17, b"491231235959+0000"))


@pytest.mark.parametrize(
    ("edit", "digest", "reason"),
    [
        (by_sha1, hashes.SHA1(), "CA signature digest algorithm too weak"),
        (ends_in_another_time_zone, None, "format error in the certificate's notAfter"),
    ],
    ids=["SHA-1", "time zone"],
)
async def test_one_fault_under_the_signature(
    site: Site, edit: Edit, digest: hashes.HashAlgorithm | None, reason: str
) -> None:
    """TESTPLAN 1."""
    add_reworked(site, edit, digest)
    async with site.relay() as relay:
        party = await site.connect(relay, context=lenient(site))
        await party.alert()
        assert (await relay.log("refused", code="not-authorised"))["reason"].startswith(reason)


def two_sans(parts: list[bytes]) -> None:
    second = der(0x30, bytes.fromhex("0603551d11") + der(0x04, san_der(dns=[b"func1.demo"])))
    parts[7] = der(0xA3, der(0x30, content(content(parts[7])) + second))


def one_purpose_twice(parts: list[bytes]) -> None:
    extensions = content(content(parts[7]))
    [purposes] = [one for one in elements(extensions) if b"\x55\x1d\x25" in one]
    parts[7] = der(0xA3, der(0x30, extensions + purposes))


@pytest.mark.parametrize("edit", [two_sans, one_purpose_twice])
def test_an_extension_that_stands_twice(site: Site, edit: Edit) -> None:
    """TESTPLAN 3: no OpenSSL client shows such a certificate, so the test calls the relay's own verification."""
    config = load(site.write())
    assert config.tls is not None
    trust = load_outer_tls(config.tls, source=config.path)
    credential = site.ca.odd(FUNC1)
    assert trust.verify(Judged(site.ca.rework(credential, lambda parts: None), (), 0.0)) is None
    assert trust.verify(Judged(site.ca.rework(credential, edit), (), 0.0)) is not None


# --- verified, and in no route ----------------------------------------------------------------------------------------


def version_65(parts: list[bytes]) -> None:
    parts[0] = der(0xA0, der(0x02, b"\x40"))


def from_year_0(parts: list[bytes]) -> None:
    _, end = elements(content(parts[4]))
    parts[4] = der(0x30, der(0x18, b"00000101000000Z") + end)


def without_extensions(parts: list[bytes]) -> None:
    parts.pop()


@pytest.mark.parametrize("edit", [version_65, from_year_0, without_extensions])
async def test_what_only_openssl_can_read_is_nobody(site: Site, edit: Edit) -> None:
    """TESTPLAN 9: a trusted authority has signed it, but none of its names can be trusted."""
    add_reworked(site, edit)
    async with site.relay() as relay:
        await is_nobody(site, relay)
        assert "func1" not in (await relay.log("refused", code="not-authorised"))["certificate"]


NAMELESS: Final[dict[str, bytes]] = {
    "an empty SAN": san_der(),
    "the address that it comes from": san_der(raw=der(0x87, b"\x7f\0\0\1")),
    "the address as a name": san_der(dns=[b"127.0.0.1"], uris=[b"127.0.0.1"]),
    "an e-mail address": san_der(emails=[b"func1.demo", b"func1@func1.demo"]),
    "a registered ID": san_der(raw=der(0x88, b"\x2a\x03")),
    "an otherName": san_der(raw=der(0xA0, bytes.fromhex("06032a0304") + der(0xA0, der(0x0C, b"func1.demo")))),
    "a directory name": san_der(
        raw=der(0xA4, der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403") + der(0x0C, b"func1.demo")))))
    ),
}


@pytest.mark.parametrize("san", NAMELESS.values(), ids=NAMELESS)
async def test_what_is_no_identity_is_nobodys(site: Site, san: bytes) -> None:
    """TESTPLAN 4: even if the common name has the same text."""
    site.add("odd", site.ca.odd(san, common_name="func1.demo"))
    async with site.relay() as relay:
        await is_nobody(site, relay)


async def test_a_uri_is_what_it_is_octet_by_octet(site: Site) -> None:
    """TESTPLAN 5: nothing is normalised, for an exact selector or a wildcard."""
    right = site.add("right", site.ca.odd(san_der(uris=[b"https://acme/other", b"https://acme/jobs/func1"])))
    assert right.name
    for selector in ("uri:https://acme/jobs/func1", "uri:https://acme/jobs/*"):
        async with site.relay(route(selector)) as relay:
            for uri in ODD_URIS.values():
                site.add("odd", site.ca.odd(san_der(uris=[uri.encode()])))
                await is_nobody(site, relay)
            # If there are several URIs and no SPIFFE ID, each of them counts.
            assert await waits_as(await come(site, relay, "right")) == "uri:https://acme/jobs/func1"


async def test_an_international_name_is_its_a_label(site: Site) -> None:
    """TESTPLAN 3: no other spelling counts, and nothing that looks like it."""
    async with site.relay(route("dns:xn--mnchen-3ya.demo")) as relay:
        for text in ("m\u00fcnchen.demo", "munchen.demo", "xn--mnchen-3y.demo", "xn--mnchen-3yb.demo", "xn--.demo"):
            site.add("odd", site.ca.odd(san_der(dns=[text.encode()])))
            await is_nobody(site, relay)
        site.add("odd", site.ca.odd(san_der(dns=[b"XN--Mnchen-3YA.demo"])))
        assert await waits_as(await come(site, relay)) == "dns:xn--mnchen-3ya.demo"


# --- very large -------------------------------------------------------------------------------------------------------


async def test_sixty_kilobytes_of_names_are_kept_once(site: Site) -> None:
    """A certificate of 60 KiB is let in, kept once for all that show it, and its line in the log stays bounded."""
    # The most names that are allowed, each nearly of the greatest length.
    long = ".".join(["x" * 60] * 3)
    odd = site.add("odd", site.ca.odd([*(x509.DNSName(f"f{n}.{long}.demo") for n in range(255)), *FUNC1]))
    assert len(odd.cert_pem) > 60_000
    async with site.relay() as relay:
        for _ in range(5):
            assert await waits_as(await come(site, relay)) == "dns:func1.demo"
        await eventually(lambda: relay.waiting() == (5, 0), "all of them wait")
        places = list(relay.relay.routes["demo"].lobby.waiting("func1"))
        assert len({id(place.leg.credential) for place in places}) == 1
        assert all(len(str(event)) < 5000 for event in relay.events)


@pytest.mark.parametrize(("kilobytes", "is_admitted"), [(60, True), (150, False)])
async def test_a_long_tail_of_certificates_is_bounded(site: Site, kilobytes: int, is_admitted: bool) -> None:
    """What a stranger may send is bounded, and superfluous certificates of a function are not kept."""
    one = site.ca.party(dns=["func1.demo"])
    filler = site.ca.odd(san_der(dns=[b"x" * 60 + b".demo"] * 80)).certificate
    size = len(filler.public_bytes(serialization.Encoding.DER))
    tail = (filler,) * (kilobytes * 1024 // size)
    site.add("odd", Credential("tail", one.certificate, one.private_key, (one.certificate, *tail)))
    async with site.relay() as relay:
        if is_admitted:
            assert await waits_as(await come(site, relay)) == "dns:func1.demo"
            await eventually(lambda: relay.waiting() == (1, 0), "it waits")
            [place] = relay.relay.routes["demo"].lobby.waiting("func1")
            assert place.leg.credential is not None
            assert place.leg.credential.intermediates == ()
            return
        party = await site.connect(relay, context=lenient(site))
        await party.alert()
        refused = await relay.log("refused", code="protocol-error")
        assert "excessive message size" in refused["reason"]
        party.close()
        await eventually(lambda: relay.legs == 0, "nothing is held")


# --- lists of another kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extension",
    [
        x509.DeltaCRLIndicator(1),
        x509.IssuingDistributionPoint(
            full_name=None,
            relative_name=None,
            only_contains_user_certs=False,
            only_contains_ca_certs=True,
            only_some_reasons=None,
            indirect_crl=False,
            only_contains_attribute_certs=False,
        ),
        UNHEARD_OF,
    ],
    ids=["changes only", "authorities only", "a critical extension unheard of"],
)
async def test_a_list_that_is_not_about_parties_lets_no_party_in(site: Site, extension: x509.ExtensionType) -> None:
    """TESTPLAN 12: a list that does not cover a party does not count as a list for it."""
    site.ca.write_crl(site.directory, site.ca.crl(critical=[extension]))
    async with site.relay(crl=True) as relay:
        party = await site.connect(relay, "func1")
        await party.alert()
        await relay.log("refused", code="not-authorised")
        assert relay.waiting() == (0, 0)
