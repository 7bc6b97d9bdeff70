"""Any TLS client is a party: ``openssl s_client``, ``socat``, ``stunnel`` and a plain ``ssl`` socket meet functions.

They know nothing of frelay: no ALPN, no frames (docs/protocol.md, section 6). Each meets a framed function in both
modes, and several meet each other. What they carry is arbitrary bytes where the route allows it, and TLS from end to
end where, as by default, a handed-off leg must speak it.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import pytest
import trio

from frelay.client.contexts import inner_context
from support.bare_tunnels import KINDS, BareTunnel, Kind, Program, bare_tunnel, installed
from support.ends import OPEN, End, Mode, block
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT

FRAMED: Final[tuple[Mode, ...]] = ("raw", "tunnel")
ANY_SIZE: Final = 256 * 1024 + 7
# The pairs of bare tunnels: each kind at least once on both sides.
EACH_OTHER: Final[tuple[tuple[Kind, Kind], ...]] = (
    ("socat", "stunnel"),
    ("stunnel", "s_client"),
    ("s_client", "ssl"),
    ("ssl", "socat"),
    ("s_client", "s_client"),
    ("stunnel", "stunnel"),
)

with_every_framed_mode = pytest.mark.parametrize("mode", FRAMED)
with_every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return installed(request.param)


@pytest.fixture
def kind1(request: pytest.FixtureRequest) -> Kind:
    return installed(request.param)


@pytest.fixture
def kind2(request: pytest.FixtureRequest) -> Kind:
    return installed(request.param)


async def framed(site: Site, relay: RelayInProcess, name: str, mode: Mode) -> End:
    """A framed function, paired with the waiting one."""
    party = await site.party(relay, name)
    await party.join(modes=["handoff" if mode == "raw" else "tunnel"])
    await party.expect("WAITING")
    await party.expect("PAIRED")
    if mode == "raw":
        await party.hand_off()
    return End(party, mode)


@asynccontextmanager
async def waiting(site: Site, relay: RelayInProcess, kind: Kind, party: str) -> AsyncIterator[BareTunnel]:
    """A bare tunnel that the relay has admitted as ``party`` and that waits there."""
    async with bare_tunnel(kind, site, relay.port(), party) as tunnel:
        await relay.log("waiting", party=party)
        yield tunnel


async def cross(one: BareTunnel | End, two: BareTunnel | End) -> None:
    """Send bytes both ways at once; all must arrive."""
    forth, back = block(ANY_SIZE, 1), block(ANY_SIZE, 2)
    came: dict[str, bytes] = {}

    async def receive(end: BareTunnel | End, key: str) -> None:
        came[key] = await end.receive_exactly(ANY_SIZE)

    with trio.fail_after(TIMEOUT * 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, forth)
            nursery.start_soon(two.send, back)
            nursery.start_soon(receive, one, "back")
            nursery.start_soon(receive, two, "forth")
    assert came == {"forth": forth, "back": back}


# --- bytes both ways ------------------------------------------------------------------------------------------------


@with_every_framed_mode
@with_every_kind
async def test_bytes_cross_both_ways_with_a_framed_function(site: Site, kind: Kind, mode: Mode) -> None:
    """Mixed pairings; the function's end reaches the program as a clean end."""
    async with site.relay(OPEN) as relay, waiting(site, relay, kind, "func1") as tunnel:
        function = await framed(site, relay, "func2", mode)
        handed_off = await relay.log("handed off")
        assert (handed_off["func1_mode"], handed_off["func2_mode"]) == (
            "tunnel",
            "handoff" if mode == "raw" else "tunnel",
        )
        await cross(tunnel, function)
        with trio.fail_after(TIMEOUT):
            await function.send_eof()
            assert await tunnel.receive_to_end() == b""
            if tunnel.can_half_close:
                await tunnel.send_eof()
            # s_client ends both directions when its input from the peer ends, and sends close_notify.
            assert await function.receive_to_end() == b""
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("closed", "both")
        assert (record["bytes_func1_to_func2"], record["bytes_func2_to_func1"]) == (ANY_SIZE, ANY_SIZE)
        assert await tunnel.left_in_order()


@pytest.mark.parametrize(("kind1", "kind2"), EACH_OTHER, indirect=True)
async def test_bytes_cross_both_ways_between_two_programs(site: Site, kind1: Kind, kind2: Kind) -> None:
    async with (
        site.relay() as relay,  # nothing is raw here, so require_inner_tls, which is on, does not apply
        waiting(site, relay, kind1, "func1") as one,
        bare_tunnel(kind2, site, relay.port(), "func2") as two,
    ):
        await cross(one, two)
        handed_off = await relay.log("handed off")
        assert (handed_off["func1_mode"], handed_off["func2_mode"]) == ("tunnel", "tunnel")


# --- ends -----------------------------------------------------------------------------------------------------------


@with_every_framed_mode
@pytest.mark.parametrize("kind", ["socat", "stunnel", "ssl"], indirect=True)
async def test_a_program_ends_first_and_still_gets_its_reply(site: Site, kind: Kind, mode: Mode) -> None:
    """TESTPLAN 25: half-close, if the program supports it; s_client does not."""
    async with site.relay(OPEN) as relay, waiting(site, relay, kind, "func2") as tunnel:
        function = await framed(site, relay, "func1", mode)
        reply = block(ANY_SIZE, 3)
        with trio.fail_after(TIMEOUT):
            await tunnel.send(b"question")
            await tunnel.send_eof()
            assert await function.receive_to_end() == b"question"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(function.send, reply)
                assert await tunnel.receive_exactly(len(reply)) == reply
            await function.send_eof()
            assert await tunnel.receive_to_end() == b""
        assert (await relay.outcome())["outcome"] == "closed"
        assert await tunnel.left_in_order()


@with_every_framed_mode
@pytest.mark.parametrize("kind", ["socat", "stunnel", "ssl"], indirect=True)
async def test_a_program_replies_after_the_functions_end(site: Site, kind: Kind, mode: Mode) -> None:
    """TESTPLAN 25, the other way round."""
    async with site.relay(OPEN) as relay, waiting(site, relay, kind, "func2") as tunnel:
        function = await framed(site, relay, "func1", mode)
        reply = block(ANY_SIZE, 4)
        with trio.fail_after(TIMEOUT):
            await function.send(b"question")
            await function.send_eof()
            assert await tunnel.receive_to_end() == b"question"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tunnel.send, reply)
                assert await function.receive_exactly(len(reply)) == reply
            await tunnel.send_eof()
            assert await function.receive_to_end() == b""
        assert (await relay.outcome())["outcome"] == "closed"
        assert await tunnel.left_in_order()


# --- early data -----------------------------------------------------------------------------------------------------


@with_every_framed_mode
@with_every_kind
async def test_early_data_is_kept_by_the_kernel_and_delivered_whole(site: Site, kind: Kind, mode: Mode) -> None:
    """TESTPLAN 30: more bytes than the kernel holds are sent before a partner comes."""
    early = block(16 * 1024 * 1024, 5)
    async with site.relay(OPEN) as relay, bare_tunnel(kind, site, relay.port(), "func1") as tunnel:
        sent = trio.Event()

        async def send() -> None:
            await tunnel.send(early)
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await relay.log("waiting", party="func1")
            function = await framed(site, relay, "func2", mode)
            assert not sent.is_set(), "the test is too small to show that anything was held back"
            with trio.fail_after(TIMEOUT * 2):
                received = await function.receive_exactly(len(early))
        assert hashlib.sha256(received).digest() == hashlib.sha256(early).digest()


# --- refusals -------------------------------------------------------------------------------------------------------


@with_every_kind
async def test_a_certificate_that_fits_no_party_gets_an_orderly_close(site: Site, kind: Kind) -> None:
    """The program sees a clean end of TLS; the log has the reason."""
    site.add("func3", site.ca.party(dns=["func3.demo"]))
    async with site.relay() as relay, bare_tunnel(kind, site, relay.port(), "func3") as tunnel:
        with trio.fail_after(TIMEOUT):
            assert await tunnel.receive_to_end() == b""
            if tunnel.can_half_close:
                await tunnel.send_eof()
        assert await tunnel.left_in_order()
        refused = await relay.log("refused", code="not-authorised")
        assert "fits no" in refused["reason"]
        assert "func3.demo" in refused["certificate"]


@with_every_kind
async def test_nobody_came_is_an_orderly_close(site: Site, kind: Kind) -> None:
    """TESTPLAN 32: without frames only the route's limit holds, and the program gets only a close."""
    async with site.relay(DEMO + "wait_timeout = 0.3\n") as relay, waiting(site, relay, kind, "func1") as tunnel:
        with trio.fail_after(TIMEOUT):
            assert await tunnel.receive_to_end() == b""
            if tunnel.can_half_close:
                await tunnel.send_eof()
        assert await tunnel.left_in_order()
        assert (await relay.log("refused", code="wait-timeout"))["reason"] == "nobody came within 0.3 s"
        # Its place is free again.
        assert relay.waiting() == (0, 0)


@pytest.mark.parametrize("kind", ["s_client", "socat", "stunnel"], indirect=True)
async def test_a_stranger_among_the_programs_is_turned_away_by_an_alert(site: Site, kind: Kind) -> None:
    """TESTPLAN 1: a certificate of another CA; the reason is in the log, and no byte reaches anybody."""
    site.add("stranger", type(site.ca)("other CA").party(dns=["func1.demo"]))
    async with site.relay() as relay, bare_tunnel(kind, site, relay.port(), "stranger") as tunnel:
        assert isinstance(tunnel, Program)
        with trio.fail_after(TIMEOUT):
            try:
                assert await tunnel.receive_to_end() == b""
            except trio.BrokenResourceError:
                pass  # a program that fails may close its local side abruptly
            await tunnel.send_eof()
            in_order = await tunnel.left_in_order()
        if kind == "s_client":  # the others do not say why they ended
            assert not in_order
            assert b"alert unknown ca" in tunnel.stderr
        refused = await relay.log("refused", code="not-authorised")
        assert "unable to get local issuer certificate" in refused["reason"]
        assert not relay.logged("waiting")


# --- end to end TLS through the programs ------------------------------------------------------------------------------


def _question(sock: socket.socket, context: ssl.SSLContext, name: str) -> bytes:
    """Inner TLS client: ask, end, return the whole answer."""
    with context.wrap_socket(sock, suppress_ragged_eofs=False) as wire:
        wire.settimeout(TIMEOUT)
        wire.sendall(f"question of {name}".encode())
        wire.shutdown(socket.SHUT_WR)
        return b"".join(iter(partial(wire.recv, 65536), b""))


def _answer(sock: socket.socket, context: ssl.SSLContext, answer: bytes) -> bytes:
    """Inner TLS server: take all that comes, answer, end."""
    with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as wire:
        wire.settimeout(TIMEOUT)
        question = b"".join(iter(partial(wire.recv, 65536), b""))
        wire.sendall(answer)
        return question


async def _converse(site: Site, one: socket.socket, two: socket.socket) -> None:
    """Inner mTLS over the two local ends, func1 as its client, and a question with its answer over it."""
    client = inner_context("client", *site.paths["func1"], site.ca_path)
    server = inner_context("server", *site.paths["func2"], site.ca_path)
    answer, came = block(ANY_SIZE, 6), {}

    async def in_thread(key: str, function: partial[bytes]) -> None:
        came[key] = await trio.to_thread.run_sync(function)

    with trio.fail_after(TIMEOUT * 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, "answer", partial(_question, one, client, "func1"))
            nursery.start_soon(in_thread, "question", partial(_answer, two, server, answer))
    assert came == {"question": b"question of func1", "answer": answer}


@pytest.mark.parametrize("kind", ["socat", "stunnel"], indirect=True)
async def test_inner_tls_runs_between_a_handed_off_function_and_a_program(site: Site, kind: Kind) -> None:
    """The default route: a raw leg must speak TLS, and here it is the functions' own."""
    async with site.relay() as relay, waiting(site, relay, kind, "func2") as tunnel:
        assert isinstance(tunnel, Program)
        function = await framed(site, relay, "func1", "raw")
        raw = function.party.socket.dup()
        with socket.socket(fileno=raw.detach()) as one, tunnel.thread_socket() as two:
            one.settimeout(TIMEOUT)
            site.hang_up()
            await tunnel.local.aclose()
            await _converse(site, one, two)
        assert (await relay.outcome())["outcome"] == "closed"
        assert await tunnel.left_in_order()


@pytest.mark.parametrize(("kind1", "kind2"), [("socat", "stunnel"), ("stunnel", "socat")], indirect=True)
async def test_inner_tls_runs_between_two_programs(site: Site, kind1: Kind, kind2: Kind) -> None:
    """``require_inner_tls = "always"`` requires it of tunnels too, and neither program has to know."""
    async with (
        site.relay(DEMO + 'require_inner_tls = "always"\n') as relay,
        waiting(site, relay, kind1, "func1") as one,
        bare_tunnel(kind2, site, relay.port(), "func2") as two,
    ):
        assert isinstance(one, Program)
        assert isinstance(two, Program)
        with one.thread_socket() as sock1, two.thread_socket() as sock2:
            await one.local.aclose()
            await two.local.aclose()
            await _converse(site, sock1, sock2)
        assert (await relay.outcome())["outcome"] == "closed"


@with_every_kind
async def test_plaintext_of_a_program_is_stopped_where_always_holds(site: Site, kind: Kind) -> None:
    """TESTPLAN 20, for a tunnel: not a byte of it reaches the other party."""
    routes = DEMO + 'require_inner_tls = "always"\n'
    async with site.relay(routes) as relay, waiting(site, relay, kind, "func1") as tunnel:
        function = await framed(site, relay, "func2", "raw")
        await tunnel.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await function.ended() == "reset"
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("not-tls", "func1")
        assert record["bytes_func1_to_func2"] == 0
