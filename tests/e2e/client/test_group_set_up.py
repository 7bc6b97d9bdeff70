"""A group that does not form says which rank is missing or does not fit, at every rank, and leaves nothing behind."""

from __future__ import annotations

from typing import Any, Final

import pytest

import frelay
from frelay.errors import GroupBroken, Refused
from support.groups import GROUP_ROUTE, in_threads
from support.site import Site
from support.waiting import eventually

SIZE: Final = 3
# Of the set-up without progress. It is waited for once a test, so it is short; a slow machine makes progress, too.
TIMEOUT: Final = 2.0


async def form(site: Site, *, without: int | None = None, **options: Any) -> list[Any]:
    """The errors of the ranks of a group; None for a rank that was not started."""
    async with site.relay(GROUP_ROUTE) as relay:
        found = await in_threads(
            site,
            relay,
            SIZE,
            lambda group: group.barrier(),
            only=lambda rank: rank != without,
            timeout=TIMEOUT,
            **options,
        )
        await eventually(lambda: relay.legs == 0, "the end of all legs")
        return found


@pytest.mark.parametrize("missing", range(SIZE))
async def test_the_rank_that_never_comes_is_blamed_by_all(site: Site, missing: int) -> None:
    errors = await form(site, without=missing)
    assert errors.pop(missing) is None
    for error in errors:
        assert isinstance(error, GroupBroken), errors
        assert error.rank == missing, errors
        assert "after 2 s: was each rank started, and once, and does peer= fit its certificate?" in error.text


@pytest.mark.parametrize("missing", range(SIZE))
async def test_with_one_join_at_a_time_a_rank_blames_the_one_that_it_waits_for(site: Site, missing: int) -> None:
    """That one may be waiting for the missing rank itself, which only its own error tells."""
    errors = await form(site, without=missing, at_once=1)
    assert errors.pop(missing) is None
    assert all(isinstance(error, GroupBroken) for error in errors), errors
    assert missing in [error.rank for error in errors], errors


async def test_names_that_do_not_fit_look_like_ranks_that_never_come(site: Site) -> None:
    for error in await form(site, peer="dns:rank{rank}.other"):
        assert isinstance(error, GroupBroken)
        assert "does peer= fit its certificate?" in error.text


async def test_a_route_that_takes_a_certificate_for_one_party_only(site: Site) -> None:
    """The relay's reason, and what the certificates of a group need."""
    route = GROUP_ROUTE.replace('func2 = "dns:*.job"', 'func2 = "dns:*.other"')
    async with site.relay(route) as relay:
        errors = await in_threads(site, relay, 2, frelay.Group.barrier, timeout=TIMEOUT)
    refused = [error for error in errors if isinstance(error, Refused)]
    assert refused, errors
    assert refused[0].code == "not-authorised"
    assert refused[0].__notes__ == ["A certificate of a group must fit both parties of the route, func1 and func2."]
