"""The outcome ``dial-failed`` says that a service failed, so it is the only thing that may cause it.

A caller that had too little time, or left before the service answered, says nothing about the service. It counts as a
refusal with ``wait-timeout``; otherwise nothing would show a service that never answers if all its callers leave early.
"""

from __future__ import annotations

import pytest
import trio

from support.relay import RelayInProcess
from support.services import CALLERS, black_hole, dialling, echo, nobody, serving
from support.site import Site
from support.waiting import TIMEOUT, eventually


def counted(relay: RelayInProcess) -> dict[str, int]:
    """The metrics of the route: pairings by outcome, refusals by code."""
    totals = relay.relay.journal.totals["demo"]
    return {**totals.outcomes, **totals.refusals}


@pytest.mark.parametrize("wait", [0, 0.0001])
async def test_a_caller_without_time_says_nothing_of_the_service(site: Site, wait: float) -> None:
    async with serving(echo) as service, site.relay(dialling(service)) as relay:
        for _ in range(3):
            party = await site.party(relay, "func1")
            await party.join(wait=wait)
            await party.expect("WAITING")
            assert (await party.refusal())["code"] == "wait-timeout"
        assert counted(relay) == {"wait-timeout": 3}
        assert not relay.logged("pairing ended")


async def test_a_callers_own_limit_says_nothing_of_the_service(site: Site) -> None:
    """Even if the service never answers: a caller that waits less than connect_timeout cannot know that."""
    with black_hole() as address:
        async with site.relay(dialling(address, options=", connect_timeout = 60")) as relay:
            party = await site.party(relay, "func1")
            await party.join(wait=0.3)
            assert (await party.expect("WAITING"))["deadline"] == 0.3
            assert await party.refusal() == {
                "code": "wait-timeout",
                "reason": "the service did not answer within the 0.3 s that this function could wait",
                "retry_after": 0.0,
            }
            assert counted(relay) == {"wait-timeout": 1}
            assert not relay.logged("pairing ended")


@pytest.mark.parametrize("how", ["LEAVE", "close_notify", "FIN", "RST"])
async def test_a_caller_that_gives_up_first_is_counted(site: Site, how: str) -> None:
    with black_hole() as address:
        async with site.relay(dialling(address, options=", connect_timeout = 60")) as relay:
            party = await site.party(relay, "func1")
            await party.join()
            await party.expect("WAITING")
            await eventually(lambda: relay.legs == 2, "the relay dials")
            if how == "LEAVE":
                await party.send_frame("LEAVE")
            elif how == "close_notify":
                await party.stream.send_all(party.close_notify())
            elif how == "FIN":
                party.take_in()
                await party.send_eof()
            else:
                party.reset()
            entry = await relay.log("refused")
            assert entry["code"] == "wait-timeout"
            assert entry["reason"].endswith(", before the service answered")
            assert counted(relay) == {"wait-timeout": 1}
            assert not relay.logged("pairing ended")


@pytest.mark.parametrize("wait", [None, 5.0], ids=["as long as it takes", "for a while"])
@pytest.mark.parametrize("caller", CALLERS)
async def test_a_service_that_refuses_has_failed(site: Site, caller: str, wait: float | None) -> None:
    """Whatever time its caller could have waited."""
    more = 'handoff = "hello"\n' if caller == "hello" else ""
    with nobody() as address:
        async with site.relay(dialling(address, more=more)) as relay:
            if caller in ("bare", "hello"):
                party = await site.party(relay, "func1", alpn=())
                if caller == "hello":
                    await party.send(b"Hello\n")
                with trio.fail_after(TIMEOUT):
                    assert await party.receive() == b""
            else:
                party = await site.party(relay, "func1")
                await party.join(**({} if wait is None else {"wait": wait}))
                await party.expect("WAITING")
                assert (await party.refusal())["code"] == "wait-timeout"
            assert counted(relay) == {"dial-failed": 1, "wait-timeout": 1}


async def test_a_service_that_had_all_the_time_of_the_route_has_failed(site: Site) -> None:
    """Whether connect_timeout or a shorter wait_timeout ends it: the caller would have waited longer."""
    for limits in (", connect_timeout = 0.2", ""):
        more = "" if limits else "wait_timeout = 0.2\n"
        with black_hole() as address:
            async with site.relay(dialling(address, options=limits, more=more)) as relay:
                party = await site.party(relay, "func1")
                await party.join(wait=30)
                await party.expect("WAITING")
                assert (await party.refusal())["reason"] == "the service of this route cannot be reached"
                assert counted(relay) == {"dial-failed": 1, "wait-timeout": 1}
