"""``relay.demo.`` is ``relay.demo``: with the dot a resolver skips its search list; certificates have no dot."""

from __future__ import annotations

import pytest
import trio

from support.clients import CLIENTS, Client, answer, ask, meet, options
from support.commands import arguments, command
from support.site import DEMO, Site


@pytest.mark.parametrize("client", CLIENTS)
async def test_the_relay_and_the_peer_may_be_named_absolutely(site: Site, client: Client) -> None:
    async with site.relay(DEMO) as relay:
        given = (
            options(site, "func1", "func2", server_name="localhost.", peer="dns:func2.demo."),
            options(site, "func2", "func1", server_name="relay.test.", peer=["dns:nobody.demo.", "dns:FUNC1.demo."]),
        )
        parts = (ask(b"question"), answer(b"reply"))
        address = f"127.0.0.1:{relay.port()}"
        assert await meet((client, "trio"), address, parts, given) == (b"reply", b"question")


async def test_the_command_takes_them_too(site: Site) -> None:
    async with site.relay(DEMO) as relay:
        place = f"127.0.0.1:{relay.port()}"
        absolute = arguments(site, place, "func1", "func2", "--exec", "cat")
        for option, value in (("--server-name", "localhost."), ("--peer", "dns:func2.demo.")):
            absolute[absolute.index(option) + 1] = value
        async with (
            command(absolute) as one,
            command(arguments(site, place, "func2", "func1")) as two,
            trio.open_nursery() as nursery,
        ):

            async def put() -> None:
                async with two.stdin:
                    await two.stdin.send_all(b"there and back")

            nursery.start_soon(put)
            assert await two.output() == b"there and back"
            assert (await one.exit_code(), await two.exit_code()) == (0, 0)
