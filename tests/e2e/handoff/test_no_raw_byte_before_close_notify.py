"""The relay sends no raw byte to a leg before it has read that leg's close_notify, whatever the other leg does.

So a TLS library that reads ahead cannot swallow raw bytes. The kernel shows that nothing was sent: the count of bytes
received does not grow.
"""

from __future__ import annotations

import pytest
import trio

from support.handoffs import is_silent, met, tcp_info
from support.party import TLS_HEADER, Party
from support.site import Site

HELLO = TLS_HEADER + b"hello"


async def flood(party: Party) -> int:
    """Send HELLO again and again until the relay takes no more; returns how many bytes it took."""
    data = HELLO * 8192
    sent = 0
    while True:
        with trio.move_on_after(0.3) as pause:
            await trio.lowlevel.wait_writable(party.socket)
        if pause.cancelled_caught:
            return sent
        try:
            sent += party.socket._sock.send(data[sent % len(HELLO) :])  # type: ignore[attr-defined]
        except BlockingIOError:
            continue


@pytest.mark.parametrize("who", ["func1", "func2"])
@pytest.mark.parametrize(
    ("mode", "early"),
    [
        ("handoff", "a few bytes"),
        ("handoff", "a few bytes and the end"),
        ("handoff", "more than the kernel holds"),
        ("tunnel", "a few bytes"),
        ("tunnel", "a few bytes and the end"),
    ],
)
async def test_raw_bytes_wait_for_the_last_byte_of_close_notify(site: Site, mode: str, who: str, early: str) -> None:
    """TESTPLAN 14, 18: 23 of its 24 bytes are not enough. ``mode`` is the mode of the leg that is ready first."""
    async with site.relay() as relay:
        modes = ("handoff", mode) if who == "func1" else (mode, "handoff")
        one, two = await met(site, relay, *modes)
        slow, ready = (one, two) if who == "func1" else (two, one)
        count = len(HELLO)
        if mode == "handoff":
            await ready.hand_off(HELLO)
        else:
            await ready.send(HELLO)
        if early == "more than the kernel holds":
            count += await flood(ready)
        elif early == "a few bytes and the end":
            await (ready.send_eof() if mode == "handoff" else ready.send_raw(ready.close_notify()))
        await slow.read_to_close_notify()
        assert slow.leftover == b""
        record = slow.close_notify()
        received = tcp_info(slow).bytes_received
        for byte in record[:-1]:
            await slow.send_raw(bytes([byte]))
            assert await is_silent(slow)
        assert tcp_info(slow).bytes_received == received
        await slow.send_raw(record[-1:])
        assert await slow.receive_exactly(count) == (HELLO * (count // len(HELLO) + 1))[:count]
        if early == "a few bytes and the end":
            assert await slow.receive_raw() == b""
