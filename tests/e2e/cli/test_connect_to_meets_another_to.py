"""Two ``frelay connect --to`` on one route would both wait for a call for ever: both report it, and back off."""

from __future__ import annotations

import pytest

from support.commands import arguments, command
from support.connects import dial, port_here, still_echoes
from support.services import echo, serving
from support.site import Site


@pytest.mark.parametrize("mode", ["handoff", "ticket", "tunnel"])
async def test_both_are_told_and_back_off(site: Site, mode: str) -> None:
    async with serving(echo) as service, site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        to = ("--to", service.address, "--mode", mode)
        async with (
            command(arguments(site, place, "func1", "func2", *to)) as one,
            command(arguments(site, place, "func2", "func1", *to)) as two,
        ):
            for end in (one, two):
                failed = await end.say("failed")
                assert failed["error"] == "MetAnotherService", end.stderr
                assert "is a `frelay connect --to` as well" in failed["reason"]
                await end.say("retrying", 3)
                assert end.process.returncode is None
            # The pauses grow: the third is at least 2 s, the first at most 1 s.
            assert one.said("retrying")[2]["seconds"] > one.said("retrying")[0]["seconds"]


async def test_a_caller_is_served_among_them(site: Site) -> None:
    async with serving(echo) as service, site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func1", "func2", "--to", service.address)) as one,
            command(arguments(site, place, "func2", "func1", "--to", service.address)) as two,
        ):
            await one.say("failed")
            await two.say("failed")
            one.process.terminate()
            assert await one.exit_code() == 0
            async with port_here(site, relay) as (_, port), await dial(port) as caller:
                await still_echoes(caller)
