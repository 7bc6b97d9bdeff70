"""The hello hand-off: the party sends a line, gets it back once, and then has a raw socket, without close_notify.

Real clients are written in Go; ``test_example_hello.py`` runs one. Here the test controls every byte.
"""

from __future__ import annotations

import pytest
import trio

from support.party import TLS_HEADER, Party
from support.relay import RelayInProcess
from support.site import DEMO, Site

HELLO = DEMO + 'handoff = "hello"\nhello_settle = 0.05\n'


async def hello(site: Site, relay: RelayInProcess, name: str, line: bytes = b"Hello\n") -> Party:
    party = await site.party(relay, name, alpn=())
    await party.send(line)
    return party


async def test_two_old_clients_meet(site: Site) -> None:
    async with site.relay(HELLO) as relay:
        one = await hello(site, relay, "func1", b"Hello\n")
        await relay.log("waiting", party="func1")
        # Raw bytes before the other party has joined wait in the kernel.
        two = await hello(site, relay, "func2", b"Hi, a longer line\n")
        assert await one.receive() == b"Hello\n"
        assert await two.receive() == b"Hi, a longer line\n"
        await one.send_raw(TLS_HEADER + b"one")
        await two.send_raw(TLS_HEADER + b"two")
        assert await two.receive_exactly(6) == TLS_HEADER + b"one"
        assert await one.receive_exactly(6) == TLS_HEADER + b"two"
        assert one.incoming.pending == two.incoming.pending == 0, "a second echo, or a close_notify"
        await one.send_eof()
        await two.send_eof()
        assert await one.receive_raw() == b""
        assert (await relay.outcome())["outcome"] == "closed"


async def test_an_old_client_meets_a_framed_function(site: Site) -> None:
    async with site.relay(HELLO) as relay:
        one = await hello(site, relay, "func1")
        two = await site.party(relay, "func2")
        await two.join()
        await two.expect("WAITING")
        await two.expect("PAIRED")
        await two.hand_off(TLS_HEADER + b"early")
        assert await one.receive() == b"Hello\n"
        assert await one.receive_exactly(8) == TLS_HEADER + b"early"


@pytest.mark.load
async def test_nothing_raw_before_the_echo_has_settled(site: Site) -> None:
    async with site.relay(DEMO + 'handoff = "hello"\nhello_settle = 0.5\n') as relay:
        one = await hello(site, relay, "func1")
        two = await hello(site, relay, "func2")
        assert await two.receive() == b"Hello\n"
        assert await one.receive() == b"Hello\n"
        began = trio.current_time()
        await two.send_raw(TLS_HEADER)
        assert await one.receive_exactly(3) == TLS_HEADER
        assert trio.current_time() - began > 0.4


@pytest.mark.parametrize("line", [b"Hello\nmore", b"x" * 513, b"a\nb\n"], ids=["more", "too long", "two lines"])
async def test_a_line_that_is_none_is_refused(site: Site, line: bytes) -> None:
    async with site.relay(HELLO) as relay:
        one = await hello(site, relay, "func1", line)
        assert await one.receive() == b""
        await relay.log("refused", code="protocol-error")


async def test_silence_is_refused_in_time(site: Site) -> None:
    async with site.relay(HELLO, sections="[limits]\njoin_timeout = 0.2\n") as relay:
        one = await site.party(relay, "func1", alpn=())
        assert await one.receive() == b""
        await relay.log("refused", code="protocol-error")
