"""Reads the names in a verified certificate that selectors may match.

Only three things in a certificate are identities: the SAN URIs, the SAN DNS names, and the public key itself. The
common name, e-mail addresses, other names and IP addresses are never identities, whatever their text.

This module never raises and never guesses. A value that could be read in two ways is left out, and ``ignored`` says
why, so that a person can find out why no route matches a certificate. An odd DNS name is left out alone. With an odd
URI all other URIs are left out, since SPIFFE has one rule for all of them together. If the extensions cannot be parsed,
the certificate has no names at all, not even its key pin, because another parser may have understood its purposes and
constraints differently. A certificate with more than :data:`MOST_NAMES` names is refused as a whole, before any is
decoded: if only some were used, the certificate would mean something else than its authority signed.

Nothing is verified here. OpenSSL has checked the signature, dates, purpose, constraints and revocation before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from frelay.protocol.identity import (
    Kind,
    Name,
    OddName,
    alternative_name_count,
    distinguished_name_sizes,
    dns_name,
    spki_of_certificate,
    uri_names,
)

__all__ = ["MOST_NAMES", "PeerIdentity", "describe_unverified", "distinguished_name", "identities", "nobody"]

# Bounds of describe(): a certificate may have hundreds of names, but a log line should not.
_SHOWN: Final = 8
MOST_NAMES: Final = 256
"""How many names of all kinds a certificate may have. All of them are compared with routes at each JOIN."""
_SHOWN_LENGTH: Final = 256
# Bytes of DER. The log describes the certificate of every stranger, and a name of 80 KiB takes 30 ms.
_LONGEST_NAME: Final = 4096

_NEVER: Final[dict[type[x509.GeneralName], str]] = {
    x509.RFC822Name: "e-mail address",
    x509.IPAddress: "IP address",
    x509.DirectoryName: "directory name",
    x509.RegisteredID: "registered ID",
    x509.OtherName: "otherName",
}


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """The identity of a peer, from its certificate.

    ``names`` are what selectors match: URIs first, then DNS names, then the key pin. ``ignored`` holds a sentence for
    each thing in the certificate that is not an identity. ``subject`` and ``issuer`` are RFC 4514 text, safe to log.
    ``not_before`` and ``not_after`` are seconds since the epoch.
    """

    names: tuple[Name, ...]
    ignored: tuple[str, ...]
    subject: str
    issuer: str
    serial: int
    not_before: float
    not_after: float
    objection: str | None = None
    """Why nobody with this certificate is let in to any route; None if its names decide."""

    def describe(self) -> str:
        """One line for the log: subject, names (without the key pin), what was ignored, issuer, serial in hex."""
        shown = [name for name in self.names if name.kind is not Kind.SPKI]
        parts = [_short(self.subject) or "(no subject)", f"names {_some(shown) or 'none'}"]
        if self.ignored:
            parts.append(f"ignored {_some(self.ignored)}")
        parts += [f"issuer {_short(self.issuer)}", f"serial {self.serial:x}"]
        return "; ".join(parts)


def identities(certificate: x509.Certificate) -> PeerIdentity:
    """Read the names of ``certificate``, which must be verified already; no content of it makes this raise."""
    try:
        return _read(certificate)
    except Exception as error:  # a date before the year 1, or another value that only OpenSSL accepts
        return nobody(error)


def nobody(error: Exception) -> PeerIdentity:
    """The identity of a verified certificate that cannot be read because of ``error``: it has no names."""
    unreadable = f"(unreadable: {_reason(error)})"
    return PeerIdentity(
        names=(),
        ignored=(_unparsed(error),),
        subject=unreadable,
        issuer=unreadable,
        serial=0,
        not_before=0.0,
        not_after=0.0,
    )


def _unparsed(error: Exception) -> str:
    return f"all names, because the certificate cannot be parsed: {_reason(error)}"


def _read(certificate: x509.Certificate) -> PeerIdentity:
    names: list[Name] = []
    ignored: list[str] = []
    objection = None
    sizes = (0, 0)
    try:
        der = certificate.public_bytes(Encoding.DER)
        sizes = distinguished_name_sizes(der)
        count = alternative_name_count(der)
        if count > MOST_NAMES:
            objection = f"the certificate has {count} names, and at most {MOST_NAMES} are allowed"
            ignored.append(f"all names, because there are {count}: at most {MOST_NAMES} are allowed")
        else:
            names, ignored = _names(certificate, der)
    except Exception as error:  # whatever the parser raises: a certificate that it cannot read has no names
        names, ignored = [], [_unparsed(error)]
    return PeerIdentity(
        names=tuple(names),
        ignored=tuple(ignored),
        subject=_short_name(lambda: certificate.subject, sizes[1]),
        issuer=_short_name(lambda: certificate.issuer, sizes[0]),
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        objection=objection,
    )


def _short_name(read: Callable[[], x509.Name], size: int) -> str:
    """:func:`distinguished_name` of a name of ``size`` bytes; only its size if a stranger made it too long."""
    return distinguished_name(read) if size <= _LONGEST_NAME else f"(a name of {size} bytes)"


def describe_unverified(read: Callable[[], x509.Certificate]) -> str:
    """:meth:`PeerIdentity.describe` of the certificate that ``read`` returns, which is not verified; never raises.

    It helps a person to find a mistake: it says who the other side claims to be. Nothing may be decided by it.
    """
    try:
        return f"unverified: {identities(read()).describe()}"
    except Exception as error:  # a stranger made it: even its dates may be unreadable
        return f"unverified: (unreadable: {_reason(error)})"


def distinguished_name(read: Callable[[], x509.Name]) -> str:
    """The RFC 4514 text of the name that ``read`` returns, escaped so that it cannot forge or garble a log line.

    It takes a callable, because ``cryptography`` parses a name only when it is read, and may then raise.
    """
    try:
        text = read().rfc4514_string()
    except Exception as error:
        return f"(unreadable: {_reason(error)})"
    # RFC 4514, 2.4 allows any octet as \XX, so the text stays a distinguished name. isprintable() is false for
    # line ends, escape sequences and the characters that turn the direction of writing.
    return "".join(
        char if char.isprintable() else "".join(f"\\{octet:02x}" for octet in char.encode("utf-8", "surrogatepass"))
        for char in text
    )


def _names(certificate: x509.Certificate, der: bytes) -> tuple[list[Name], list[str]]:
    names: list[Name] = []
    ignored: list[str] = []
    pin = spki_of_certificate(der)
    extensions = certificate.extensions
    try:
        alternatives = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [pin], ["the common name: it is never an identity, and there is no other name"]

    uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    try:
        if any(uri[:7].lower() == "spiffe:" for uri in uris) and _may_sign(extensions):
            raise OddName("a SPIFFE ID in the certificate of an authority names no function")
        names += uri_names(uris)
    except OddName as odd:
        ignored.append(f"all URIs: {odd}" if len(uris) > 1 else str(odd))
    for value in alternatives.get_values_for_type(x509.DNSName):
        try:
            names.append(dns_name(value))
        except OddName as odd:
            ignored.append(str(odd))
    ignored += _other_kinds(alternatives)
    # A name that is there twice, or in upper and lower case, counts once.
    return [*dict.fromkeys(names), pin], ignored


def _other_kinds(alternatives: x509.SubjectAlternativeName) -> Iterator[str]:
    for one in alternatives:
        kind = _NEVER.get(type(one))
        if kind is not None:
            yield f"{kind} {_short(repr(one.value))}: never an identity"


def _may_sign(extensions: x509.Extensions) -> bool:
    """X509-SVID.md, section 5.2: a leaf has no cA flag, and neither keyCertSign nor cRLSign."""
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            return True
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            return True
    return False


def _reason(error: Exception) -> str:
    return _short(f"{type(error).__name__}: {error!s}".encode("unicode_escape").decode("ascii"))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."


def _some(things: Sequence[Name | str]) -> str:
    more = len(things) - _SHOWN
    shown = ", ".join(_short(str(one)) for one in things[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
