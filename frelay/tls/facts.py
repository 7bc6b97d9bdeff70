"""Reads what a PEM file holds, as facts for people and programs. It verifies nothing, and shows no secret.

``frelay ca show`` prints all of it, and ``frelay why`` compares a certificate with what a route wants. Every text is
safe to print (see :func:`~frelay.tls.identity.distinguished_name`), even that of a stranger's certificate.

``as_json`` of each kind of facts is a stable shape: keys may be added, but none is removed or changes its meaning.
Times are UTC, ``2026-01-31T12:00:00Z``.

* certificate: ``kind`` "certificate", ``subject``, ``names`` (as selectors, the key pin last), ``ignored`` (a sentence
  for each thing that is no identity), ``issuer``, ``serial`` (hex), ``not_before``, ``not_after``, ``expired``,
  ``usages`` (extended key usages; null: it names none, so all are allowed), ``key_usages`` (likewise), ``key``,
  ``authority`` (whether it is a CA).
* CRL: ``kind`` "crl", ``issuer``, ``number`` (or null), ``this_update``, ``next_update`` (or null), ``expired``,
  ``revoked``: a list of ``serial`` (hex), ``date`` and ``reason`` (or null).
* key: ``kind`` "private key" or "public key", ``key`` (or null if it is encrypted), ``encrypted``.
* anything else: ``kind`` "other", ``label`` (the text after BEGIN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from frelay.errors import CertificateError
from frelay.tls.identity import distinguished_name, identities

__all__ = [
    "CertificateFacts",
    "Claim",
    "CrlFacts",
    "Facts",
    "KeyFacts",
    "OtherFacts",
    "certificate_facts",
    "read_facts",
]

T = TypeVar("T")

_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)
_PRIVATE_KEYS: Final = frozenset({b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY", b"DSA PRIVATE KEY"})

_PURPOSES: Final = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
    ExtendedKeyUsageOID.CODE_SIGNING: "codeSigning",
    ExtendedKeyUsageOID.EMAIL_PROTECTION: "emailProtection",
    ExtendedKeyUsageOID.TIME_STAMPING: "timeStamping",
    ExtendedKeyUsageOID.OCSP_SIGNING: "OCSPSigning",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "anyExtendedKeyUsage",
}
# In the order of RFC 5280, 4.2.1.3. Its last two are left out: they only have a meaning together with keyAgreement.
_KEY_USAGES: Final = {
    "digital_signature": "digitalSignature",
    "content_commitment": "nonRepudiation",
    "key_encipherment": "keyEncipherment",
    "data_encipherment": "dataEncipherment",
    "key_agreement": "keyAgreement",
    "key_cert_sign": "keyCertSign",
    "crl_sign": "cRLSign",
}
# The usual names of curves, by their names of SECG.
_CURVES: Final = {"secp224r1": "P-224", "secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_EDWARDS: Final = {"Ed25519PublicKey": "Ed25519", "Ed448PublicKey": "Ed448", "DSAPublicKey": "DSA"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A name in a certificate, whether it is an identity or not: its field, and its exact text."""

    where: str
    """One of: common name, DNS name, URI, e-mail address, IP address, otherName."""
    text: str


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The facts of a certificate. ``claims`` are its exact texts, for comparison; they are not safe to print."""

    subject: str
    names: tuple[str, ...]
    ignored: tuple[str, ...]
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime
    usages: tuple[str, ...] | None
    key_usages: tuple[str, ...] | None
    key: str
    authority: bool
    claims: tuple[Claim, ...] = field(repr=False)

    def as_json(self, now: datetime) -> dict[str, Any]:
        """See the module."""
        return {
            "kind": "certificate",
            "subject": self.subject,
            "names": list(self.names),
            "ignored": list(self.ignored),
            "issuer": self.issuer,
            "serial": self.serial,
            "not_before": iso(self.not_before),
            "not_after": iso(self.not_after),
            "expired": now > self.not_after,
            "usages": None if self.usages is None else list(self.usages),
            "key_usages": None if self.key_usages is None else list(self.key_usages),
            "key": self.key,
            "authority": self.authority,
        }


@dataclass(frozen=True, slots=True)
class Revoked:
    """One entry of a CRL."""

    serial: str
    date: datetime
    reason: str | None


@dataclass(frozen=True, slots=True)
class CrlFacts:
    """The facts of a revocation list."""

    issuer: str
    number: int | None
    this_update: datetime
    next_update: datetime | None
    revoked: tuple[Revoked, ...]

    def as_json(self, now: datetime) -> dict[str, Any]:
        """See the module."""
        return {
            "kind": "crl",
            "issuer": self.issuer,
            "number": self.number,
            "this_update": iso(self.this_update),
            "next_update": None if self.next_update is None else iso(self.next_update),
            # Without nextUpdate a list would never expire. The relay treats it as expired, so it is called that here.
            "expired": self.next_update is None or now > self.next_update,
            "revoked": [{"serial": one.serial, "date": iso(one.date), "reason": one.reason} for one in self.revoked],
        }


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """The kind of a key, and nothing else of it; ``key`` is None if the key is encrypted with a password."""

    kind: str
    key: str | None

    def as_json(self, now: datetime) -> dict[str, Any]:
        """See the module."""
        return {"kind": self.kind, "key": self.key, "encrypted": self.key is None}


@dataclass(frozen=True, slots=True)
class OtherFacts:
    """A PEM block of another kind."""

    label: str

    def as_json(self, now: datetime) -> dict[str, Any]:
        """See the module."""
        return {"kind": "other", "label": self.label}


Facts = CertificateFacts | CrlFacts | KeyFacts | OtherFacts


def iso(moment: datetime) -> str:
    """``moment`` as the JSON shapes write it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_facts(content: bytes) -> list[tuple[Facts, x509.Certificate | None]]:
    """The facts of each PEM block of ``content``, in order, and the certificate itself if it is one.

    A file without any PEM is tried as one DER certificate or CRL.

    Raises:
        CertificateError: says what cannot be read; the caller knows the file's name.
    """
    blocks = [(found[1], found[0]) for found in _BLOCK.finditer(content)]
    if not blocks:
        return [_read_der(content)]
    return [_read_block(label, block) for label, block in blocks]


def certificate_facts(certificate: x509.Certificate) -> CertificateFacts:
    """The facts of ``certificate``; no content of it makes this raise."""
    identity = identities(certificate)
    extensions: list[x509.Extension[x509.ExtensionType]] = _tried(lambda: list(certificate.extensions), [])
    usages = next((one.value for one in extensions if isinstance(one.value, x509.ExtendedKeyUsage)), None)
    key_usage = next((one.value for one in extensions if isinstance(one.value, x509.KeyUsage)), None)
    return CertificateFacts(
        subject=identity.subject,
        names=tuple(map(str, identity.names)),
        ignored=identity.ignored,
        issuer=identity.issuer,
        serial=f"{identity.serial:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        usages=None if usages is None else tuple(_PURPOSES.get(one, one.dotted_string) for one in usages),
        key_usages=None if key_usage is None else _key_usages(key_usage),
        key=_tried(lambda: _key_kind(certificate.public_key()), "of an unknown kind"),
        authority=any(isinstance(one.value, x509.BasicConstraints) and one.value.ca for one in extensions),
        claims=tuple(_claims(certificate, extensions)),
    )


def _crl_facts(crl: x509.CertificateRevocationList) -> CrlFacts:
    number = _tried(lambda: crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number, None)
    return CrlFacts(
        issuer=distinguished_name(partial(getattr, crl, "issuer")),
        number=number,
        this_update=crl.last_update_utc,
        next_update=crl.next_update_utc,
        revoked=tuple(Revoked(f"{one.serial_number:x}", one.revocation_date_utc, _why_revoked(one)) for one in crl),
    )


def _why_revoked(entry: x509.RevokedCertificate) -> str | None:
    return _tried(lambda: entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value, None)


def _read_block(label: bytes, block: bytes) -> tuple[Facts, x509.Certificate | None]:
    text = label.decode("ascii")
    try:
        if label == b"CERTIFICATE":
            certificate = x509.load_pem_x509_certificate(block)
            return certificate_facts(certificate), certificate
        if label == b"X509 CRL":
            return _crl_facts(x509.load_pem_x509_crl(block)), None
        if label == b"PUBLIC KEY":
            return KeyFacts("public key", _key_kind(load_pem_public_key(block))), None
        if label == b"ENCRYPTED PRIVATE KEY":
            return KeyFacts("private key", None), None
        if label in _PRIVATE_KEYS:
            return KeyFacts("private key", _private_key_kind(block)), None
    except UnsupportedAlgorithm:
        raise CertificateError(f"holds a {text} of a kind that frelay does not know") from None
    except (ValueError, x509.InvalidVersion) as error:
        # The parser's message may quote the key.
        detail = "" if b"KEY" in label else f" ({error})"
        raise CertificateError(f"holds a {text} that cannot be read{detail}; write the file again") from None
    return OtherFacts(text), None


def _read_der(content: bytes) -> tuple[Facts, x509.Certificate | None]:
    try:
        certificate = x509.load_der_x509_certificate(content)
        return certificate_facts(certificate), certificate
    except (ValueError, x509.InvalidVersion):
        pass
    try:
        return _crl_facts(x509.load_der_x509_crl(content)), None
    except ValueError:
        raise CertificateError("holds neither PEM nor a certificate or CRL in DER; give a file that does") from None


def _private_key_kind(block: bytes) -> str | None:
    try:
        return _key_kind(load_pem_private_key(block, password=None).public_key())
    except TypeError:  # it has a password
        return None


def _key_kind(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {_CURVES.get(key.curve.name, key.curve.name)}"
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    kind = type(key).__name__
    return _EDWARDS.get(kind, kind.removesuffix("PublicKey"))


def _key_usages(usage: x509.KeyUsage) -> tuple[str, ...]:
    return tuple(shown for attribute, shown in _KEY_USAGES.items() if getattr(usage, attribute))


def _claims(certificate: x509.Certificate, extensions: Iterable[x509.Extension[x509.ExtensionType]]) -> list[Claim]:
    claims: list[Claim] = _tried(
        lambda: [
            Claim("common name", str(one.value))
            for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ],
        [],
    )
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            claims += [claim for name in extension.value if (claim := _claim(name)) is not None]
    return claims


def _claim(name: x509.GeneralName) -> Claim | None:
    match name:
        case x509.DNSName():
            return Claim("DNS name", name.value)
        case x509.UniformResourceIdentifier():
            return Claim("URI", name.value)
        case x509.RFC822Name():
            return Claim("e-mail address", name.value)
        case x509.IPAddress():
            return Claim("IP address", str(name.value))
        case x509.OtherName():
            # Usually a UTF8String or an IA5String of less than 128 octets: tag, length, text.
            return Claim("otherName", name.value[2:].decode("utf-8", "replace"))
    return None


def _tried(read: Callable[[], T], otherwise: T) -> T:
    """The result of ``read``, or ``otherwise`` if it raises: any part of a stranger's certificate may be unreadable."""
    try:
        return read()
    except Exception:
        return otherwise
