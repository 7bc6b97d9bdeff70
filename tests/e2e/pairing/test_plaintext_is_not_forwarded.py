"""Where ``require_inner_tls`` holds, a leg's first bytes must begin a TLS record, or the outcome is ``not-tls``.

A handed-off leg is bare TCP. A function that forgot its own TLS must learn it before its data is on the network.
"""

from __future__ import annotations

import pytest
import trio

from support.ends import Mode, join_ends
from support.handoffs import client_hello, is_silent, met, relay_has_read
from support.party import TLS_HEADER
from support.relay import RelayInProcess
from support.site import DEMO, Site

OPEN = DEMO + "require_inner_tls = false\n"
ALWAYS = DEMO + 'require_inner_tls = "always"\n'

NOT_TLS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: func2.demo\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(100),
    "another record type": b"\x17\x03\x03\x00\x05hello",
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "another major version": b"\x16\x02\x00\x00\x05hello",
    "no minor version": b"\x16\x03\x10\x00\x05hello",
    "SSL 2": b"\x80\x2e\x01\x00\x02",
    "one byte": b"G",
}


async def check_refused(relay: RelayInProcess, side: str) -> None:
    ended = await relay.outcome()
    assert (ended["outcome"], ended["side"]) == ("not-tls", side)
    assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)


@pytest.mark.parametrize("who", ["func1", "func2"])
@pytest.mark.parametrize("first", NOT_TLS)
async def test_plaintext_on_a_raw_leg_ends_the_pairing(site: Site, first: str, who: str) -> None:
    """TESTPLAN 20: from either side; the other function gets a reset and not a byte."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", "raw")
        sender, other = (one, two) if who == "func1" else (two, one)
        await sender.send(NOT_TLS[first])
        with pytest.raises(trio.BrokenResourceError):
            await other.receive()
        assert await sender.ended() == "reset"
        await check_refused(relay, who)


@pytest.mark.parametrize("mode", ["tunnel", "bare"])
async def test_plaintext_on_a_raw_leg_whose_other_is_a_tunnel(site: Site, mode: Mode) -> None:
    """TESTPLAN 20: raw to TLS is other code, with the same result."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", mode)
        await one.send(NOT_TLS["HTTP"])
        assert await two.ended() == "reset"
        await check_refused(relay, "func1")


@pytest.mark.parametrize("other", ["raw", "tunnel"])
@pytest.mark.parametrize("first", [b"\x16G", b"\x16\x03G", b"\x17"])
async def test_plaintext_that_comes_byte_by_byte_goes_nowhere(site: Site, first: bytes, other: Mode) -> None:
    """TESTPLAN 20: the relay holds bytes that may be TLS until it knows that they are not."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", other)
        for byte in first[:-1]:
            await one.send(bytes([byte]))
            assert await is_silent(two.party)
        await one.send(first[-1:])
        assert await two.ended() == "reset"
        await check_refused(relay, "func1")


@pytest.mark.parametrize("other", ["raw", "tunnel"])
async def test_tls_that_comes_byte_by_byte_goes_through_whole(site: Site, other: Mode) -> None:
    """TESTPLAN 20: the bytes that the relay held arrive first."""
    async with site.relay() as relay:
        hello = client_hello(site)
        one, two = await join_ends(site, relay, "raw", other)
        for position, byte in enumerate(hello[:20]):
            await one.send(bytes([byte]))
            await relay_has_read(relay)
            if position < 2:
                assert await is_silent(two.party)
        await one.send(hello[20:])
        assert await two.receive_exactly(len(hello)) == hello


@pytest.mark.parametrize("other", ["raw", "tunnel"])
@pytest.mark.parametrize("first", [b"\x16", b"\x16\x03"])
async def test_an_end_before_the_bytes_could_be_checked(site: Site, first: bytes, other: Mode) -> None:
    """TESTPLAN 20: one or two bytes of a TLS record and then FIN are no TLS, and are not forwarded."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", other)
        await one.send(first)
        await one.send_eof()
        assert await two.ended() == "reset"
        await check_refused(relay, "func1")


@pytest.mark.parametrize("other", ["raw", "tunnel"])
async def test_an_end_without_any_bytes_is_a_clean_one(site: Site, other: Mode) -> None:
    """TESTPLAN 20: a function may have nothing to send."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", other)
        await one.send_eof()
        assert await two.receive() == b""
        await two.send(TLS_HEADER)
        await two.send_eof()
        assert await one.receive_to_end() == TLS_HEADER
        assert (await relay.outcome())["outcome"] == "closed"


async def test_plaintext_behind_close_notify_in_one_segment(site: Site) -> None:
    """TESTPLAN 20: the relay also checks a function that sends its first bytes together with its close_notify."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        await one.hand_off(NOT_TLS["HTTP"])
        await two.hand_off()
        assert await two.ended() == "reset"
        await check_refused(relay, "func1")


async def test_only_the_first_bytes_are_checked(site: Site) -> None:
    """The relay does not filter what follows."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, "raw", "raw")
        await one.send(TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await one.send(NOT_TLS["HTTP"])
        assert await two.receive_exactly(len(NOT_TLS["HTTP"])) == NOT_TLS["HTTP"]


@pytest.mark.parametrize(("mode1", "mode2"), [("raw", "raw"), ("raw", "tunnel"), ("tunnel", "tunnel"), ("bare", "raw")])
async def test_without_require_inner_tls_anything_goes(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 20: ``false``."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        for sender, receiver in ((one, two), (two, one)):
            await sender.send(NOT_TLS["SSH"])
            assert await receiver.receive_exactly(len(NOT_TLS["SSH"])) == NOT_TLS["SSH"]


@pytest.mark.parametrize("mode", ["tunnel", "bare"])
async def test_the_default_trusts_what_is_encrypted_to_the_relay(site: Site, mode: Mode) -> None:
    """TESTPLAN 20: ``true`` is about raw legs; the relay's TLS encrypts a tunnel's plaintext on its way here."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay, mode, "tunnel")
        await one.send(NOT_TLS["HTTP"])
        assert await two.receive_exactly(len(NOT_TLS["HTTP"])) == NOT_TLS["HTTP"]


@pytest.mark.parametrize(
    ("mode1", "mode2"), [("tunnel", "tunnel"), ("bare", "raw"), ("tunnel", "raw"), ("raw", "bare")]
)
async def test_always_demands_inner_tls_of_tunnels_too(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 20: ``"always"``."""
    async with site.relay(ALWAYS) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        await one.send(NOT_TLS["HTTP"])
        assert await two.ended() == "reset"
        await check_refused(relay, "func1")


@pytest.mark.parametrize(("mode1", "mode2"), [("tunnel", "tunnel"), ("bare", "raw")])
async def test_always_lets_inner_tls_through(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 20: a true first flight passes, also through tunnels."""
    async with site.relay(ALWAYS) as relay:
        hello = client_hello(site)
        one, two = await join_ends(site, relay, mode1, mode2)
        await one.send(hello)
        assert await two.receive_exactly(len(hello)) == hello
