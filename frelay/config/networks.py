"""A set of networks that quickly says whether it contains an address.

A route may admit all networks of a cloud, and the lists that clouds publish have thousands of entries. The relay checks
every connection against them, also those of strangers. Here a check costs one look-up for each prefix length that
occurs: at most 33 for IPv4 and 129 for IPv6.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from frelay.config.address import Network

__all__ = ["NetworkSet"]

_BITS: Final = {4: 32, 6: 128}


class NetworkSet:
    """An immutable set of networks; ``host in networks`` says whether one of them contains it.

    ``host`` is an IP address as text, with or without a scope. An IPv4-mapped address (``::ffff:10.0.0.1``) counts as
    its IPv4 address.
    """

    __slots__ = ("_prefixes",)

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._prefixes: Final[dict[int, dict[int, set[int]]]] = {4: {}, 6: {}}
        """By IP version, then by the number of host bits: the prefixes, shifted to the right by that number."""
        for network in networks:
            rest = _BITS[network.version] - network.prefixlen
            self._prefixes[network.version].setdefault(rest, set()).add(int(network.network_address) >> rest)

    def __contains__(self, host: str) -> bool:
        if not self._prefixes[4] and not self._prefixes[6]:
            return False
        address = ipaddress.ip_address(host)
        found = getattr(address, "ipv4_mapped", None) or address
        number = int(found)
        return any(number >> rest in prefixes for rest, prefixes in self._prefixes[found.version].items())
