"""Each pairing leaves one correct record: why it ended, by which side, and how many bytes went each way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block, join_all, join_ends
from support.party import TLS_HEADER, pair
from support.site import DEMO, Site
from support.waiting import eventually

FORTH, BACK = 123_457, 65_537


async def talk(one: End, two: End) -> None:
    """FORTH bytes from func1 and BACK bytes from func2, all delivered."""

    async def carry(source: End, sink: End, size: int) -> None:
        data = block(size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.send, data)
            assert await sink.receive_exactly(size) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, one, two, FORTH)
        nursery.start_soon(carry, two, one, BACK)


async def end_both(one: End, two: End) -> None:
    await one.send_eof()
    assert await two.receive() == b""
    await two.send_eof()
    assert await one.receive() == b""


async def reset(ender: End, other: End) -> None:
    ender.party.reset()
    assert await other.ended() == "reset"


async def vanish(ender: End, other: End) -> None:
    """FIN without close_notify."""
    await ender.party.send_eof()
    assert await other.ended() == "reset"


async def talk_nonsense(ender: End, other: End) -> None:
    """Bytes that are no TLS record at all."""
    await ender.party.send_raw(b"\x00" * 64)
    assert await other.ended() == "reset"


Ending = Callable[[End, End], Awaitable[None]]
ENDINGS: list[tuple[Ending, str, tuple[Mode, ...]]] = [
    (reset, "reset", ("raw", "tunnel", "bare")),
    (vanish, "truncated", ("tunnel", "bare")),
    (talk_nonsense, "protocol-error", ("tunnel", "bare")),
]


def check_names_and_bytes(record: Any) -> None:
    assert (record["bytes_func1_to_func2"], record["bytes_func2_to_func1"]) == (FORTH, BACK)
    assert (record["func1"], record["func2"]) == ("dns:func1.demo", "dns:func2.demo")
    assert record["route"] == "demo"
    assert 0 <= record["duration"] < 60


async def test_a_pairing_that_both_have_ended(site: Site) -> None:
    """ "closed" by "both", in every combination of modes, with every byte counted."""
    async with site.relay(OPEN) as relay:
        for one, two in await join_all(site, relay):
            await talk(one, two)
            await end_both(one, two)
        await eventually(lambda: not relay.relay.pairings, "all have ended")
        records = relay.logged("pairing ended", outcome="closed", side="both")
        assert len(records) == len(relay.logged("pairing ended")) == len(PAIRS_OF_MODES)
        assert len({record["pairing"] for record in records}) == len(PAIRS_OF_MODES)
        for record in records:
            check_names_and_bytes(record)


@pytest.mark.parametrize("who", ["func1", "func2"])
@pytest.mark.parametrize(("ending", "outcome", "modes"), ENDINGS, ids=["reset", "truncated", "protocol-error"])
async def test_a_pairing_that_one_has_broken(
    site: Site, ending: Ending, outcome: str, modes: tuple[Mode, ...], who: str
) -> None:
    """The side is the party that broke it, in every combination of modes, and all bytes before that count."""
    combinations = [(mode1, mode2) for mode1, mode2 in PAIRS_OF_MODES if (mode1 if who == "func1" else mode2) in modes]
    async with site.relay(OPEN) as relay:
        for one, two in await join_all(site, relay, combinations):
            await talk(one, two)
            await ending(*((one, two) if who == "func1" else (two, one)))
        await eventually(lambda: not relay.relay.pairings, "all have ended")
        records = relay.logged("pairing ended")
        assert [(record["outcome"], record["side"]) for record in records] == [(outcome, who)] * len(combinations)
        for record in records:
            check_names_and_bytes(record)


@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_leg_that_speaks_no_tls(site: Site, who: str) -> None:
    """ "not-tls" by the party that sent the bytes, and none of them counts as delivered."""
    async with site.relay(DEMO) as relay:
        one, two = await join_ends(site, relay)
        culprit, other = (one, two) if who == "func1" else (two, one)
        await culprit.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await other.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("not-tls", who)
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)


@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_leg_that_goes_within_the_hand_off(site: Site, who: str) -> None:
    """ "handoff-aborted" by the party that went. The other one is cut, and what it sent does not count as delivered."""
    async with site.relay(DEMO) as relay:
        parties = {"func1": await site.party(relay, "func1"), "func2": await site.party(relay, "func2")}
        await pair(parties["func1"], parties["func2"])
        leaver = parties.pop(who)
        (other,) = parties.values()
        await other.hand_off(TLS_HEADER + b"first words")
        leaver.close()
        assert await other.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-aborted", who)
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (0, 0)
        assert len(relay.logged("pairing ended")) == 1


async def test_bytes_are_readable_while_they_flow(site: Site) -> None:
    """The counters of a running pairing say what the record will say."""
    async with site.relay(OPEN) as relay:
        for mode1, mode2 in PAIRS_OF_MODES:
            one, two = await join_ends(site, relay, mode1, mode2)
            await talk(one, two)
            pairing = relay.relay.pairings[-1]
            # A stream pump counts a piece when the sink has taken it, and this sink may be faster than the pump's task.
            await eventually(lambda: pairing.bytes_moved == {"func1": FORTH, "func2": BACK})  # noqa: B023
