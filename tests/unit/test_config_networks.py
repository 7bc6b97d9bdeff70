"""A set of networks contains the addresses of its networks, and a check costs the same for any number of them."""

from __future__ import annotations

import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frelay.config.address import Network
from frelay.config.networks import NetworkSet

networks = st.one_of(
    st.builds(
        lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda number, length: IPv6Network((number >> (128 - length) << (128 - length), length)),
        st.integers(0, 2**128 - 1),
        st.integers(0, 128),
    ),
)
near = st.tuples(networks, st.integers(-2, 2))


@given(listed=st.lists(networks, max_size=8), asked=st.lists(near, max_size=8), others=st.lists(st.ip_addresses()))
@example(listed=[ip_network("0.0.0.0/0")], asked=[], others=[IPv4Address(0), IPv6Address(0)])
@example(listed=[ip_network("::/0")], asked=[], others=[IPv4Address(1), IPv6Address(1)])
def test_it_holds_what_one_of_them_holds(
    listed: list[Network], asked: list[tuple[Network, int]], others: list[IPv4Address | IPv6Address]
) -> None:
    """Also the first and the last address of each network."""
    found = NetworkSet(listed)
    for network in listed:
        others += [network[0], network[-1]]
    for network, offset in asked:
        number = int(network[0]) + offset
        if 0 <= number < 2**network.max_prefixlen:
            others.append(type(network[0])(number))
    for address in others:
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        assert (str(address) in found) is any((mapped or address) in network for network in listed)


@pytest.mark.load
def test_a_cloud_of_networks_costs_what_one_does() -> None:
    """A check against 8,000 networks takes at most three times as long as against one."""

    def cost(count: int) -> float:
        found = NetworkSet(IPv4Network((number << 12, 20 + number % 5)) for number in range(1, count + 1))
        times = []
        for _ in range(50):
            began = time.perf_counter()
            for _ in range(20):
                assert "250.1.2.3" not in found
            times.append(time.perf_counter() - began)
        return min(times)

    one, many = cost(1), cost(8000)
    assert many <= 3 * one, (one, many)
