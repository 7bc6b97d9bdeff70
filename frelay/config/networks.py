"""Many networks at once: whether any of them holds an address, without trying one after the other.

The lists that clouds publish of their own networks have thousands of entries, and a route may let in all of them. Every
connection is asked about, a stranger's too; here it costs one look-up for each length of prefix that occurs, at most 33
for IPv4 and 129 for IPv6.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from frelay.config.address import Network

__all__ = ["NetworkSet"]

_BITS: Final = {4: 32, 6: 128}


class NetworkSet:
    """An immutable set of networks; ``host in networks`` says whether one of them holds it.

    ``host`` is an IP address as text, with or without a scope. One that stands for an IPv4 address
    (``::ffff:10.0.0.1``) is looked for as that.
    """

    __slots__ = ("_prefixes",)

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._prefixes: Final[dict[int, dict[int, set[int]]]] = {4: {}, 6: {}}
        """By version, then by how many bits are no part of the prefix: the prefixes, shifted to the right by those."""
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
