"""The names that the other function must have, and those that its certificate shows. Standard library only."""

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
    """The selectors of a ``peer=`` argument; the peer must match one of them. Raises ValueError."""
    texts = [peer] if isinstance(peer, str) else list(peer)
    if not texts:
        raise ValueError("peer= names nobody: write for example peer='dns:func2.acme'")
    return tuple(parse_selector(without_root(text) if text.startswith("dns:") else text) for text in texts)


def without_root(name: str) -> str:
    """``name`` without the final dot of an absolute name: certificates and SNI never have it."""
    return name[:-1] if name.endswith(".") and not name.endswith("..") else name


def agreed_protocol(tls: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The ALPN protocol that both sides agreed on. Bytes that are no text give ``""``, which is never offered."""
    try:
        return tls.selected_alpn_protocol()
    except UnicodeDecodeError:
        return ""


def names_of_peer(tls: ssl.SSLObject | ssl.SSLSocket) -> list[Name]:
    """The names in the peer's certificate, which TLS has verified; none if the ssl module cannot parse it.

    Then the key pin does not count either, as at the relay: another parser may read such a certificate differently.
    """
    try:
        return read_peer(tls.getpeercert(), tls.getpeercert(True))
    except Exception:
        # The ssl module decodes every field. It raises UnicodeDecodeError, ssl.SSLError, or in future something else.
        return []


def read_peer(certificate: Any, der: bytes | None) -> list[Name]:
    """The names in a verified certificate, given as ``getpeercert()`` and ``getpeercert(True)``.

    Malformed names are left out.

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
    """The name of the peer that matches an expected selector; raises PeerIdentityMismatch."""
    name = match(expected, found)
    if name is None:
        raise PeerIdentityMismatch(" or ".join(str(item) for item in expected), [str(item) for item in found])
    return name
