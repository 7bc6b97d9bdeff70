"""If a function says of which trace it is a part (JOIN.traceparent), the log lines of its leg and pairing have it."""

from __future__ import annotations

from functools import partial
from typing import Final

import pytest
import trio

from support.clients import CLIENTS, Client, answer, ask, options, run_function
from support.party import pair
from support.site import Site

ONE: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TWO: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


async def test_each_line_of_a_leg_and_of_its_pairing_carries_it(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join(traceparent=ONE)
        await one.expect("WAITING")
        await two.join(traceparent=TWO)
        await two.expect("WAITING")
        await one.expect("PAIRED")
        await two.expect("PAIRED")
        await one.hand_off()
        await two.hand_off()
        await relay.log("handed off", func1_traceparent=ONE, func2_traceparent=TWO)
        one.reset()
        await relay.log("pairing ended", func1_traceparent=ONE, func2_traceparent=TWO)
        assert relay.logged("waiting", party="func1", traceparent=ONE)


async def test_a_refusal_carries_it_too(site: Site) -> None:
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.join(traceparent=ONE, route="another")
        await party.refusal()
        await relay.log("refused", code="unknown-route", traceparent=ONE)


@pytest.mark.parametrize("given", [{}, {"traceparent": "00-what-ever-01"}, {"traceparent": ONE.upper()}])
async def test_where_there_is_none_there_is_no_word_of_it(site: Site, given: dict[str, str]) -> None:
    """If it is missing or ill-formed, the function is served all the same."""
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two, **given)
        one.reset()
        await relay.outcome()
        assert not [event for event in relay.events for key in event if "traceparent" in key]


async def test_it_may_be_given_for_one_of_the_two(site: Site) -> None:
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join()
        await one.expect("WAITING")
        await two.join(traceparent=TWO)
        await two.expect("WAITING")
        await one.expect("PAIRED")
        two.reset()
        record = await relay.outcome()
        assert record["func2_traceparent"] == TWO
        assert "func1_traceparent" not in record


@pytest.mark.parametrize("client", CLIENTS)
async def test_every_client_says_it(site: Site, client: Client) -> None:
    async with site.relay() as relay, trio.open_nursery() as nursery:
        place = f"127.0.0.1:{relay.port()}"
        given = options(site, "func1", "func2", traceparent=ONE)
        nursery.start_soon(partial(run_function, client, place, ask(b"hello"), given))
        # The client does not send an ill-formed one: a mistake in tracing must not fail the call.
        other = options(site, "func2", "func1", traceparent="x" * 10_000)
        assert await run_function(client, place, answer(b"hello yourself"), other) == b"hello"
        record = await relay.outcome()
        assert record["func1_traceparent"] == ONE
        assert "func2_traceparent" not in record
