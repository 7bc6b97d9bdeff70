"""Which names of a certificate are identities that may match, and which never are."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frelay.protocol.identity import (
    Kind,
    Name,
    OddName,
    alternative_name_count,
    match,
    parse_selector,
    spki_of_certificate,
)
from frelay.tls.identity import MOST_NAMES, PeerIdentity, describe_unverified, distinguished_name, identities
from support.certs import Credential, TestAuthority
from support.der import der, san_der
from support.odd_names import ODD_DNS, ODD_SPIFFE, SPIFFE_ID

FUNC1 = [parse_selector("dns:func1.demo")]
JOB1 = [parse_selector(f"uri:{SPIFFE_ID}")]


@pytest.fixture(scope="module")
def ca() -> TestAuthority:
    return TestAuthority()


def pin(credential: Credential) -> Name:
    return spki_of_certificate(credential.certificate.public_bytes(Encoding.DER))


def self_signed_as(name: x509.Name) -> x509.Certificate:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


def named(identity: PeerIdentity) -> list[Name]:
    """The names other than the key pin, which every readable certificate has."""
    return [name for name in identity.names if name.kind is not Kind.SPKI]


# --- what counts ------------------------------------------------------------------------------------------------


def test_names_are_uris_then_dns_names_then_the_pin(ca: TestAuthority) -> None:
    one = ca.party(dns=["b.demo", "a.demo"], uris=["https://acme/2", "https://acme/1"])
    assert identities(one.certificate).names == (
        Name(Kind.URI, "https://acme/2"),
        Name(Kind.URI, "https://acme/1"),
        Name(Kind.DNS, "b.demo"),
        Name(Kind.DNS, "a.demo"),
        pin(one),
    )


def test_dns_names_fold_case_and_count_once(ca: TestAuthority) -> None:
    one = ca.odd(san_der(dns=[b"FUNC1.demo", b"func1.DEMO"]))
    assert named(identities(one.certificate)) == [Name(Kind.DNS, "func1.demo")]


def test_the_pin_alone_is_an_identity(ca: TestAuthority) -> None:
    one = ca.party()
    identity = identities(one.certificate)
    assert identity.names == (pin(one),)
    assert match([parse_selector(str(pin(one)))], identity.names) == pin(one)
    assert match([parse_selector(str(pin(ca.party())))], identity.names) is None


def test_the_other_facts_of_the_certificate(ca: TestAuthority) -> None:
    begin, end = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC), datetime(2051, 1, 2, 3, 4, 5, tzinfo=UTC)
    one = ca.odd([x509.DNSName("func1.demo")], common_name="func, one", not_before=begin, not_after=end)
    identity = identities(one.certificate)
    assert (identity.not_before, identity.not_after) == (begin.timestamp(), end.timestamp())
    assert identity.serial == one.certificate.serial_number
    assert (identity.subject, identity.issuer) == ("CN=func\\, one", "CN=test CA")
    assert identity.ignored == ()


# --- what never counts ------------------------------------------------------------------------------------------


def test_the_common_name_is_never_an_identity(ca: TestAuthority) -> None:
    """TESTPLAN 2."""
    identity = identities(ca.cn_only("func1.demo").certificate)
    assert match(FUNC1, identity.names) is None
    assert named(identity) == []
    assert "common name" in identity.ignored[0]


@pytest.mark.parametrize("octets", ODD_DNS.values(), ids=ODD_DNS)
def test_a_dns_name_that_only_looks_like_it_never_matches(ca: TestAuthority, octets: bytes) -> None:
    """TESTPLAN 3."""
    identity = identities(ca.odd(san_der(dns=[octets])).certificate)
    assert match(FUNC1, identity.names) is None


@pytest.mark.parametrize("what", sorted(ODD_DNS.keys() - {"prefix", "suffix", "label before", "A-label"}))
def test_an_odd_dns_name_is_no_name_and_says_so(ca: TestAuthority, what: str) -> None:
    """TESTPLAN 3: a name that could be read in two ways fits no selector, with or without a wildcard."""
    identity = identities(ca.odd(san_der(dns=[ODD_DNS[what]])).certificate)
    assert named(identity) == []
    (why,) = identity.ignored
    assert re.match(r"(DNS name \S+|all names,|DNS name of) .*\w+ \w+", why)


def test_an_odd_dns_name_falls_alone(ca: TestAuthority) -> None:
    one = ca.odd(san_der(dns=[b"f1\0.evil", b"func1.demo", b"*.demo"], uris=[SPIFFE_ID.encode()]))
    identity = identities(one.certificate)
    assert named(identity) == [Name(Kind.URI, SPIFFE_ID), Name(Kind.DNS, "func1.demo")]
    assert len(identity.ignored) == 2


@pytest.mark.parametrize("uris", ODD_SPIFFE.values(), ids=ODD_SPIFFE)
def test_a_spiffe_id_that_only_looks_like_it_never_matches(ca: TestAuthority, uris: tuple[str, ...]) -> None:
    """TESTPLAN 5."""
    identity = identities(ca.odd(san_der(uris=[uri.encode() for uri in uris])).certificate)
    assert match(JOB1, identity.names) is None


@pytest.mark.parametrize(
    "what",
    sorted(
        # These are valid names, but of another function.
        ODD_SPIFFE.keys() - {"wrong trust domain", "trust domain as prefix", "another scheme", "case of the path"}
    ),
)
def test_an_odd_uri_takes_all_uris_with_it_and_nothing_else(ca: TestAuthority, what: str) -> None:
    """TESTPLAN 5: no selector fits, with or without a wildcard; the DNS name beside it still counts."""
    one = ca.odd(san_der(uris=[uri.encode() for uri in ODD_SPIFFE[what]], dns=[b"func1.demo"]))
    identity = identities(one.certificate)
    assert named(identity) == [Name(Kind.DNS, "func1.demo")]
    (why,) = identity.ignored
    assert re.match(r"(all URIs: )?(\d+ )?(URIs?|SPIFFE ID) \S.* \w+", why)


def test_a_good_uri_falls_with_an_odd_one(ca: TestAuthority) -> None:
    one = ca.odd(san_der(uris=[b"https://acme/good", b"https://acme/a b"]))
    identity = identities(one.certificate)
    assert named(identity) == []
    assert identity.ignored[0].startswith("all URIs: ")


def test_the_same_text_in_other_places_never_matches(ca: TestAuthority) -> None:
    """TESTPLAN 4: the text is in e-mail, otherName, directory name, CN and URI; only a DNS name would count."""
    identity = identities(ca.text_elsewhere("func1.demo").certificate)
    assert match(FUNC1, identity.names) is None
    assert named(identity) == []
    assert [sentence.split()[0] for sentence in identity.ignored] == [
        "URI",
        "e-mail",
        "e-mail",
        "otherName",
        "directory",
    ]


def test_a_uri_as_dns_name_or_e_mail_never_matches(ca: TestAuthority) -> None:
    """TESTPLAN 4, for a route with a SPIFFE ID."""
    identity = identities(ca.odd(san_der(dns=[SPIFFE_ID.encode()], emails=[SPIFFE_ID.encode()])).certificate)
    assert match(JOB1, identity.names) is None
    assert named(identity) == []


def test_an_ip_address_never_matches(ca: TestAuthority) -> None:
    """Neither the IP SAN nor a DNS name that is written like one: verifiers disagree on what the latter means."""
    identity = identities(ca.odd(san_der(dns=[b"10.0.0.1"], raw=der(0x87, b"\x0a\0\0\1"))).certificate)
    assert named(identity) == []
    assert len(identity.ignored) == 2


def test_an_authority_is_no_spiffe_function(ca: TestAuthority) -> None:
    """X509-SVID 5.2: a certificate that may sign others is no leaf, even with a SPIFFE ID."""
    uri = san_der(uris=[SPIFFE_ID.encode()])
    assert match(JOB1, identities(ca.odd(uri).certificate).names) is not None
    assert match(JOB1, identities(ca.odd(uri, ca=True).certificate).names) is None


@pytest.mark.parametrize("usage", ["key_cert_sign", "crl_sign"])
def test_who_may_sign_certificates_or_lists_is_no_spiffe_function(ca: TestAuthority, usage: str) -> None:
    """X509-SVID 5.2: either of the two is enough, with or without the cA flag."""
    uri = san_der(uris=[SPIFFE_ID.encode()])
    identity = identities(ca.odd(uri, usages=[usage]).certificate)
    assert match(JOB1, identity.names) is None
    assert identity.ignored == ("a SPIFFE ID in the certificate of an authority names no function",)


# --- certificates that cannot be read ---------------------------------------------------------------------------


UNREADABLE: dict[str, bytes] = {
    "latin-1": san_der(dns=[b"func1.demo", b"f\xfcnc1.demo"]),
    "no bytes": b"",
    "garbage": b"\0\1\2",
    "trailing byte": san_der(dns=[b"func1.demo"]) + b"\0",
    "cut short": san_der(dns=[b"func1.demo"])[:-1],
    "unknown tag": san_der(dns=[b"func1.demo"], raw=der(0x89, b"x")),
    "IP address of three octets": san_der(dns=[b"func1.demo"], raw=der(0x87, b"abc")),
    "broken otherName": san_der(dns=[b"func1.demo"], raw=der(0xA0, b"abc")),
    "x400Address": san_der(dns=[b"func1.demo"], raw=der(0xA3, b"")),
    "ediPartyName": san_der(dns=[b"func1.demo"], raw=der(0xA5, b"")),
}


@pytest.mark.parametrize("san", UNREADABLE.values(), ids=UNREADABLE)
def test_a_certificate_that_cannot_be_parsed_is_nobody(ca: TestAuthority, san: bytes) -> None:
    """TESTPLAN 3, 9: not even its key pin counts, and nothing is raised."""
    identity = identities(ca.odd(san).certificate)
    assert identity.names == ()
    assert "cannot be parsed" in identity.ignored[0]
    assert identity.subject == "CN=odd"


def test_a_second_san_extension_makes_it_nobody(ca: TestAuthority) -> None:
    """RFC 5280 forbids two such extensions, and nobody can say which one was meant."""
    other = x509.ObjectIdentifier("2.5.29.99")
    one = ca.odd(san_der(dns=[b"func1.demo"]), extra=[x509.UnrecognizedExtension(other, san_der(dns=[b"func2.demo"]))])
    octets = one.certificate.public_bytes(Encoding.DER)
    assert octets.count(b"\x06\x03\x55\x1d\x63") == 1
    # Its signature is wrong now, but that is not checked here.
    doubled = x509.load_der_x509_certificate(octets.replace(b"\x06\x03\x55\x1d\x63", b"\x06\x03\x55\x1d\x11"))
    identity = identities(doubled)
    assert identity.names == ()
    assert "DuplicateExtension" in identity.ignored[0]


def test_another_broken_extension_makes_it_nobody(ca: TestAuthority) -> None:
    broken = x509.UnrecognizedExtension(x509.OID_NAME_CONSTRAINTS, b"\0\1")
    identity = identities(ca.odd(san_der(dns=[b"func1.demo"]), extra=[broken]).certificate)
    assert identity.names == ()


def test_a_name_that_cannot_be_parsed_is_told_not_raised() -> None:
    def refuse() -> x509.Name:
        raise ValueError("odd\nbytes")

    assert distinguished_name(refuse) == "(unreadable: ValueError: odd\\nbytes)"


octets = st.one_of(st.binary(max_size=40), st.sampled_from([b"func1.demo", b"f1\0.evil", SPIFFE_ID.encode()]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dns=st.lists(octets, max_size=3), uris=st.lists(octets, max_size=3), rest=octets, whole=st.booleans())
def test_whatever_the_san_holds_nothing_is_raised(
    *, dns: list[bytes], uris: list[bytes], rest: bytes, whole: bool
) -> None:
    """TESTPLAN 9: and each name that is read, used as a selector, matches itself and nothing else."""
    san = rest if whole else san_der(dns=dns, uris=uris, raw=rest)
    identity = identities(AUTHORITY.odd(san).certificate)
    for name in identity.names:
        assert str(parse_selector(str(name))) == str(name)
        assert "*" not in name.value
    line = identity.describe()
    assert line.isprintable()


AUTHORITY = TestAuthority()


# --- for the log ------------------------------------------------------------------------------------------------


def test_describe_tells_subject_names_issuer_and_serial(ca: TestAuthority) -> None:
    one = ca.odd(san_der(dns=[b"func1.demo", b"f1\0.evil"]), common_name="function one")
    assert identities(one.certificate).describe() == (
        "CN=function one; names dns:func1.demo; "
        r"ignored DNS name 'f1\x00.evil' has the label 'f1\x00', which no selector may match; "
        f"issuer CN=test CA; serial {one.certificate.serial_number:x}"
    )


def test_what_is_not_verified_is_described_and_says_so(ca: TestAuthority) -> None:
    one = ca.odd(san_der(dns=[b"func1.demo"]), common_name="function one")
    assert describe_unverified(lambda: one.certificate) == (
        "unverified: CN=function one; names dns:func1.demo; "
        f"issuer CN=test CA; serial {one.certificate.serial_number:x}"
    )


def test_what_is_not_verified_may_be_no_certificate_at_all() -> None:
    def read() -> x509.Certificate:
        return x509.load_der_x509_certificate(b"\x1b[2J")

    assert describe_unverified(read).startswith("unverified: (unreadable: ValueError: ")
    assert describe_unverified(read).isprintable()


def test_a_subject_cannot_forge_a_log_line(ca: TestAuthority) -> None:
    """TESTPLAN 54, for certificates: line ends, escape sequences and direction overrides are written as octets."""
    one = ca.odd(None, common_name="a\nlevel=info admitted=yes\x1b[31m\u202e\u2028caf\u00e9")
    identity = identities(one.certificate)
    assert identity.subject == r"CN=a\0alevel=info admitted=yes\1b[31m\e2\80\ae\e2\80\a8café"
    assert identity.describe().isprintable()


def test_describe_stays_short_however_many_names_there_are(ca: TestAuthority) -> None:
    one = ca.odd(san_der(dns=[f"f{i}.{'x' * 60}.demo".encode() for i in range(255)], emails=[b"e" * 50_000]))
    identity = identities(one.certificate)
    assert len(named(identity)) == 255
    assert len(identity.describe()) < 2_000
    assert "and 247 more" in identity.describe()


@pytest.mark.parametrize("count", [MOST_NAMES, MOST_NAMES + 1, 3500])
def test_a_certificate_with_more_names_than_that_is_refused_as_a_whole(ca: TestAuthority, count: int) -> None:
    """Names of all kinds count: with 256 all are there, with one more none is, and no pin either."""
    texts = [f"f{number}.demo".encode() for number in range(count - 2)]
    one = ca.odd(san_der(dns=texts, uris=[b"https://acme/f"], emails=[b"f@demo"]))
    identity = identities(one.certificate)
    if count <= MOST_NAMES:
        assert identity.objection is None
        assert len(identity.names) == count  # with the pin, and without the e-mail address
    else:
        assert identity.objection == f"the certificate has {count} names, and at most 256 are allowed"
        assert identity.names == ()
        assert f"ignored all names, because there are {count}" in identity.describe()


def test_a_name_that_is_too_long_to_describe_is_told_by_its_size(ca: TestAuthority) -> None:
    """A subject has no limit of its own, and the log describes the certificate of a stranger at each handshake."""
    for count, is_shown in ((60, True), (200, False)):
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, f"{i:040}") for i in range(count)])
        size = len(name.public_bytes())
        identity = identities(self_signed_as(name))
        expected = name.rfc4514_string() if is_shown else f"(a name of {size} bytes)"
        assert (identity.subject, identity.issuer) == (expected, expected)


@given(
    dns=st.lists(st.just(b"a.demo"), max_size=3),
    uris=st.lists(st.just(b"https://acme/f"), max_size=3),
    is_critical=st.booleans(),
    more=st.lists(st.sampled_from([b"\x83\x00", b"\x87\x04\x01\x02\x03\x04", b"\x88\x01\x2a"]), max_size=3),
)
@settings(deadline=None, max_examples=40)
def test_names_are_counted_without_decoding_them(
    ca: TestAuthority, dns: list[bytes], uris: list[bytes], is_critical: bool, more: list[bytes]
) -> None:
    """Names of any kind, with other extensions beside them; and a certificate that is cut short does no harm."""
    san = san_der(dns=dns, uris=uris, raw=b"".join(more))
    if is_critical:
        one = ca.odd(None, critical=[x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), san)])
    else:
        one = ca.odd(san)
    certificate = one.certificate.public_bytes(Encoding.DER)
    assert alternative_name_count(certificate) == len(dns) + len(uris) + len(more)
    assert alternative_name_count(ca.cn_only("func1.demo").certificate.public_bytes(Encoding.DER)) == 0
    for length in range(0, len(certificate), 7):
        with suppress(OddName):
            alternative_name_count(certificate[:length])
