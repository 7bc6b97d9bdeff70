"""Finds selectors that can match nobody, because the name constraints of ``client_ca`` forbid such names.

It reports only what is certain. A name that the constraints permit may be impossible for another reason. OpenSSL checks
in each handshake whether a certificate obeys them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509

from frelay.protocol.identity import Kind, Selector
from frelay.tls.anchors import UNREADABLE

__all__ = ["NameLimits", "name_limits"]


@dataclass(frozen=True, slots=True)
class _Subtrees:
    """The constraints of one certificate on names of one kind. ``permitted`` is None if it permits all."""

    permitted: tuple[str, ...] | None
    excluded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NameLimits:
    """The names that the authorities above a function may give to it."""

    dns: tuple[_Subtrees, ...] = ()
    uri: tuple[_Subtrees, ...] = ()

    def permit(self, selector: Selector) -> bool:
        """Whether some name that ``selector`` matches may be permitted; if not, that is certain."""
        match selector.kind:
            case Kind.DNS:
                return all(_permits_dns(one, selector.pattern.split(".")) for one in self.dns)
            case Kind.URI:
                return all(_permits_uri(one, selector.pattern) for one in self.uri)
        return True


def name_limits(line: Sequence[x509.Certificate]) -> NameLimits:
    """The limits of a ``line``: an authority, followed by the authorities above it."""
    constraints = [found for one in line if (found := _constraints(one)) is not None]
    return NameLimits(
        dns=tuple(_subtrees(one, x509.DNSName) for one in constraints),
        uri=tuple(_subtrees(one, x509.UniformResourceIdentifier) for one in constraints),
    )


def _constraints(one: x509.Certificate) -> x509.NameConstraints | None:
    try:
        return one.extensions.get_extension_for_class(x509.NameConstraints).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None


def _subtrees(
    constraints: x509.NameConstraints, kind: type[x509.DNSName] | type[x509.UniformResourceIdentifier]
) -> _Subtrees:
    permitted = tuple(one.value.lower() for one in constraints.permitted_subtrees or () if isinstance(one, kind))
    excluded = tuple(one.value.lower() for one in constraints.excluded_subtrees or () if isinstance(one, kind))
    return _Subtrees(permitted or None, excluded)


# --- as OpenSSL compares (crypto/x509/v3_ncons.c) -----------------------------------------------------------------


def _permits_dns(subtrees: _Subtrees, pattern: list[str]) -> bool:
    if subtrees.permitted is not None and not any(_may_be_below(pattern, base) for base in subtrees.permitted):
        return False
    return not any(_is_below(pattern, base) for base in subtrees.excluded)


def _may_be_below(pattern: list[str], base: str) -> bool:
    """Whether some name of ``pattern`` is in the subtree ``base``."""
    tail = _tail(pattern, base)
    return tail is not None and all(found in ("*", wanted) for found, wanted in tail)


def _is_below(pattern: list[str], base: str) -> bool:
    """Whether all names of ``pattern`` are in the subtree ``base``."""
    tail = _tail(pattern, base)
    return tail is not None and all(found == wanted for found, wanted in tail)


def _tail(pattern: list[str], base: str) -> list[tuple[str, str]] | None:
    """The last labels of ``pattern`` in pairs with those of ``base``; None if it has too few."""
    if not base:
        return []
    labels = base.removeprefix(".").split(".")
    # A leading dot requires one more label.
    if len(pattern) < len(labels) + base.startswith("."):
        return None
    return list(zip(pattern[-len(labels) :], labels, strict=True))


def _permits_uri(subtrees: _Subtrees, pattern: str) -> bool:
    if subtrees.permitted is None and not subtrees.excluded:
        return True
    _, slashes, rest = pattern.partition("://")
    host = rest.replace("/", ":").partition(":")[0].lower()
    if not slashes or not host:
        return False  # with constraints on hosts, OpenSSL refuses a URI without a host
    if subtrees.permitted is not None and not any(_is_host_in(host, base) for base in subtrees.permitted):
        return False
    return not any(_is_host_in(host, base) for base in subtrees.excluded)


def _is_host_in(host: str, base: str) -> bool:
    return len(host) > len(base) and host.endswith(base) if base.startswith(".") else host == base
