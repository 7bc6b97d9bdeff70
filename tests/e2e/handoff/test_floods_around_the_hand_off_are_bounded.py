"""A party can send many TLS records without data: KeyUpdates, empty records, padding. The relay limits all of them.

The tests build the records themselves (``tests/support/records.py``), because no TLS library sends them.
``tests/unit/test_tls_stream.py`` shows record by record that a flood does not keep others waiting; the tests here show
it for the whole relay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from support.ends import join_ends
from support.handoffs import client_hello, forging_party, relay_has_read
from support.party import Party, frame
from support.records import ALERT, CLOSE_NOTIFY, HANDSHAKE, RecordForge
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT

JOIN = frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e"})
TUNNEL = frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e", "modes": ["tunnel"]})
SPARE = DEMO.replace('"demo"', '"spare"')

Around = Callable[[RecordForge], bytes]


def nothing(forge: RecordForge) -> bytes:
    return b""


def key_updates(forge: RecordForge) -> bytes:
    return b"".join(forge.key_update() for _ in range(300))


def a_request_for_a_key_update(forge: RecordForge) -> bytes:
    return forge.key_update(request=True)


def a_few_empty_records(forge: RecordForge) -> bytes:
    return b"".join(forge.record(b"") for _ in range(20))


def padding(forge: RecordForge) -> bytes:
    return b"".join(forge.record(b"", padding=16000) for _ in range(20))


async def meet(one: Party, two: Party) -> None:
    """func2 joins while func1 waits."""
    await two.join()
    await two.expect("WAITING")
    await one.expect("PAIRED")
    await two.expect("PAIRED")


async def forged_pair(
    site: Site, relay: RelayInProcess, keylog: Path, join: bytes = JOIN, before: Around = nothing
) -> tuple[Party, RecordForge, Party]:
    """A func1 that forges records, and func2, both told PAIRED; func1 sends ``before`` while it waits."""
    one, forge = await forging_party(site, relay, keylog)
    await one.send_raw(forge.record(join))
    await one.expect("WAITING")
    await one.send_raw(before(forge))
    await relay_has_read(relay)
    two = await site.party(relay, "func2")
    await meet(one, two)
    return one, forge, two


@pytest.mark.parametrize("after", [nothing, key_updates, a_request_for_a_key_update, a_few_empty_records, padding])
@pytest.mark.parametrize("before", [nothing, key_updates, a_request_for_a_key_update])
async def test_what_is_allowed_does_not_move_the_boundary(
    site: Site, tmp_path: Path, before: Around, after: Around
) -> None:
    """TESTPLAN 19: before PAIRED, and between PAIRED and close_notify in one piece with the raw bytes after it."""
    async with site.relay() as relay:
        hello = client_hello(site)
        one, forge, two = await forged_pair(site, relay, tmp_path / "keys", before=before)
        await one.read_to_close_notify()
        await one.send_raw(after(forge) + forge.close_notify() + hello)
        await two.hand_off(hello)
        assert await two.receive_exactly(len(hello)) == hello
        assert await one.receive_exactly(len(hello)) == hello


@pytest.mark.parametrize(
    ("content", "kind", "count"),
    [
        (b"", 23, 100),
        (b"\x04\x00\x00\x15" + bytes(21), HANDSHAKE, 1),
        (b"\x01\x00\x00\x02\x03\x03", HANDSHAKE, 1),
        (b"\x01\x5a", ALERT, 100),
        (b"\x02\x50", ALERT, 1),
        (b"\x01", 20, 1),
    ],
    ids=[
        "empty records",
        "session ticket",
        "ClientHello",
        "warnings",
        "fatal alert",
        "change_cipher_spec",
    ],
)
async def test_what_is_not_allowed_ends_the_pairing(
    site: Site, tmp_path: Path, content: bytes, kind: int, count: int
) -> None:
    """TESTPLAN 19: endless empty records, session tickets from the client, a second handshake, warning alerts."""
    async with site.relay() as relay:
        one, forge, two = await forged_pair(site, relay, tmp_path / "keys")
        await two.hand_off()
        await one.read_to_close_notify()
        flood = b"".join(forge.record(content, kind) for _ in range(count))
        await one.send_raw(flood + forge.close_notify() + client_hello(site))
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"], ended["bytes_func1_to_func2"]) == ("protocol-error", "func1", 0)


@pytest.mark.parametrize("count", [2, 300])
async def test_tls_that_was_made_to_speak_on_is_no_hand_off(site: Site, tmp_path: Path, count: int) -> None:
    """docs/protocol.md, 4.1: after its close_notify the relay writes nothing more in TLS.

    OpenSSL answers a request for a KeyUpdate when it reads the next record, even after it has sent close_notify. Then
    func1 would find the answer before func2's first bytes.
    """
    async with site.relay() as relay:
        one, forge, two = await forged_pair(site, relay, tmp_path / "keys")
        await one.read_to_close_notify()
        flood = b"".join(forge.key_update(request=True) for _ in range(count))
        await one.send_raw(flood + forge.close_notify() + client_hello(site))
        await two.hand_off(client_hello(site))
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("protocol-error", "func1")
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)


@pytest.mark.parametrize("when", ["while waiting", "in the hand-off", "in the tunnel"])
async def test_a_flood_of_key_updates_keeps_nobody_waiting(site: Site, tmp_path: Path, when: str) -> None:
    """TESTPLAN 19: while func1 sends them as fast as it can, another pairing works as usual, and func1 goes on."""
    hello = client_hello(site)
    async with site.process(DEMO + SPARE, sections="[limits]\nhandoff_timeout = 60\n") as relay:
        left, right = await join_ends(site, relay, "raw", "raw", route="spare")
        one, forge = await forging_party(site, relay, tmp_path / "keys")
        await one.send_raw(forge.record(TUNNEL if when == "in the tunnel" else JOIN))
        await one.expect("WAITING")
        two = await site.party(relay, "func2")
        if when != "while waiting":
            await meet(one, two)
        flood = b"".join(forge.key_update() for _ in range(5000))
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send_raw, flood)
                for _ in range(50):
                    for sender, receiver in ((left, right), (right, left)):
                        await sender.send(hello)
                        assert await receiver.receive_exactly(len(hello)) == hello
        if when == "while waiting":
            await meet(one, two)
        if when == "in the tunnel":
            await one.send_raw(forge.record(hello))
        else:
            await one.read_to_close_notify()
            await one.send_raw(forge.close_notify() + hello)
        await two.hand_off()
        assert await two.receive_exactly(len(hello)) == hello


async def test_a_tunnel_goes_on_through_key_updates(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19: between any two bytes of the stream they change the keys, and nothing else."""
    async with site.relay() as relay:
        one, forge, two = await forged_pair(site, relay, tmp_path / "keys", TUNNEL)
        await two.hand_off()
        expected = b""
        for number in range(100):
            part = number.to_bytes(2, "big") * 10
            await one.send_raw(forge.record(part) + forge.key_update(request=True))
            expected += part
        assert await two.receive_exactly(len(expected)) == expected
        await two.send_raw(b"\x16\x03\x01answer")
        # The relay had to change its keys too: its first record uses a new key, and the party's TLS follows.
        assert await one.receive_exactly(9, raw=False) == b"\x16\x03\x01answer"
        await one.send_raw(forge.record(CLOSE_NOTIFY, ALERT))
        assert await two.receive_raw() == b""
        await two.send_eof()
        assert (await relay.outcome())["outcome"] == "closed"
