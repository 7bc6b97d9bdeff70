"""A ticket makes a second, plain connection the leg: only once, in time, and at the listener that issued it."""

from __future__ import annotations

import secrets
import socket

import pytest
import trio

from frelay.joining.legs import FramedLeg
from support.party import TLS_HEADER, Party
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.streams import read_to_end
from support.waiting import eventually

TWO = DEMO + DEMO.replace('"demo"', '"other"')


async def paired_by_ticket(site: Site, relay: RelayInProcess) -> tuple[Party, Party, str]:
    """func1 in ticket mode, func2 already handed off; returns func1's ticket."""
    one = await site.party(relay, "func1")
    two = await site.party(relay, "func2")
    await one.join(modes=["ticket"])
    await one.expect("WAITING")
    await two.join()
    await two.expect("WAITING")
    paired = await one.expect("PAIRED")
    assert paired["mode"] == "ticket"
    await two.expect("PAIRED")
    await two.hand_off()
    ticket = paired["ticket"]
    assert len(bytes.fromhex(ticket)) == 32
    return one, two, ticket


async def bring(relay: RelayInProcess, line: bytes, *, route: str = "demo") -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", relay.port(route))
    await stream.send_all(line)
    return stream


async def test_the_connection_that_brings_the_ticket_is_the_leg(site: Site) -> None:
    async with site.relay() as relay:
        one, two, ticket = await paired_by_ticket(site, relay)
        # Raw bytes in one segment with the line: the relay must not take them for a part of the line.
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER + b"first")
        assert await two.receive_exactly(8) == TLS_HEADER + b"first"
        await two.send_raw(TLS_HEADER + b"answer")
        await two.send_eof()
        assert await read_to_end(raw) == TLS_HEADER + b"answer"
        await raw.send_eof()
        assert await two.receive_raw() == b""
        # The relay has ended the TLS connection in order.
        assert await one.receive() == b""
        assert (await relay.outcome())["outcome"] == "closed"
        await raw.aclose()
        await eventually(lambda: relay.relay.parts.admission.legs == 0, "the slots are given back")


@pytest.mark.parametrize(
    "line",
    [
        b"FRELAY/1 " + secrets.token_hex(32).encode() + b"\n",
        b"FRELAY/1 " + b"0" * 64 + b"\n",
        b"FRELAY/2 " + b"0" * 64 + b"\n",
        b"FRELAY/1 " + b"z" * 64 + b"\n",
        b"FRELAY/1 " + b"0" * 65 + b"\n",
        b"F" * 500,
    ],
    ids=["guessed", "zeros", "other version", "no hex", "too long", "no line"],
)
async def test_a_wrong_ticket_gets_nothing(site: Site, line: bytes) -> None:
    async with site.relay() as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        wrong = await bring(relay, line)
        assert await read_to_end(wrong) == b""
        await wrong.aclose()
        # The right ticket is still valid.
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await raw.aclose()


async def test_a_used_ticket_gets_nothing(site: Site) -> None:
    async with site.relay() as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        line = f"FRELAY/1 {ticket}\n".encode()
        raw = await bring(relay, line + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        again = await bring(relay, line + b"stolen")
        assert await read_to_end(again) == b""
        await raw.send_all(b"mine")
        assert await two.receive_exactly(4) == b"mine"
        await raw.aclose()
        await again.aclose()


async def test_a_late_ticket_gets_nothing(site: Site) -> None:
    async with site.relay(DEMO + "ticket_timeout = 0.3\n") as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("handoff-timeout", "func1")
        assert await two.ended() == "reset"
        late = await bring(relay, f"FRELAY/1 {ticket}\n".encode())
        assert await read_to_end(late) == b""
        await late.aclose()


async def test_a_ticket_is_good_only_where_it_was_issued(site: Site) -> None:
    async with site.relay(TWO) as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        elsewhere = await bring(relay, f"FRELAY/1 {ticket}\n".encode(), route="other")
        assert await read_to_end(elsewhere) == b""
        await elsewhere.aclose()
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await raw.aclose()


async def test_a_ticket_line_may_come_byte_by_byte(site: Site) -> None:
    async with site.relay() as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        raw = await bring(relay, b"")
        for byte in f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER:
            await raw.send_all(bytes([byte]))
        assert await two.receive_exactly(3) == TLS_HEADER
        await raw.aclose()


def breaks_off(one: Party, how: str) -> None:
    """End the connection on which the ticket came, without close_notify."""
    if how == "reset":
        one.reset()
    elif how == "end of the stream":
        one.socket.shutdown(socket.SHUT_WR)
    else:
        one.take_in()
        one.close()


@pytest.mark.parametrize("how", ["reset", "end of the stream", "close"])
async def test_the_first_connection_may_break_off_once_the_ticket_is_out(site: Site, how: str) -> None:
    """Not every TLS library can end a connection in order; only the ticket shows whether the party is still there."""
    async with site.relay() as relay:
        one, two, ticket = await paired_by_ticket(site, relay)
        breaks_off(one, how)
        # The relay reads the end before the ticket comes.
        await eventually(lambda: has_read_to_the_end(relay), "the relay noticed")
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await two.send_raw(TLS_HEADER)
        await two.send_eof()
        assert await read_to_end(raw) == TLS_HEADER
        await raw.send_eof()
        assert await two.receive_raw() == b""
        assert (await relay.outcome())["outcome"] == "closed"
        await raw.aclose()
        await eventually(lambda: relay.legs == 0, "the slots are given back")


def has_read_to_the_end(relay: RelayInProcess) -> bool:
    """Whether the relay knows that the connection on which func1 got its ticket has ended."""
    (pairing,) = relay.relay.pairings
    leg = pairing.legs["func1"]
    assert isinstance(leg, FramedLeg)
    return leg.tls._receive_failure is not None


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_party_that_dies_with_its_ticket_ends_the_pairing_in_time(site: Site, how: str) -> None:
    async with site.relay(DEMO + "ticket_timeout = 0.5\n") as relay:
        one, two, ticket = await paired_by_ticket(site, relay)
        breaks_off(one, how)
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("handoff-timeout", "func1")
        assert await two.ended() == "reset"
        assert await read_to_end(await bring(relay, f"FRELAY/1 {ticket}\n".encode())) == b""
        assert len(relay.relay.parts.shared.tickets) == 0


SAID = {
    "another JOIN": (("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e"}), "protocol-error"),
    "LEAVE": (("LEAVE", {}), "handoff-aborted"),
}


@pytest.mark.parametrize("said", SAID)
async def test_what_a_party_says_instead_of_bringing_its_ticket(site: Site, said: str) -> None:
    """Its first connection follows the rules of a framed leg until it ends; then the ticket is invalid."""
    (name, payload), outcome = SAID[said]
    async with site.relay() as relay:
        one, two, ticket = await paired_by_ticket(site, relay)
        await one.send_frame(name, payload)
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == (outcome, "func1")
        assert await two.ended() == "reset"
        assert await read_to_end(await bring(relay, f"FRELAY/1 {ticket}\n".encode())) == b""


async def test_a_party_may_close_its_tls_before_it_brings_the_ticket(site: Site) -> None:
    async with site.relay() as relay:
        one, two, ticket = await paired_by_ticket(site, relay)
        await one.stream.send_all(one.close_notify())
        await one.send_eof()
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await raw.aclose()


async def test_plaintext_on_a_ticket_leg_is_cut(site: Site) -> None:
    async with site.relay() as relay:
        _, two, ticket = await paired_by_ticket(site, relay)
        raw = await bring(relay, f"FRELAY/1 {ticket}\n".encode() + b"GET / HTTP/1.1\r\n")
        assert (await relay.outcome())["outcome"] == "not-tls"
        assert await two.ended() == "reset"
        await raw.aclose()
