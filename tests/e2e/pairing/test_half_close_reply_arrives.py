"""A party that has ended its direction still gets the whole reply, however late it comes, and then its end."""

from __future__ import annotations

import pytest
import trio

from support.ends import OPEN, PAIRS_OF_MODES, End, Mode, block, join_ends
from support.site import Site

QUESTION = block(100_003, 1)
REPLY = block(1_000_003, 2)

# The limit for silence after the half-close. The replies come before it is over, and each begins it anew.
LIMITS = "[limits]\nhalf_close_timeout = 20\n"


async def ask(end: End) -> bytes:
    await end.send(QUESTION)
    await end.send_eof()
    return await end.receive_to_end()


async def reply(end: End, delay: float) -> bytes:
    question = await end.receive_to_end()
    await trio.sleep(delay)
    await end.send(REPLY)
    await end.send_eof()
    return question


async def converse(asker: End, replier: End, delay: float) -> None:
    found: dict[str, bytes] = {}

    async def asking() -> None:
        found["reply"] = await ask(asker)

    async def replying() -> None:
        found["question"] = await reply(replier, delay)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking)
        nursery.start_soon(replying)
    assert found["question"] == QUESTION
    assert found["reply"] == REPLY


@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
@pytest.mark.parametrize("first", ["func1", "func2"])
async def test_the_reply_arrives_whole_and_then_its_end(site: Site, mode1: Mode, mode2: Mode, first: str) -> None:
    """TESTPLAN 25: half-close from either side in every combination of modes."""
    async with site.relay(OPEN, sections=LIMITS) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        await converse(*((one, two) if first == "func1" else (two, one)), delay=0.1)
        ended = await relay.outcome()
    sent = {"func1": len(QUESTION), "func2": len(REPLY)}
    if first == "func2":
        sent = {"func1": len(REPLY), "func2": len(QUESTION)}
    assert (ended["outcome"], ended["side"]) == ("closed", "both")
    assert ended["bytes_func1_to_func2"] == sent["func1"]
    assert ended["bytes_func2_to_func1"] == sent["func2"]


async def test_a_reply_two_seconds_later(site: Site) -> None:
    """TESTPLAN 25: two seconds of silence after the half-close harm no pairing, in any mode."""
    async with site.relay(OPEN, sections=LIMITS) as relay:
        pairs = [await join_ends(site, relay, *modes) for modes in PAIRS_OF_MODES]
        async with trio.open_nursery() as nursery:
            for one, two in pairs:
                nursery.start_soon(converse, one, two, 2.0)


@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_an_end_without_a_byte_is_an_end_too(site: Site, mode1: Mode, mode2: Mode) -> None:
    """The end of an empty direction is passed on, and the other direction goes on."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        await one.send_eof()
        assert await two.receive() == b""
        await two.send(b"all the same")
        await two.send_eof()
        assert await one.receive_to_end() == b"all the same"
        ended = await relay.outcome()
    assert (ended["outcome"], ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == ("closed", 0, 12)


@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
async def test_an_answer_that_flows_while_the_question_ends(site: Site, mode1: Mode, mode2: Mode) -> None:
    """When one direction ends in the middle of the other's bulk transfer, no byte of that is lost."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        found = bytearray()

        async def receive() -> None:
            while data := await one.receive():
                found.extend(data)

        async def send() -> None:
            await two.send(REPLY)
            await two.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            found += await one.receive_exactly(100_000)
            await one.send(b"enough")
            await one.send_eof()
            nursery.start_soon(receive)
            assert await two.receive_to_end() == b"enough"
        assert bytes(found) == REPLY
        assert (await relay.outcome())["outcome"] == "closed"
