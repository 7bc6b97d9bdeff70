"""TESTPLAN 8: the certificate is checked for every connection; no session, ticket or early data avoids that.

A resumed session would let a function in after its expiry, its revocation or the removal of its route.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from support.party import Party, frame
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

NEW_SESSION_TICKET = 4


def note_messages(context: ssl.SSLContext) -> list[int]:
    """Have ``context`` note the types of the handshake messages that it reads (RFC 8446, B.3)."""
    read: list[int] = []

    def note(connection: Any, direction: str, version: Any, content_type: int, message_type: int, data: bytes) -> None:
        if direction == "read" and content_type == 22:
            read.append(int(message_type))

    context._msg_callback = note  # type: ignore[attr-defined]  # the ssl module's own tests use it
    return read


async def waiting_party(site: Site, relay: RelayInProcess, context: ssl.SSLContext, alpn: tuple[str, ...]) -> Party:
    party = await site.connect(relay, context=context)
    await party.handshake()
    if alpn:
        await party.join()
        await party.expect("WAITING")
    else:
        await eventually(lambda: relay.waiting() != (0, 0), "a place")
        party.take_in()
    with pytest.raises(ssl.SSLWantReadError):
        party.tls.read(1)
    return party


@pytest.mark.parametrize("alpn", [("frelay/1",), ()], ids=["framed", "bare"])
async def test_no_ticket_is_sent(site: Site, alpn: tuple[str, ...]) -> None:
    """TESTPLAN 8. A client that never reads would close with the ticket unread, which would reset the connection."""
    async with site.relay() as relay:
        context = site.context("func1", alpn=alpn)
        read = note_messages(context)
        await waiting_party(site, relay, context, alpn)
        assert NEW_SESSION_TICKET not in read


def test_the_probe_for_tickets_sees_them(site: Site) -> None:
    """A server with Python's defaults does send tickets, and :func:`note_messages` finds them."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*site.relay_paths)
    context = site.context()
    read = note_messages(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context.wrap_bio(down, up, server_hostname="localhost")
    two = server.wrap_bio(up, down, server_side=True)
    for side in (one, two, one, two, one):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    with pytest.raises(ssl.SSLWantReadError):
        one.read(1)
    assert NEW_SESSION_TICKET in read


@pytest.mark.parametrize("alpn", [("frelay/1",), ()], ids=["framed", "bare"])
async def test_a_session_that_is_offered_is_not_resumed(site: Site, alpn: tuple[str, ...]) -> None:
    """TESTPLAN 8: whatever the client keeps from its last connection, the next handshake is a full one."""
    async with site.relay() as relay:
        context = site.context("func1", alpn=alpn)
        session = None
        for _ in range(3):
            party = await site.connect(relay, context=context)
            if session is not None:
                party.tls.session = session
            await party.handshake()
            assert party.tls.session_reused is False
            if alpn:
                await party.join()
                await party.expect("WAITING")
            else:
                await eventually(lambda: relay.waiting() != (0, 0), "a place")
                party.take_in()
                with pytest.raises(ssl.SSLWantReadError):
                    party.tls.read(1)
            session = party.tls.session
            party.close()
            await eventually(lambda: relay.waiting() == (0, 0), "its place free")


async def test_after_a_revocation_an_old_session_opens_nothing(site: Site) -> None:
    """TESTPLAN 8: revoked, and the route removed and brought back, between two connections of one client."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        context = site.context("func1")
        first = await waiting_party(site, relay, context, ("frelay/1",))
        session = first.tls.session
        assert session is not None
        first.close()
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func1"]], number=2))
        await relay.relay.reload()
        second = await site.connect(relay, context=context)
        second.tls.session = session
        await second.handshake()
        await second.join()
        assert await second.alert() == "SSLV3_ALERT_CERTIFICATE_REVOKED"
        assert second.tls.session_reused is False
        assert relay.waiting() == (0, 0)


# --- with openssl's own client, which can do more than Python's ------------------------------------------------------

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not here")


class Command:
    """A running `openssl` command."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def say(self, text: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(text.encode())

    async def until(self, pattern: str) -> str:
        """Wait until the output matches ``pattern``; gives the whole output so far."""
        assert self._process.stdout is not None
        with trio.move_on_after(20):
            while re.search(pattern.encode(), self._said) is None:
                more = await self._process.stdout.receive_some(65536)
                if not more:
                    break
                self._said += more
        told = self._said.decode("utf-8", "replace")
        assert re.search(pattern, told), f"no {pattern!r} in what openssl says:\n{told}"
        return told


@asynccontextmanager
async def openssl(*arguments: str) -> AsyncIterator[Command]:
    process = await trio.lowlevel.open_process(
        ["openssl", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield Command(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await trio.aclose_forcefully(stream)


def client_options(site: Site, port: int) -> list[str]:
    certificate, key = map(str, site.paths["func1"])
    return [
        *("s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-alpn", "frelay/1"),
        *("-cert", certificate, "-key", key, "-CAfile", str(site.ca_path)),
    ]


@pytest.fixture
async def foreign_session(site: Site) -> str:
    """A session file with a ticket good for early data, from another server that has the relay's name and key."""
    written, session, early = (site.directory / name for name in ("written.pem", "session.pem", "early-there"))
    early.write_bytes(b"early")

    def has_session() -> bool:
        # Copied while it is complete: for the second ticket openssl writes the file again, and may be ended in between.
        session.write_bytes(written.read_bytes() if written.exists() else b"")
        return b"-----END" in session.read_bytes()

    certificate, key = map(str, site.relay_paths)
    arguments = ["s_server", "-accept", "127.0.0.1:0", "-cert", certificate, "-key", key, "-early_data"]
    async with openssl(*arguments, "-no_anti_replay", "-alpn", "frelay/1") as server:
        port = re.search(r"ACCEPT [^ ]*:(\d+)\s", await server.until(r"ACCEPT [^ ]*:\d+\s"))
        assert port is not None
        options = client_options(site, int(port[1]))
        async with openssl(*options, "-sess_out", str(written)) as client:
            await client.say("hello\n")  # until then the server waits for early data
            # Openssl keeps its message about it in a buffer.
            await eventually(has_session, "the session")
        # The server that made it accepts it, so it is the relay that refuses it below.
        async with openssl(*options, "-sess_in", str(session), "-early_data", str(early)) as client:
            told = await client.until("Early data was [a-z ]+")
            assert "Reused, TLSv1.3" in told
            assert "Early data was accepted" in told
    return str(session)


@needs_openssl
async def test_a_ticket_made_elsewhere_is_a_full_handshake_here(site: Site, foreign_session: str) -> None:
    """TESTPLAN 8: the offer does no harm either, because the certificate is good."""
    async with site.relay() as relay:
        async with openssl(*client_options(site, relay.port()), "-sess_in", foreign_session) as client:
            told = await client.until("(New|Reused), TLSv1.3")
        assert "New, TLSv1.3" in told
        assert "Reused" not in told


@needs_openssl
async def test_early_data_is_never_read(site: Site, foreign_session: str) -> None:
    """TESTPLAN 10: a JOIN in early data, which anybody could replay, does not count."""
    early = site.directory / "early"
    early.write_bytes(frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000"}))
    async with site.relay(sections="[limits]\njoin_timeout = 1\n") as relay:
        options = [*client_options(site, relay.port()), "-sess_in", foreign_session, "-early_data", str(early)]
        async with openssl(*options) as client:
            assert "Early data was rejected" in await client.until("Early data was [a-z ]+")
            await relay.log("refused", code="protocol-error", reason="no JOIN within 1 s")
        assert not relay.logged("waiting")
        await eventually(lambda: relay.legs == 0, "its slot free")
