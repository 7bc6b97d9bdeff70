"""A leg that breaks off its hand-off, or never finishes it, ends the pairing, and the other function learns it by RST.

It must be RST: after PAIRED and the relay's close_notify, a FIN would look like a peer that said nothing and left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from support.handoffs import client_hello, forging_party, is_silent, met
from support.party import Party, frame
from support.site import Site


async def fin(party: Party) -> None:
    await party.send_eof()


async def rst(party: Party) -> None:
    party.reset()


async def half_a_close_notify_and_fin(party: Party) -> None:
    await party.send_raw(party.close_notify()[:12])
    await party.send_eof()


async def half_a_close_notify_and_rst(party: Party) -> None:
    await party.send_raw(party.close_notify()[:12])
    assert await is_silent(party)
    party.reset()


async def leave(party: Party) -> None:
    party.tls.write(frame("LEAVE"))
    await party.send_raw(party.take_outgoing() + party.close_notify())


WAYS: list[Callable[[Party], Awaitable[None]]] = [
    fin,
    rst,
    half_a_close_notify_and_fin,
    half_a_close_notify_and_rst,
    leave,
]


async def ending_of(party: Party, mode: str, has_answered: bool) -> str:
    """How the connection of ``party`` ends: "reset", "truncated", "eof", or the bytes that came and should not have."""
    try:
        if mode == "tunnel":
            data = await party.receive()
        else:
            if not has_answered:
                await party.read_to_close_notify()
            data = await party.receive_raw()
    except trio.BrokenResourceError:
        return "reset"
    except OSError:
        return "truncated"
    return f"data: {data!r}" if data else "eof"


@pytest.mark.parametrize(
    ("mode", "has_answered"),
    [("handoff", True), ("handoff", False), ("tunnel", True)],
    ids=["other leg raw", "other leg in TLS", "other leg a tunnel"],
)
@pytest.mark.parametrize("who", ["func1", "func2"])
@pytest.mark.parametrize("way", WAYS)
async def test_an_end_instead_of_close_notify_aborts_and_is_told(
    site: Site, way: Callable[[Party], Awaitable[None]], who: str, mode: str, has_answered: bool
) -> None:
    """TESTPLAN 16."""
    async with site.relay() as relay:
        modes = ("handoff", mode) if who == "func1" else (mode, "handoff")
        one, two = await met(site, relay, *modes)
        victim, other = (one, two) if who == "func1" else (two, one)
        if mode == "handoff" and has_answered:
            await other.hand_off()
        await victim.read_to_close_notify()
        await way(victim)
        with trio.fail_after(20):
            assert await ending_of(other, mode, has_answered) == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-aborted", who)
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)
        assert relay.logged("handed off") == []


async def test_the_bytes_of_a_leg_that_was_ready_are_not_called_delivered(site: Site) -> None:
    """TESTPLAN 16: func1's first bytes were in the relay's kernel. They are not delivered, and the record says so."""
    async with site.relay() as relay:
        one, two = await met(site, relay)
        await one.hand_off(client_hello(site))
        two.reset()
        assert await one.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-aborted", "func2")
        assert ended["bytes_func1_to_func2"] == 0


SHORT = "[limits]\nhandoff_timeout = 0.4\n"


@pytest.mark.load
@pytest.mark.parametrize("answer", ["nothing", "half a close_notify", "raw bytes from the other leg only"])
@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_leg_that_does_not_answer_in_time_ends_the_pairing(site: Site, who: str, answer: str) -> None:
    """docs/protocol.md, 4.6: each leg has handoff_timeout, and the outcome names the leg that was late."""
    async with site.relay(sections=SHORT) as relay:
        began = trio.current_time()  # before the relay's clock, which starts as it pairs them
        one, two = await met(site, relay)
        late, other = (one, two) if who == "func1" else (two, one)
        await other.hand_off(client_hello(site) if answer == "raw bytes from the other leg only" else b"")
        await late.read_to_close_notify()
        if answer == "half a close_notify":
            await late.send_raw(late.close_notify()[:12])
        assert await other.ended() == "reset"
        assert trio.current_time() - began >= 0.4
        assert await late.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-timeout", who)


async def test_busy_tls_does_not_extend_the_hand_off(site: Site, tmp_path: Path) -> None:
    """TESTPLAN 19: the limit is absolute; records without data are no progress."""
    async with site.relay(sections=SHORT) as relay:
        forging, forge = await forging_party(site, relay, tmp_path / "keys")
        join = b'{"attempt":"0f8fad5b-d9cb-469f-a165-70867728950e"}'
        await forging.send_raw(forge.record(b"\x01\x00" + len(join).to_bytes(2, "big") + join))
        await forging.expect("WAITING")
        two = await site.party(relay, "func2")
        await two.join()
        await two.expect("WAITING")
        await forging.expect("PAIRED")
        await two.expect("PAIRED")
        await two.hand_off()

        async def keep_busy() -> None:
            try:
                while True:
                    await forging.send_raw(forge.key_update())
                    await trio.sleep(0.02)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_busy)
            assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-timeout", "func1")
