"""Certificates for tests: good ones, and every bad one that the relay must not let in.

Keys are P-256 unless a test says otherwise, so a whole set costs a few milliseconds; nothing is cached or shared
between tests. Good certificates come from :mod:`frelay.pki` as users get them, odd ones straight from ``cryptography``,
and from :mod:`support.der` where ``cryptography`` would refuse to write them::

    from support.certs import TestAuthority, self_signed

    async def test_something(tmp_path: Path) -> None:
        ca = TestAuthority()
        ca_path = ca.write(tmp_path)                                     # tmp_path/ca.pem
        crl_path = ca.write_crl(tmp_path, ca.crl())                      # tmp_path/crl.pem, nobody revoked
        cert, key = ca.relay().write(tmp_path)                           # tmp_path/relay.pem, relay.key (0600)
        cert1, key1 = ca.party(dns=["func1.demo"]).write(tmp_path)       # tmp_path/func1.demo.pem, .key
        bad = ca.expired(dns=["func1.demo"])                             # ... and so on, see below
        stranger = TestAuthority("other CA").party(dns=["func1.demo"])
        ca.write_crl(tmp_path, ca.crl(revoked=[bad], number=2))          # replaces it

Every certificate is a :class:`Credential` with ``cert_pem``, ``key_pem`` and ``chain_pem`` (bytes), ``name`` and
``write(directory, name=None)``; the certificate file that it writes is the chain, leaf first.

=========================================  ==========================================================================
``ca.relay()``                             serverAuth; relay.test, localhost, 127.0.0.1, ::1
``ca.party(dns=, uris=)``                  what a function has
``ca.expired(...)`` ``.not_yet_valid()``   outside its dates; ``ca.ending(seconds)`` ends soon
``ca.server_only(...)``                    serverAuth without clientAuth; ``ca.client_only(...)`` the other way round
``ca.cn_only(text)``                       the name in the CN, no SAN
``ca.text_elsewhere(text)``                the text as e-mail, otherName, directory name and URI, not as DNS name
``ca.odd(san)``                            any subjectAltName: GeneralNames, or DER made by ``san_der``
``ca.rework(one, edit)``                   any octets at all, under a right signature
``self_signed(...)``                       its own issuer
``ca.intermediate(...)``                   an authority below ``ca``, with name constraints if wanted
``ca.crl(...)``                            fresh; ``revoked=`` somebody; ``ca.expired_crl()``
=========================================  ==========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from frelay.pki.authority import Authority, Issued, SigningKey
from frelay.pki.files import certificates_pem, key_pem
from support.der import content, der, elements

__all__ = ["Credential", "TestAuthority", "self_signed"]

_CLIENT_AND_SERVER: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True)
class Credential:
    """A certificate with its key, in every form a test wants it."""

    name: str
    certificate: x509.Certificate
    private_key: SigningKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = field(repr=False)
    """What is sent to the TLS peer: the leaf, then the intermediates, never the root."""

    @property
    def cert_pem(self) -> bytes:
        """The certificate alone."""
        return certificates_pem([self.certificate])

    @property
    def chain_pem(self) -> bytes:
        """The certificate and its intermediates."""
        return certificates_pem(self.chain)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.private_key)

    def write(self, directory: Path, name: str | None = None) -> tuple[Path, Path]:
        """Write NAME.pem (the chain) and NAME.key (mode 0600) into ``directory``, replacing them."""
        cert_path = directory / f"{name or self.name}.pem"
        key_path = directory / f"{name or self.name}.key"
        _write(cert_path, self.chain_pem, 0o644)
        _write(key_path, self.key_pem, 0o600)
        return cert_path, key_path


class TestAuthority:
    """A certificate authority for one test. Nobody trusts ``TestAuthority("other CA")``."""

    __test__ = False  # the name is for readers; pytest should not collect it

    def __init__(self, common_name: str = "test CA", *, authority: Authority | None = None) -> None:
        self.authority: Final = authority or Authority.create(common_name)

    # --- good ones ---

    def relay(
        self,
        *,
        dns: Sequence[str] = ("relay.test", "localhost"),
        ips: Sequence[str] = ("127.0.0.1", "::1"),
        common_name: str = "relay",
    ) -> Credential:
        """The certificate of a relay."""
        return _credential(self.authority.issue(common_name=common_name, dns=dns, ips=ips, usage="relay"), common_name)

    def party(
        self,
        *,
        dns: Sequence[str] = (),
        uris: Sequence[str] = (),
        common_name: str | None = None,
    ) -> Credential:
        """A function's certificate; named after its first name. Without ``dns`` and ``uris`` only its key pins it."""
        name = common_name or _file_name([*dns, *uris, "party"][0])
        return _credential(self.authority.issue(common_name=name[:64], dns=dns, uris=uris, usage="party"), name)

    # --- bad ones: right in everything but one ---

    def expired(self, *, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
        """Ended an hour ago."""
        now = datetime.now(UTC)
        return self.odd(_san(dns, uris), name="expired", not_before=now - _DAY, not_after=now - timedelta(hours=1))

    def not_yet_valid(self, *, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
        """Begins tomorrow."""
        now = datetime.now(UTC)
        return self.odd(_san(dns, uris), name="not-yet-valid", not_before=now + _DAY, not_after=now + 2 * _DAY)

    def ending(self, seconds: float, *, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
        """Good now, and for about ``seconds`` more: certificates count whole seconds, so up to one second less."""
        return self.odd(_san(dns, uris), name="ending", not_after=datetime.now(UTC) + timedelta(seconds=seconds))

    def server_only(self, *, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
        """For servers only, as most public authorities issue them now."""
        return self.odd(_san(dns, uris), name="server-only", purposes=[ExtendedKeyUsageOID.SERVER_AUTH])

    def client_only(self, *, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
        """For clients only, as templates for "client certificates" say."""
        return self.odd(_san(dns, uris), name="client-only", purposes=[ExtendedKeyUsageOID.CLIENT_AUTH])

    def cn_only(self, text: str) -> Credential:
        """``text`` as common name, and no SAN."""
        return self.odd(None, name="cn-only", common_name=text)

    def text_elsewhere(self, text: str) -> Credential:
        """``text`` as common name and as every kind of SAN that can hold it, except DNS name."""
        upn = x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3")
        return self.odd(
            [
                x509.RFC822Name(text),
                x509.RFC822Name(f"{text}@{text}"),
                x509.OtherName(upn, der(0x0C, text.encode())),
                x509.DirectoryName(_name(text)),
                x509.UniformResourceIdentifier(text),
            ],
            name="text-elsewhere",
            common_name=text,
        )

    def odd(
        self,
        san: Iterable[x509.GeneralName] | bytes | None,
        *,
        name: str = "odd",
        common_name: str | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = _CLIENT_AND_SERVER,
        extra: Sequence[x509.ExtensionType] = (),
        critical: Sequence[x509.ExtensionType] = (),
        ca: bool = False,
        key: SigningKey | None = None,
        usages: Sequence[str] = (),
    ) -> Credential:
        """A party's certificate in which anything may be strange.

        ``san`` is a list of GeneralNames, the DER of the whole extension value (:func:`san_der`), or None for no SAN.
        ``extra`` and ``critical`` extensions are added as they are. ``key`` is the party's own, instead of a P-256 one,
        and ``usages`` are key usages that a leaf has not.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(
            subject=_name(common_name or name),
            key=key,
            issuer=self.authority.certificate,
            issuer_key=self.authority.private_key,
            san=san,
            not_before=not_before,
            not_after=not_after,
            purposes=purposes,
            extra=extra,
            critical=critical,
            ca=ca,
            usages=usages,
        )
        return Credential(name, certificate, key, (certificate, *self._chain()))

    def rework(
        self, credential: Credential, edit: Callable[[list[bytes]], None], *, digest: hashes.HashAlgorithm | None = None
    ) -> bytes:
        """``credential`` with its signed part edited as DER and signed again: what no builder would make.

        ``edit`` is given the DER elements of the TBSCertificate: version, serial number, signature algorithm, issuer,
        validity, subject, public key, extensions.
        """
        octets = credential.certificate.public_bytes(serialization.Encoding.DER)
        return self.rework_der(octets, edit, algorithm=2, digest=digest)

    def rework_der(
        self,
        octets: bytes,
        edit: Callable[[list[bytes]], None],
        *,
        algorithm: int,
        digest: hashes.HashAlgorithm | None = None,
    ) -> bytes:
        """:meth:`rework` for anything that is signed; ``algorithm`` is where its signature algorithm stands."""
        parts = elements(content(elements(content(octets))[0]))
        edit(parts)
        signed = der(0x30, b"".join(parts))
        assert isinstance(self.authority.private_key, ec.EllipticCurvePrivateKey)
        signature = self.authority.private_key.sign(signed, ec.ECDSA(digest or hashes.SHA256()))
        return der(0x30, signed + parts[algorithm] + der(0x03, b"\0" + signature))

    # --- authorities below this one ---

    def intermediate(
        self,
        common_name: str = "test intermediate CA",
        *,
        permitted: Sequence[x509.GeneralName] | None = None,
        excluded: Sequence[x509.GeneralName] | None = None,
        path_length: int | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
        not_after: datetime | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = (),
    ) -> TestAuthority:
        """An authority signed by this one; ``permitted`` and ``excluded`` are its name constraints.

        One whose ``not_after`` has passed began a day before that.

        With the ``key`` and the name of an authority that somebody else has signed, it is cross-signed.

        ``ca.intermediate(permitted=[x509.DNSName("acme")]).party(dns=["func1.demo"])`` violates them. The root needs
        room below it, so make it with :meth:`root_for_intermediates`.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        constraints = [x509.NameConstraints(permitted, excluded)] if permitted or excluded else []
        certificate = _sign(
            subject=_name(common_name),
            key=key,
            issuer=self.authority.certificate,
            issuer_key=self.authority.private_key,
            san=None,
            purposes=purposes,
            critical=constraints,
            ca=True,
            path_length=path_length,
            not_before=None if not_after is None else not_after - _DAY,
            not_after=not_after,
        )
        above = (self.authority.certificate, *self.authority.above)
        return TestAuthority(authority=Authority(certificate, key, above))

    @classmethod
    def root_for_intermediates(
        cls,
        common_name: str = "test root CA",
        *,
        key: ec.EllipticCurvePrivateKey | None = None,
        not_after: datetime | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = (),
        critical: Sequence[x509.ExtensionType] = (),
    ) -> TestAuthority:
        """A root without a pathlen; those that frelay makes have pathlen 0 and allow no authority below them."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = _name(common_name)
        certificate = _sign(
            subject=subject,
            key=key,
            issuer=None,
            issuer_key=key,
            san=None,
            purposes=purposes,
            critical=critical,
            ca=True,
            not_before=None if not_after is None else not_after - _DAY,
            not_after=not_after,
        )
        return cls(authority=Authority(certificate, key))

    # --- what a verifier needs ---

    @property
    def root(self) -> x509.Certificate:
        """The trust anchor: this authority, or the topmost above it."""
        return (self.authority.certificate, *self.authority.above)[-1]

    @property
    def cert_pem(self) -> bytes:
        """The trust anchor in PEM."""
        return certificates_pem([self.root])

    def write(self, directory: Path, name: str = "ca") -> Path:
        """Write the trust anchor to NAME.pem in ``directory``, replacing it; give its path."""
        path = directory / f"{name}.pem"
        _write(path, self.cert_pem, 0o644)
        return path

    def crl(
        self,
        *,
        revoked: Iterable[Credential] = (),
        number: int = 1,
        last_update: datetime | None = None,
        next_update: datetime | None = None,
        critical: Sequence[x509.ExtensionType] = (),
    ) -> bytes:
        """A CRL in PEM, fresh unless the dates say otherwise. For a chain, join those of all its authorities."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.authority.certificate.subject)
            .last_update(last_update or now - timedelta(minutes=5))
            .next_update(next_update or now + _DAY)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(_authority_key_identifier(self.authority.certificate), critical=False)
        )
        for extension in critical:
            builder = builder.add_extension(extension, critical=True)
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(one.certificate.serial_number)
                .revocation_date(now - timedelta(minutes=1))
                .build()
            )
        return builder.sign(self.authority.private_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def expired_crl(self, *, revoked: Iterable[Credential] = (), number: int = 1) -> bytes:
        """A CRL whose nextUpdate was an hour ago."""
        now = datetime.now(UTC)
        return self.crl(revoked=revoked, number=number, last_update=now - _DAY, next_update=now - timedelta(hours=1))

    def write_crl(self, directory: Path, crl: bytes, name: str = "crl") -> Path:
        """Write ``crl`` to NAME.pem in ``directory``, replacing it by rename; give its path."""
        path = directory / f"{name}.pem"
        _write(path, crl, 0o644)
        return path

    def _chain(self) -> tuple[x509.Certificate, ...]:
        line = (self.authority.certificate, *self.authority.above)
        return tuple(one for one in line if one.subject != one.issuer)


def self_signed(*, dns: Sequence[str] = (), uris: Sequence[str] = ()) -> Credential:
    """A party's certificate that no authority has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(
        subject=_name("self-signed"), key=key, issuer=None, issuer_key=key, san=_san(dns, uris), ca=False
    )
    return Credential("self-signed", certificate, key, (certificate,))


# --- inside -------------------------------------------------------------------------------------------------------


def _credential(issued: Issued, name: str) -> Credential:
    return Credential(name, issued.certificate, issued.private_key, issued.chain)


def _file_name(text: str) -> str:
    return "".join(char if char.isalnum() or char in ".-_" else "-" for char in text).strip(".-")[:100] or "party"


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _san(dns: Sequence[str], uris: Sequence[str]) -> list[x509.GeneralName]:
    return [*(x509.DNSName(one) for one in dns), *(x509.UniformResourceIdentifier(one) for one in uris)]


def _authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _sign(
    *,
    subject: x509.Name,
    key: SigningKey,
    issuer: x509.Certificate | None,
    issuer_key: SigningKey,
    san: Iterable[x509.GeneralName] | bytes | None,
    ca: bool,
    path_length: int | None = None,
    purposes: Sequence[x509.ObjectIdentifier] = _CLIENT_AND_SERVER,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    extra: Sequence[x509.ExtensionType] = (),
    critical: Sequence[x509.ExtensionType] = (),
    usages: Sequence[str] = (),
) -> x509.Certificate:
    """Sign with nothing checked; ``issuer`` None makes it self-signed."""
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5) if not_before is None else not_before)
        .not_valid_after(now + 2 * _DAY if not_after is None else not_after)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca or "key_cert_sign" in usages,
                crl_sign=ca or "crl_sign" in usages,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(identifier, critical=False)
    )
    if issuer is not None:
        builder = builder.add_extension(_authority_key_identifier(issuer), critical=False)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if isinstance(san, bytes):
        unread = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, san)
        builder = builder.add_extension(unread, critical=False)
    elif san is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    for extension in critical:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _write(path: Path, octets: bytes, mode: int) -> None:
    # By rename, and with its mode from the start: a relay that watches the directory never sees half a file.
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(octets)
    temporary.replace(path)
