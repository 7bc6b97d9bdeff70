"""A blocking group on a real relay, all ranks as threads: every method, sizes of messages, and how it ends well."""

from __future__ import annotations

from array import array
from functools import reduce as fold
from typing import Any

import pytest

import frelay
from support.descriptors import open_descriptors, opened_since
from support.group_calls import everything_blocking
from support.groups import GROUP_ROUTE, in_threads
from support.site import Site
from support.waiting import eventually


@pytest.mark.parametrize(("size", "options"), [(1, {}), (2, {}), (3, {}), (5, {"at_once": 1}), (6, {"eager": False})])
async def test_every_method(site: Site, size: int, options: dict[str, Any]) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, size, everything_blocking, **options) == [None] * size
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        # A group that ends in good order leaves no cut behind.
        outcomes = [event["outcome"] for event in relay.logged("pairing ended")]
        assert set(outcomes) <= {"closed"}
        if options.get("eager") is None:
            assert len(outcomes) == size * (size - 1) // 2


@pytest.mark.parametrize("mode", ["ticket", "tunnel"])
async def test_other_modes(site: Site, mode: str) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        assert await in_threads(site, relay, 3, everything_blocking, mode=mode) == [None] * 3


async def test_an_operation_that_does_not_commute(site: Site) -> None:
    def compose(lower: int, higher: int) -> int:
        (a, b), (c, d) = divmod(lower, 256), divmod(higher, 256)
        return (a * c % 251) * 256 + (b * c + d) % 251

    def body(group: frelay.Group) -> int:
        buf = array("q", [(group.rank + 2) * 256 + group.rank])
        group.allreduce(buf, op=compose)
        return buf[0]

    async with site.relay(GROUP_ROUTE) as relay:
        expected = fold(compose, [(rank + 2) * 256 + rank for rank in range(5)])
        assert await in_threads(site, relay, 5, body) == [expected] * 5


@pytest.mark.load
async def test_no_descriptor_is_left(site: Site) -> None:
    async with site.relay(GROUP_ROUTE) as relay:
        await in_threads(site, relay, 3, lambda group: group.barrier(), name="first")
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        before = open_descriptors()
        await in_threads(site, relay, 4, lambda group: group.barrier(), name="second")
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        pipes = relay.relay.parts.forwarding.pipes
        await eventually(lambda: not opened_since(before, pipes=pipes), "the end of all descriptors")
