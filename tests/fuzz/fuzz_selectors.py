"""Any text or certificate gives names and selectors with one meaning, or a ValueError.

Input: one byte for its kind; then, by that byte modulo 4,

0. the text of a selector and, after a line end, that of a name: each has one meaning, and they match exactly if a
   regular expression made of the selector does;
1. the content of a subjectAltName extension, and
2. a whole certificate in DER: its identities are returned or left out, nothing is raised, and each fits only itself;
3. DER in which a public key is searched.

The description of a certificate stays short and printable, however large the certificate is.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from campaign import run
from frelay.pki.authority import Authority
from frelay.protocol.identity import (
    Kind,
    Name,
    OddName,
    Selector,
    dns_name,
    match,
    parse_selector,
    spki_name,
    spki_of_certificate,
    uri_names,
)
from frelay.tls.identity import describe_unverified, identities

__all__ = ["certificate_with", "one_input"]

# describe() shows eight names and eight reasons of at most 256 characters each, and two distinguished names.
_LONGEST: Final = 20 * 300


# --- selectors and names --------------------------------------------------------------------------------------------


def any_name(text: str) -> Name | None:
    """``text`` of a certificate or of the wire as a name, or None if it is none."""
    kind, _, value = text.partition(":")
    try:
        if kind == "dns":
            return dns_name(value)
        if kind == "uri":
            [found] = uri_names([value])
            return found
        return spki_name(value)
    except OddName:
        return None


def any_selector(text: str) -> Selector | None:
    try:
        return parse_selector(text)
    except ValueError:
        return None


def as_expression(selector: Selector) -> re.Pattern[str]:
    """What ``selector`` matches, in another notation."""
    star = "[^.]+" if selector.kind is Kind.DNS else r"(?!\.\.?(?:[/?#]|\Z))[^/?#%]+"
    return re.compile(star.join(re.escape(part) for part in selector.pattern.split("*")) + r"\Z")


def check_texts(text: str) -> None:
    pattern, _, written = text.partition("\n")
    selector, name = any_selector(pattern), any_name(written)
    if selector is not None:
        assert str(selector).isprintable()
        assert parse_selector(str(selector)) == selector
    if name is not None:
        check_name(name)
    if selector is not None and name is not None:
        fits = selector.kind is name.kind and as_expression(selector).match(name.value) is not None
        assert selector.matches(name) is fits
        assert match([selector], [name]) == (name if fits else None)


def check_name(name: Name) -> None:
    """A name fits the selector that has its text, and that selector matches nothing else."""
    assert "*" not in name.value
    assert str(name).isprintable()
    assert str(name).isascii()
    own = parse_selector(str(name))
    assert (own.kind, own.pattern) == (name.kind, name.value)
    assert own.matches(name)


# --- certificates ---------------------------------------------------------------------------------------------------


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, size] if size < 0x80 else [tag, 0x80 | len(length), *length]) + content


def _split(content: bytes) -> list[bytes]:
    """``content`` as DER elements, with lengths in short form, or of one or two octets."""
    elements = []
    while content:
        octets = max(0, content[1] - 0x80)
        length = int.from_bytes(content[2 : 2 + octets], "big") if octets else content[1]
        end = 2 + octets + length
        elements.append(content[:end])
        content = content[end:]
    return elements


@cache
def _around() -> tuple[bytes, bytes]:
    """The parts of a valid certificate before its extensions, and after its signed part."""
    issued = Authority.create("fuzz CA").issue(common_name="party", dns=["func1.demo"], usage="party")
    [whole] = _split(issued.certificate.public_bytes(Encoding.DER))
    body, *behind = _split(whole[4:])
    *before, _ = _split(body[4:])
    return b"".join(before), b"".join(behind)


def certificate_with(san: bytes) -> bytes:
    """A certificate whose subjectAltName has this content. Its signature is wrong, but that is not checked here."""
    before, behind = _around()
    extension = _der(0x30, bytes.fromhex("0603551d11") + _der(0x04, san))
    return _der(0x30, _der(0x30, before + _der(0xA3, _der(0x30, extension))) + behind)


def check_certificate(octets: bytes) -> None:
    line = describe_unverified(lambda: x509.load_der_x509_certificate(octets))
    assert line.isprintable()
    assert len(line) < _LONGEST
    try:
        certificate = x509.load_der_x509_certificate(octets)
    except (ValueError, x509.InvalidVersion):
        return
    identity = identities(certificate)
    for name in identity.names:
        check_name(name)
    assert len(set(identity.names)) == len(identity.names)
    # All or nothing: a certificate that could be read has the pin of its key.
    assert [name.kind for name in identity.names].count(Kind.SPKI) == (1 if identity.names else 0)
    assert identity.subject.isprintable()
    assert identity.issuer.isprintable()


def check_pin(octets: bytes) -> None:
    try:
        name = spki_of_certificate(octets)
    except OddName:
        return
    check_name(name)


def one_input(data: bytes) -> None:
    """Check one input; raises AssertionError, or the exception that should never be raised."""
    if not data:
        return
    what, content = data[0] % 4, data[1:]
    if what == 0:
        check_texts(content.decode("utf-8", "surrogateescape"))
    elif what == 1:
        check_certificate(certificate_with(content))
    elif what == 2:
        check_certificate(content)
    else:
        check_pin(content)


if __name__ == "__main__":
    run(one_input, instrument=("frelay.protocol", "frelay.tls.identity", "urllib.parse", "__main__"))
