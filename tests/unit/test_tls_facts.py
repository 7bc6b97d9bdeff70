"""The facts of a PEM file: never a verdict, and never a secret."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from frelay.errors import CertificateError
from frelay.pki.files import key_pem
from frelay.tls.facts import CertificateFacts, CrlFacts, KeyFacts, OtherFacts, certificate_facts, read_facts
from support.certs import TestAuthority
from support.der import san_der

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def ca() -> TestAuthority:
    return TestAuthority()


def test_a_certificate(ca: TestAuthority) -> None:
    party = ca.party(dns=["func1.demo"], uris=["spiffe://acme/jobs/func1"])
    ((facts, certificate),) = read_facts(party.cert_pem)
    assert certificate == party.certificate
    shape = facts.as_json(NOW)
    assert shape["names"][:2] == ["uri:spiffe://acme/jobs/func1", "dns:func1.demo"]
    assert shape["names"][2].startswith("spki:sha256:")
    del shape["names"], shape["not_before"], shape["not_after"]
    assert shape == {
        "kind": "certificate",
        "subject": "CN=func1.demo",
        "ignored": [],
        "issuer": "CN=test CA",
        "serial": f"{party.certificate.serial_number:x}",
        "expired": False,
        "usages": ["clientAuth", "serverAuth"],
        "key_usages": ["digitalSignature"],
        "key": "EC P-256",
        "authority": False,
    }


def test_without_extensions_any_use_is_meant(ca: TestAuthority) -> None:
    facts = certificate_facts(ca.authority.certificate)
    assert facts.usages is None
    assert facts.key_usages == ("keyCertSign", "cRLSign")
    assert facts.authority


def test_claims_are_all_that_it_says_of_its_owner(ca: TestAuthority) -> None:
    facts = certificate_facts(ca.text_elsewhere("func1.demo").certificate)
    assert {(one.where, one.text) for one in facts.claims} == {
        ("common name", "func1.demo"),
        ("e-mail address", "func1.demo"),
        ("e-mail address", "func1.demo@func1.demo"),
        ("otherName", "func1.demo"),
        ("URI", "func1.demo"),
    }


def test_what_cannot_be_parsed_is_no_exception(ca: TestAuthority) -> None:
    facts = certificate_facts(ca.odd(b"\x30\x03\x82\x05x").certificate)
    assert facts.names == ()
    assert "cannot be parsed" in facts.ignored[0]
    assert [one.where for one in facts.claims] == ["common name"]


def test_no_text_moves_a_cursor(ca: TestAuthority) -> None:
    odd = ca.odd(san_der(dns=[b"\x1b[2J.demo"], emails=[b"\x1b[2J"]), common_name="x\x1b[2J")
    facts = certificate_facts(odd.certificate)
    assert "\x1b" not in repr(facts.as_json(NOW).values())


def test_a_list(ca: TestAuthority) -> None:
    bad = ca.party(dns=["func1.demo"])
    ((facts, certificate),) = read_facts(ca.crl(revoked=[bad], number=7))
    assert certificate is None
    assert isinstance(facts, CrlFacts)
    shape = facts.as_json(NOW)
    assert (shape["kind"], shape["issuer"], shape["number"], shape["expired"]) == ("crl", "CN=test CA", 7, False)
    ((entry),) = shape["revoked"]
    assert entry["serial"] == f"{bad.certificate.serial_number:x}"
    assert entry["reason"] is None
    assert facts.as_json(NOW + timedelta(days=400))["expired"] is True


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "EC P-384"),
        (ec.generate_private_key(ec.SECP256K1()), "EC secp256k1"),
        (rsa.generate_private_key(65537, 2048), "RSA 2048"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ed448.Ed448PrivateKey.generate(), "Ed448"),
        (dsa.generate_private_key(1024), "DSA"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_of_a_key_nothing_but_its_kind(key: ec.EllipticCurvePrivateKey, kind: str) -> None:
    assert read_facts(key_pem(key)) == [(KeyFacts("private key", kind), None)]
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert read_facts(public) == [(KeyFacts("public key", kind), None)]


def test_of_an_encrypted_key_not_even_that() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for kind in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        pem = key.private_bytes(Encoding.PEM, kind, BestAvailableEncryption(b"secret"))
        ((facts, _),) = read_facts(pem)
        assert facts.as_json(NOW) == {"kind": "private key", "key": None, "encrypted": True}


def test_a_file_of_several(ca: TestAuthority) -> None:
    party = ca.party(dns=["func1.demo"])
    other = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    found = read_facts(other + party.key_pem + b"text between\n" + party.cert_pem + ca.cert_pem + ca.crl())
    assert [type(facts) for facts, _ in found] == [
        *(OtherFacts, KeyFacts, CertificateFacts, CertificateFacts, CrlFacts)
    ]


def test_der_is_read_too(ca: TestAuthority) -> None:
    ((facts, _),) = read_facts(ca.authority.certificate.public_bytes(Encoding.DER))
    assert isinstance(facts, CertificateFacts)
    ((facts, _),) = read_facts(x509.load_pem_x509_crl(ca.crl()).public_bytes(Encoding.DER))
    assert isinstance(facts, CrlFacts)


@pytest.mark.parametrize("label", ["CERTIFICATE", "X509 CRL", "PRIVATE KEY", "PUBLIC KEY"])
def test_what_cannot_be_read_is_told(label: str) -> None:
    with pytest.raises(CertificateError, match=f"holds a {label} that cannot be read"):
        read_facts(f"-----BEGIN {label}-----\nc2VjcmV0\n-----END {label}-----\n".encode())


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"-----BEGIN CERTIFICATE-----\nAAAA"])
def test_a_file_of_something_else_is_told(content: bytes) -> None:
    with pytest.raises(CertificateError, match="holds neither PEM nor"):
        read_facts(content)
