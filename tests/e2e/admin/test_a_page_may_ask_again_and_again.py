"""The admin API for a page that is open all night: polling is cheap, no event is missed, and a link opens the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
import trio

from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

ADMIN: Final = '[admin]\nlisten = "unix:frelay.sock"\n'
ROUTE: Final = '[[route]]\nname = "demo"\nlisten = "127.0.0.1:0"\nfunc1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'
VISIT: Final = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


async def get(site: Site, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """The status and the body of one answer."""
    lines = [f"GET {path} HTTP/1.1", "host: localhost", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    with trio.fail_after(TIMEOUT):
        async with await trio.open_unix_socket(str(site.directory / "frelay.sock")) as stream:
            await stream.send_all("\r\n".join([*lines, "", ""]).encode())
            answer = b"".join([bytes(data) async for data in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def events(site: Site, query: str, count: int, headers: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The first ``count`` events of a stream."""
    lines = [f"GET /v1/events{query} HTTP/1.1", "host: localhost"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    found: list[dict[str, Any]] = []
    rest = b""
    with trio.fail_after(TIMEOUT):
        async with await trio.open_unix_socket(str(site.directory / "frelay.sock")) as stream:
            await stream.send_all("\r\n".join([*lines, "", ""]).encode())
            async for data in stream:
                *whole, rest = (rest + data).split(b"\n")
                found += [json.loads(line[6:]) for line in whole if line.startswith(b"data: ")]
                if len(found) >= count:
                    return found
    raise AssertionError(f"the stream ended after {found}")


async def refused_twice(site: Site, relay: RelayInProcess) -> None:
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    for _ in range(2):
        stranger = await site.party(relay, "stranger")
        await stranger.join()
        await stranger.refusal()
    await eventually(lambda: len(relay.logged("refused")) == 2)


async def test_traffic_is_what_the_routes_say(site: Site) -> None:
    async with site.relay(ROUTE, sections=ADMIN) as relay:
        await refused_twice(site, relay)
        waiting = await site.party(relay)
        await waiting.join()
        await waiting.expect("WAITING")
        traffic = json.loads((await get(site, "/v1/traffic"))[1])
        (route,) = json.loads((await get(site, "/v1/routes"))[1])["routes"]
        (moving,) = traffic["routes"]
        assert moving["waiting"]["func1"][0].pop("since") == pytest.approx(
            route["waiting"]["func1"][0].pop("since"), abs=0.1
        )
        assert moving == {key: route[key] for key in moving}
        assert traffic["last_reload_at"] == relay.relay.last_reload_at


async def test_a_new_reader_can_have_what_came_before_it(site: Site) -> None:
    async with site.relay(ROUTE, sections=ADMIN) as relay:
        await refused_twice(site, relay)
        assert [event["id"] for event in await events(site, "?after=0", 2)] == [1, 2]
        assert [event["id"] for event in await events(site, "?after=1", 1)] == [2]
        # A browser that reconnects repeats the URL, and adds Last-Event-ID, which takes precedence.
        assert [event["id"] for event in await events(site, "?after=0", 1, {"last-event-id": "1"})] == [2]


async def test_a_number_from_before_a_restart_hides_nothing(site: Site) -> None:
    async with site.relay(ROUTE, sections=ADMIN) as relay:
        await refused_twice(site, relay)
        assert [event["id"] for event in await events(site, "", 2, {"last-event-id": "5000"})] == [1, 2]


async def test_a_link_on_another_page_may_be_followed(site: Site) -> None:
    async with site.relay(ROUTE, sections=ADMIN):
        assert (await get(site, "/", VISIT))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {**VISIT, "sec-fetch-dest": "iframe"},
        {**VISIT, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
        {**VISIT, "origin": "https://elsewhere.example"},
    ],
    ids=["framed", "as a script", "with its origin"],
)
async def test_nothing_else_of_another_page_may(site: Site, headers: Mapping[str, str]) -> None:
    async with site.relay(ROUTE, sections=ADMIN):
        assert (await get(site, "/v1/status", headers))[0] == 403
