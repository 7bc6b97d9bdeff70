"""Real handshakes with the bad certificates of ``certs``: each is refused for the one fault that it has.

The relay's own policy is tested where it is built; here it is shown that every bad certificate is right in all but
one thing, so that a test which uses it tests what it says.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from support.certs import Credential, TestAuthority, self_signed
from support.odd_names import SPIFFE_ID

FUNC1 = ["func1.demo"]

# X509_V_ERR_* of x509_vfy.h: the numbers are stable, the texts of OpenSSL are not.
VERDICTS = {
    9: "not yet valid",
    10: "expired",
    12: "CRL expired",
    18: "self-signed",
    20: "unknown issuer",
    23: "revoked",
    25: "path too long",
    26: "wrong purpose",
    47: "not permitted",
    48: "excluded",
}


@dataclass
class Setting:
    """An authority, a relay's certificate from it, and the directory with all of them."""

    ca: TestAuthority
    directory: Path

    def verdict(self, party: Credential, *, crl: bytes | None = None, trust: TestAuthority | None = None) -> str:
        """Connect with ``party`` to a TLS 1.3 server; returns 'admitted', or the reason why OpenSSL refused it."""
        authority = trust or self.ca
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.minimum_version = ssl.TLSVersion.TLSv1_3
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(authority.write(self.directory))
        server.load_cert_chain(*self.ca.relay().write(self.directory))
        if crl is not None:
            server.load_verify_locations(authority.write_crl(self.directory, crl))
            server.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.load_verify_locations(self.ca.write(self.directory, "relay-ca"))
        client.load_cert_chain(*party.write(self.directory))
        return handshake(server, client, "relay.test")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    relay = server.wrap_bio(upward, downward, server_side=True)
    party = client.wrap_bio(downward, upward, server_hostname=name)
    for _ in range(10):
        for side in (party, relay):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return VERDICTS[error.verify_code]
        if relay.version() and relay.getpeercert(binary_form=True):
            return "admitted"
    raise AssertionError("the handshake went round in circles")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(TestAuthority(), tmp_path)


def test_good_parties_are_admitted(setting: Setting) -> None:
    assert setting.verdict(setting.ca.party(dns=FUNC1)) == "admitted"
    assert setting.verdict(setting.ca.party(uris=[SPIFFE_ID])) == "admitted"
    assert setting.verdict(setting.ca.party()) == "admitted"
    assert setting.verdict(setting.ca.ending(3600, dns=FUNC1)) == "admitted"
    assert setting.verdict(setting.ca.cn_only("func1.demo")) == "admitted"  # but it has no name: test_identity.py


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ca: TestAuthority("other CA").party(dns=FUNC1), "unknown issuer"),
        (lambda ca: TestAuthority("test CA").party(dns=FUNC1), "unknown issuer"),
        (lambda ca: self_signed(dns=FUNC1), "self-signed"),
        (lambda ca: ca.expired(dns=FUNC1), "expired"),
        (lambda ca: ca.not_yet_valid(dns=FUNC1), "not yet valid"),
        (lambda ca: ca.server_only(dns=FUNC1), "wrong purpose"),
    ],
    ids=["other CA", "other CA of the same name", "self-signed", "expired", "not yet valid", "serverAuth only"],
)
def test_a_bad_party_is_refused_for_its_one_fault(
    setting: Setting, make: Callable[[TestAuthority], Credential], reason: str
) -> None:
    """TESTPLAN 1, at the level of the certificate."""
    assert setting.verdict(make(setting.ca)) == reason


def test_a_crl_revokes_exactly_whom_it_names(setting: Setting) -> None:
    """TESTPLAN 1, 12."""
    good, bad = setting.ca.party(dns=FUNC1), setting.ca.party(dns=FUNC1)
    assert setting.verdict(bad, crl=setting.ca.crl()) == "admitted"
    crl = setting.ca.crl(revoked=[bad], number=2)
    assert setting.verdict(bad, crl=crl) == "revoked"
    assert setting.verdict(good, crl=crl) == "admitted"


def test_an_expired_crl_lets_nobody_in(setting: Setting) -> None:
    """TESTPLAN 12."""
    assert setting.verdict(setting.ca.party(dns=FUNC1), crl=setting.ca.expired_crl()) == "CRL expired"


def test_name_constraints_hold(setting: Setting) -> None:
    """TESTPLAN 11."""
    root = TestAuthority.root_for_intermediates()
    acme = root.intermediate(permitted=[x509.DNSName("acme")])
    no_demo = root.intermediate(excluded=[x509.DNSName("demo")])
    assert setting.verdict(acme.party(dns=["func1.acme"]), trust=root) == "admitted"
    assert setting.verdict(acme.party(dns=FUNC1), trust=root) == "not permitted"
    assert setting.verdict(no_demo.party(dns=FUNC1), trust=root) == "excluded"


def test_a_chain_of_intermediates_is_sent_whole(setting: Setting) -> None:
    root = TestAuthority.root_for_intermediates()
    below = root.intermediate("first").intermediate("second")
    party = below.party(dns=FUNC1)
    assert [one.subject.rfc4514_string() for one in party.chain] == ["CN=func1.demo", "CN=second", "CN=first"]
    assert setting.verdict(party, trust=root) == "admitted"


def test_our_authority_allows_no_authority_below_it(setting: Setting) -> None:
    """pathlen 0: neither a stolen key of a party nor a careless signature makes a second authority."""
    assert setting.verdict(setting.ca.intermediate().party(dns=FUNC1)) == "path too long"
