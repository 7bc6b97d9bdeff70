"""A route by itself: what it makes of an address, where no socket can give it one."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from frelay.config.model import Address, Limits, Route
from frelay.pairing import Forwarding
from frelay.route import LiveRoute


@pytest.mark.parametrize(
    ("host", "is_inside"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        # As an IPv6 socket that takes IPv4 as well would write it, one that somebody has passed to us, say.
        ("::ffff:10.1.2.3", True),
        ("::ffff:11.1.2.3", False),
        ("fe80::1", True),
        # A link-local address comes with the interface that it is on.
        ("fe80::1%eth0", True),
        ("fe81::1%eth0", False),
        ("::1", False),
    ],
)
async def test_allow_from_knows_an_address_however_it_is_written(host: str, is_inside: bool) -> None:
    networks = (ip_network("10.0.0.0/8"), ip_network("fe80::/64"))
    listen = Address("127.0.0.1", 0)
    table = Route(name="r", listen=listen, func1=(), func2=(), outer="none", allow_from=networks, source=Path("r"))
    route = LiveRoute(table, Limits(), policy_ends_pairings=True, forwarding=Forwarding(), trust=lambda: None)
    assert route.admits_address(host) is is_inside
