"""A waiting leg is paired at the moment when something else happens to it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from frelay.config.model import Limits
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.legs import FramedLeg
from frelay.joining.tickets import TicketIssuer, TicketRegistry
from frelay.net.slots import Admission, Slot
from frelay.pairing.leg import LegGone
from frelay.protocol.messages import Mode, Paired, Waiting
from frelay.protocol.refusal import Refusal
from frelay.tls.stream import TlsStream
from frelay.tls.trust import Credential, VerifiedPeer
from support.party import TLS_HEADER, Party, frame
from support.site import Site
from support.streams import server_context, tcp_pair
from support.waiting import TIMEOUT

PAIRED = Paired("1", "demo", "dns:func2.demo", "client", "tunnel")


class HinderedStream(TlsStream):
    """A stream that cancels ``scope``, once it is set, before a send begins.

    Once it ``is_stuck``, a send never ends: its party reads nothing, and the kernel has no room.
    """

    scope: trio.CancelScope | None = None
    is_stuck = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_stuck:
            await trio.sleep_forever()
        if self.scope is not None:
            self.scope.cancel()
        await super().send_all(data)

    async def send_eof(self) -> None:
        if self.is_stuck:
            await trio.sleep_forever()
        await super().send_eof()


@asynccontextmanager
async def waiting_leg(site: Site, mode: Mode = "tunnel") -> AsyncIterator[tuple[FramedLeg, HinderedStream, Party]]:
    """A leg that was told WAITING, its stream, and its party."""
    one, other = tcp_pair()
    stream = HinderedStream(one, server_context(site))
    party = Party(trio.SocketStream(trio.socket.from_stdlib_socket(other)), site.context("func1"), "localhost")
    leg = FramedLeg(stream, nobody(), "127.0.0.1:1", Slot(Admission(Limits(), descriptor_limit=1024)))
    leg.mode = mode
    try:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.do_handshake)
                nursery.start_soon(party.handshake)
            await party.join()
            await leg.receive_join()
            await leg.welcome(Waiting("demo", "func1", "dns:func1.demo", 60.0, None))
            await party.expect("WAITING")
            yield leg, stream, party
    finally:
        leg.close()
        party.close()


def nobody() -> VerifiedPeer:
    """A certificate; these tests do not depend on it."""
    return VerifiedPeer(None, Credential(b"", (), 0.0), None)  # type: ignore[arg-type]


async def test_a_ping_that_was_never_written_is_not_waited_for(site: Site) -> None:
    """It was due at the moment of the pairing. No PONG will come, and the first bytes of the tunnel are none."""
    async with waiting_leg(site) as (leg, stream, party):
        with trio.CancelScope() as scope:
            stream.scope = scope
            await leg.attend(ping_interval=0.01, pong_timeout=TIMEOUT)
        assert scope.cancelled_caught
        stream.scope = None
        await leg.begin(PAIRED)
        await party.expect("PAIRED", pong=False)
        await party.send(TLS_HEADER)
        assert await stream.receive_some() == TLS_HEADER


async def test_who_takes_no_ping_has_gone(site: Site) -> None:
    """A REFUSED cannot be sent after a PING that cannot be written."""
    async with waiting_leg(site) as (leg, stream, _):
        stream.is_stuck = True
        end = await leg.attend(ping_interval=0.01, pong_timeout=0.05)
        assert end == LegGone("did not read PING within 0.05 s")


@pytest.mark.parametrize("mode", ["tunnel", "handoff"])
@pytest.mark.parametrize(
    ("last_frames", "error", "why"),
    [
        (frame("LEAVE"), ConnectionBroken, "as it was paired: left (LEAVE)"),
        (None, ConnectionBroken, "as it was paired: left (close_notify)"),
        (
            frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e"}),
            RemoteProtocolError,
            "JOIN while waiting",
        ),
    ],
    ids=["LEAVE", "close_notify", "nonsense"],
)
async def test_a_leg_that_went_as_it_was_paired_is_not_handed_off(
    site: Site, last_frames: bytes | None, error: type[Exception], why: str, mode: Mode
) -> None:
    """Its task has read that it leaves, the lobby does not know yet, and another leg is matched with it."""
    async with waiting_leg(site, mode) as (leg, _, party):
        if last_frames is None:
            await party.send_raw(party.close_notify())
        else:
            await party.send(last_frames)
        await leg.attend(ping_interval=TIMEOUT, pong_timeout=TIMEOUT)
        with pytest.raises(error) as caught:
            await leg.begin(PAIRED)
        # The detail of the pairing's record, which says why the pairing failed.
        assert str(caught.value) == why


async def test_a_cut_leg_is_reset_in_whatever_state(site: Site) -> None:
    """It gets an RST and never a FIN, which could be taken for an end; a second cut is no error."""
    async with waiting_leg(site) as (leg, _, party):
        leg.cut()
        leg.cut()
        assert await party.ended() == "reset"
        with pytest.raises(trio.ClosedResourceError):
            leg.stream()


async def test_who_does_not_take_its_refusal_is_closed_without_it(site: Site) -> None:
    """Within seconds, whenever the party reads: until then it holds a slot and a descriptor."""
    async with waiting_leg(site) as (leg, stream, party):
        stream.is_stuck = True
        sock = leg.sock
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leg.refuse, Refusal("limit", "there is no room"))
            with trio.fail_after(TIMEOUT):
                with pytest.raises(ssl.SSLEOFError):
                    await party.receive()
                party.close()
        assert sock.fileno() == -1


async def test_a_clogged_connection_does_not_hold_up_the_one_that_brought_the_ticket(site: Site) -> None:
    """The old connection has seconds to end in order; then it is closed and its slot is free."""
    admission, registry = Admission(Limits(), descriptor_limit=1024), TicketRegistry()
    async with waiting_leg(site, "ticket") as (leg, stream, party):
        leg.slot, leg.ticket_issuer = Slot.for_dialled(admission), TicketIssuer(registry, ["here"], 40.0)
        old = leg.sock
        brought, other = tcp_pair()
        with brought, other, trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leg.begin, replace(PAIRED, mode="ticket"))
                ticket = (await party.expect("PAIRED"))["ticket"]
                stream.is_stuck = True
                assert registry.redeem(ticket, "here", brought, Slot.for_dialled(admission))
            assert leg.sock is brought
            assert old.fileno() == -1
            assert admission.legs == 1


@pytest.mark.parametrize("goodbye", ["end", "reset"])
async def test_the_first_look_finds_a_leg_that_has_gone(site: Site, goodbye: str) -> None:
    """is_gone() is called once, before the pairing; the kernel reports a reset only once, and then an end."""
    async with waiting_leg(site) as (leg, _, party):
        assert not leg.is_gone()
        if goodbye == "reset":
            party.reset()
        else:
            await party.send_eof()
        await trio.lowlevel.wait_readable(leg.sock)
        assert leg.is_gone()


@pytest.mark.parametrize("is_raw", [False, True])
async def test_a_closed_leg_has_closed_its_connection(site: Site, is_raw: bool) -> None:
    """At once, not when the object is freed; a second close is no error."""
    async with waiting_leg(site) as (leg, stream, _):
        brought, other = tcp_pair()
        with brought, other:
            if is_raw:
                leg.become_raw(brought)
            sock = leg.sock
            leg.close()
            leg.close()
            assert sock.fileno() == -1
        stream.close()


@pytest.mark.parametrize(("mode", "timeout"), [("handoff", 5.0), ("tunnel", 5.0), ("ticket", 40.0)])
async def test_each_mode_has_its_own_time_to_begin(site: Site, mode: Mode, timeout: float) -> None:
    """A second connection takes longer than a close_notify; the other modes get no extra time."""
    async with waiting_leg(site, mode) as (leg, _, _):
        leg.ticket_issuer = TicketIssuer(TicketRegistry(), ["here"], 40.0)
        assert leg.begin_timeout(5.0) == timeout
