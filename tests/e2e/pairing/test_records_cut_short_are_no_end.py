"""A TLS record that FIN, RST or silence cuts at any byte is never an end and never a part of the stream.

An attacker on the way can do no more than this to a leg in TLS. Here the attacker also has the keys, so it can send
records where no TLS library would (``tests/support/records.py``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from support.handoffs import client_hello, forging_party, met, relay_has_read
from support.party import Party, frame, pair
from support.records import PLAIN_CLOSE_NOTIFY, RecordForge
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

JOIN = frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e"})
TUNNEL = frame("JOIN", {"attempt": "0f8fad5b-d9cb-469f-a165-70867728950e", "modes": ["tunnel"]})
CLOSE_NOTIFY = 24
"""Bytes of a close_notify record in TLS 1.3."""
OPEN = DEMO + "require_inner_tls = false\n"


async def end(party: Party, how: str) -> None:
    if how == "FIN":
        await party.send_eof()
    else:
        party.reset()


async def forged_tunnel(site: Site, relay: RelayInProcess, keylog: Path) -> tuple[Party, RecordForge, Party]:
    """A func1 that forges records, in a tunnel to a raw func2; func1's first record has arrived."""
    one, forge = await forging_party(site, relay, keylog)
    await one.send_raw(forge.record(TUNNEL))
    await one.expect("WAITING")
    two = await site.party(relay, "func2")
    await two.join()
    await two.expect("WAITING")
    await two.expect("PAIRED")
    await one.expect("PAIRED")
    await two.hand_off()
    await one.send_raw(forge.record(b"whole"))
    assert await two.receive_exactly(5) == b"whole"
    return one, forge, two


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_close_notify_that_is_cut_at_any_byte_aborts_the_hand_off(site: Site, how: str) -> None:
    """TESTPLAN 16: 23 of its 24 bytes are no close_notify, so the leg has gone away."""
    async with site.relay() as relay:
        for cut in range(CLOSE_NOTIFY):
            one, two = await met(site, relay)
            victim, other = (one, two) if cut % 2 else (two, one)
            await other.hand_off(client_hello(site))
            await victim.read_to_close_notify()
            await victim.send_raw(victim.close_notify()[:cut])
            await relay_has_read(relay)
            await end(victim, how)
            assert await other.ended() == "reset", f"cut after {cut} bytes"
            await eventually(lambda: not relay.relay.pairings, "the pairing has ended")
            site.hang_up()
        records = relay.logged("pairing ended")
        assert len(records) == CLOSE_NOTIFY
        assert {record["outcome"] for record in records} == {"handoff-aborted"}
        assert {record["bytes_func1_to_func2"] + record["bytes_func2_to_func1"] for record in records} == {0}


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_record_of_a_tunnel_that_is_cut_at_any_byte_is_not_delivered(
    site: Site, tmp_path: Path, how: str
) -> None:
    """TESTPLAN 16: its content was never authenticated. The other party sees a FIN without close_notify as a cut."""
    async with site.relay(OPEN) as relay:
        length = len(b"cut short") + 22
        for cut in range(length + 1):
            one, forge, two = await forged_tunnel(site, relay, tmp_path / f"keys {cut}")
            await one.send_raw(forge.record(b"cut short")[:cut])
            await relay_has_read(relay)
            if cut == length:
                assert await two.receive_exactly(9) == b"cut short"
            await end(one, how)
            with pytest.raises(trio.BrokenResourceError):
                raise AssertionError(f"cut after {cut} bytes, and this was heard: {await two.receive_raw()!r}")
            await eventually(lambda: not relay.relay.pairings, "the pairing has ended")
            site.hang_up()
        records = relay.logged("pairing ended")
        assert {record["outcome"] for record in records} == {"truncated" if how == "FIN" else "reset"}
        assert {record["side"] for record in records} == {"func1"}
        assert [record["bytes_func1_to_func2"] for record in records] == [5] * length + [14]


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_join_that_is_cut_at_any_byte_leaves_nothing(site: Site, tmp_path: Path, how: str) -> None:
    async with site.relay() as relay:
        for cut in range(0, len(JOIN) + 22, 3):
            party, forge = await forging_party(site, relay, tmp_path / f"keys {cut}")
            await party.send_raw(forge.record(JOIN)[:cut])
            await relay_has_read(relay)
            await end(party, how)
            await eventually(lambda: relay.legs == 0, f"nothing held, cut after {cut} bytes")
            party.close()
        assert not relay.logged("waiting")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


@pytest.mark.parametrize("cut", [1, 5, 20])
async def test_half_a_join_and_then_silence(site: Site, tmp_path: Path, cut: int) -> None:
    """join_timeout is absolute, and an incomplete record is no JOIN."""
    async with site.relay(sections="[limits]\njoin_timeout = 0.3\n") as relay:
        party, forge = await forging_party(site, relay, tmp_path / "keys")
        await party.send_raw(forge.record(JOIN)[:cut])
        assert (await party.refusal())["reason"] == "no JOIN within 0.3 s"
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot")


@pytest.mark.parametrize("cut", [1, 5, 20])
async def test_half_a_pong_and_then_silence(site: Site, tmp_path: Path, cut: int) -> None:
    """A waiting leg that has sent only a part of its answer has not answered."""
    limits = "[limits]\nping_interval = 0.1\npong_timeout = 0.3\n"
    async with site.relay(sections=limits) as relay:
        party, forge = await forging_party(site, relay, tmp_path / "keys")
        await party.send_raw(forge.record(JOIN))
        await party.expect("WAITING")
        ping = await party.expect("PING")
        await party.send_raw(forge.record(frame("PONG", ping))[:cut])
        assert (await party.refusal())["code"] == "pong-timeout"
        assert relay.waiting() == (0, 0)


@pytest.mark.parametrize("cut", [1, 5, 20])
async def test_half_a_record_of_a_tunnel_and_then_silence(site: Site, tmp_path: Path, cut: int) -> None:
    """Bytes of an incomplete record are no progress: the pairing is idle, and both parties are told when it ends."""
    async with site.relay(OPEN + "idle_timeout = 0.5\n") as relay:
        one, forge, two = await forged_tunnel(site, relay, tmp_path / "keys")
        await one.send_raw(forge.record(b"cut short")[:cut])
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["bytes_func1_to_func2"]) == ("idle-timeout", 5)


FORGED = {
    "close_notify in the clear": PLAIN_CLOSE_NOTIFY,
    "a fatal alert in the clear": b"\x15\x03\x03\x00\x02\x02\x50",
    "plaintext": b"GET / HTTP/1.1\r\n\r\n",
    "application data of nobody's": b"\x17\x03\x03\x00\x20" + bytes(32),
}


@pytest.mark.parametrize("forged", FORGED)
async def test_what_is_forged_into_a_tunnel_is_no_end(site: Site, tmp_path: Path, forged: str) -> None:
    """TESTPLAN 17: an attacker who can write into the connection can break it, but cannot make func2 see an end."""
    async with site.relay(OPEN) as relay:
        one, forge, two = await forged_tunnel(site, relay, tmp_path / "keys")
        await one.send_raw(FORGED[forged] + forge.record(b"and more"))
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"], ended["bytes_func1_to_func2"]) == ("protocol-error", "func1", 5)


async def test_empty_records_without_end_are_no_tunnel(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19: each costs the relay a decryption, and none carries data."""
    async with site.relay(OPEN) as relay:
        one, forge, two = await forged_tunnel(site, relay, tmp_path / "keys")
        await one.send_raw(b"".join(forge.record(b"") for _ in range(1000)) + forge.record(b"and more"))
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"], ended["bytes_func1_to_func2"]) == ("protocol-error", "func1", 5)
