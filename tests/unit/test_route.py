"""A route by itself, in situations that a test cannot cause with sockets and clocks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import cast

import pytest

from frelay.config.model import Address, Addresses, Limits, Route
from frelay.joining.charges import Charges
from frelay.joining.lobby import Matched
from frelay.joining.route import LiveRoute
from frelay.net.streams import RawStream
from frelay.pairing.forwarding import Forwarding
from frelay.pairing.leg import Leg, LegGone
from frelay.pairing.pairing import Pairing
from frelay.protocol.identity import parse_selector
from frelay.protocol.messages import LegParty
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.tls.trust import EXPIRED, OuterTls, VerifiedPeer
from support.streams import tcp_pair


class StandInLeg(Leg):
    """A leg with nothing but a connection and a certificate."""

    def __init__(self, party: LegParty, sock: socket.socket) -> None:
        self.party = party
        self.identity = f"dns:{party}.demo"
        self.peer = cast(VerifiedPeer, object())
        self._sock = sock

    @property
    def sock(self) -> socket.socket:
        return self._sock

    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone:
        raise AssertionError("it is matched, and no more")

    async def refuse(self, refusal: Refusal) -> None:
        raise AssertionError("it is matched, and no more")

    def stream(self) -> RawStream:
        raise AssertionError("it is matched, and no more")

    def close(self) -> None:
        raise AssertionError("it is matched, and no more")


class Judge:
    """An outer TLS that rejects the certificates of some legs since they were let in."""

    def __init__(self) -> None:
        self.rejected: list[VerifiedPeer | None] = []

    def recheck(self, peer: VerifiedPeer) -> Refusal | None:
        return EXPIRED if peer in self.rejected else None


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    one, other = tcp_pair()
    with one, other:
        yield one


async def test_nobody_is_paired_with_one_whose_certificate_is_no_longer_good(connection: socket.socket) -> None:
    """A waiting leg has a deadline for that, and a reload checks all waiting legs; the match checks once more.

    It is the last of three checks, and the only one that does not depend on which task runs first.
    """
    judge = Judge()
    table = Route(name="r", listen=Addresses([Address("127.0.0.1", 0)]), func1=(), func2=(), source=Path("r"))
    route = LiveRoute(
        table, Limits(), policy_ends_pairings=True, forwarding=Forwarding(), trust=lambda: cast(OuterTls, judge)
    )
    woken = []
    first, second = StandInLeg("func1", connection), StandInLeg("func1", connection)
    waiters = [
        route.lobby.enter(leg, lambda leg=leg: woken.append(leg), recompute_expiry=lambda: None)  # type: ignore[misc]
        for leg in (first, second)
    ]
    judge.rejected.append(first.peer)
    pairing = route.match(StandInLeg("func2", connection))
    assert isinstance(pairing, Pairing)
    assert pairing.legs["func1"] is second
    assert waiters[0].verdict == EXPIRED
    assert waiters[1].verdict == Matched(pairing)
    assert woken == [first, second]


async def test_nobody_is_paired_on_a_route_that_is_gone(connection: socket.socket) -> None:
    """Waiting legs are evicted a few at a time, and the service of one of them may answer in between."""
    table = Route(name="r", listen=Addresses([Address("127.0.0.1", 0)]), func1=(), func2=(), source=Path("r"))
    route = LiveRoute(table, Limits(), policy_ends_pairings=True, forwarding=Forwarding(), trust=lambda: None)
    waiters = [
        route.lobby.enter(StandInLeg("func1", connection), lambda: None, recompute_expiry=lambda: None)
        for _ in range(100)
    ]
    refusal = Refusal("route-removed", "the route was removed")
    route.close(refusal, outcome=Outcome.ROUTE_REMOVED, cut_at=0.0)
    assert waiters[-1].verdict is None
    assert route.match_with(waiters[-1], StandInLeg("func2", connection)) is refusal
    assert not route.pairings


@pytest.mark.parametrize(
    ("host", "is_inside"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        # As an IPv6 socket writes it that takes IPv4 as well; systemd may pass such a socket.
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
    listen = Addresses([Address("127.0.0.1", 0)])
    table = Route(name="r", listen=listen, func1=(), func2=(), outer="none", allow_from=networks, source=Path("r"))
    route = LiveRoute(table, Limits(), policy_ends_pairings=True, forwarding=Forwarding(), trust=lambda: None)
    assert route.admits_address(host) is is_inside


@pytest.mark.parametrize(
    ("names", "holder"), [(("dns:a", "dns:b"), "dns:either.demo"), (("dns:a",), "route r, either")], ids=["list", "one"]
)
def test_a_leg_that_may_be_either_is_charged_like_the_parties(
    names: tuple[str, ...], holder: str, connection: socket.socket
) -> None:
    """To its function where several may be one of them; to its side where only one name can be."""
    selectors = tuple(map(parse_selector, names))
    table = Route(
        name="r", listen=Addresses([Address("127.0.0.1", 0)]), func1=selectors, func2=selectors[:1], source=Path("r")
    )
    leg = StandInLeg("either", connection)
    assert Charges(table).waiting(leg) == holder
