"""The dashboard in a real browser: an operator finds what is needed at night, whatever the size of relay and window.

With ``FRELAY_SCREENSHOTS=DIR`` the tests write screenshots to DIR. The one for the README takes two minutes, to fill
its sparklines.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import pytest
import trio
from playwright.sync_api import Page, Route, expect

from frelay.errors import ConfigError
from support.browser import Browser, Forwarded, View, browser, forwarded
from support.party import TLS_HEADER, Party, pair
from support.relay import RelayInProcess
from support.site import Site

ADMIN: Final = '[relay]\nname = "relay-1"\n[admin]\nlisten = "unix:frelay.sock"\n'

NAMES: Final = ("shuffle", "ingest", "model-serving", "checkpoints", "feature-store", "batch-export", "log-tail")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


def route(name: str, func1: str | None = None, func2: str | None = None) -> str:
    return (
        f'[[route]]\nname = "{name}"\nlisten = "127.0.0.1:0"\n'
        f'func1 = "{func1 or f"dns:func1.{name}.acme"}"\nfunc2 = "{func2 or f"dns:func2.{name}.acme"}"\n'
    )


def routes(count: int) -> str:
    return "".join(route(f"{NAMES[i % len(NAMES)]}-{i:04}") for i in range(count))


@dataclass
class Scene:
    """A relay, the way to its dashboard, and a page that shows it."""

    site: Site
    relay: RelayInProcess
    way: Forwarded
    view: View

    async def party(self, name: str, dns: str, on: str) -> Party:
        """A function with a certificate for ``dns``, on the route ``on``."""
        if name not in self.site.credentials:
            self.site.add(name, self.site.ca.party(dns=[dns]))
        return await self.site.party(self.relay, name, route=on)

    async def waits(self, name: str, dns: str, on: str) -> Party:
        party = await self.party(name, dns, on)
        await party.join()
        await party.expect("WAITING")
        return party

    async def wire(self, on: str) -> tuple[Party, Party]:
        """A pairing of the route's two functions, raw on both sides."""
        one = await self.party(f"{on}-1", f"func1.{on}.acme", on)
        two = await self.party(f"{on}-2", f"func2.{on}.acme", on)
        await pair(one, two)
        await one.hand_off()
        await two.hand_off()
        for sender, receiver in ((one, two), (two, one)):
            await sender.send_raw(TLS_HEADER)
            await receiver.receive_exactly(len(TLS_HEADER))
        return one, two


@asynccontextmanager
async def scene(
    site: Site,
    chromium: Browser,
    table: str,
    *,
    sections: str = "",
    width: int = 1280,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
) -> AsyncIterator[Scene]:
    async with (
        site.relay(table, sections=ADMIN + sections) as relay,
        forwarded(site.directory / "frelay.sock") as way,
        chromium.page(way.url, width=width, height=height, scheme=scheme) as view,
    ):
        await view.see(lambda page: expect(page.locator("#state")).to_have_text("running"))
        yield Scene(site, relay, way, view)


async def carry(sender: Party, receiver: Party, base: float, phase: float = 0.0) -> None:
    """Send about ``base`` bytes a second, up and down as traffic goes, until cancelled."""

    async def take() -> None:
        while await receiver.receive_raw():
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        while True:
            now = trio.current_time()
            swing = 1 + 0.5 * math.sin(now / 9 + phase) + 0.3 * math.sin(now / 2.3 + 2 * phase)
            await sender.send_raw(bytes(int(base * max(swing, 0.05) / 10)))
            await trio.sleep(0.1)


async def settle(view: View, text: str, selector: str = "body") -> None:
    """Wait until ``selector`` shows ``text``."""
    await view.see(lambda page: expect(page.locator(selector)).to_contain_text(text))


def rows(page: Page, table: str) -> Any:
    return page.get_by_role("table", name=re.compile(rf"^{table}")).locator("tbody tr")


def overflow(page: Page) -> int:
    """How many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


# --- how many routes --------------------------------------------------------------------------------------------------


async def test_a_relay_without_routes_says_how_to_add_one(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, "") as found:
        await settle(found.view, "This relay has no route yet.", "#routes")
        await settle(found.view, "frelay route add", "#routes")
        await settle(found.view, str(site.config), "#routes")
        await settle(found.view, "Nobody was refused", "#refusals")
        await found.view.shoot("empty")


@pytest.mark.load
@pytest.mark.parametrize("count", [300, 1000])
async def test_many_routes_are_as_usable_as_few(site: Site, chromium: Browser, count: int) -> None:
    async with scene(site, chromium, routes(count)) as found:
        last = f"{NAMES[(count - 1) % len(NAMES)]}-{count - 1:04}"

        def use(page: Page) -> None:
            began = time.monotonic()
            page.reload()
            expect(rows(page, "Routes")).to_have_count(50)
            # It takes a second on an idle machine, mostly in Chromium. The limit only finds a page that hangs.
            assert time.monotonic() - began < 20
            expect(page.locator("#routes .count")).to_have_text(f"{count:,}")
            page.get_by_role("searchbox", name="Filter").fill(last)
            expect(rows(page, "Routes")).to_have_count(1)
            expect(rows(page, "Routes")).to_contain_text(f"dns:func1.{last}.acme")
            expect(page.locator("#routes .count")).to_have_text(f"1 of {count:,}")
            page.get_by_role("searchbox", name="Filter").fill("")
            page.get_by_role("button", name=re.compile("Show 100 more")).click()
            expect(rows(page, "Routes")).to_have_count(150)

        await found.view.see(use)
        await found.view.shoot(f"routes-{count}")


async def test_a_look_at_many_routes_leaves_their_rows_alone(site: Site, chromium: Browser) -> None:
    """Unchanged rows are not touched, because a page that is open all night must not keep a machine busy."""
    async with scene(site, chromium, routes(300)) as found:

        def count(page: Page) -> int:
            expect(rows(page, "Routes").first).to_contain_text("0 B/s")
            page.evaluate(
                """() => {
                    window.changes = 0;
                    new MutationObserver((all) => { window.changes += all.length; }).observe(
                        document.querySelector("#routes tbody"),
                        { subtree: true, childList: true, characterData: true, attributes: true });
                }"""
            )
            page.wait_for_timeout(5000)
            return int(page.evaluate("window.changes"))

        changes = await found.view.see(count)
        # Only the paths of the few sparklines on the screen change.
        assert changes < 50 * 2 * 3


# --- what an operator looks for ---------------------------------------------------------------------------------------

THREE: Final = route("shuffle") + route("ingest") + route("model-serving")


@pytest.mark.load
async def test_who_waits_who_is_paired_and_who_was_refused(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found, trio.open_nursery() as nursery:
        view = found.view
        one, two = await found.wire("shuffle")
        nursery.start_soon(carry, one, two, 200_000)
        await found.waits("serving", "func2.model-serving.acme", "model-serving")
        for _ in range(2):
            stranger = await found.party("func1", "func1.demo", "ingest")
            await stranger.join()
            await stranger.refusal()

        await settle(view, "dns:func2.model-serving.acme", "#waiting")
        await settle(view, "for dns:func1.model-serving.acme", "#waiting")
        await settle(view, "not-authorised", "#refusals")
        await settle(view, "2 times", "#refusals")
        await settle(view, "dns:func1.demo", "#refusals")
        await settle(view, "from 127.0.0.1 to ingest", "#refusals")

        def look(page: Page) -> None:
            pairing = rows(page, "Pairings")
            expect(pairing).to_contain_text("dns:func1.shuffle.acme")
            expect(pairing).to_contain_text("dns:func2.shuffle.acme")
            expect(pairing).to_contain_text("KiB/s")
            expect(pairing).to_contain_text("open")
            carrying = rows(page, "Routes").filter(has_text="shuffle")
            expect(carrying).to_contain_text("KiB/s")
            path = carrying.locator("path.there")
            expect(path).to_have_attribute("d", re.compile(r"^M.*L.*Z$"))
            expect(rows(page, "Routes").filter(has_text="model-serving")).to_contain_text("func2 ·")
            overview = page.get_by_role("navigation", name="Overview")
            expect(overview.get_by_role("link", name=re.compile(r"^Pairings 1 on 1 of 3 routes"))).to_be_visible()
            expect(overview.get_by_role("link", name=re.compile(r"^Waiting 1 longest"))).to_be_visible()
            expect(overview.get_by_role("link", name=re.compile(r"^Refused, last 15 min 2 last"))).to_be_visible()

        await view.see(look)
        await view.shoot("three")

        nursery.cancel_scope.cancel(reason="the pairing has been seen")


async def test_an_ending_is_told_with_its_outcome(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:
        before, _ = await found.wire("ingest")
        before.reset()
        await settle(found.view, "reset", "#endings")
        # A page that is opened later shows the same, and a page that is shown again has no row twice.
        await found.view.see(lambda page: page.reload())
        await settle(found.view, "dns:func1.ingest.acme and dns:func2.ingest.acme", "#endings")
        await found.view.see(lambda page: expect(rows(page, "Ended")).to_have_count(1))


async def test_a_refused_reload_is_the_first_thing_to_be_seen(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:
        good = site.config.read_text()
        site.config.write_text(good.replace("func1 =", "fnc1 =", 1))
        with pytest.raises(ConfigError):
            await found.relay.relay.reload()
        await settle(found.view, "The last reload was refused.", "#alerts")
        await settle(found.view, 'did you mean "func1"?', "#alerts")
        await settle(found.view, "The last reload was refused.", "#announcement")
        await found.view.shoot("reload-refused")
        site.config.write_text(good)
        await found.relay.relay.reload()
        await found.view.see(lambda page: expect(page.locator("#alerts")).to_be_hidden())
        await settle(found.view, "The configuration was reloaded.", "#announcement")


async def test_draining_is_the_first_thing_to_be_seen(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:
        await found.wire("shuffle")
        found.relay.relay.drain(reason="the test says so")
        await settle(found.view, "draining", "#state")
        await settle(found.view, "Draining: nobody new is let in. 1 pairing may still end.", "#alerts")
        await found.view.shoot("draining")


async def test_what_runs_out_is_told_before_it_does(site: Site, chromium: Browser) -> None:
    site.ca.ending(3 * 86400, dns=["relay.test", "localhost"]).write(site.directory, "relay")
    async with scene(site, chromium, THREE) as found:
        await settle(found.view, "The certificate runs out in 2 d 23 h.", "#alerts")


async def test_a_lost_connection_is_said_and_mended(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:
        await settle(found.view, "0 B/s", "#routes")
        found.way.cut()
        await settle(found.view, "No connection to the relay.", "#alerts")
        await settle(found.view, "connection lost", "#state")
        await found.view.shoot("lost")
        await found.way.mend()
        await found.view.see(lambda page: expect(page.locator("#alerts")).to_be_hidden())
        await settle(found.view, "running", "#state")
        await settle(found.view, "Connected again.", "#announcement")
        # A browser logs each unanswered request to its console; there must be nothing else.
        assert [text for text in found.view.console if not re.search(r"net::ERR_|ERR_", text)] == []
        found.view.console.clear()


async def test_a_hidden_page_asks_nothing(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:

        def asked_while(page: Page, hidden: bool) -> list[str]:
            asked: list[str] = []
            page.evaluate(
                """(hidden) => {
                    Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
                    document.dispatchEvent(new Event("visibilitychange"));
                }""",
                hidden,
            )
            page.wait_for_timeout(500)
            page.on("request", lambda request: asked.append(request.url))
            page.wait_for_timeout(3000)
            return asked

        assert await found.view.see(lambda page: asked_while(page, True)) == []
        assert await found.view.see(lambda page: asked_while(page, False))


# --- strangers --------------------------------------------------------------------------------------------------------


async def test_what_a_stranger_made_up_is_text(site: Site, chromium: Browser) -> None:
    hostile = '<script>document.title="owned"</script><img src=x onerror=alert(1)>\u202egnp.exe'

    def poisoned(value: Any) -> Any:
        """``value`` with every text in it replaced, except the words that the page compares."""
        if isinstance(value, dict):
            found = {key: one if key in ("what", "state") else poisoned(one) for key, one in value.items()}
            if "problems" in found:
                found |= {"ok": False, "problems": [dict.fromkeys(("message", "key", "file", "line"), hostile)]}
            return found
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return hostile if isinstance(value, str) else value

    site.add("evil", site.ca.cn_only(hostile[:64]))
    async with scene(site, chromium, route("shuffle")) as found:
        evil = await site.party(found.relay, "evil", route="shuffle")
        await evil.join(route='<b id="made-up">bold</b>')
        await evil.refusal()
        await settle(found.view, r"\<script\>document.title=", "#refusals")

        def look(page: Page) -> None:
            assert page.locator("#refusals script, #refusals img, #made-up").count() == 0
            assert "owned" not in page.title()
            # The relay escapes much of it, and the page must be safe without that.
            page.route("**/v1/status", lambda request: request.fulfill(json=poisoned(request.fetch().json())))
            expect(page.locator("#refusals")).to_contain_text(r'<script>document.title="owned"</script>')
            expect(page.locator("#refusals")).to_contain_text(r"\u{202e}gnp.exe")
            expect(page.locator("#alerts")).to_contain_text(r"<img src=x onerror=alert(1)>\u{202e}gnp.exe")
            expect(page.locator("h1")).to_contain_text("<script>")
            assert page.locator("#refusals script, #refusals img, #alerts img, h1 script").count() == 0
            assert page.evaluate("document.scripts.length") == 1
            # Not even through the filter in a link that an attacker has sent.
            page.goto(page.url + "#filter=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%E2%80%AE")
            page.reload()
            expect(page.locator("#routes .nothing")).to_have_text("Nothing here matches the filter.")

        await found.view.see(look)
        await found.view.shoot("hostile")


async def test_the_browser_is_told_to_run_nothing_else(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:

        def headers(page: Page, path: str) -> dict[str, str]:
            response = page.request.get(found.way.url + path)
            assert response.status == 200
            return response.headers

        for path, kind in [
            ("", "text/html; charset=utf-8"),
            ("dashboard.js", "text/javascript; charset=utf-8"),
            ("dashboard.css", "text/css; charset=utf-8"),
            ("favicon.svg", "image/svg+xml"),
        ]:
            told = await found.view.see(lambda page, path=path: headers(page, path))  # type: ignore[misc]
            assert told["content-type"] == kind
            assert told["x-content-type-options"] == "nosniff"
            assert told["referrer-policy"] == "no-referrer"
            assert told["cache-control"] == "no-store"
            policy = dict(part.split(" ", 1) for part in told["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"

        schema = await found.view.see(lambda page: page.request.get(f"{found.way.url}openapi.json").json())
        assert not {"/", "/dashboard.js", "/dashboard.css", "/favicon.svg"} & set(schema["paths"])


# --- accessibility ----------------------------------------------------------------------------------------------------

# The contrast of each text with its real background: WCAG 2.2, 1.4.3, by the formula in its definitions.
CONTRASTS: Final = """() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => {
        const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest(".unseen, template")) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) found.push(`${walker.currentNode.data.trim()}: ${contrast.toFixed(2)}`);
    }
    return found;
}"""


@pytest.mark.load
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
async def test_it_fits_any_window_and_can_be_read(
    site: Site, chromium: Browser, width: int, scheme: Literal["light", "dark"]
) -> None:
    site.ca.ending(3 * 86400, dns=["relay.test", "localhost"]).write(site.directory, "relay")
    long = route("a-route-with-a-name-of-sixty-three-characters-which-is-the-most-", 'dns:*.acme"\n# "')
    table = THREE + long.replace("most-", "most")
    async with scene(site, chromium, table, width=width, scheme=scheme) as found, trio.open_nursery() as nursery:
        one, two = await found.wire("shuffle")
        nursery.start_soon(carry, one, two, 300_000)
        nursery.start_soon(carry, two, one, 90_000, 2.0)
        await found.waits("ingest-1", "func1.ingest.acme", "ingest")
        stranger = await found.party("func1", "func1.demo", "ingest")
        await stranger.join()
        await stranger.refusal()
        await settle(found.view, "not-authorised", "#refusals")
        # Rows outside of the screen are not drawn again.
        await found.view.see(lambda page: page.locator("#pairings").scroll_into_view_if_needed())
        await settle(found.view, "KiB/s", "#pairings")
        assert await found.view.see(overflow) <= 0
        assert await found.view.see(lambda page: page.evaluate(CONTRASTS)) == []
        await found.view.shoot(f"{width}-{scheme}")
        nursery.cancel_scope.cancel(reason="seen")


async def test_the_keyboard_reaches_everything(site: Site, chromium: Browser) -> None:
    def tab(page: Page) -> str:
        page.keyboard.press("Tab")
        return str(
            page.evaluate(
                """() => {
                    const node = document.activeElement;
                    const { outlineStyle, outlineWidth } = getComputedStyle(node);
                    if (outlineStyle === "none" || outlineWidth === "0px") return `invisible focus: ${node.outerHTML}`;
                    return node.id || node.dataset.sort || node.textContent.trim();
                }"""
            )
        )

    def use(page: Page) -> None:
        expect(rows(page, "Routes")).to_have_count(3)
        reached = [tab(page) for _ in range(18)]
        assert not [one for one in reached if one.startswith("invisible")]
        assert reached[:2] == ["Skip to the routes", "filter"]
        names = [one for one in reached if one in ("shuffle", "ingest", "model-serving")]
        assert names == ["ingest", "model-serving", "shuffle"]
        assert [one for one in reached if one in ("name", "rate", "pairings", "waiting", "refused")]
        while tab(page) != "shuffle":
            pass

    def choose(page: Page) -> None:
        page.locator("#filter").focus()
        while tab(page) != "shuffle":
            pass
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Route shuffle")).to_be_visible()
        expect(rows(page, "Routes")).to_have_count(1)
        expect(page.locator("#filter")).to_have_value("route:shuffle")
        page.get_by_role("button", name="Show all routes").press("Enter")
        expect(rows(page, "Routes")).to_have_count(3)
        expect(page.locator("#filter")).to_be_focused()

    async with scene(site, chromium, THREE) as found:
        await found.view.see(use)
        await found.view.see(choose)


@pytest.mark.load
async def test_sorting_is_said_and_the_focus_stays(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found, trio.open_nursery() as nursery:
        one, two = await found.wire("shuffle")
        nursery.start_soon(carry, one, two, 200_000)
        await settle(found.view, "KiB/s", "#routes")

        def use(page: Page) -> None:
            page.get_by_role("button", name="ingest", exact=True).focus()
            # Sorted by the test, so that the row with the focus is moved.
            page.evaluate("document.querySelector('#routes [data-sort=rate]').click()")
            header = page.get_by_role("columnheader", name="Traffic").first
            expect(header).to_have_attribute("aria-sort", "descending")
            expect(rows(page, "Routes").first).to_contain_text("shuffle")
            expect(page.get_by_role("button", name="ingest", exact=True)).to_be_focused()

        await found.view.see(use)
        nursery.cancel_scope.cancel(reason="seen")


async def test_it_can_be_found_by_ear(site: Site, chromium: Browser) -> None:
    async with scene(site, chromium, THREE) as found:
        await found.waits("ingest-1", "func1.ingest.acme", "ingest")
        await settle(found.view, "dns:func1.ingest.acme", "#waiting")
        tree = await found.view.see(lambda page: page.locator("body").aria_snapshot())
        for line in [
            "- banner:",
            '- heading "frelay relay-1" [level=1]',
            "- search:",
            '- searchbox "Filter"',
            '- navigation "Overview":',
            "- main:",
            "- contentinfo",
            '- heading "Routes 3" [level=2]',
            '- table "Routes 3":',
            '- columnheader "Route"',
            '- rowheader "ingest',
            '- table "Waiting 1":',
            '- rowheader "ingest dns:func1.ingest.acme"',
            '- heading "Refused 0" [level=2]',
        ]:
            assert line in tree, f"{line}\n{tree}"


# --- the picture of the README ----------------------------------------------------------------------------------------


@pytest.mark.load
@pytest.mark.skipif("FRELAY_SCREENSHOTS" not in os.environ, reason="takes two minutes; set FRELAY_SCREENSHOTS=DIR")
@pytest.mark.timeout(300)
async def test_picture(site: Site, chromium: Browser) -> None:
    table = "".join(route(name) for name in NAMES)
    async with scene(site, chromium, table, height=955) as found, trio.open_nursery() as nursery:
        for index, (name, there, back) in enumerate(
            [
                ("shuffle", 6e6, 4e5),
                ("ingest", 4e5, 1.2e5),
                ("model-serving", 6e4, 2.4e5),
                ("checkpoints", 2.2e6, 9e3),
                ("feature-store", 9e3, 7e4),
            ]
        ):
            one, two = await found.wire(name)
            nursery.start_soon(carry, one, two, there, index)
            nursery.start_soon(carry, two, one, back, index + 2)
        for _ in range(3):
            stranger = await found.party("loader", "loader-17.staging.acme", "ingest")
            await stranger.join()
            await stranger.refusal()
        gone, _ = await found.wire("batch-export")
        await trio.sleep(80)
        gone.reset()
        await found.relay.outcome()
        await found.waits("export", "func2.batch-export.acme", "batch-export")
        await trio.sleep(42)
        await found.waits("tail", "func1.log-tail.acme", "log-tail")

        def as_installed(page: Page) -> None:
            where = str(site.directory)

            def answer(request: Route) -> None:
                request.fulfill(body=request.fetch().text().replace(where, "/etc/frelay"))

            page.route("**/v1/status", answer)

        await found.view.see(as_installed)
        await settle(found.view, "/etc/frelay/relay.pem", "#certificates")
        await trio.sleep(5)
        await found.view.shoot("dashboard", full=False)
        nursery.cancel_scope.cancel(reason="it is taken")
