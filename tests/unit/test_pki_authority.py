"""An authority issues what OpenSSL accepts in its strictest mode, and no name that no selector could match."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.errors import CertificateError
from frelay.pki.authority import Authority
from frelay.pki.files import crl_number
from frelay.tls.identity import identities
from support.certs import TestAuthority
from support.odd_names import ODD_DNS, ODD_SPIFFE, SPIFFE_ID

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension[Any]:
    return certificate.extensions.get_extension_for_class(kind)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("frelay CA")


# --- the profile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "purposes"),
    [
        ("relay", {ExtendedKeyUsageOID.SERVER_AUTH}),
        ("party", {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}),
    ],
)
def test_a_leaf_may_do_its_work_and_nothing_more(authority: Authority, usage: Any, purposes: set[Any]) -> None:
    leaf = authority.issue(common_name="x", dns=["x.demo"], usage=usage).certificate
    assert set(extension(leaf, x509.ExtendedKeyUsage).value) == purposes
    constraints = extension(leaf, x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    key_usage = extension(leaf, x509.KeyUsage)
    assert key_usage.critical
    assert key_usage.value.digital_signature
    assert not any(
        [
            key_usage.value.content_commitment,
            key_usage.value.key_encipherment,
            key_usage.value.data_encipherment,
            key_usage.value.key_agreement,
            key_usage.value.key_cert_sign,
            key_usage.value.crl_sign,
        ]
    )
    own = extension(authority.certificate, x509.SubjectKeyIdentifier).value
    assert extension(leaf, x509.AuthorityKeyIdentifier).value.key_identifier == own.digest
    leaf.verify_directly_issued_by(authority.certificate)


def test_the_authority_signs_leaves_and_no_authorities(authority: Authority) -> None:
    constraints = extension(authority.certificate, x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    key_usage = extension(authority.certificate, x509.KeyUsage)
    assert (key_usage.critical, key_usage.value.key_cert_sign, key_usage.value.crl_sign) == (True, True, True)
    assert not key_usage.value.digital_signature


def test_times_begin_before_now_for_machines_with_a_slow_clock(authority: Authority) -> None:
    now = datetime.now(UTC)
    leaf = authority.issue(common_name="x", usage="party", days=10).certificate
    crl = authority.revocation_list(number=1, days=10)
    for begin in (authority.certificate.not_valid_before_utc, leaf.not_valid_before_utc, crl.last_update_utc):
        assert timedelta(minutes=4) < now - begin < timedelta(minutes=15)
    for end in (leaf.not_valid_after_utc, crl.next_update_utc):
        assert end is not None
        assert abs(end - now - timedelta(days=10)) < timedelta(minutes=10)


def test_serial_numbers_do_not_repeat(authority: Authority) -> None:
    serials = {authority.issue(common_name="x", usage="party").certificate.serial_number for _ in range(50)}
    assert len(serials) == 50
    assert min(serials) > 1 << 64


def test_names_are_issued_as_the_relay_will_read_them(authority: Authority) -> None:
    issued = authority.issue(
        common_name="x", dns=["FUNC1.demo", "func1.demo"], uris=[SPIFFE_ID], ips=["::1", "127.0.0.1"], usage="party"
    )
    assert [str(name) for name in identities(issued.certificate).names[:-1]] == [f"uri:{SPIFFE_ID}", "dns:func1.demo"]
    san = extension(issued.certificate, x509.SubjectAlternativeName).value
    assert [str(one) for one in san.get_values_for_type(x509.IPAddress)] == ["::1", "127.0.0.1"]


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_both_algorithms_sign_and_are_signed(algorithm: Any) -> None:
    authority = Authority.create("x", algorithm=algorithm)
    issued = authority.issue(common_name="y", usage="party", algorithm=algorithm)
    kind = {"p256": ec.EllipticCurvePrivateKey, "ed25519": ed25519.Ed25519PrivateKey}[algorithm]
    assert isinstance(issued.private_key, kind)
    assert issued.private_key.public_key() == issued.certificate.public_key()
    issued.certificate.verify_directly_issued_by(authority.certificate)
    assert authority.revocation_list(number=1, days=1).is_signature_valid(authority.private_key.public_key())


@needs_openssl
@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_openssl_takes_them_at_its_strictest(tmp_path: Path, algorithm: Any) -> None:
    authority = Authority.create("x", algorithm=algorithm)
    authority.write(tmp_path / "ca.pem", tmp_path / "ca.key")
    for usage in ("relay", "party"):
        issued = authority.issue(common_name=usage, dns=["x.demo"], usage=usage, algorithm=algorithm)
        issued.write(tmp_path / f"{usage}.pem", tmp_path / f"{usage}.key")

    def verify(purpose: str, name: str) -> int:
        return subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", f"{name}.pem"],
            cwd=tmp_path,
            capture_output=True,
        ).returncode

    assert [verify("sslserver", "relay"), verify("sslserver", "party"), verify("sslclient", "party")] == [0, 0, 0]
    assert verify("sslclient", "relay") != 0


def test_private_keys_are_not_in_the_repr(authority: Authority) -> None:
    issued = authority.issue(common_name="x", usage="party")
    assert "private" not in repr(issued).lower()
    assert "private" not in repr(authority).lower()


# --- what is refused --------------------------------------------------------------------------------------------


# "A-label", "prefix" and so on are valid names, but not those of func1.
@pytest.mark.parametrize("what", sorted(ODD_DNS.keys() - {"prefix", "suffix", "label before", "A-label", "latin-1"}))
def test_no_dns_name_is_issued_that_the_relay_would_ignore(authority: Authority, what: str) -> None:
    with pytest.raises(CertificateError, match="choose another name"):
        authority.issue(common_name="x", dns=[ODD_DNS[what].decode()], usage="party")


@pytest.mark.parametrize(
    "what",
    sorted(ODD_SPIFFE.keys() - {"wrong trust domain", "trust domain as prefix", "another scheme", "case of the path"}),
)
def test_no_uri_is_issued_that_the_relay_would_ignore(authority: Authority, what: str) -> None:
    with pytest.raises(CertificateError, match="choose another name"):
        authority.issue(common_name="x", uris=ODD_SPIFFE[what], usage="party")


def test_only_a_relay_may_have_a_leading_wildcard(authority: Authority) -> None:
    relay = authority.issue(common_name="x", dns=["*.relay.demo"], usage="relay").certificate
    san = extension(relay, x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == ["*.relay.demo"]
    for name in ("*", "*.", "*.*.demo", "relay.*.demo", "r*.demo"):
        with pytest.raises(CertificateError, match="choose another name"):
            authority.issue(common_name="x", dns=[name], usage="relay")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"usage": "relay"}, "a relay needs a DNS name or an IP address"),
        ({"usage": "server"}, "'server' is not a usage; use one of relay, party"),
        ({"ips": ["127.0.0.256"]}, "'127.0.0.256' does not appear to be .*write an address such as"),
        ({"algorithm": "rsa"}, "'rsa' is not a known key algorithm; use one of p256, ed25519"),
        ({"common_name": ""}, "common name '': 1 to 64 printable"),
        ({"common_name": "x" * 65}, "1 to 64 printable"),
        ({"common_name": "a\nb"}, "1 to 64 printable"),
        ({"days": 0}, "cannot be valid for 0 days"),
        ({"days": -1}, "cannot be valid for -1 days"),
        ({"days": 10**9}, "1000000000 days"),
        ({"days": 10**12}, "1000000000000 days would end after the year 9999"),
        ({"days": 3651}, r"3651 days are longer than the authority is valid \(until .*ask for 36(49|50) at most"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_remedy(
    authority: Authority, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(CertificateError, match=text):
        authority.issue(**{"common_name": "x", "usage": "party", **arguments})


def test_the_default_life_ends_with_the_authority_at_the_latest() -> None:
    assert Authority.create("x").issue(common_name="y", usage="party").certificate.not_valid_after_utc < (
        datetime.now(UTC) + timedelta(days=826)
    )
    short = Authority.create("x", days=30)
    assert (
        short.issue(common_name="y", usage="party").certificate.not_valid_after_utc
        == short.certificate.not_valid_after_utc
    )


def test_an_authority_that_ended_signs_nothing() -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    ended = TestAuthority.root_for_intermediates().odd(
        None, ca=True, common_name="ended", not_before=past - timedelta(days=1), not_after=past
    )
    authority = Authority(ended.certificate, ended.private_key)
    with pytest.raises(CertificateError, match="the authority CN=ended expired on"):
        authority.issue(common_name="x", usage="party")
    with pytest.raises(CertificateError, match="the authority CN=ended has expired"):
        authority.revocation_list(number=1, days=1)


# --- on disk ----------------------------------------------------------------------------------------------------


def test_what_is_written_can_be_loaded_and_goes_on_signing(tmp_path: Path) -> None:
    made = Authority.create("x")
    made.write(tmp_path / "ca.pem", tmp_path / "ca.key")
    loaded = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    assert loaded.certificate == made.certificate
    assert loaded.fingerprint == made.fingerprint
    loaded.issue(common_name="y", usage="party").certificate.verify_directly_issued_by(made.certificate)
    with pytest.raises(CertificateError, match="already there"):
        made.write(tmp_path / "ca.pem", tmp_path / "ca.key")


def test_below_an_intermediate_the_chain_leads_up_to_the_root_and_leaves_it_out(tmp_path: Path) -> None:
    below = TestAuthority.root_for_intermediates().intermediate("first").intermediate("second").authority
    below.write(tmp_path / "ca.pem", tmp_path / "ca.key")
    loaded = Authority.load(tmp_path / "ca.pem", tmp_path / "ca.key")
    issued = loaded.issue(common_name="leaf", usage="party")
    assert [one.subject.rfc4514_string() for one in issued.chain] == ["CN=leaf", "CN=second", "CN=first"]


def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Authority.create(name).write(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    with pytest.raises(CertificateError, match=r"two.key: is not the key of .*one.pem"):
        Authority.load(tmp_path / "one.pem", tmp_path / "two.key")


def test_a_leaf_is_no_authority(tmp_path: Path) -> None:
    paths = TestAuthority().party(dns=["func1.demo"]).write(tmp_path)
    with pytest.raises(CertificateError, match=r"func1.demo.pem: is not an authority's certificate .*CA:FALSE"):
        Authority.load(*paths)


def test_a_certificate_that_says_nothing_of_it_is_no_authority(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    bare = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    Authority(bare, key).write(tmp_path / "x.pem", tmp_path / "x.key")
    with pytest.raises(CertificateError, match=r"x.pem: is not an authority's certificate"):
        Authority.load(tmp_path / "x.pem", tmp_path / "x.key")


@needs_openssl
def test_an_authority_that_openssl_made_will_do(tmp_path: Path) -> None:
    """``openssl req -x509`` writes no keyUsage, and uses RSA by default."""
    cert, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=x", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    authority = Authority.load(cert, key)
    issued = authority.issue(common_name="y", dns=["func1.demo"], usage="party")
    issued.certificate.verify_directly_issued_by(authority.certificate)
    assert authority.revoke(authority.revocation_list(number=1, days=1), [5], days=1)


# --- revocation -------------------------------------------------------------------------------------------------


def test_the_next_crl_keeps_what_was_revoked_and_is_newer(authority: Authority) -> None:
    long_ago = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    first = authority.revocation_list([(11, long_ago)], number=41, days=5)
    second = authority.revoke(first, [11, 12], days=5)
    third = authority.revoke(second, days=5)
    assert [crl_number(one) for one in (first, second, third)] == [41, 42, 43]
    assert first.last_update_utc < second.last_update_utc < third.last_update_utc <= datetime.now(UTC)
    for crl in (second, third):
        assert {one.serial_number for one in crl} == {11, 12}
        entry = crl.get_revoked_certificate_by_serial_number(11)
        assert entry is not None
        assert entry.revocation_date_utc == long_ago
        assert crl.is_signature_valid(authority.private_key.public_key())


def test_the_next_crl_keeps_the_reasons(authority: Authority) -> None:
    why = x509.CRLReason(x509.ReasonFlags.key_compromise)
    now = datetime.now(UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(7).revocation_date(now).add_extension(why, False)
    foreign = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - timedelta(hours=1))
        .next_update(now + timedelta(hours=1))
        .add_extension(x509.CRLNumber(1), False)
        .add_revoked_certificate(entry.build())
        .sign(authority.private_key, hashes.SHA256())
    )
    (kept,) = authority.revoke(foreign, days=1)
    assert kept.extensions.get_extension_for_class(x509.CRLReason).value == why


def test_a_crl_of_another_authority_is_not_carried_on(authority: Authority) -> None:
    """Not even one with the same name: its serial numbers belong to other certificates."""
    for other in (
        Authority.create("other"),
        Authority.create("frelay CA"),
        Authority.create("frelay CA", algorithm="ed25519"),
    ):
        with pytest.raises(CertificateError, match="a key that is not this authority's"):
            authority.revoke(other.revocation_list(number=1, days=1), days=1)


def test_a_crl_from_the_future_is_not_carried_on(authority: Authority) -> None:
    crl = x509.load_pem_x509_crl(
        TestAuthority(authority=authority).crl(
            last_update=datetime.now(UTC) + timedelta(hours=1), next_update=datetime.now(UTC) + timedelta(days=1)
        )
    )
    with pytest.raises(CertificateError, match="in the future; check this machine's clock"):
        authority.revoke(crl, days=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"number": -1, "days": 1}, "is no CRLNumber: it must not be negative"),
        ({"number": 1, "days": 0}, "cannot be valid for 0 days"),
        ({"number": 1, "days": 1, "revoked": [(0, datetime(2024, 1, 1, tzinfo=UTC))]}, "serial number 0 of 2024"),
        ({"number": 1, "days": 1, "revoked": [(1 << 200, datetime(2024, 1, 1, tzinfo=UTC))]}, "serial number 1000"),
    ],
)
def test_a_crl_that_makes_no_sense_is_refused(authority: Authority, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CertificateError, match=text):
        authority.revocation_list(**arguments)


def test_a_crl_lives_no_longer_than_its_authority() -> None:
    authority = Authority.create("x", days=3)
    assert authority.revocation_list(number=1, days=30).next_update_utc == authority.certificate.not_valid_after_utc
