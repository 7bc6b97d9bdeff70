"""Who a function is: typed names, and the selectors that match them.

A certificate can have the same text in several fields (CN, DNS, URI, e-mail), and most identity mistakes of proxies
come from comparing text without its type. So a :class:`Name` is always a kind *and* a value, and a :class:`Selector`
only matches names of its own kind.

Rules, the same ones for the relay (route file) and for a function (``peer=``):

1. ``dns:`` a SAN dNSName. Letters fold case (RFC 4343), nothing else does. ``*`` stands for exactly one whole label.
2. ``uri:`` a SAN uniformResourceIdentifier, compared octet by octet. ``*`` stands for exactly one whole,
   non-empty path segment after ``//authority/``; never for a scheme or an authority, and never for a segment that
   some readers take for another path: ``.``, ``..`` or one with a percent-encoded octet.
3. ``spki:sha256:`` the SHA-256 of the DER SubjectPublicKeyInfo, 64 hex digits. No wildcard.
4. A value that could be read in two ways is not a name at all (:func:`dns_name` and :func:`uri_names` refuse it):
   NUL and other control bytes, trailing or doubled dots, a wildcard *inside the certificate*, bytes outside ASCII
   (an IDN must come as its A-label), a DNS name written like an IPv4 address, and SPIFFE IDs that the SPIFFE
   specification rules out.
5. So the text of a name, read as a selector, matches that name and no other: ``peer`` of a PAIRED message can be
   written into a route file as it is.

Standard library only: this runs inside functions too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final
from urllib.parse import urlsplit

__all__ = [
    "Kind",
    "Name",
    "OddName",
    "Selector",
    "alternative_name_count",
    "distinguished_name_sizes",
    "dns_name",
    "match",
    "may_stand_under_wildcard",
    "parse_selector",
    "spki_name",
    "spki_of_certificate",
    "split_name",
    "uri_names",
]

# RFC 1035: 63 octets a label, 253 for a whole name in text form. '_' is not a host-name character, but real
# service names use it, and it cannot be confused with anything.
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_MAX_DNS: Final = 253
# Some verifiers compare a dNSName with an IP address, others do not: so we refuse a name of this form.
_DOTTED_QUAD: Final = re.compile(r"[0-9]+(?:\.[0-9]+){3}\Z")
# RFC 3986 sets no limit. SPIFFE sets 2048 octets for a whole ID.
_MAX_URI: Final = 2048
_URI_CHARS: Final = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+\Z")
_BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SPIFFE_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}\Z")
_SPIFFE_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+\Z")
_SUBJECT_ALT_NAME: Final = bytes((0x55, 0x1D, 0x11))  # 2.5.29.17
_SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}\Z")


class Kind(Enum):
    """The type of a name: which field of the certificate it came from."""

    DNS = "dns"
    URI = "uri"
    SPKI = "spki"


class OddName(ValueError):
    """A name in a certificate that must not be used as an identity; the text says why."""


@dataclass(frozen=True, slots=True)
class Name:
    """One verified name of a function; ``str()`` gives the form used on the wire, e.g. ``dns:func1.acme``."""

    kind: Kind
    value: str

    def __str__(self) -> str:
        if self.kind is Kind.SPKI:
            return f"spki:sha256:{self.value}"
        return f"{self.kind.value}:{self.value}"


def dns_name(value: str) -> Name:
    """Make a name of a SAN dNSName; raises :class:`OddName` for one that could be read in two ways."""
    return Name(Kind.DNS, _checked_dns(value, wildcard=False))


def uri_names(values: Sequence[str]) -> list[Name]:
    """Make names of all SAN URIs of one certificate together; raises :class:`OddName`.

    They are checked together because SPIFFE allows exactly one URI in a certificate: with a second one beside a SPIFFE
    ID nobody can say which of the two the issuer meant.
    """
    for value in values:
        _check_uri(value)
        # Used as a selector, its text would match other names, too (rule 5).
        if "*" in value:
            raise OddName(f"URI {value!r} has a wildcard; only selectors may")
    spiffe = [value for value in values if _is_spiffe(value)]
    if spiffe and len(values) > 1:
        raise OddName(f"{len(values)} URIs in one certificate beside the SPIFFE ID {spiffe[0]!r}")
    for value in spiffe:
        _check_spiffe(value, wildcard=False)
    return [Name(Kind.URI, value) for value in values]


def spki_name(sha256_hex: str) -> Name:
    """Make a name of the SHA-256 (hex) of a DER SubjectPublicKeyInfo."""
    digest = sha256_hex.lower()
    if _SHA256_HEX.match(digest) is None:
        raise OddName("a public-key pin is 64 hexadecimal digits")
    return Name(Kind.SPKI, digest)


def spki_of_certificate(der: bytes) -> Name:
    """The public-key pin of a DER certificate: the digest of its SubjectPublicKeyInfo, byte for byte as it is there.

    To parse and encode the key again would be wrong: RSASSA-PSS keys and compressed EC points get other bytes, and
    the pin would differ from the one that ``openssl x509 -pubkey`` gives. Raises :class:`OddName` for what is not
    a certificate.
    """
    # RFC 5280, 4.1. Certificate: SEQUENCE { tbsCertificate, ... };
    # tbsCertificate: SEQUENCE { [0] version, serialNumber, signature, issuer, validity, subject, spki, ... }
    _, at, end = _der_element(der, 0, len(der), 0x30)
    _, at, end = _der_element(der, at, end, 0x30)
    if der[at : at + 1] == b"\xa0":
        at, _, _ = _der_element(der, at, end, 0xA0)
    for tag in (0x02, 0x30, 0x30, 0x30, 0x30):
        at, _, _ = _der_element(der, at, end, tag)
    after, _, _ = _der_element(der, at, end, 0x30)
    # Imported here: it loads libcrypto, which nobody without a pin needs (importing frelay must not).
    from hashlib import sha256

    return spki_name(sha256(der[at:after]).hexdigest())


def distinguished_name_sizes(der: bytes) -> tuple[int, int]:
    """How many bytes the issuer and the subject of a DER certificate take; raises :class:`OddName` if it is none."""
    _, at, end = _der_element(der, 0, len(der), 0x30)
    _, at, end = _der_element(der, at, end, 0x30)
    if der[at : at + 1] == b"\xa0":
        at, _, _ = _der_element(der, at, end, 0xA0)
    sizes = []
    for tag in (0x02, 0x30, 0x30, 0x30, 0x30):  # serialNumber, signature, issuer, validity, subject
        before = at
        at, _, _ = _der_element(der, at, end, tag)
        sizes.append(at - before)
    return sizes[2], sizes[4]


def alternative_name_count(der: bytes) -> int:
    """How many subject alternative names, of any kind, a DER certificate holds; none of them is decoded.

    Raises :class:`OddName` for what is not a certificate.
    """
    # As above: what follows the public key is [1] and [2], which nobody uses, and [3], the extensions.
    _, at, end = _der_element(der, 0, len(der), 0x30)
    _, at, end = _der_element(der, at, end, 0x30)
    while at < end and der[at] != 0xA3:
        at, _, _ = _der_element(der, at, end, der[at])
    if at >= end:
        return 0
    _, at, end = _der_element(der, at, end, 0xA3)
    _, at, end = _der_element(der, at, end, 0x30)
    count = 0
    while at < end:
        at, inside, inside_end = _der_element(der, at, end, 0x30)
        value, oid, oid_end = _der_element(der, inside, inside_end, 0x06)
        if der[oid:oid_end] != _SUBJECT_ALT_NAME:
            continue
        if der[value : value + 1] == b"\x01":  # whether it is critical
            value, _, _ = _der_element(der, value, inside_end, 0x01)
        _, name, names_end = _der_element(der, value, inside_end, 0x04)
        _, name, names_end = _der_element(der, name, names_end, 0x30)
        while name < names_end:
            # Inlined: there may be tens of thousands, and a call for each would take most of the time.
            length = der[name + 1] if name + 1 < names_end else 0x80
            name = name + 2 + length if length < 0x80 else _der_element(der, name, names_end, der[name])[0]
            count += 1
        if name != names_end:
            raise OddName("not a DER certificate: it is cut short")
    return count


def _der_element(der: bytes, at: int, end: int, tag: int) -> tuple[int, int, int]:
    """The element with ``tag`` at offset ``at``: where the next one begins, and where its content begins and ends."""
    content = at + 2
    if content > end or der[at] != tag:
        raise OddName("not a DER certificate: an element is missing or of another type")
    length = der[at + 1]
    if length > 0x80:
        content += length - 0x80
        length = int.from_bytes(der[at + 2 : content], "big")
    elif length == 0x80:
        raise OddName("not a DER certificate: an indefinite length, which is BER")
    if content + length > end:
        raise OddName("not a DER certificate: it is cut short")
    return content + length, content, content + length


def _checked_dns(value: str, *, wildcard: bool) -> str:
    """``value`` with its letters folded, or OddName; with ``wildcard``, whole labels may be ``*``."""
    # Checked before lower(), which turns the Kelvin sign and some others *into* ASCII.
    if not value or not value.isascii():
        raise OddName(f"DNS name {value!a} is empty or not ASCII (write an international name as xn--...)")
    if len(value) > _MAX_DNS:
        raise OddName(f"DNS name of {len(value)} characters (at most {_MAX_DNS})")
    folded = value.lower()
    for label in folded.split("."):
        if _LABEL.match(label) is None and not (wildcard and label == "*"):
            raise OddName(f"DNS name {value!r} has the label {label!r}, which no selector may match")
    if _DOTTED_QUAD.match(folded):
        raise OddName(f"DNS name {value!r} is written like an IP address")
    return folded


def _check_uri(value: str) -> None:
    if not value or len(value) > _MAX_URI:
        raise OddName(f"URI of {len(value)} characters (1 to {_MAX_URI})")
    if _URI_CHARS.match(value) is None:
        raise OddName(f"URI {value!a} has characters that RFC 3986 does not allow")
    if _SCHEME.match(value) is None:
        raise OddName(f"URI {value!r} has no scheme")
    if _BROKEN_ESCAPE.search(value):
        raise OddName(f"URI {value!r} has a '%' without two hexadecimal digits")
    try:
        urlsplit(value)
    except ValueError as error:  # a malformed authority, e.g. an open IPv6 bracket
        raise OddName(f"URI {value!r}: {error}") from None


def _is_spiffe(value: str) -> bool:
    return value[:7].lower() == "spiffe:"


def _check_spiffe(value: str, *, wildcard: bool) -> None:
    """Refuse what is not the SPIFFE ID of a leaf.

    SPIFFE-ID.md section 2: no userinfo, port, query, fragment, percent-encoding, dot or empty segment.
    X509-SVID.md section 3.1: a leaf has a path; an ID without one names the trust domain itself.
    """
    if not value.startswith("spiffe://"):
        raise OddName(f"SPIFFE ID {value!r} does not begin with 'spiffe://'")
    trust_domain, _, path = value.removeprefix("spiffe://").partition("/")
    if _SPIFFE_TRUST_DOMAIN.match(trust_domain) is None:
        raise OddName(f"SPIFFE ID {value!r}: the trust domain may hold a-z, 0-9, '.', '-' and '_' only")
    if not path:
        raise OddName(f"SPIFFE ID {value!r} has no path: it names a trust domain, not a function in it")
    for segment in path.split("/"):
        if wildcard and segment == "*":
            continue
        if segment in ("", ".", "..") or _SPIFFE_SEGMENT.match(segment) is None:
            raise OddName(f"SPIFFE ID {value!r}: {segment!r} is not a path segment that SPIFFE allows")


@dataclass(frozen=True, slots=True)
class Selector:
    """A pattern for names of one kind, made by :func:`parse_selector`; ``str()`` returns its text."""

    kind: Kind
    pattern: str

    def __str__(self) -> str:
        return str(Name(self.kind, self.pattern))

    @property
    def is_exact(self) -> bool:
        """Whether only one name can match it."""
        return "*" not in self.pattern

    def matches(self, name: Name) -> bool:
        """Whether ``name`` is of this selector's kind and fits its pattern, as a whole."""
        if name.kind is not self.kind:
            return False
        if self.is_exact:
            return name.value == self.pattern
        fixed, wanted = split_name(self.kind, self.pattern)
        other_fixed, found = split_name(name.kind, name.value)
        return (
            fixed == other_fixed
            and len(wanted) == len(found)
            and all(w == f or (w == "*" and may_stand_under_wildcard(f)) for w, f in zip(wanted, found, strict=True))
        )


def may_stand_under_wildcard(part: str) -> bool:
    """Whether ``*`` may stand for this label or segment."""
    # No label of a name has any of these: the rule is for the segments of a URI.
    return part not in ("", ".", "..") and "%" not in part


def split_name(kind: Kind, value: str) -> tuple[object, list[str]]:
    """Split a DNS name or a URI into the part that must be equal, and the labels or segments that ``*`` may match."""
    return (None, value.split(".")) if kind is Kind.DNS else _split_uri(value)


def _split_uri(value: str) -> tuple[tuple[str, str | None, str], list[str]]:
    """Split into what must be equal (scheme, authority, query with fragment) and the path's segments.

    The query and fragment are among the equal parts because a ``*`` for the last segment would otherwise
    swallow them.
    """
    cut = min((i for i in (value.find("?"), value.find("#")) if i >= 0), default=len(value))
    body, tail = value[:cut], value[cut:]
    scheme, _, rest = body.partition(":")
    if not rest.startswith("//"):
        return (scheme, None, tail), rest.split("/")
    authority, slash, path = rest[2:].partition("/")
    return (scheme, authority, tail), path.split("/") if slash else []


def parse_selector(text: str) -> Selector:
    """Read ``dns:NAME``, ``uri:URI`` or ``spki:sha256:HEX``.

    Raises:
        ValueError: says what is wrong with ``text`` and how to write it.
    """
    kind, colon, value = text.partition(":")
    if not colon or kind not in ("dns", "uri", "spki"):
        raise ValueError(f"{text!r} is not a selector: write dns:NAME, uri:URI or spki:sha256:HEX")
    if kind == "spki":
        algorithm, _, digest = value.partition(":")
        if algorithm != "sha256":
            raise ValueError(f"{text!r}: public-key pins are written spki:sha256:HEX")
        return Selector(Kind.SPKI, spki_name(digest).value)
    if kind == "dns":
        pattern = _checked_dns(value, wildcard=True)
        if all(label == "*" for label in pattern.split(".")):
            raise ValueError(f"{text!r} would match any name: keep at least one label of it, as in dns:*.acme")
        return Selector(Kind.DNS, pattern)
    _check_uri(value)
    if _is_spiffe(value):
        _check_spiffe(value, wildcard=True)
    if "*" in value:
        (_, authority, tail), segments = _split_uri(value)
        if not authority:
            raise ValueError(f"{text!r}: '*' needs an authority before it, as in uri:spiffe://acme/jobs/*")
        if "*" in authority + tail or any("*" in segment and segment != "*" for segment in segments):
            raise ValueError(f"{text!r}: '*' stands for one whole path segment, nowhere else")
    return Selector(Kind.URI, value)


def match(selectors: Iterable[Selector], names: Iterable[Name]) -> Name | None:
    """The first of ``names`` that any of ``selectors`` matches, or None."""
    patterns = tuple(selectors)
    for name in names:
        if any(selector.matches(name) for selector in patterns):
            return name
    return None
