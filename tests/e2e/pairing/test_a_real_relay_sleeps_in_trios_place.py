"""A ``frelay run``, alone and with workers, sees Trio's epoll set, so small messages cost no turn of Trio's loop."""

from __future__ import annotations

import pytest

from support.site import Site


@pytest.mark.parametrize("sections", ["", "[relay]\nworkers = 2\n"], ids=["one process", "two workers"])
async def test_a_real_relay_sees_trios_set(site: Site, sections: str) -> None:
    """Also when it may not be dumped or traced; for another user see test_privileges_are_given_up.py."""
    async with site.process(sections=sections, options=["--no-watch"]) as relay:
        assert relay.logged("ready")
        assert not relay.logged("small messages cost more than they should")
