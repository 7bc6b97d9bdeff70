"""The accept loop ends only when the relay stops it, whatever a caller or the kernel does at any moment.

Otherwise one unlucky connection could end the whole relay with all its pairings.
"""

from __future__ import annotations

import errno
import socket
import struct

import pytest
import trio

import frelay.joining.listener
import frelay.net.sockets
from support.party import pair
from support.site import DEMO, Site
from support.waiting import eventually


def call(port: int) -> socket.socket:
    """A connection that the kernel has accepted and the relay has not taken yet."""
    sock = socket.socket()
    sock.connect(("127.0.0.1", port))
    return sock


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("end", ["drain", "stop"])
async def test_a_listener_stopped_at_the_moment_of_a_call(site: Site, end: str, turns: int) -> None:
    """The stop comes ``turns`` passes of the scheduler after the call, so that it hits every step of accepting."""
    other = DEMO.replace('"demo"', '"other"')
    for _ in range(4):
        async with site.relay(DEMO + other) as relay:
            keeper1 = await site.party(relay, "func1", route="other")
            keeper2 = await site.party(relay, "func2", route="other")
            await pair(keeper1, keeper2)
            # The end of a reload, without the threads that load its files, so that the test chooses the pass.
            listener = next(found for key, found in relay.relay.parts.active.listeners.items() if "demo" in str(key))
            calls = [call(relay.port()) for _ in range(3)]
            for _ in range(turns):
                await trio.lowlevel.cancel_shielded_checkpoint()
            if end == "drain":
                relay.relay.drain(reason="maintenance")
            else:
                listener.stop()
            for sock in calls:
                sock.close()
            await keeper1.hand_off()
            await keeper2.hand_off()
            await keeper1.send_raw(b"\x16\x03\x01unharmed")
            assert await keeper2.receive_exactly(11) == b"\x16\x03\x01unharmed"


@pytest.mark.parametrize(
    "number",
    [
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    ],
    ids=errno.errorcode.get,
)
async def test_an_error_of_accept_is_not_the_end(site: Site, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """accept(2) returns errors of the next connection, and EPERM if a firewall forbids it: not of the listener."""
    original = frelay.net.sockets.accept
    failures = [OSError(number, "injected")] * 3

    def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
        if failures:
            raise failures.pop()
        return original(listener)

    monkeypatch.setattr(frelay.joining.listener, "accept", accept)
    async with site.relay() as relay:
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert not failures


async def test_callers_that_are_gone_before_they_are_accepted(site: Site) -> None:
    """A burst of connections that were reset while they queued."""
    async with site.relay() as relay:
        for _ in range(50):
            sock = call(relay.port())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        await eventually(lambda: relay.legs == 2, "nothing held of them")
