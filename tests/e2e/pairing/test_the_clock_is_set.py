"""TESTPLAN 50: the relay's clock is set by a day. Time limits do not change; certificates are checked by the new date.

libfaketime moves only the relay's clock, and only the date: Linux's monotonic clock never jumps.
"""

from __future__ import annotations

import signal
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
import trio
from cryptography import x509

from support.ends import MODES, OPEN, End, join_ends
from support.party import Party
from support.relay import RelayProcess
from support.site import Site
from support.tools import library
from support.waiting import TIMEOUT, before_it_expires

HOUR: Final = 3600
DAY: Final = 24 * HOUR
ROUTES: Final = OPEN + OPEN.replace('"demo"', '"lobby"') + "wait_timeout = 3600\n"
"""One route for pairings, and one where no leg meets another before the test wants it."""

# A waiting leg has a timer for its pings, and a clock that jumps must not make any of them early or late.
SECTIONS: Final = "[limits]\nping_interval = 0.2\npong_timeout = 60\n"


class Clock:
    """The date that a relay sees: the true one plus some seconds."""

    def __init__(self, site: Site, ahead: int) -> None:
        self._path = site.directory / "clock"
        self.set(ahead)
        self.env: Final = {
            "LD_PRELOAD": library("libfaketimeMT.so.1", "faketime"),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            # The older and the newer name of one switch.
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, ahead: int) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(f"{ahead:+d}\n")
        new.replace(self._path)


@asynccontextmanager
async def relay_with_clock(
    site: Site, ahead: int = 0, *, limits: str = ""
) -> AsyncIterator[tuple[RelayProcess, Clock]]:
    clock = Clock(site, ahead)
    async with site.process(ROUTES, sections=SECTIONS + limits, env=clock.env) as relay:
        yield relay, clock


async def waits(site: Site, relay: RelayProcess, name: str) -> Party:
    party = await site.party(relay, name, route="lobby")
    await party.join()
    await party.expect("WAITING")
    return party


async def is_asked(party: Party) -> None:
    """The leg gets a PING, so it still has its place, and answers."""
    for _ in range(2):
        # Twice: the first may have been sent a while ago; the second is sent only after the answer to the first.
        await party.send_frame("PONG", await party.expect("PING"))


async def talk(*pairs: tuple[End, End]) -> None:
    with trio.fail_after(TIMEOUT):
        for ends in pairs:
            for source, sink in (ends, reversed(ends)):
                await source.send(b"still here")
                assert await sink.receive_exactly(10) == b"still here"


async def is_refused(site: Site, relay: RelayProcess, name: str) -> str:
    """The alert that a newcomer gets."""
    return await (await site.connect(relay, name)).alert()


async def test_ahead_and_back(site: Site) -> None:
    """Legs that are expired by the new date end; others notice nothing. When it is set back, they may join again."""
    site.add("short", site.ca.ending(12 * HOUR, dns=["func1.demo"]))
    async with relay_with_clock(site) as (relay, clock):
        pairs = [await join_ends(site, relay, mode, mode) for mode in MODES]
        short = [await join_ends(site, relay, mode, mode, names=("short", "func2")) for mode in MODES]
        stays, goes = await waits(site, relay, "func1"), await waits(site, relay, "short")
        await is_asked(goes)
        clock.set(DAY)
        assert (await goes.refusal())["code"] == "certificate-expired"
        await relay.log("pairing ended", outcome="certificate-expired", count=len(short))
        for end in (end for ends in short for end in ends):
            assert await end.ended() in ("reset", "truncated")
        assert "EXPIRED" in await is_refused(site, relay, "short")
        await is_asked(stays)
        await talk(*pairs)
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")
        await is_asked(stays)
        await talk(*pairs, await join_ends(site, relay))

        clock.set(0)
        await relay.log("the clock was set", count=2)
        again = await waits(site, relay, "short")
        await is_asked(again)
        await is_asked(stays)
        await talk(*pairs, await join_ends(site, relay, names=("short", "func2")))
        two = await waits(site, relay, "func2")
        await stays.expect("PAIRED")
        await two.expect("PAIRED")
        assert len(relay.logged("pairing ended")) == len(short)


async def test_a_grace_goes_by_the_date_too(site: Site) -> None:
    """When set ahead, a pairing goes on within the grace, and ends after it. A waiting leg has no grace."""
    site.add("short", site.ca.ending(12 * HOUR, dns=["func1.demo"]))
    async with relay_with_clock(site, limits=f"certificate_grace = {DAY}\n") as (relay, clock):
        ends = await join_ends(site, relay, names=("short", "func2"))
        goes = await waits(site, relay, "short")
        clock.set(DAY)
        assert (await goes.refusal())["code"] == "certificate-expired"
        # The relay checks the clock now and then: if it were set back too soon, the relay would see no change.
        await relay.log("the clock was set")
        await talk(ends)
        clock.set(0)
        await relay.log("the clock was set", count=2)
        await talk(ends)
        clock.set(2 * DAY)
        assert (await relay.log("pairing ended"))["outcome"] == "certificate-expired"
        for end in ends:
            assert await end.ended() in ("reset", "truncated")


async def test_back_and_ahead(site: Site) -> None:
    """A certificate that is suddenly not valid yet admits no new leg, but does not end the legs that it admitted."""
    noon = datetime.now(UTC) + timedelta(hours=12)
    san = [x509.DNSName("func1.demo")]
    site.add("young", site.ca.odd(san, name="young", not_before=noon, not_after=noon + timedelta(days=1)))
    async with relay_with_clock(site, DAY) as (relay, clock):
        pairs = [await join_ends(site, relay, mode, mode, names=("young", "func2")) for mode in MODES]
        stays = await waits(site, relay, "young")
        clock.set(0)
        await relay.log("the clock was set")
        assert "BAD_CERTIFICATE" in await is_refused(site, relay, "young")
        await is_asked(stays)
        await talk(*pairs)
        # A reload verifies all admitted legs again.
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")
        await is_asked(stays)
        await talk(*pairs)
        two = await waits(site, relay, "func2")
        await stays.expect("PAIRED")
        await two.expect("PAIRED")

        clock.set(DAY)
        await relay.log("the clock was set", count=2)
        await talk(*pairs, await join_ends(site, relay, names=("young", "func2")))
        assert not relay.logged("pairing ended")


@pytest.mark.load
async def test_back_again_before_it_expires(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the clock is set back, the expiry of a certificate moves later; a waiting or paired leg lives until then.

    Here only Python's clock is set, and OpenSSL's goes on: its first refusal tells when the old expiry has come.
    """

    def make(seconds: float) -> datetime:
        # And enough time for the relay to see the change.
        short = site.add("short", site.ca.ending(seconds + 2, dns=["func1.demo"]))
        return short.certificate.not_valid_after_utc - timedelta(seconds=2)

    async def come() -> tuple[tuple[End, End], Party]:
        waiting = await site.party(relay, "short", route="lobby")
        await waiting.join()
        await waiting.expect("WAITING")
        return await join_ends(site, relay, names=("short", "func2")), waiting

    async with site.relay(ROUTES, sections=SECTIONS) as relay:
        (ends, waiting), _ = await before_it_expires(make, come)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - DAY)
        await relay.log("the clock was set")
        with trio.fail_after(TIMEOUT):
            while all("identity" in entry for entry in relay.logged("refused", code="certificate-expired")):
                # An entry with an identity is about a leg that was admitted.
                newcomer = await site.connect(relay, "short")
                with suppress(ssl.SSLError):
                    await newcomer.handshake()
                    await newcomer.join()
                    await newcomer.expect("WAITING")
                newcomer.close()
        await is_asked(waiting)
        await talk(ends)
        monkeypatch.setattr(time, "time", now)
        assert (await waiting.refusal())["code"] == "certificate-expired"
        assert (await relay.outcome())["outcome"] == "certificate-expired"


async def test_legs_that_may_be_either_party_follow_the_date_too(site: Site) -> None:
    """They wait by a key, in queues of their own."""
    site.add("short", site.ca.ending(12 * HOUR, dns=["both.demo"]))
    site.add("long", site.ca.party(dns=["both.demo"]))
    routes = OPEN.replace('"dns:func1.demo"', '["dns:func1.demo", "dns:both.demo"]')
    routes = routes.replace('"dns:func2.demo"', '["dns:func2.demo", "dns:both.demo"]')
    clock = Clock(site, 0)
    async with site.process(routes, sections=SECTIONS, env=clock.env) as relay:
        legs = []
        for name, key in (("long", "a"), ("short", "b")):
            leg = await site.party(relay, name)
            await leg.join(meet=key)
            assert (await leg.expect("WAITING"))["party"] is None
            legs.append(leg)
        stays, goes = legs
        await is_asked(goes)
        clock.set(DAY)
        assert (await goes.refusal())["code"] == "certificate-expired"
        await is_asked(stays)
