"""A group of two ranks that block: small messages go a short way there, beside the queues of the long one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any, Final

import pytest

import frelay
from frelay.client.group.frames import FORMAT
from frelay.errors import GroupBroken
from support.groups import GROUP_ROUTE, in_threads, rank_processes
from support.site import Site

BOUND: Final = 2.0
# The longest message of one TLS record, one more, and what is longer in all ways.
LONGEST: Final = 16384 - FORMAT.size
LENGTHS: Final = (0, 1, 64, 1000, LONGEST, LONGEST + 1, 70_000, 600_000)


def content(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


def receive(group: frelay.Group, way: int, length: int) -> bytes:
    """A message from the other rank, into one of the kinds of buffers."""
    other = 1 - group.rank
    if way == 0:
        found = group.recv(other)
        assert isinstance(found, bytearray)
        found += b"x"  # it is the caller's own
        return bytes(found[:-1])
    into: Any = bytearray(length + 7) if way == 1 else array("B", bytes(length))
    found = group.recv(other, into)
    assert bytes(into[:length]) == bytes(found)
    return bytes(found)


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("seed", range(3))
async def test_any_order_of_messages(site: Site, seed: int, mode: str) -> None:
    """Ranks that send ahead, short messages behind long ones, and collectives between: all come whole, and in order."""
    program = random.Random(seed)
    steps = [
        (
            program.choice(("send", "send", "send", "both", "barrier")),
            program.randrange(2),
            program.choice(LENGTHS),
            way,
        )
        for way in (program.randrange(3) for _ in range(150))
    ]

    def body(group: frelay.Group) -> None:
        for number, (kind, sender, length, way) in enumerate(steps):
            if kind == "barrier":
                group.barrier()
            elif kind == "both":
                mine, theirs = content(number + group.rank, length), content(number + 1 - group.rank, length)
                assert bytes(group.sendrecv(mine, 1 - group.rank, 1 - group.rank)) == theirs
            elif sender == group.rank:
                data = content(number, length)
                group.send(data if way else memoryview(data), 1 - group.rank)
            else:
                assert receive(group, way, length) == content(number, length)

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 2, body, mode=mode) == [None, None]


async def test_a_full_kernel(site: Site) -> None:
    """The kernel takes a part of a short message, or none of it: the rest is sent before the next one."""
    groups: dict[int, frelay.Group] = {}
    is_full = threading.Event()
    counts: list[int] = []

    def body(group: frelay.Group) -> None:
        groups[group.rank] = group
        group.barrier()
        if group.rank == 0:
            count = 0
            while not is_full.is_set():
                group.send(count.to_bytes(4, "big") * 4000, 1)
                count += 1
            group.send(b"", 1)
            counts.append(count)
            return
        wire = groups[0]._mesh.only_wire()
        assert wire is not None
        while not wire.link.has_output:
            time.sleep(0.01)
        is_full.set()
        count = 0
        while data := group.recv(0):
            assert bytes(data) == count.to_bytes(4, "big") * 4000
            count += 1
        counts.append(count)

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 2, body) == [None, None]
    assert counts[0] == counts[1] > 0


def broken(call: Callable[[], object]) -> str:
    with pytest.raises(GroupBroken) as caught:
        call()
    return str(caught.value)


async def test_a_message_that_does_not_fit(site: Site) -> None:
    def body(group: frelay.Group) -> str:
        group.barrier()
        if group.rank == 0:
            group.send(b"four", 1)
        return broken(lambda: group.recv(1) if group.rank == 0 else group.recv(0, bytearray(3)))

    async with site.relay(GROUP_ROUTE) as relay:
        for text in await in_threads(site, relay, 2, body):
            assert "its send has 4 bytes, and this rank's buffer has 3" in str(text)


async def test_another_call_than_the_other_rank(site: Site) -> None:
    def body(group: frelay.Group) -> str:
        if group.rank == 0:
            group.send(b"data", 1)
            return broken(lambda: group.recv(1))
        return broken(group.barrier)

    async with site.relay(GROUP_ROUTE) as relay:
        for text in await in_threads(site, relay, 2, body):
            assert "out of step: it is in" in str(text)


async def test_an_abort_reaches_a_rank_that_only_sends(site: Site) -> None:
    """It never waits for a message, so the word comes when its own messages do not get through any more."""

    def body(group: frelay.Group) -> str | None:
        group.barrier()
        if group.rank == 1:
            group.abort("enough")
            return None

        def send() -> None:
            while True:
                group.send(b"data", 1)

        return broken(send)

    async with site.relay(GROUP_ROUTE) as relay:
        text, _ = await in_threads(site, relay, 2, body)
        assert "rank 1 aborted: enough" in str(text)


async def test_wrong_arguments_break_nothing(site: Site) -> None:
    def body(group: frelay.Group) -> None:
        other = 1 - group.rank
        for _ in range(2):
            with pytest.raises(TypeError, match="data: a bytes-like object"):
                group.send("text", other)
            with pytest.raises(ValueError, match="to=2: the ranks of this group are 0 to 1"):
                group.send(b"", 2)
            with pytest.raises(ValueError, match=f"source={group.rank}: this is rank {group.rank} itself"):
                group.recv(group.rank)
            with pytest.raises(ValueError, match="into: the buffer is read-only"):
                group.recv(other, b"1234")
            group.send(b"1234", other)
            assert bytes(group.recv(other)) == b"1234"
            with pytest.raises(ValueError, match="into: the buffer is read-only"):
                group.recv(other, b"1234")
            group.send(b"", other)
            assert bytes(group.recv(other)) == b""
            with pytest.raises(TypeError, match="data: a bytes-like object"):
                group.send("text", other)

    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 2, body) == [None, None]


async def test_an_interrupted_call_breaks_the_group(site: Site) -> None:
    """A part of a message may be lost, so the next call must not go on, even if the caller has caught the error."""

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    def body(group: frelay.Group) -> str:
        if group.rank == 1:
            assert group._short is not None
            group._short._recv_into = interrupt  # type: ignore[misc,assignment]
            with pytest.raises(KeyboardInterrupt):
                group.recv(0)
        return broken(lambda: group.recv(1 - group.rank))

    async with site.relay(GROUP_ROUTE) as relay:
        for text in await in_threads(site, relay, 2, body):
            assert "rank 1 has left the group: KeyboardInterrupt" in str(text)


async def test_a_closed_group_says_so(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        groups = await in_threads(site, relay, 2, lambda group: group)
        for group in groups:
            assert isinstance(group, frelay.Group)
            for call in (lambda: group.send(b"", 1 - group.rank), lambda: group.recv(1 - group.rank)):  # noqa: B023
                with pytest.raises(frelay.LocalProtocolError, match="this group is closed"):
                    call()


@pytest.mark.load
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_the_other_rank_ends_while_both_wait_for_a_message(site: Site, how: signal.Signals) -> None:
    async with site.process(GROUP_ROUTE) as relay, rank_processes(site, relay, 2, "recv") as ranks:
        for one in ranks:
            await one.say("ready")
        since = time.monotonic()
        os.kill(ranks[1].process.pid, how)
        found = await ranks[0].say("broken", "closed", "error")
        assert (found["at"], found["rank"]) == ("broken", 1), found
        assert found["clock"] - since < BOUND
        assert found["left"] == found["before"], "descriptors are left"
        assert ("broke" if how == signal.SIGKILL else "rank 1 has left the group: KeyboardInterrupt") in found["text"]


@pytest.mark.load
async def test_the_other_rank_is_stopped_while_both_wait_for_a_message(site: Site) -> None:
    timeout = 2.0
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, 2, "recv", timeout=timeout) as ranks,
    ):
        for one in ranks:
            await one.say("ready")
        os.kill(ranks[1].process.pid, signal.SIGSTOP)
        try:
            found = await ranks[0].say("broken", "closed", "error")
        finally:
            os.kill(ranks[1].process.pid, signal.SIGCONT)
        assert (found["at"], found["rank"]) == ("broken", 1), found
        assert "made no progress for 2 s: rank 1 does not answer" in found["text"]
