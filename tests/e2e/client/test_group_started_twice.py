"""The platform starts a rank of a group twice: the group forms with one of the two processes, and never with both."""

from __future__ import annotations

from typing import Any, Final

import trio

from support.groups import GROUP_ROUTE, RankProcess, add_ranks, start_rank
from support.relay import RelayProcess
from support.site import Site

SIZE: Final = 5


class Job:
    """Starts the ranks of one group, in the order of a test."""

    def __init__(self, site: Site, relay: RelayProcess, nursery: trio.Nursery) -> None:
        self._site = site
        self._relay = relay
        self._nursery = nursery
        self.started: list[RankProcess] = []
        add_ranks(site, SIZE)

    async def start(self, rank: int, *, at_once: int = 4, eager: bool = True) -> RankProcess:
        options: dict[str, Any] = {"at_once": at_once, "eager": eager}
        found = await start_rank(self._nursery, self._site, self._relay, rank, SIZE, "close", "blocking", options, {})
        self.started.append(found)
        return found

    async def waiting(self, low: int, high: int, *, count: int = 1) -> None:
        """Return when ``count`` legs have waited by the key of these two ranks."""
        await self._relay.log("waiting", count=count, meet=f"run/{low}-{high}")

    def end(self) -> None:
        for one in self.started:
            if one.process.returncode is None:
                one.process.kill()


async def test_rank_0_whose_processes_could_each_take_a_part_of_the_group(site: Site) -> None:
    """The second process waits for rank 2 before the first does, and yet rank 2 must go to the first, as rank 1 did."""
    async with site.process(GROUP_ROUTE) as relay, trio.open_nursery() as nursery:
        job = Job(site, relay, nursery)
        try:
            first = await job.start(0, at_once=1)
            await job.waiting(0, 1)
            second = await job.start(0)
            await job.waiting(0, 1, count=2)
            ranks = [first, await job.start(2)]
            await job.waiting(0, 2)
            ranks += [await job.start(rank) for rank in (1, 3, 4)]
            for one in ranks:
                assert (await one.say("closed", "broken", "error"))["at"] == "closed", one.said
            assert second.process.returncode is None, second.said
        finally:
            job.end()


async def test_another_rank_whose_processes_each_take_a_part_of_the_group(site: Site) -> None:
    """Rank 0 says which of the two it has. The other one is told, and all its partners join with the right one."""
    async with site.process(GROUP_ROUTE) as relay, trio.open_nursery() as nursery:
        job = Job(site, relay, nursery)
        try:
            refused = await job.start(3, at_once=1)
            await job.waiting(2, 3)
            chosen = await job.start(3)
            for other in ((2, 3), (3, 4), (1, 3), (0, 3)):
                await job.waiting(*other, count=2 if other == (2, 3) else 1)
            # Rank 2 takes the process that has waited longer. That one then waits for rank 4, which the other one has.
            ranks = [chosen, await job.start(4)]
            await relay.log("handed off", meet="run/3-4")
            ranks.append(await job.start(2))
            await relay.log("handed off", meet="run/2-3")
            ranks += [await job.start(rank) for rank in (0, 1)]
            for one in ranks:
                assert (await one.say("closed", "broken", "error"))["at"] == "closed", one.said
            found = await refused.say("closed", "broken", "error")
            assert (found["at"], found["rank"]) == ("broken", 3), found
            assert "rank 3 was started twice, and the group has the other process" in found["text"]
        finally:
            job.end()
