"""With any content of the operator's certificate files, a configuration is accepted or refused; nothing else is raised.

OpenSSL and ``cryptography`` do not agree on what can be read, and what cannot is not always a ValueError: the relay has
to say which file it is, at start as at reload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.tls.loading import load_outer_tls
from support.certs import Credential, TestAuthority
from support.der import content, der, elements, pem, san_der
from support.site import Site

Edit = Callable[[list[bytes]], None]


def version(parts: list[bytes]) -> None:
    parts[0] = der(0xA0, der(0x02, b"\x41"))


def begins_in_year_0(parts: list[bytes]) -> None:
    _, end = elements(content(parts[4]))
    parts[4] = der(0x30, der(0x18, b"00000101000000Z") + end)


def ends_in_year_0(parts: list[bytes]) -> None:
    begin, _ = elements(content(parts[4]))
    parts[4] = der(0x30, begin + der(0x18, b"00000101000000Z"))


def two_sans(parts: list[bytes]) -> None:
    extensions = content(content(parts[7]))
    second = der(0x30, bytes.fromhex("0603551d11") + der(0x04, san_der(dns=[b"other.demo"])))
    parts[7] = der(0xA3, der(0x30, extensions + second))


def a_broken_extension(parts: list[bytes]) -> None:
    extensions = elements(content(content(parts[7])))
    broken = der(0x30, bytes.fromhex("0603551d25") + der(0x04, b"\x30\x03\x02"))
    parts[7] = der(0xA3, der(0x30, b"".join(one for one in extensions if b"\x55\x1d\x25" not in one) + broken))


def an_address_of_the_post(parts: list[bytes]) -> None:
    extensions = elements(content(content(parts[7])))
    san = der(0x30, bytes.fromhex("0603551d11") + der(0x04, san_der(raw=der(0xA5, b""))))
    parts[7] = der(0xA3, der(0x30, b"".join(one for one in extensions if b"\x55\x1d\x11" not in one) + san))


def a_subject_that_is_no_text(parts: list[bytes]) -> None:
    name = der(0x31, der(0x30, bytes.fromhex("0603550403") + der(0x0C, b"\xff\xfe")))
    parts[5] = der(0x30, name)


EDITS: Final[dict[str, Edit]] = {edit.__name__.replace("_", " "): edit for edit in (
    version,
    begins_in_year_0,
    ends_in_year_0,
    two_sans,
    a_broken_extension,
    an_address_of_the_post,
    a_subject_that_is_no_text,
)}  # fmt: skip


def outcome(site: Site, *, crl: bool = False) -> set[str | None]:
    """The keys of the problems; none if the files are accepted."""
    config = load(site.write(crl=crl))
    assert config.tls is not None
    try:
        load_outer_tls(config.tls, source=config.path)
    except ConfigError as error:
        problems = error.problems
    else:
        return set()
    assert all(problem.message.isprintable() for problem in problems)
    return {problem.key for problem in problems}


def reworked(issuer: TestAuthority, credential: Credential, edit: Edit) -> bytes:
    return pem(issuer.rework(credential, edit))


@pytest.mark.parametrize("name", EDITS)
def test_the_relays_own_certificate(site: Site, name: str) -> None:
    """TESTPLAN 40: the file is named, for any fault in it. Only a certificate that OpenSSL can show is accepted."""
    relay = site.ca.relay()
    relay.write(site.directory, "relay")
    site.relay_paths[0].write_bytes(reworked(site.ca, relay, EDITS[name]))
    assert outcome(site) <= {"tls.certificate", "tls"}


@pytest.mark.parametrize("name", EDITS)
def test_a_ca_of_the_operator(site: Site, name: str) -> None:
    """TESTPLAN 40: also among valid ones."""
    odd = site.ca.odd(None, ca=True)
    site.ca_path.write_bytes(site.ca.cert_pem + reworked(site.ca, odd, EDITS[name]))
    assert outcome(site) <= {"tls.client_ca", "tls"}


@pytest.mark.parametrize("name", ["version", "begins in year 0", "ends in year 0"])
def test_what_nobody_can_read_is_refused(site: Site, name: str) -> None:
    """TESTPLAN 40."""
    relay = site.ca.relay()
    relay.write(site.directory, "relay")
    site.relay_paths[0].write_bytes(reworked(site.ca, relay, EDITS[name]))
    odd = site.ca.odd(None, ca=True)
    site.ca_path.write_bytes(site.ca.cert_pem + reworked(site.ca, odd, EDITS[name]))
    assert outcome(site) == {"tls.certificate", "tls.client_ca"}


LIST_EDITS: Final[dict[str, Callable[[list[bytes]], None]]] = {
    "version": lambda parts: parts.__setitem__(0, der(0x02, b"\x41")),
    "this update in year 0": lambda parts: parts.__setitem__(3, der(0x18, b"00000101000000Z")),
    "next update in year 0": lambda parts: parts.__setitem__(4, der(0x18, b"00000101000000Z")),
    "no next update": lambda parts: parts.__delitem__(4),
    "an issuer that is no text": lambda parts: parts.__setitem__(
        2, der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403") + der(0x0C, b"\xff\xfe"))))
    ),
}


@pytest.mark.parametrize("name", LIST_EDITS)
def test_a_revocation_list(site: Site, name: str) -> None:
    """TESTPLAN 12: a list that cannot be read, or never expires, is refused."""
    octets = x509.load_pem_x509_crl(site.ca.crl()).public_bytes(Encoding.DER)
    site.ca.write_crl(site.directory, pem(site.ca.rework_der(octets, LIST_EDITS[name], algorithm=1), "X509 CRL"))
    assert outcome(site, crl=True) == {"tls.crl"}
