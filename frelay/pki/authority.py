"""A certificate authority: it issues what the relay and its parties need, and nothing else.

Two usages, because frelay has two kinds of peers. A *relay* is only ever a TLS server. A *party* is a client of
the relay and then, inside the pairing, the client or the server of the other party, so it needs both purposes.
Every name is checked by the rules of :mod:`frelay.protocol.identity` before it is signed: it is better to refuse a name
here than to find out from a refused connection that the relay ignores it.

The profile is RFC 5280's, tight enough for ``openssl verify -x509_strict``: basicConstraints and keyUsage critical,
one authority that may sign no further authority (pathlen 0), key identifiers on everything, random serial numbers.
Validity begins :data:`CLOCK_SKEW` in the past, since the clock of the machine that verifies may be behind this one.

An authority keeps no list of what it issued. What it revoked is in its last CRL, and :meth:`Authority.revoke` makes
the next one from that.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from frelay.errors import CertificateError
from frelay.pki.files import (
    PemFile,
    certificates_pem,
    crl_number,
    key_pem,
    read_certificates,
    read_private_key,
    write_together,
)
from frelay.protocol.identity import OddName, dns_name, uri_names

__all__ = ["CLOCK_SKEW", "Algorithm", "Authority", "Issued", "SigningKey", "Usage"]

Algorithm = Literal["p256", "ed25519"]
Usage = Literal["relay", "party"]
SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | rsa.RSAPrivateKey

# Kerberos has tolerated five minutes between two clocks since RFC 4120, and so do most certificate authorities.
CLOCK_SKEW: Final = timedelta(minutes=5)
# The longest lifetime of a leaf that the rules of Apple and the CA/Browser Forum have allowed since 2018.
_LEAF_DAYS: Final = 825
# RFC 5280, appendix A: ub-common-name.
_MAX_COMMON_NAME: Final = 64
_PURPOSES: Final = {
    "relay": [ExtendedKeyUsageOID.SERVER_AUTH],
    "party": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
}


@dataclass(frozen=True, slots=True)
class Issued:
    """A fresh certificate with its key.

    ``chain`` is what a TLS peer must be sent: the certificate itself first, then every intermediate authority up to,
    and without, the root.
    """

    certificate: x509.Certificate
    private_key: SigningKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = field(repr=False)

    def files(self, certificate_path: Path, key_path: Path) -> list[PemFile]:
        """Its two files, for :func:`~frelay.pki.files.write_together`."""
        return [
            PemFile(certificate_path, certificates_pem(self.chain)),
            PemFile(key_path, key_pem(self.private_key), secret=True),
        ]

    def write(self, certificate_path: Path, key_path: Path, *, force: bool = False) -> list[Path]:
        """Write both files or neither; raises :class:`~frelay.errors.CertificateError`."""
        return write_together(self.files(certificate_path, key_path), force=force)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate, its key, and the authorities above it, if any.

    Made by :meth:`create` or :meth:`load`. ``above`` leads from the issuer of ``certificate`` towards the root;
    a self-signed authority has none.
    """

    certificate: x509.Certificate
    private_key: SigningKey = field(repr=False)
    above: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(cls, common_name: str, *, days: int = 3650, algorithm: Algorithm = "p256") -> Authority:
        """Make a new self-signed authority with a life of ``days``; raises ``CertificateError``."""
        key = _new_key(algorithm)
        subject = _subject(common_name)
        now = _now()
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(_after(now, days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        )
        return cls(builder.sign(key, _hash_for(key)), key)

    @classmethod
    def load(cls, certificate_path: Path, key_path: Path) -> Authority:
        """Read an authority from PEM files. In the certificate file the authorities above it may follow.

        Raises:
            CertificateError: names the file and what is wrong: unreadable, a key that others can read, a key that
                belongs to another certificate, a certificate that may not sign.
        """
        certificate, *above = read_certificates(certificate_path)
        key = read_private_key(key_path)
        if not isinstance(key, SigningKey):
            raise CertificateError(f"{key_path}: a key of this kind cannot sign; use EC, Ed25519, Ed448 or RSA")
        if certificate.public_key() != key.public_key():
            raise CertificateError(
                f"{key_path}: is not the key of {certificate_path}; give the pair that was made together"
            )
        fault = _why_no_authority(certificate)
        if fault is not None:
            raise CertificateError(f"{certificate_path}: {fault}; give the authority's own certificate")
        return cls(certificate, key, tuple(above))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the DER certificate, in hex: two people compare it to know that they have the same one."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def files(self, certificate_path: Path, key_path: Path) -> list[PemFile]:
        """The two files that hold it, for :func:`~frelay.pki.files.write_together`."""
        return [
            PemFile(certificate_path, certificates_pem([self.certificate, *self.above])),
            PemFile(key_path, key_pem(self.private_key), secret=True),
        ]

    def write(self, certificate_path: Path, key_path: Path, *, force: bool = False) -> list[Path]:
        """Write both files or neither; raises :class:`~frelay.errors.CertificateError`."""
        return write_together(self.files(certificate_path, key_path), force=force)

    def issue(
        self,
        *,
        common_name: str,
        dns: Sequence[str] = (),
        uris: Sequence[str] = (),
        ips: Sequence[str] = (),
        usage: Usage,
        days: int | None = None,
        algorithm: Algorithm = "p256",
    ) -> Issued:
        """Make a key and a certificate for a relay or a party.

        ``common_name`` is for people: no verifier of ours reads it as an identity. ``days`` is 825 or, if the
        authority expires earlier, until then. A relay's ``dns`` may begin with ``*.``.

        Raises:
            CertificateError: a name that could not be matched later, a life longer than the authority's, or a relay
                without any name to verify it by.
        """
        now = _now()
        end = self.certificate.not_valid_after_utc
        if end <= now:
            raise CertificateError(
                f"the authority {self.certificate.subject.rfc4514_string()} expired on {end:%Y-%m-%d}; make a new one"
            )
        if days is None:
            not_after = min(_after(now, _LEAF_DAYS), end)
        elif (not_after := _after(now, days)) > end:
            raise CertificateError(
                f"{days} days are longer than the authority is valid (until {end:%Y-%m-%d}); "
                f"ask for {(end - now).days} at most, or make a new authority"
            )
        names = _alternative_names(usage, dns, uris, ips)
        key = _new_key(algorithm)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_PURPOSES[usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.private_key, _hash_for(self.private_key))
        line = (self.certificate, *self.above)
        return Issued(certificate, key, (certificate, *(one for one in line if one.subject != one.issuer)))

    def revocation_list(
        self, revoked: Iterable[tuple[int, datetime]] = (), *, number: int, days: int
    ) -> x509.CertificateRevocationList:
        """Sign a CRL of ``(serial number, revoked when)``, valid for ``days``, but not longer than the authority.

        ``number`` is its CRLNumber, and must be above that of every CRL that this authority signed before:
        verifiers may keep the higher one. :meth:`revoke` counts up by itself.
        """
        entries = [_revoked(serial, when) for serial, when in revoked]
        return self._sign_crl(entries, number, days, _now() - CLOCK_SKEW)

    def revoke(
        self,
        previous: x509.CertificateRevocationList,
        serials: Iterable[int] = (),
        *,
        days: int,
        when: datetime | None = None,
    ) -> x509.CertificateRevocationList:
        """Sign the next CRL after ``previous``: it revokes the same and ``serials``, with a higher number.

        ``when`` is the date of the new entries (default: now); a serial that was revoked before keeps its date.
        Without serials it only renews the CRL.

        Raises:
            CertificateError: ``previous`` was not signed by this authority, has no CRLNumber, or has a date in the
            future.
        """
        if previous.issuer != self.certificate.subject or not self._signed(previous):
            raise CertificateError(
                f"the CRL is signed by {previous.issuer.rfc4514_string()} with a key that is not this authority's "
                f"({self.certificate.subject.rfc4514_string()}); give the CRL that belongs to it"
            )
        entries = {one.serial_number: one for one in previous}  # with the reason, if one was given
        for serial in serials:
            entries.setdefault(serial, _revoked(serial, when or _now()))
        # OpenSSL compares these dates, not the numbers: two CRLs of one second would be equally new.
        this_update = max(_now() - CLOCK_SKEW, previous.last_update_utc + timedelta(seconds=1))
        if this_update > _now():
            raise CertificateError(
                f"the CRL is dated {previous.last_update_utc:%Y-%m-%d %H:%M:%S} UTC and the next one must be later, "
                "which is in the future; check this machine's clock"
            )
        return self._sign_crl(entries.values(), crl_number(previous) + 1, days, this_update)

    def _sign_crl(
        self, revoked: Iterable[x509.RevokedCertificate], number: int, days: int, this_update: datetime
    ) -> x509.CertificateRevocationList:
        if number < 0:
            raise CertificateError(f"{number} is no CRLNumber: it must not be negative; count up from 1")
        now = _now()
        end = min(_after(now, days), self.certificate.not_valid_after_utc)
        if end <= now:
            raise CertificateError(
                f"the authority {self.certificate.subject.rfc4514_string()} has expired and can sign no CRL; "
                "make a new one"
            )
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(this_update)
            .next_update(end)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(one)
        return builder.sign(self.private_key, _hash_for(self.private_key))

    def _signed(self, crl: x509.CertificateRevocationList) -> bool:
        try:
            return crl.is_signature_valid(self.private_key.public_key())
        except (TypeError, ValueError):  # signed by a key of another kind
            return False

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        try:
            own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private_key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _now() -> datetime:
    # Certificates count whole seconds.
    return datetime.now(UTC).replace(microsecond=0)


def _after(now: datetime, days: int) -> datetime:
    if days < 1:
        raise CertificateError(f"a certificate cannot be valid for {days} days; give 1 or more")
    try:
        return now + timedelta(days=days)
    except OverflowError:
        raise CertificateError(f"{days} days would end after the year 9999; give fewer") from None


def _revoked(serial: int, when: datetime) -> x509.RevokedCertificate:
    try:
        return x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
    except ValueError as error:
        raise CertificateError(f"serial number {serial:x} of {when}: {error}; take it from the certificate") from None


def _new_key(algorithm: Algorithm) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    if algorithm == "p256":
        return ec.generate_private_key(ec.SECP256R1())
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    raise CertificateError(f"{algorithm!r} is not a known key algorithm; use one of {', '.join(get_args(Algorithm))}")


def _hash_for(key: SigningKey) -> hashes.SHA256 | None:
    # The Edwards curves hash by themselves.
    return hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None


def _subject(common_name: str) -> x509.Name:
    if not 0 < len(common_name) <= _MAX_COMMON_NAME or not common_name.isprintable():
        raise CertificateError(
            f"common name {common_name!r}: 1 to {_MAX_COMMON_NAME} printable characters are needed; "
            "it is a label for people, the identity is in the other names"
        )
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative_names(
    usage: Usage, dns: Sequence[str], uris: Sequence[str], ips: Sequence[str]
) -> list[x509.GeneralName]:
    if usage not in _PURPOSES:
        raise CertificateError(f"{usage!r} is not a usage; use one of {', '.join(_PURPOSES)}")
    if usage == "relay" and not (dns or ips):
        raise CertificateError("a relay needs a DNS name or an IP address, by which functions verify it; give one")
    try:
        # A client checks a relay's name as a host name, and there one leading wildcard label is well defined. The names
        # of a party are matched by selectors, and only the selector may have a wildcard.
        hosts = [
            f"*.{dns_name(one[2:]).value}" if usage == "relay" and one.startswith("*.") else dns_name(one).value
            for one in dns
        ]
        paths = [name.value for name in uri_names(uris)]
    except OddName as error:
        raise CertificateError(f"{error}; no selector could ever match it, so choose another name") from None
    try:
        addresses = [ipaddress.ip_address(one) for one in ips]
    except ValueError as error:
        raise CertificateError(f"{error}; write an address such as 192.0.2.1 or 2001:db8::1") from None
    return [
        *(x509.UniformResourceIdentifier(one) for one in paths),
        *(x509.DNSName(one) for one in dict.fromkeys(hosts)),
        *(x509.IPAddress(one) for one in dict.fromkeys(addresses)),
    ]


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _why_no_authority(certificate: x509.Certificate) -> str | None:
    """Why ``certificate`` is not that of an authority, or None."""
    try:
        extensions = certificate.extensions
        if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return "is not an authority's certificate (basicConstraints says CA:FALSE)"
        # RFC 5280, 4.2.1.3: without the extension, every use is allowed.
        usages = [one.value for one in extensions if isinstance(one.value, x509.KeyUsage)]
        if not all(usage.key_cert_sign and usage.crl_sign for usage in usages):
            return "may not sign certificates and CRLs (keyUsage lacks keyCertSign or cRLSign)"
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        return f"is not an authority's certificate ({error})"
    return None
