"""Everything that shows a leg shows the key by which it meets its partner, and no metric does.

A key is visible ASCII that a function chooses, so ``<script>`` is a legal one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Final

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from frelay.journal import Entry, HandshakeDone, PairingEnded
from frelay.protocol.outcome import Record
from support.admin import ADMIN, admin, events
from support.browser import Browser, View, browser, forwarded
from support.commands import ask
from support.party import Party
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT

MESH: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:func1.demo", "dns:both.demo"]
func2 = ["dns:func2.demo", "dns:both.demo"]
"""
SECTIONS: Final = ADMIN + '[metrics]\nlisten = "127.0.0.1:0"\n'
SCRIPT: Final = "<script>alert(1)</script>&\"'"
LONG: Final = "job/" + "x" * 124


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@asynccontextmanager
async def meetings(site: Site, workers: int | None = None) -> AsyncIterator[RelayProcess]:
    """A relay with one pairing by key, and func1, func2 and either waiting, all with keys; and one without."""
    site.add("both", site.ca.party(dns=["both.demo"]))
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    site.workers = workers

    async def joined(name: str, **fields: object) -> Party:
        party = await site.party(relay, name)
        await party.join(**fields)
        await party.expect("WAITING")
        return party

    async with site.process(MESH, sections=SECTIONS) as relay:
        one = await joined("func1", meet=SCRIPT)
        await joined("func2", meet=SCRIPT)
        await one.expect("PAIRED")
        await joined("func1", meet=SCRIPT)
        await joined("func2", meet=LONG)
        await joined("both", meet="job/7")
        await joined("func1")
        refused = await joined("func1", meet="job/8", wait=0.2)
        assert (await refused.refusal())["code"] == "wait-timeout"
        stranger = await site.party(relay, "stranger")
        await stranger.join(meet="a-strangers-key")
        await stranger.refusal()
        await relay.log("waiting", count=6)
        yield relay


@pytest.mark.parametrize("workers", [None, 2])
async def test_the_api_tells_them(site: Site, workers: int | None) -> None:
    async with meetings(site, workers), admin(site) as api:
        waiting = (await api.get("/v1/routes/demo")).json()["waiting"]
        assert [leg["meet"] for leg in waiting["func1"]] == [SCRIPT, None]
        assert [leg["meet"] for leg in waiting["func2"]] == [LONG]
        assert [(leg["meet"], leg["identity"]) for leg in waiting["either"]] == [("job/7", "dns:both.demo")]
        traffic = (await api.get("/v1/traffic")).json()["routes"][0]["waiting"]
        assert {party: [leg["meet"] for leg in legs] for party, legs in traffic.items()} == {
            party: [leg["meet"] for leg in legs] for party, legs in waiting.items()
        }
        (pairing,) = (await api.get("/v1/pairings")).json()["pairings"]
        assert pairing["meet"] == SCRIPT
        status = (await api.get("/v1/status")).json()
        assert status["waiting"] == 4
        # A stranger chose its key; it is nowhere.
        assert [one["meet"] for one in status["refusals"]] == [None, "job/8"]
        assert "a-strangers-key" not in json.dumps(status)


async def test_each_event_tells_them(site: Site) -> None:
    async with site.relay(sections=ADMIN) as relay, admin(site) as api, events(api) as stream:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join(meet=SCRIPT)
        await one.expect("WAITING")
        assert (await stream.wait("waiting"))["meet"] == SCRIPT
        await two.join(meet=SCRIPT)
        await two.expect("WAITING")
        assert (await stream.wait("paired"))["meet"] == SCRIPT
        one.reset()
        assert (await stream.wait("ended"))["meet"] == SCRIPT
        late = await site.party(relay, "func1")
        await late.join(meet=SCRIPT, wait=0.1)
        assert (await stream.wait("refused"))["meet"] == SCRIPT


async def test_the_api_describes_them(site: Site) -> None:
    """Where ``meet`` and the party "either" appear in /openapi.json, it says what they are."""
    async with site.relay(sections=ADMIN), admin(site) as api:
        schema = (await api.get("/openapi.json")).json()
    told = {
        (name, key): field.get("description", "")
        for name, model in schema["components"]["schemas"].items()
        for key, field in model.get("properties", {}).items()
        if "meet" in key or "either" in (key, *re.findall(r"\w+", json.dumps(field.get("anyOf", [field]))))
    }
    assert told.keys() == {
        *((name, "meet") for name in ("LegView", "PairingView", "RefusalView")),
        *((name, f"max_waiting_{by}_meet") for name in ("RouteBody", "PartyLimits") for by in ("per", "by")),
        ("WaitingView", "either"),
        ("RefusalView", "party"),
    }
    for place, text in told.items():
        assert "key" in text, place
    _, kinds, rest = schema["paths"]["/v1/events"]["get"]["description"].split("\n\n")
    assert {
        kind: re.findall(r"`(\w+)`", keys) for kind, keys in re.findall(r"^- `([\w-]+)`: ([^-]*)", kinds, re.MULTILINE)
    } == {
        entry.kind: [
            one.name for one in fields(Record if entry.kind == PairingEnded.kind else entry) if one.name != "at"
        ]
        for entry in Entry.__subclasses__()
        if entry.kind != HandshakeDone.kind
    }
    assert "`meet` is the key" in rest
    assert "`party` is `either`" in rest


@pytest.mark.parametrize("workers", [None, 2])
async def test_no_metric_tells_them(site: Site, workers: int | None) -> None:
    async with meetings(site, workers) as relay, httpx.AsyncClient(timeout=TIMEOUT) as http:
        place = (await relay.log("serving"))["metrics"]
        for accept in ("text/plain", "application/openmetrics-text"):
            text = (await http.get(f"http://{place}/metrics", headers={"Accept": accept})).text
            assert 'frelay_keys_waiting{route="demo"} 3' in text
            assert 'frelay_legs_waiting{party="either",route="demo"} 1' in text
            for key in ("<script>", LONG, "job/7", "job/8", "a-strangers-key"):
                assert key not in text


async def test_the_commands_tell_them(site: Site) -> None:
    async with meetings(site):
        shown = await ask("route", "show", "demo", "-c", site.config)
        assert f", by key {SCRIPT}" in shown.stdout
        assert "waiting either" in shown.stdout
        listed = await ask("route", "list", "-c", site.config)
        assert "  2/1+1  " in listed.stdout
        status = await ask("status", "-c", site.config)
        assert "  KEY  " in status.stdout
        assert "  job/8  " in status.stdout
        top = await ask("top", "-c", site.config, env={**os.environ, "COLUMNS": "400"})
        lines = top.stdout.splitlines()
        assert any(line.split()[:3] == ["demo", "either", "dns:both.demo"] and line.endswith("job/7") for line in lines)
        assert sum(SCRIPT in line for line in lines) == 2, "the one that waits, and the pairing"


# --- the dashboard ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def dashboard(site: Site, chromium: Browser, width: int) -> AsyncIterator[tuple[RelayProcess, View]]:
    async with (
        meetings(site) as relay,
        forwarded(site.directory / "a.sock") as way,
        chromium.page(way.url, width=width, height=900) as view,
    ):
        yield relay, view


def row(page: Page, table: str, key: str) -> Locator:
    """The row of a table that shows this key."""
    return page.locator(f"#{table} tbody tr").filter(has=page.locator(".key").get_by_text(f"key {key}", exact=True))


@pytest.mark.parametrize("width", [1280, 360])
async def test_the_dashboard_shows_them_as_text(site: Site, chromium: Browser, width: int) -> None:
    async with dashboard(site, chromium, width) as (_, view):

        def look(page: Page) -> None:
            for table, keys in {
                "waiting": [SCRIPT, LONG, "job/7"],
                "pairings": [SCRIPT],
                "refusals": ["job/8"],
            }.items():
                for key in keys:
                    expect(row(page, table, key)).to_have_count(1)
            expect(row(page, "waiting", "job/7")).to_contain_text("as either party from")
            expect(page.locator("#routes")).to_contain_text("2 func1, func2, either")
            # Neither a leg without a key nor a stranger has one, and no key has become a part of the page.
            expect(page.locator("#waiting .key:empty")).to_have_count(1)
            expect(page.locator("#refusals .key:empty")).to_have_count(1)
            assert "a-strangers-key" not in page.content()
            assert page.evaluate("document.scripts.length") == 1

        await view.see(look)
        await view.shoot(f"keys-{width}")


@pytest.mark.parametrize("width", [1280, 360])
async def test_a_long_key_makes_no_table_wider(site: Site, chromium: Browser, width: int) -> None:
    """In a wide window it loses its middle and keeps both ends; on a phone, which shows no title, it is whole."""
    async with dashboard(site, chromium, width) as (relay, view):

        def look(page: Page, table: str) -> None:
            found = row(page, table, LONG).locator(".key")
            expect(found).to_have_count(1)
            expect(found).to_have_attribute("title", LONG)
            shown = found.evaluate(SHOWN)
            assert shown["copied"] == f"key {LONG}"
            assert shown["endIsInside"]
            assert (shown["lines"] == 1) is (width == 1280), shown
            # Other tables have a line that is nearly long enough; the font decides whether it is.
            assert shown["isCut"] is (width == 1280) or table == "pairings", shown
            for place in ("document.documentElement", f'document.querySelector("#{table}")'):
                assert page.evaluate(f"{place}.scrollWidth - {place}.clientWidth") == 0

        await view.see(lambda page: look(page, "waiting"))
        one = await site.party(relay, "func1")
        await one.join(meet=LONG)
        await one.expect("WAITING")
        await one.expect("PAIRED")
        await view.see(lambda page: look(page, "pairings"))
        await view.shoot(f"long-key-{width}")
        one.reset()
        late = await site.party(relay, "func1")
        await late.join(meet=LONG, wait=0.1)
        await late.expect("WAITING")
        await late.refusal()
        await view.see(lambda page: look(page, "endings"))
        await view.see(lambda page: look(page, "refusals"))
        await view.shoot(f"long-key-over-{width}")


# What a person sees of a key, and what is copied if it is selected.
SHOWN: Final = """(node) => {
    getSelection().selectAllChildren(node);
    const [start, end] = node.querySelectorAll("span");
    const [outer, inner] = [node.getBoundingClientRect(), end.getBoundingClientRect()];
    return {
        copied: getSelection().toString(),
        isCut: start.scrollWidth > start.clientWidth && start.clientWidth > 0,
        endIsInside: inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.bottom <= outer.bottom + 1,
        lines: Math.round(node.offsetHeight / parseFloat(getComputedStyle(node).lineHeight)),
    };
}"""


async def test_the_filter_finds_them(site: Site, chromium: Browser) -> None:
    async with dashboard(site, chromium, 1280) as (_, view):

        def look(page: Page) -> None:
            box = page.get_by_role("searchbox", name="Filter")
            for key, counts in {
                SCRIPT: {"waiting": "1 of 4", "pairings": "1 of 1", "refusals": "0 of 2", "routes": "1 of 1"},
                LONG: {"waiting": "1 of 4", "pairings": "0 of 1", "refusals": "0 of 2", "routes": "1 of 1"},
                "JOB/8": {"waiting": "0 of 4", "pairings": "0 of 1", "refusals": "1 of 2", "routes": "0 of 1"},
                "func1 job/": {"waiting": "0 of 4", "pairings": "0 of 1", "refusals": "1 of 2"},
            }.items():
                box.fill(key)
                for table, count in counts.items():
                    expect(page.locator(f"#{table} .count")).to_have_text(count)

        await view.see(look)
