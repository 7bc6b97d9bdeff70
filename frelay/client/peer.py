"""Who the other function must be, and who its certificate says it is. Standard library only."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any

from frelay.errors import PeerIdentityMismatch
from frelay.protocol.identity import (
    Name,
    OddName,
    Selector,
    dns_name,
    match,
    parse_selector,
    spki_of_certificate,
    uri_names,
)

__all__ = ["agreed_protocol", "check_peer", "names_of_peer", "read_peer", "read_selectors", "without_root"]


def read_selectors(peer: str | Sequence[str]) -> tuple[Selector, ...]:
    """The selectors of a ``peer=`` argument: one, or several of which any will do; raises ValueError."""
    texts = [peer] if isinstance(peer, str) else list(peer)
    if not texts:
        raise ValueError("peer= names nobody: write for example peer='dns:func2.acme'")
    return tuple(parse_selector(without_root(text) if text.startswith("dns:") else text) for text in texts)


def without_root(name: str) -> str:
    """``name`` without the dot at its end that makes it absolute: certificates and SNI never have it."""
    return name[:-1] if name.endswith(".") and not name.endswith("..") else name


def agreed_protocol(tls: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The ALPN protocol that both sides agreed on; what is no text reads as ``""``, which nobody can have asked for."""
    try:
        return tls.selected_alpn_protocol()
    except UnicodeDecodeError:
        return ""


def names_of_peer(tls: ssl.SSLObject | ssl.SSLSocket) -> list[Name]:
    """The names in the peer's certificate, which TLS has verified; none where the ssl module cannot read it.

    None of them then, not even the key pin, as at the relay: another parser may have understood the rest differently.
    """
    try:
        return read_peer(tls.getpeercert(), tls.getpeercert(True))
    except Exception:
        # The ssl module decodes every field: UnicodeDecodeError, ssl.SSLError, or what its next version raises.
        return []


def read_peer(certificate: Any, der: bytes | None) -> list[Name]:
    """The names in a verified certificate, given as ``getpeercert()`` and ``getpeercert(True)``; odd ones are left out.

    The same rules as the relay's (``frelay.tls.identity``).
    """
    alternatives = (certificate or {}).get("subjectAltName", ())
    names: list[Name] = []
    try:
        names += uri_names([value for kind, value in alternatives if kind == "URI"])
    except OddName:
        pass
    for kind, value in alternatives:
        if kind == "DNS":
            try:
                names.append(dns_name(value))
            except OddName:
                continue
    if der is not None:
        names.append(spki_of_certificate(der))
    return names


def check_peer(expected: Sequence[Selector], found: Sequence[Name]) -> Name:
    """The name of the peer that is one of those expected; raises PeerIdentityMismatch."""
    name = match(expected, found)
    if name is None:
        raise PeerIdentityMismatch(" or ".join(str(item) for item in expected), [str(item) for item in found])
    return name
