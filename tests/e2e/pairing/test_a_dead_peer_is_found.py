"""What finds a peer that is gone: the kernel's probes on every leg, and a last check before a leg is paired.

test_a_cut_cable_is_noticed.py shows in a network namespace that the probes find a peer behind a network that drops
everything. For the PINGs of a waiting leg see test_waiting_legs_are_pinged.py, for stalls
test_limits_never_strike_early.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import trio

from frelay.joining.frameless_legs import BareLeg
from frelay.joining.legs import FramedLeg
from support.ends import OPEN, PLAIN, Mode, join_ends
from support.party import Party
from support.relay import address_seen
from support.site import DEMO, Site
from support.waiting import eventually

TCP = '[tcp]\nkeepalive = [11, 7, 2]\nuser_timeout = 130\ncongestion_control = "reno"\n'


def check_probes(sock: socket.socket) -> None:
    """The values of [tcp]: for a silent peer, and for one that acknowledges nothing. Neither covers the other case."""
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 11
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 7
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 2
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 130_000
    # Not a probe, but the same code sets it, for the same legs.
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"


@pytest.mark.parametrize("mode", ["raw", "tunnel", "bare", "plain"])
async def test_every_kind_of_leg_is_probed(site: Site, mode: Mode) -> None:
    async with site.relay(PLAIN if mode == "plain" else OPEN, sections=TCP) as relay:
        await join_ends(site, relay, mode, mode)
        (pairing,) = relay.relay.pairings
        for leg in pairing.legs.values():
            check_probes(leg.sock)


async def test_a_leg_that_waits_is_probed(site: Site) -> None:
    async with site.relay(sections=TCP) as relay:
        party = await site.party(relay, "func1")
        await party.join()
        await party.expect("WAITING")
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        (place,) = relay.relay.routes["demo"].lobby.waiting("func1")
        check_probes(place.leg.sock)


async def test_the_connection_that_a_ticket_was_brought_on_is_probed(site: Site) -> None:
    async with site.relay(sections=TCP) as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join(modes=["ticket"])
        await one.expect("WAITING")
        await two.join()
        ticket = (await one.expect("PAIRED"))["ticket"]
        await two.expect("WAITING")
        await two.expect("PAIRED")
        await two.hand_off()
        second = await site.connect(relay, None)
        await second.send_raw(f"FRELAY/1 {ticket}\n".encode())
        await relay.log("handed off")
        (pairing,) = relay.relay.pairings
        host, port = pairing.legs["func1"].sock.getpeername()
        assert f"{host}:{port}" == address_seen(relay, second)
        check_probes(pairing.legs["func1"].sock)


async def test_a_leg_of_the_oldest_clients_is_probed(site: Site) -> None:
    async with site.relay(OPEN + 'handoff = "hello"\n', sections=TCP) as relay:
        party = await site.party(relay, "func1", alpn=())
        await party.send(b"hello\n")
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        (place,) = relay.relay.routes["demo"].lobby.waiting("func1")
        check_probes(place.leg.sock)


def by_fin(party: Party) -> None:
    party.take_in()
    party.close()


def by_reset(party: Party) -> None:
    party.reset()


@pytest.mark.parametrize("goodbye", [by_fin, by_reset])
@pytest.mark.parametrize("kind", ["framed", "bare"])
async def test_nobody_is_paired_with_a_leg_that_is_seen_to_be_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch, kind: str, goodbye: Callable[[Party], None]
) -> None:
    """The leg goes when its partner comes, before the leg's own task can notice. The next leg in line is paired.

    The test keeps the task from looking, so it cannot notice.
    """

    async def attend(leg: object, *, ping_interval: float, pong_timeout: float) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(FramedLeg if kind == "framed" else BareLeg, "attend", attend)
    alpn = ("frelay/1",) if kind == "framed" else ()

    async def waiter() -> Party:
        had = relay.waiting()[0]
        party = await site.party(relay, "func1", alpn=alpn)
        if kind == "framed":
            await party.join(modes=["tunnel"])
            await party.expect("WAITING")
        await eventually(lambda: relay.waiting() == (had + 1, 0), "its place")
        return party

    async with site.relay(DEMO + "require_inner_tls = false\n") as relay:
        gone, alive = await waiter(), await waiter()
        lobby = relay.relay.routes["demo"].lobby
        first = lobby.waiting("func1")[0].leg
        goodbye(gone)
        await eventually(first.is_gone, "its end has arrived")
        assert relay.waiting() == (2, 0)
        two = await site.party(relay, "func2")
        await two.join(modes=["tunnel"])
        await two.expect("WAITING")
        await two.expect("PAIRED")
        if kind == "framed":
            await alive.expect("PAIRED")
        await alive.send(b"here")
        assert await two.receive_exactly(4, raw=False) == b"here"
        assert len(relay.logged("handed off")) == 1
        # The party cannot be told any more, but its operator can. "nobody came" would be wrong.
        refused = await relay.log("refused", address=first.address)
        assert (refused["code"], refused["reason"]) == ("pong-timeout", "the connection has ended")
