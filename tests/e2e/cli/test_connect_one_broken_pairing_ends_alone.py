"""When one pairing of ``frelay connect`` breaks, its own caller sees a cut; the port and all other callers go on."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

import pytest
import trio

from support.commands import arguments, command
from support.connects import dial, ends_by_reset, offering, port_here, reset, still_echoes
from support.ports import reserved_port
from support.services import echo, nobody, serving
from support.site import DEMO, Site
from support.waiting import eventually


async def moody(stream: trio.SocketStream) -> None:
    """An echo service that resets its caller on command."""
    while data := await stream.receive_some(65536):
        if data == b"reset":
            reset(stream)
            return
        await stream.send_all(data)


async def the_service_resets(caller: trio.SocketStream) -> None:
    await caller.send_all(b"reset")
    assert await ends_by_reset(caller)


async def the_caller_resets(caller: trio.SocketStream) -> None:
    reset(caller)


async def the_caller_resets_with_bytes_on_their_way(caller: trio.SocketStream) -> None:
    """It makes both directions break at once."""
    with trio.move_on_after(0.5):
        await caller.send_all(b"x" * 50_000_000)
    reset(caller)


WHO: Final = [the_service_resets, the_caller_resets, the_caller_resets_with_bytes_on_their_way]


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("break_it", WHO)
async def test_a_side_that_resets(
    site: Site, break_it: Callable[[trio.SocketStream], Awaitable[None]], mode: str
) -> None:
    async with (
        serving(moody) as service,
        site.relay() as relay,
        offering(site, relay, service.address, "--mode", mode) as there,
        port_here(site, relay, "--mode", mode) as (here, place),
    ):
        async with await dial(place) as calm:
            await still_echoes(calm)
            for count in range(1, 4):
                async with await dial(place) as bad:
                    await still_echoes(bad)
                    await break_it(bad)
                await eventually(
                    lambda count=count: len(here.said("failed")) == len(there.said("failed")) == count,  # type: ignore[misc]
                    "both have noticed",
                )
                await still_echoes(calm)
            async with await dial(place) as fresh:
                await still_echoes(fresh)
        assert there.process.returncode is None
        assert "Traceback" not in there.stderr


async def test_a_service_that_is_down(site: Site) -> None:
    """The error names its address, the caller sees a cut, and running pairings go on."""
    async with site.relay() as relay, AsyncExitStack() as stack:
        with nobody() as place_of_nobody:
            there = await stack.enter_async_context(offering(site, relay, place_of_nobody))
            _, place = await stack.enter_async_context(port_here(site, relay))
            for count in (1, 2):
                async with await dial(place) as caller:
                    assert await ends_by_reset(caller)
                reason = (await there.say("failed", count))["reason"]
                assert reason == f"no connection to the local service {place_of_nobody}: Connection refused"
        assert there.process.returncode is None


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_partner_that_goes_before_its_tls(site: Site, how: str) -> None:
    async with (
        serving(echo) as service,
        site.relay() as relay,
        port_here(site, relay) as (here, place),
        offering(site, relay, service.address, "--concurrency", "1"),
    ):
        calm = await dial(place)
        await still_echoes(calm)
        bad = await site.party(relay, "func2")
        await bad.join()
        await bad.expect("WAITING")
        async with await dial(place) as caller:
            await bad.expect("PAIRED")
            await bad.hand_off()
            if how == "FIN":
                bad.close()
            else:
                bad.reset()
            assert await ends_by_reset(caller)
        assert (await here.say("failed"))["error"] == "PeerGone"
        await still_echoes(calm)
        await calm.aclose()
        async with await dial(place) as fresh:
            await still_echoes(fresh)


async def test_a_partner_that_shows_another_name(site: Site) -> None:
    """Its inner certificate has another name: the caller is cut, and no byte was sent to the partner."""
    site.add("other", site.ca.party(dns=["other.demo"]))
    cert, key = site.paths["other"]
    inner = ("--inner-cert", str(cert), "--inner-key", str(key))
    async with serving(echo) as service, site.relay() as relay, port_here(site, relay) as (here, place):
        async with offering(site, relay, service.address):
            calm = await dial(place)
            await still_echoes(calm)
        # Kill that one: its caller sees a cut as well.
        assert await ends_by_reset(calm)
        async with offering(site, relay, service.address, *inner) as wrong:
            async with await dial(place) as caller:
                assert await ends_by_reset(caller)
            await eventually(
                lambda: any(one["error"] == "PeerIdentityMismatch" for one in here.said("failed")), "it is named"
            )
            assert wrong.process.returncode is None
        async with offering(site, relay, service.address), await dial(place) as fresh:
            await still_echoes(fresh)


async def test_a_to_that_is_killed(site: Site) -> None:
    """Its callers see a cut; callers of another process of the same service notice nothing."""
    async with (
        serving(echo) as service,
        site.relay() as relay,
        port_here(site, relay) as (_, place),
        offering(site, relay, service.address),
    ):
        calm = await dial(place)
        await still_echoes(calm)
        async with offering(site, relay, service.address) as doomed:
            struck = []
            while not doomed.said("connected"):
                struck.append(await dial(place))
                await still_echoes(struck[-1])
            doomed.process.kill()
            await doomed.process.wait()
        assert await ends_by_reset(struck[-1])
        for caller in (calm, *struck[:-1]):
            await still_echoes(caller)
            await caller.aclose()
        async with await dial(place) as fresh:
            await still_echoes(fresh)


async def test_a_relay_that_is_killed(site: Site) -> None:
    """All its pairings are cut, and both sides see a cut; then both ends join the next relay."""
    cuts: list[bool] = []

    async def service(stream: trio.SocketStream) -> None:
        try:
            await echo(stream)
            cuts.append(False)
        except trio.BrokenResourceError:
            cuts.append(True)

    with reserved_port() as port:
        routes = DEMO.replace(":0", f":{port}")
        async with (
            serving(service) as local,
            command(arguments(site, f"127.0.0.1:{port}", "func2", "func1", "--to", local.address)) as there,
            port_here(site, port) as (_, place),
        ):
            async with site.process(routes) as relay:
                await there.say("waiting")
                callers = [await dial(place) for _ in range(3)]
                for caller in callers:
                    await still_echoes(caller)
                relay.process.kill()
                await relay.process.wait()
            for caller in callers:
                assert await ends_by_reset(caller)
            await eventually(lambda: cuts == [True] * 3, "the service saw cuts")
            # Without a relay a caller is cut, and the port stays open.
            assert await is_cut(place)
            count = len(there.said("waiting"))
            async with site.process(routes):
                await there.say("waiting", count + 1)
                async with await dial(place) as fresh:
                    await still_echoes(fresh)


async def is_cut(place: str) -> bool:
    """Whether a caller is cut. That may come so soon that it is seen in place of the end of the dialling."""
    try:
        async with await dial(place) as caller:
            return await ends_by_reset(caller)
    except OSError as error:
        return "Connection reset by peer" in str(error.__cause__.exceptions[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_port_that_goes_cuts_its_callers(site: Site, number: signal.Signals) -> None:
    """Their data must not look complete, also if the process had no time to cut them itself."""
    async with (
        serving(echo) as service,
        site.relay() as relay,
        offering(site, relay, service.address),
        port_here(site, relay, lives=False) as (here, place),
        await dial(place) as caller,
    ):
        await still_echoes(caller)
        here.process.send_signal(number)
        assert await ends_by_reset(caller)
        assert await here.exit_code() == (0 if number == signal.SIGTERM else -number)
