"""Finds out which authorities of ``client_ca`` can be used, and which of them admit nobody, with the reason.

Each certificate of ``client_ca`` is trusted because the operator put it there. OpenSSL ends a chain only at a root. So
a certificate whose issuer is not in the file is an anchor *by itself*, and has to be marked as one
(:mod:`frelay.tls.context`). From every other certificate the chain goes on upwards, as far as the file has issuers: so
a list can revoke an authority in the file, and the constraints of the authorities above it hold.

Expired certificates are left out. They admit nobody, and OpenSSL might take one of them instead of a newer certificate
of the same name.

This module decides nothing about a function: if it says that an authority admits nobody, OpenSSL refuses its functions
in any case. The operator is told before the first function is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.tls.identity import distinguished_name

__all__ = [
    "UNREADABLE",
    "Anchors",
    "Blocked",
    "RevocationList",
    "find_anchors",
    "has_issued",
    "objection_to_list",
    "scope_of",
    "signers",
    "subject",
]

UNREADABLE: Final = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""The errors of ``cryptography`` for a certificate or a list that it cannot parse. Not all are a ValueError."""

_NOT_SIGNED: Final = (TypeError, InvalidSignature, ValueError, UnsupportedAlgorithm)


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list, and the certificates of the authority that signed it; at least one of them has not expired."""

    crl: x509.CertificateRevocationList
    signers: tuple[x509.Certificate, ...]
    counts: bool = True
    """Whether OpenSSL uses it."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """An authority that admits nobody. ``why`` follows its name in a sentence; ``key`` is the setting to correct."""

    certificate: x509.Certificate
    key: Literal["client_ca", "crl"]
    why: str


@dataclass(frozen=True, slots=True)
class Anchors:
    """The authorities, sorted by how OpenSSL has to use them."""

    chained: tuple[x509.Certificate, ...]
    """Roots, and authorities whose issuer is in the file."""
    alone: tuple[x509.Certificate, ...]
    """Authorities whose issuer is not in the file: anchors by themselves."""
    expired: tuple[x509.Certificate, ...]
    """Expired authorities, which are not used."""
    blocked: tuple[Blocked, ...]
    """Those of ``chained`` and ``alone`` that admit nobody."""
    open: tuple[tuple[x509.Certificate, ...], ...]
    """The others, each followed by the authorities above it in the file, one of each name and key."""


def find_anchors(
    authorities: Sequence[x509.Certificate], lists: Sequence[RevocationList] | None, now: float
) -> Anchors:
    """Sort ``authorities``. ``lists`` is None if revocation is not checked; ``now`` is in seconds since 1970."""
    unique = list({one.public_bytes(Encoding.DER): one for one in authorities}.values())
    expired = [one for one in unique if now > one.not_valid_after_utc.timestamp()]
    used = [one for one in unique if one not in expired]
    hierarchy = _Hierarchy(used, lists, now)
    return Anchors(
        chained=tuple(one for one in used if not hierarchy.stands_alone(one)),
        alone=tuple(one for one in used if hierarchy.stands_alone(one)),
        expired=tuple(expired),
        blocked=tuple(blocked for one in used if (blocked := hierarchy.blocked(one)) is not None),
        open=tuple(tuple(hierarchy.line(one)) for one in used if hierarchy.blocked(one) is None),
    )


class _Hierarchy:
    """The authorities of one file, and which of them issued which."""

    def __init__(
        self, authorities: Sequence[x509.Certificate], lists: Sequence[RevocationList] | None, now: float
    ) -> None:
        self._lists = lists
        self._now = now
        self._by_subject: dict[bytes, list[x509.Certificate]] = defaultdict(list)
        for one in authorities:
            self._by_subject[_name(one, "subject")].append(one)
        self._issuers = {one: self._find_issuers(one) for one in authorities}
        self._blocked: dict[x509.Certificate, Blocked | None] = {}

    def _find_issuers(self, one: x509.Certificate) -> tuple[x509.Certificate, ...]:
        if has_issued(one, one):
            return (one,)
        return tuple(other for other in self._by_subject[_name(one, "issuer")] if has_issued(other, one))

    def stands_alone(self, one: x509.Certificate) -> bool:
        return not self._issuers[one]

    def line(self, one: x509.Certificate) -> Iterator[x509.Certificate]:
        """``one``, and the authorities above it."""
        seen: set[x509.Certificate] = set()
        while one not in seen:
            seen.add(one)
            yield one
            one = next((other for other in self._issuers[one] if self.blocked(other) is None), one)

    def blocked(self, one: x509.Certificate) -> Blocked | None:
        """Why it admits nobody, or None."""
        if one not in self._blocked:
            # Two authorities may have signed each other; this entry ends the recursion, and both are blocked.
            self._blocked[one] = Blocked(one, "client_ca", "leads to no authority that can be trusted")
            self._blocked[one] = self._find_block(one)
        return self._blocked[one]

    def _find_block(self, one: x509.Certificate) -> Blocked | None:
        if self._now < one.not_valid_before_utc.timestamp():
            return Blocked(one, "client_ca", f"is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC")
        if (objection := _objection_to_usages(one)) is not None:
            return Blocked(one, "client_ca", objection)
        if self._lists is not None and (block := self._block_by_lists(one)) is not None:
            return block
        above = [other for other in self._issuers[one] if other is not one]
        if above and all(self.blocked(other) is not None for other in above):
            block = self.blocked(above[0])
            assert block is not None  # noqa: S101  for the type checker: all of them are blocked
            return Blocked(one, block.key, f"was issued by {subject(above[0])}, which {block.why}")
        return None

    def _block_by_lists(self, one: x509.Certificate) -> Blocked | None:
        if _key_usage(one, "crl_sign") is False:
            return Blocked(one, "client_ca", "may not sign revocation lists (its key usage lacks cRLSign)")
        if next(self._own_lists(one), None) is None:
            return Blocked(one, "crl", "has no revocation list there")
        for other in self._issuers[one]:
            if other is one:
                continue  # a root is not looked up in a list
            if not any(not _is_for_leaves_only(crl) for crl in self._own_lists(other)):
                return Blocked(one, "crl", f"was issued by {subject(other)}, which has no list of authorities there")
            if any(_revokes(crl, one) for crl in self._own_lists(other)):
                return Blocked(one, "client_ca", f"is revoked by the list of {subject(other)}")
        return None

    def _own_lists(self, one: x509.Certificate) -> Iterator[x509.CertificateRevocationList]:
        return (found.crl for found in self._lists or () if one in found.signers)


# --- one certificate ----------------------------------------------------------------------------------------------


def subject(certificate: x509.Certificate) -> str:
    """The subject of a certificate, as text that is safe to print."""
    return distinguished_name(partial(getattr, certificate, "subject"))


def _name(certificate: x509.Certificate, which: Literal["subject", "issuer"]) -> bytes:
    try:
        name: x509.Name = getattr(certificate, which)
        return name.public_bytes()
    except UNREADABLE:
        return b""


def has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether ``issuer`` has signed ``certificate``, by name and by key."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except _NOT_SIGNED:
        return False
    return True


def _objection_to_usages(one: x509.Certificate) -> str | None:
    """Why an authority may not issue certificates for clients, or None."""
    if _key_usage(one, "key_cert_sign") is False:
        return "may not sign certificates (its key usage lacks keyCertSign)"
    try:
        usages = one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None
    if ExtendedKeyUsageOID.CLIENT_AUTH in usages:
        return None
    return "may not vouch for clients (its extended key usage lacks clientAuth)"


def _key_usage(one: x509.Certificate, attribute: str) -> bool | None:
    try:
        usage = one.extensions.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None
    return bool(getattr(usage, attribute))


# --- one list -----------------------------------------------------------------------------------------------------


def signers(crl: x509.CertificateRevocationList, authorities: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """Those of ``authorities`` that have signed ``crl``."""
    return [one for one in authorities if _is_signed_by(crl, one)]


def _is_signed_by(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        return crl.issuer == authority.subject and crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except _NOT_SIGNED:
        return False


def objection_to_list(crl: x509.CertificateRevocationList) -> str | None:
    """Why OpenSSL does not use ``crl``, or None if it does. Raises one of UNREADABLE."""
    for extension in crl.extensions:
        value = extension.value
        if isinstance(value, x509.DeltaCRLIndicator):
            return "is a delta list, but only complete lists are used: give the complete one"
        if isinstance(value, x509.IssuingDistributionPoint):
            if value.indirect_crl:
                return "is an indirect list, which is not used: give each authority's own list"
            if value.only_some_reasons:
                return "is a list for some reasons only, which is not used: give a list for all reasons"
            if value.only_contains_attribute_certs:
                return "is a list of attribute certificates, which functions never show: remove it"
        elif extension.critical and isinstance(value, x509.UnrecognizedExtension):
            return f"has a critical extension that frelay does not know ({extension.oid.dotted_string})"
    return None


def _revokes(crl: x509.CertificateRevocationList, one: x509.Certificate) -> bool:
    return crl.get_revoked_certificate_by_serial_number(one.serial_number) is not None


def scope_of(crl: x509.CertificateRevocationList) -> bytes:
    """The issuingDistributionPoint. Lists of one authority that differ in it are used together.

    Raises one of UNREADABLE.
    """
    try:
        return crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value.public_bytes()
    except x509.ExtensionNotFound:
        return b""


def _is_for_leaves_only(crl: x509.CertificateRevocationList) -> bool:
    try:
        return crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value.only_contains_user_certs
    except (x509.ExtensionNotFound, *UNREADABLE):
        return False
