"""What comes on a leg before its close_notify must be TLS. Anything else ends the pairing, and is not forwarded.

So an attacker who can write into the connection, or a function that sends too early, cannot make the relay take other
bytes for the end of TLS or for the first raw bytes.
"""

from __future__ import annotations

import pytest
import trio

from support.handoffs import client_hello, met, relay_has_read
from support.party import Party, frame
from support.records import PLAIN_CLOSE_NOTIFY
from support.relay import RelayInProcess
from support.site import Site

FORGED = {
    "raw bytes": b"\x16\x03\x01\x00\x05hello",
    "plaintext": b"GET / HTTP/1.1\r\n\r\n",
    "a record of nobody's": b"\x17\x03\x03\x00\x20" + bytes(32),
    "an empty record of nobody's": b"\x17\x03\x03\x00\x00",
    "close_notify in the clear": PLAIN_CLOSE_NOTIFY,
    "a fatal alert in the clear": b"\x15\x03\x03\x00\x02\x02\x50",
    "a record longer than TLS allows": b"\x17\x03\x03\xff\xff" + bytes(100),
}


async def check_ended(
    relay: RelayInProcess, one: Party, two: Party, two_has_answered: bool, *, one_was_reset: bool = False
) -> None:
    """The pairing ended because of func1, and func2 was cut off without a byte."""
    received = b""
    with trio.fail_after(20):
        try:
            if not two_has_answered:
                await two.read_to_close_notify()
                received = two.leftover
            while data := await two.receive_raw():
                received += data
        except trio.BrokenResourceError:
            ending = "reset"
        else:
            ending = "eof"
    assert (received, ending) == (b"", "reset")
    ended = await relay.outcome()
    assert (ended["outcome"], ended["side"]) == ("protocol-error", "func1")
    assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)
    # Linux reports a reset once, so an earlier call may have got it.
    assert one_was_reset or await one.ended() == "reset"


@pytest.mark.parametrize("two_has_answered", [True, False], ids=["other leg raw", "other leg in TLS"])
@pytest.mark.parametrize("forged", FORGED)
async def test_what_is_not_this_legs_tls_is_a_protocol_error(site: Site, forged: str, two_has_answered: bool) -> None:
    """TESTPLAN 15, 17: in place of the close_notify, followed by the true one and more raw bytes."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        if two_has_answered:
            await two.hand_off()
        await one.read_to_close_notify()
        await one.send_raw(FORGED[forged] + one.close_notify() + client_hello(site))
        await check_ended(relay, one, two, two_has_answered)


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 12])
async def test_a_forgery_is_found_out_however_it_is_cut(site: Site, cut: int) -> None:
    """TESTPLAN 15: the relay reads its first part, and then the rest."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        await one.read_to_close_notify()
        hello = client_hello(site)
        await one.send_raw(hello[:cut])
        await relay_has_read(relay)
        one_was_reset = False
        try:
            await one.send_raw(hello[cut:])
        except trio.BrokenResourceError:
            one_was_reset = True
        assert one_was_reset == (cut >= 5), "a record's header is enough to find it out, and less is not"
        await check_ended(relay, one, two, False, one_was_reset=one_was_reset)


@pytest.mark.parametrize("position", [0, 5, 23])
async def test_a_close_notify_with_a_flipped_bit_is_none(site: Site, position: int) -> None:
    """TESTPLAN 17: a bit of its type, of the encrypted part, or of its tag."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        await one.read_to_close_notify()
        record = bytearray(one.close_notify())
        record[position] ^= 1
        await one.send_raw(bytes(record) + client_hello(site))
        await check_ended(relay, one, two, False)


async def test_a_close_notify_replayed_from_another_connection_is_none(site: Site) -> None:
    """TESTPLAN 17: a close_notify recorded on another leg is of no use to an attacker."""
    async with site.relay() as relay:
        other = await site.party(relay, "func1")
        stolen = other.close_notify()
        one, two = await met(site, relay)
        await one.read_to_close_notify()
        await one.send_raw(stolen + client_hello(site))
        await check_ended(relay, one, two, False)


SAID = {
    "JOIN": frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e"}),
    "a PONG that nobody asked for": frame("PONG", {"n": 1}),
    "a frame of the relay's": frame("PING", {"n": 1}),
    "an unknown frame": frame(0x7F, b"{}"),
    "half a frame": frame("PONG", {"n": 1})[:3],
    "no frame at all": b"hello, func2",
}


@pytest.mark.parametrize("two_has_answered", [True, False], ids=["other leg raw", "other leg in TLS"])
@pytest.mark.parametrize("said", SAID)
async def test_application_data_after_paired_is_a_protocol_error(site: Site, said: str, two_has_answered: bool) -> None:
    """docs/protocol.md, 4.3. For what may cross with PAIRED, see test_waiting_legs_are_pinged.py."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        if two_has_answered:
            await two.hand_off()
        await one.read_to_close_notify()
        one.tls.write(SAID[said])
        await one.send_raw(one.take_outgoing() + one.close_notify() + client_hello(site))
        await check_ended(relay, one, two, two_has_answered)


async def test_a_forged_alert_ends_a_waiting_leg_and_frees_its_place(site: Site) -> None:
    """TESTPLAN 17: before PAIRED it ends that leg, and no function is paired with it."""
    async with site.relay() as relay:
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        await one.send_raw(PLAIN_CLOSE_NOTIFY)
        await relay.log("refused", code="protocol-error")
        again, two = await met(site, relay)
        await again.hand_off()
        await two.hand_off()
        await relay.log("handed off")
