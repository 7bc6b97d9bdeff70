"""Sixteen ranks, the largest full mesh by default, as processes: each method, and a rank killed in each phase."""

from __future__ import annotations

import time
from typing import Any, Final

import pytest
import trio

from support.groups import GROUP_ROUTE, RankProcess, rank_processes
from support.site import Site

SIZE: Final = 16
VICTIM: Final = 5
BOUND: Final = 2.0


async def ends(ranks: list[RankProcess]) -> list[dict[str, Any]]:
    """What all but the victim say at their end."""
    return [await one.say("broken", "closed", "error") for one in ranks if one.rank != VICTIM]


def check(found: list[dict[str, Any]], since: float) -> None:
    assert {one["at"] for one in found} == {"broken"}, found
    assert {one["rank"] for one in found} == {VICTIM}, found
    assert max(one["clock"] for one in found) - since < BOUND, (since, found)
    assert all(one["left"] == one["before"] for one in found), "descriptors are left"


@pytest.mark.parametrize("eager", [True, False])
async def test_every_method_equals_its_reference(site: Site, eager: bool) -> None:
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, SIZE, "everything", eager=eager, timeout=100.0) as ranks,
    ):
        for one in ranks:
            said = await one.say("closed", "broken", "error")
            assert said["at"] == "closed", (one.rank, said, one.stderr)


@pytest.mark.load
@pytest.mark.parametrize("do", ["bcast", "allreduce"])
async def test_a_rank_is_killed_in_a_call(site: Site, do: str) -> None:
    async with site.process(GROUP_ROUTE) as relay, rank_processes(site, relay, SIZE, do) as ranks:
        for one in ranks:
            await one.say("ready")
        await trio.sleep(0.1)  # into the middle of the calls; any moment must do
        since = time.monotonic()
        ranks[VICTIM].process.kill()
        check(await ends(ranks), since)


@pytest.mark.load
async def test_a_rank_is_killed_while_the_others_close(site: Site) -> None:
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(site, relay, SIZE, "close", victim=VICTIM, of_victim={"do": "nothing"}) as ranks,
    ):
        for one in ranks:
            await one.say("ready")
        since = time.monotonic()
        ranks[VICTIM].process.kill()
        check(await ends(ranks), since)


@pytest.mark.load
async def test_a_rank_is_killed_in_the_set_up(site: Site) -> None:
    """The others have all wires but perhaps that to the victim, which stops when it has some of its own."""
    async with (
        site.process(GROUP_ROUTE) as relay,
        rank_processes(
            site, relay, SIZE, "barrier", victim=VICTIM, of_victim={"hold_after": SIZE // 2}, hold=SIZE
        ) as ranks,
    ):
        await ranks[VICTIM].say("held")
        for one in ranks:
            if one.rank != VICTIM:
                await one.say("wires", count=SIZE - 2)
        since = time.monotonic()
        ranks[VICTIM].process.kill()
        check(await ends(ranks), since)
