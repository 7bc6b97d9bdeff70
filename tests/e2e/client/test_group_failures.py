"""A rank of a group dies, stops, leaves or goes wrong: all others raise GroupBroken with its number, within the bound.

Each rank is a process of its own, on a relay in a process of its own.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Final

import pytest
import trio

from support.groups import GROUP_ROUTE, RankProcess, rank_processes
from support.site import Site

SIZE: Final = 5
# What the design promises. Nothing in these tests waits so long, unless the machine stands still.
BOUND: Final = 2.0


async def all_ready(ranks: list[RankProcess]) -> None:
    for one in ranks:
        await one.say("ready")


async def all_blame(ranks: list[RankProcess], victim: int, since: float, bound: float = BOUND) -> list[str]:
    """All but the victim are broken by it within ``bound`` seconds of ``since``; returns what they say."""
    texts = []
    for one in ranks:
        if one.rank == victim:
            continue
        found = await one.say("broken", "closed", "error")
        assert found["at"] == "broken", (one.rank, found, one.stderr)
        assert found["rank"] == victim, (one.rank, found)
        assert found["clock"] - since < bound, (one.rank, found, since)
        assert found["left"] == found["before"], "descriptors are left"
        texts.append(found["text"])
    return texts


@pytest.mark.load
@pytest.mark.parametrize("do", ["bcast", "allreduce", "large allreduce", "alltoall", "ring", "barrier"])
@pytest.mark.parametrize("victim", [0, 3])
async def test_a_rank_that_is_killed(site: Site, do: str, victim: int) -> None:
    async with site.process(GROUP_ROUTE) as relay, rank_processes(site, relay, SIZE, do) as ranks:
        await all_ready(ranks)
        await trio.sleep(0.1)  # into the middle of the calls; any moment must do
        since = time.monotonic()
        ranks[victim].process.kill()
        await all_blame(ranks, victim, since)


@pytest.mark.load
@pytest.mark.parametrize("eager", [True, False])
async def test_a_rank_that_is_killed_while_the_others_close(site: Site, eager: bool) -> None:
    victim = 2
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, SIZE, "close", victim=victim, of_victim={"do": "nothing"}, eager=eager) as ranks,
    ):
        await all_ready(ranks)
        since = time.monotonic()
        ranks[victim].process.kill()
        await all_blame(ranks, victim, since)


@pytest.mark.load
@pytest.mark.parametrize("wires", [1, 3])
@pytest.mark.parametrize("victim", [0, 3])
async def test_a_rank_that_is_killed_in_the_set_up(site: Site, victim: int, wires: int) -> None:
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(
            site, relay, SIZE, "barrier", victim=victim, of_victim={"hold_after": wires}, hold=SIZE
        ) as ranks,
    ):
        await ranks[victim].say("held")
        # All are in the set-up, and have a wire at least to most of the others, or to the victim.
        for one in ranks:
            if one.rank != victim:
                await one.say("wires", count=SIZE - 2)
        since = time.monotonic()
        ranks[victim].process.kill()
        await all_blame(ranks, victim, since)


@pytest.mark.load
async def test_a_rank_that_is_stopped(site: Site) -> None:
    """It holds its wires, so only time tells. The rank that waits for it and those that wait for that one agree."""
    victim, timeout = 3, 2.0
    async with site.process(GROUP_ROUTE) as relay, rank_processes(site, relay, SIZE, "bcast", timeout=timeout) as ranks:
        await all_ready(ranks)
        since = time.monotonic()
        os.kill(ranks[victim].process.pid, signal.SIGSTOP)
        try:
            texts = await all_blame(ranks, victim, since, timeout + BOUND)
        finally:
            os.kill(ranks[victim].process.pid, signal.SIGCONT)
        assert any("made no progress for 2 s: rank 3 does not answer" in text for text in texts)


FAULTS: Final[dict[str, str]] = {
    "exit": "broke",
    "exit in order": "rank 2 has left the group: SystemExit: 0",
    "raise": "rank 2 has left the group: KeyError: 'a bug of rank 2'",
    "abort": "rank 2 aborted: I give up",
}


@pytest.mark.load
@pytest.mark.parametrize("role", FAULTS)
@pytest.mark.parametrize("do", ["bcast", "close"])
async def test_a_rank_that_leaves(site: Site, role: str, do: str) -> None:
    victim = 2
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, SIZE, do, victim=victim, of_victim={"role": role}) as ranks,
    ):
        since = (await ranks[victim].say("ready"))["clock"]
        texts = await all_blame(ranks, victim, since)
        assert all(FAULTS[role] in text for text in texts), texts


@pytest.mark.load
@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("out of step", "allgather (call 2)"),
        ("other root", "other arguments to bcast (call 2)"),
        ("other size", "other arguments to bcast (call 2)"),
    ],
)
async def test_a_rank_that_is_out_of_step(site: Site, role: str, text: str) -> None:
    """Nobody gets a wrong result. Who of two is wrong, nobody can know; all name the same ranks, itself included."""
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, SIZE, "bcast", victim=2, of_victim={"role": role}) as ranks,
    ):
        since = (await ranks[2].say("ready"))["clock"]
        found: list[dict[str, Any]] = [await one.say("broken", "closed", "error") for one in ranks]
        assert {one["at"] for one in found} == {"broken"}, found
        assert all("out of step" in one["text"] for one in found)
        assert any(text in one["text"] for one in found), found
        assert max(one["clock"] for one in found) - since < BOUND
