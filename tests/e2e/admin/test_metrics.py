"""What /metrics, /healthz and /readyz say is so: live, exact, and nobody's name in it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import prometheus_client.openmetrics.parser as openmetrics
import prometheus_client.parser as text
import pytest
import trio

from frelay.errors import ConfigError
from frelay.protocol.messages import REFUSAL_CODES
from frelay.protocol.outcome import Outcome
from frelay.relay.control import RelayControl
from frelay.relay.relay import Relay
from frelay.relay.views import LocalViews
from support.ends import OPEN, block, end_by_reset, end_in_order, join_ends
from support.party import pair
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT, eventually

METRICS: Final = '[metrics]\nlisten = "127.0.0.1:0"\n'

# docs/metrics.md as a table: the type of each metric and its labels.
CONTRACT: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "frelay_pairings_total": ("counter", frozenset({"route", "outcome"})),
    "frelay_pairings_active": ("gauge", frozenset({"route"})),
    "frelay_legs_waiting": ("gauge", frozenset({"route", "party"})),
    "frelay_keys_waiting": ("gauge", frozenset({"route"})),
    "frelay_bytes_total": ("counter", frozenset({"route", "direction"})),
    "frelay_refused_total": ("counter", frozenset({"route", "code"})),
    "frelay_handshake_seconds": ("histogram", frozenset()),
    "frelay_wait_seconds": ("histogram", frozenset()),
    "frelay_pairing_seconds": ("histogram", frozenset()),
    "frelay_config_last_reload_successful": ("gauge", frozenset()),
    "frelay_config_last_reload_timestamp_seconds": ("gauge", frozenset()),
    "frelay_certificate_not_after_timestamp_seconds": ("gauge", frozenset({"file"})),
    "frelay_crl_next_update_timestamp_seconds": ("gauge", frozenset()),
    "frelay_open_fds": ("gauge", frozenset()),
    "frelay_loop_lag_seconds": ("gauge", frozenset()),
    "frelay_tasks": ("gauge", frozenset()),
    "frelay_build_info": ("gauge", frozenset({"version", "python", "openssl", "trio"})),
}

# Only where there are several; tests/e2e/workers/test_workers.py reads it.
WITH_WORKERS: Final = {"frelay_worker_restarts_total": ("counter", frozenset({"worker"}))}

# What Prometheus 2 sends.
PROMETHEUS: Final = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


class Scraper:
    """A client of ``[metrics]``."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def text(self) -> str:
        answer = await self.http.get("/metrics")
        assert answer.status_code == 200
        return answer.text

    async def values(self) -> dict[tuple[str, frozenset[str]], float]:
        """Every sample, by its name and the values of its labels."""
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text.text_string_to_metric_families(await self.text())
            for sample in family.samples
        }

    async def value(self, name: str, *labels: str) -> float | None:
        """The value of one sample, or None if there is no such sample."""
        return (await self.values()).get((name, frozenset(labels)))

    async def becomes(self, value: float | None, name: str, *labels: str) -> None:
        """Wait until a sample has this value: a party may see an event shortly before its relay has noted it."""
        with trio.fail_after(TIMEOUT):
            while (found := await self.value(name, *labels)) != value:
                assert found is None or value is None or found < value or not name.endswith("_total"), found
                await trio.sleep(0.01)

    async def ready(self) -> tuple[int, str]:
        answer = await self.http.get("/readyz")
        return answer.status_code, answer.text


@asynccontextmanager
async def scraper(relay: RelayInProcess | Relay) -> AsyncIterator[Scraper]:
    running = relay.relay if isinstance(relay, RelayInProcess) else relay
    (place,) = running.served["metrics"]
    async with httpx.AsyncClient(base_url=f"http://{place}", timeout=TIMEOUT) as http:
        yield Scraper(http)


@asynccontextmanager
async def scraped(
    site: Site, routes: str = OPEN, *, sections: str = METRICS, crl: bool = False
) -> AsyncIterator[tuple[RelayInProcess, Scraper]]:
    """A relay with ``[metrics]``, and a scraper of it."""
    async with site.relay(routes, sections=sections, crl=crl) as relay, scraper(relay) as scrape:
        yield relay, scrape


async def some_of_everything(site: Site, relay: RelayInProcess) -> None:
    """One pairing that has ended, one that runs, one waiting leg and one refused connection."""
    await end_in_order(*await join_ends(site, relay))
    await join_ends(site, relay, "tunnel", "raw")
    waiter = await site.party(relay, "func1")
    await waiter.join()
    await waiter.expect("WAITING")
    site.add("mallory", site.ca.party(dns=["mallory.example"]))
    stranger = await site.party(relay, "mallory")
    await stranger.join()
    await stranger.refusal()


# --- the contract ----------------------------------------------------------------------------------------------------


async def test_the_names_and_labels_are_the_contract(site: Site) -> None:
    """No metric of the contract is missing, and there is no other metric of frelay."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with scraped(site, crl=True) as (relay, scrape):
        await some_of_everything(site, relay)
        await relay.outcome()
        found = {}
        for family in text.text_string_to_metric_families(await scrape.text()):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
            assert len(labels) == 1, name
            assert family.documentation
            found[name] = (family.type, labels.pop())
    assert {name: what for name, what in found.items() if not name.startswith("process_")} == CONTRACT


async def test_promtool_accepts_it(site: Site) -> None:
    promtool = tool("promtool")
    async with scraped(site) as (relay, scrape):
        await some_of_everything(site, relay)
        content = (await scrape.text()).encode()
        done = await trio.run_process(
            [promtool, "check", "metrics"], stdin=content, capture_stdout=True, capture_stderr=True, check=False
        )
    # It also has rules of style, and they are followed.
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_a_scraper_gets_the_format_that_it_asks_for(site: Site) -> None:
    async with scraped(site) as (relay, scrape):
        await some_of_everything(site, relay)
        for accept, is_openmetrics in {
            PROMETHEUS: True,
            "application/openmetrics-text": True,
            "Application/OpenMetrics-Text; version=1.0.0; q=1.0, text/plain; q=0.1": True,
            "text/plain": False,
            "*/*": False,
            "": False,
            "application/openmetrics-text; q=0.2, text/plain; q=0.3": False,
            "application/openmetrics-text; q=0": False,
            "application/openmetrics-text; q=x,,;;": True,
            "application/json": False,
        }.items():
            answer = await scrape.http.get("/metrics", headers={"accept": accept})
            kind = "application/openmetrics-text; version=1.0.0" if is_openmetrics else "text/plain; version=0.0.4"
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8", accept
            parse: Callable[[str], object] = (
                openmetrics.text_string_to_metric_families if is_openmetrics else text.text_string_to_metric_families
            )
            families = {family.name: family for family in parse(answer.text)}  # type: ignore[attr-defined]
            assert families["frelay_pairings"].type == "counter", accept


async def test_one_may_look_and_not_touch(site: Site) -> None:
    async with scraped(site) as (_, scrape):
        for path in ("/metrics", "/healthz", "/readyz"):
            looked = await scrape.http.head(path)
            assert (looked.status_code, looked.content) == (200, b"")
            assert int(looked.headers["content-length"]) > 0
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
                assert (await scrape.http.request(method, path)).status_code == 405
        assert (await scrape.http.get("/")).status_code == 404


async def test_nobody_is_named(site: Site) -> None:
    """No identity and no address, of parties and of refused callers: more people read metrics than logs."""
    async with scraped(site) as (relay, scrape):
        await some_of_everything(site, relay)
        for accept in ("text/plain", PROMETHEUS):
            answer = await scrape.http.get("/metrics", headers={"accept": accept})
            for name in ("func1.demo", "func2.demo", "mallory", "dns:", "127.0.0.1"):
                assert name not in answer.text


# --- bytes -----------------------------------------------------------------------------------------------------------


async def test_bytes_are_counted_while_they_flow(site: Site) -> None:
    """In the end they are exactly what the functions have counted, over all pairings of the route."""
    moved = {"func1_to_func2": 0, "func2_to_func1": 0}
    async with scraped(site) as (relay, scrape):
        for mode in ("raw", "tunnel"):
            one, two = await join_ends(site, relay, mode, "raw")
            for source, sink, direction in ((one, two, "func1_to_func2"), (two, one, "func2_to_func1")):
                for size in (1, 70_001, 1_000_003):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(source.send, block(size))
                        assert len(await sink.receive_exactly(size)) == size
                    moved[direction] += size
                    await scrape.becomes(moved[direction], "frelay_bytes_total", "demo", direction)
            assert await scrape.value("frelay_pairings_active", "demo") == 1
            await end_by_reset(one, two)  # which has another 1,000 bytes sent, from two to one
            moved["func2_to_func1"] += 1000
            await scrape.becomes(0, "frelay_pairings_active", "demo")
            for direction, count in moved.items():
                assert await scrape.value("frelay_bytes_total", "demo", direction) == count


async def test_no_look_sees_bytes_twice_or_not_at_all(site: Site) -> None:
    """rate() takes a counter that falls for one scrape for a counter that was reset."""
    async with scraped(site) as (relay, _):
        control = RelayControl(relay.relay, LocalViews(relay.relay))
        ends = [await join_ends(site, relay) for _ in range(8)]
        expected = 8 * 5000
        for one, two in ends:
            await one.send(block(5000))
            await two.receive_exactly(5000)
        looks: list[int] = []

        async def look() -> None:
            while True:
                looks.append((await control.counts()).bytes_moved["demo", "func1"])
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            for one, two in ends:
                one.party.reset()
                assert await two.ended() == "reset"
            await eventually(lambda: not relay.relay.pairings, "all have ended")
            nursery.cancel_scope.cancel()
        assert set(looks) == {expected}


# --- who comes and goes ----------------------------------------------------------------------------------------------


async def test_ends_are_counted_by_their_outcome(site: Site) -> None:
    async with scraped(site) as (relay, scrape):
        # The series exists before the first pairing ends, so that rate() counts the first one.
        assert await scrape.value("frelay_pairings_total", "demo", "closed") == 0
        assert await scrape.value("frelay_pairings_total", "demo", "reset") is None
        for _ in range(2):
            await end_in_order(*await join_ends(site, relay))
        await end_by_reset(*await join_ends(site, relay))
        await scrape.becomes(2, "frelay_pairings_total", "demo", "closed")
        await scrape.becomes(1, "frelay_pairings_total", "demo", "reset")


async def test_refusals_are_counted_by_their_code(site: Site) -> None:
    """By route, if it is known. If two routes share an address, it is unknown until the party is known."""
    site.add("mallory", site.ca.party(dns=["mallory.example"]))
    with reserved_port() as port:
        shared = "".join(OPEN.replace('"demo"', f'"{name}"').replace(":0", f":{port}") for name in ("a", "b"))
        async with scraped(site, OPEN + shared) as (relay, scrape):
            for route in ("demo", "a"):
                stranger = await site.party(relay, "mallory", route=route)
                await stranger.join()
                assert (await stranger.refusal())["code"] == "not-authorised"
            lonely = await site.party(relay, "func1", route="a")
            await lonely.join(route="a", wait=0.05)
            await lonely.expect("WAITING")
            assert (await lonely.refusal())["code"] == "wait-timeout"
            assert await scrape.value("frelay_refused_total", "demo", "not-authorised") == 1
            assert await scrape.value("frelay_refused_total", "", "not-authorised") == 1
            assert await scrape.value("frelay_refused_total", "a", "wait-timeout") == 1
            assert await scrape.value("frelay_refused_total", "b", "wait-timeout") is None


async def test_who_waits_and_who_is_paired_is_counted(site: Site) -> None:
    async with scraped(site) as (relay, scrape):
        for _ in range(2):
            waiter = await site.party(relay, "func2")
            await waiter.join()
            await waiter.expect("WAITING")
        await scrape.becomes(2, "frelay_legs_waiting", "demo", "func2")
        assert await scrape.value("frelay_legs_waiting", "demo", "func1") == 0
        assert await scrape.value("frelay_pairings_active", "demo") == 0
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        await one.expect("PAIRED")
        await scrape.becomes(1, "frelay_legs_waiting", "demo", "func2")
        assert await scrape.value("frelay_pairings_active", "demo") == 1


async def test_times_are_measured(site: Site) -> None:
    async with scraped(site) as (relay, scrape):
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        two = await site.party(relay, "func2")
        await trio.sleep(0.1)
        await two.join()
        await two.expect("WAITING")
        await two.expect("PAIRED")
        assert await scrape.value("frelay_handshake_seconds_count") == 2
        assert await scrape.value("frelay_wait_seconds_count") == 1
        assert await scrape.value("frelay_wait_seconds_bucket", "0.1") == 0
        waited = await scrape.value("frelay_wait_seconds_sum")
        assert waited is not None
        assert 0.1 <= waited < TIMEOUT
        assert await scrape.value("frelay_pairing_seconds_count") == 0
        one.reset()
        await scrape.becomes(1, "frelay_pairing_seconds_count")
        for name in ("handshake", "wait", "pairing"):
            counted = await scrape.value(f"frelay_{name}_seconds_count")
            assert await scrape.value(f"frelay_{name}_seconds_bucket", "+Inf") == counted


async def test_two_relays_in_one_process_are_two(site: Site, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    async with scraped(site) as (relay, scrape), scraped(Site(second)) as (_, other):
        parties = [await site.party(relay, name) for name in ("func1", "func2")]
        await pair(*parties)
        for party in parties:
            await party.hand_off()
        for who, count in ((scrape, 1), (other, 0)):
            assert await who.value("frelay_handshake_seconds_count") == 2 * count
            assert await who.value("frelay_pairings_active", "demo") == count


# --- routes that go --------------------------------------------------------------------------------------------------


def route(name: str) -> str:
    return OPEN.replace('"demo"', f'"{name}"')


async def test_a_route_that_goes_takes_its_series_along(site: Site) -> None:
    """When its last pairing has ended: until then its bytes are counted."""
    async with scraped(site, route("a") + route("b")) as (relay, scrape):
        one, two = await join_ends(site, relay, route="b")
        waiter = await site.party(relay, "func1", route="b")
        await waiter.join()
        await waiter.expect("WAITING")
        site.write(route("a"), sections=METRICS)
        await relay.relay.reload()
        assert (await waiter.refusal())["code"] == "route-removed"
        await one.send(b"still here")
        await two.receive_exactly(10)
        await scrape.becomes(10, "frelay_bytes_total", "b", "func1_to_func2")
        assert await scrape.value("frelay_pairings_active", "b") == 1
        assert await scrape.value("frelay_refused_total", "b", "route-removed") == 1
        await end_by_reset(one, two)
        await scrape.becomes(None, "frelay_pairings_active", "b")
        assert not [key for key in await scrape.values() if "b" in key[1]]


async def test_what_a_removed_route_says_last_does_not_bring_it_back(site: Site) -> None:
    """The API adds and removes names of routes, and their series would pile up."""
    async with scraped(site, route("a") + route("b")) as (relay, scrape):
        waiter = await site.party(relay, "func1", route="b")
        await waiter.join()
        await waiter.expect("WAITING")
        site.write(route("a"), sections=METRICS)
        await relay.relay.reload()
        assert (await waiter.refusal())["code"] == "route-removed"
        assert await scrape.value("frelay_refused_total", "", "route-removed") == 1
        assert not [key for key in await scrape.values() if "b" in key[1]]
        assert set(relay.relay.journal.totals) == {"", "a"}


async def test_a_name_that_went_twice_is_counted_to_its_last_pairing(site: Site) -> None:
    async with scraped(site, route("a") + route("b")) as (relay, scrape):
        ends = []
        for _ in range(2):
            ends.append(await join_ends(site, relay, route="b"))
            for routes in (route("a"), route("a") + route("b")):
                site.write(routes, sections=METRICS)
                await relay.relay.reload()
        site.write(route("a"), sections=METRICS)
        await relay.relay.reload()
        await scrape.becomes(2, "frelay_pairings_active", "b")
        await end_by_reset(*ends[0])
        await scrape.becomes(1, "frelay_pairings_total", "b", "reset")
        assert await scrape.value("frelay_bytes_total", "b", "func2_to_func1") == 1000
        await end_by_reset(*ends[1])
        await scrape.becomes(None, "frelay_pairings_active", "b")


# --- the relay itself ------------------------------------------------------------------------------------------------


async def test_a_refused_reload_shows(site: Site) -> None:
    """The relay stays ready, because the previous configuration stays in force."""
    async with scraped(site) as (relay, scrape):
        assert await scrape.value("frelay_config_last_reload_successful") == 1
        assert await scrape.value("frelay_config_last_reload_timestamp_seconds") == relay.relay.started_at
        site.write(OPEN + "nonsense = 1\n", sections=METRICS)
        with pytest.raises(ConfigError):
            await relay.relay.reload()
        assert await scrape.value("frelay_config_last_reload_successful") == 0
        refused_at = await scrape.value("frelay_config_last_reload_timestamp_seconds")
        assert refused_at is not None
        assert relay.relay.started_at < refused_at <= time.time()
        assert await scrape.ready() == (200, "ready\n")
        site.write(OPEN, sections=METRICS)
        await relay.relay.reload()
        assert await scrape.value("frelay_config_last_reload_successful") == 1


async def test_a_draining_relay_is_healthy_and_not_ready(site: Site) -> None:
    async with scraped(site) as (relay, scrape):
        assert await scrape.ready() == (200, "ready\n")
        one, two = await join_ends(site, relay)
        relay.relay.drain(reason="the test")
        assert await scrape.ready() == (503, "draining: it takes nothing new any more\n")
        assert (await scrape.http.get("/healthz")).text == "ok\n"
        await one.send(b"still here")
        await two.receive_exactly(10)
        await scrape.becomes(10, "frelay_bytes_total", "demo", "func1_to_func2")


@pytest.mark.parametrize(("days", "what"), [(2, "tls.crl"), (4000, "tls.certificate")])
async def test_a_relay_that_can_let_nobody_in_is_not_ready(
    site: Site, monkeypatch: pytest.MonkeyPatch, days: int, what: str
) -> None:
    site.ca.write_crl(site.directory, site.ca.crl(next_update=datetime.now(UTC) + timedelta(days=1)))
    async with scraped(site, crl=True) as (_, scrape):
        assert await scrape.ready() == (200, "ready\n")
        later = time.time() + days * 86400
        monkeypatch.setattr("frelay.relay.control.time", SimpleNamespace(time=lambda: later))
        status, reason = await scrape.ready()
        assert status == 503
        assert reason.startswith(what)
        assert reason.count("\n") == 1


async def test_what_runs_out_says_when(site: Site) -> None:
    name = "frelay_certificate_not_after_timestamp_seconds"
    async with scraped(site) as (_, scrape):
        for file, credential in (
            (site.relay_paths[0], site.ca.authority.certificate),
            (site.ca_path, site.ca.authority.certificate),
        ):
            not_after = await scrape.value(name, str(file))
            assert not_after is not None
            assert time.time() < not_after <= credential.not_valid_after_utc.timestamp()
        assert await scrape.value("frelay_crl_next_update_timestamp_seconds") is None
    next_update = (datetime.now(UTC) + timedelta(days=3)).replace(microsecond=0)
    site.ca.write_crl(site.directory, site.ca.crl(next_update=next_update))
    async with scraped(site, crl=True) as (_, scrape):
        assert await scrape.value("frelay_crl_next_update_timestamp_seconds") == next_update.timestamp()


async def test_descriptors_are_counted(site: Site) -> None:
    async with scraped(site) as (_, scrape):
        before = await scrape.value("frelay_open_fds")
        with ExitStack() as opened:
            for _ in range(25):
                opened.enter_context(socket.socket())
            after = await scrape.value("frelay_open_fds")
        assert before is not None
        assert after is not None
        assert 20 <= after - before <= 30
        limit = await scrape.value("process_max_fds")
        assert limit is not None
        assert after < limit


async def test_a_loop_that_stands_still_shows(site: Site) -> None:
    def stand_still() -> None:
        time.sleep(0.8)

    async with scraped(site) as (_, scrape):
        with trio.fail_after(TIMEOUT):
            while not (await scrape.value("frelay_loop_lag_seconds") or 0) > 0.4:
                await trio.sleep(0.05)
                stand_still()


def test_nothing_of_it_is_there_without_the_section(site: Site) -> None:
    """It opens no port, and does not spend half a second on loading the modules."""
    config = site.write(DEMO)
    code = (
        "import sys, trio\nfrom frelay.config.load import load\nfrom frelay.relay.run import make_relay\n"
        f"relay = make_relay(load({str(config)!r}), watch_files=False)\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        await nursery.start(relay.run)\n"
        "        assert relay.served == {}\n"
        "        relay.drain(reason='seen')\n"
        "trio.run(main)\n"
        "assert 'prometheus_client' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=TIMEOUT)


# --- deploy/ ---------------------------------------------------------------------------------------------------------

DEPLOY: Final = Path(__file__).parents[3] / "deploy"
ALERTS: Final = DEPLOY / "prometheus-alerts.yml"
DASHBOARD: Final = DEPLOY / "grafana-dashboard.json"

# Labels that Prometheus itself adds.
SCRAPED_ALONG: Final = frozenset({"job", "instance", "le"})
NAME: Final = re.compile(r"\b(?:frelay|process)_[a-z_]+\b")
SELECTOR: Final = re.compile(r"\b((?:frelay|process)_[a-z_]+)\{([^}]*)\}")
MATCHER: Final = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
WORDS: Final[Mapping[str, frozenset[str]]] = {
    "outcome": frozenset(outcome.value for outcome in Outcome),
    "code": REFUSAL_CODES,
}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


@pytest.mark.parametrize("command", [["check", "rules", ALERTS.name], ["test", "rules", "prometheus-alerts_test.yml"]])
def test_promtool_accepts_the_alerts(command: list[str]) -> None:
    done = subprocess.run([tool("promtool"), *command], cwd=DEPLOY, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    """The person who is woken by an alert knows less about it than its author."""
    alerts = ALERTS.read_text().split("- alert: ")[1:]
    assert len(alerts) >= 13
    for alert in alerts:
        assert "severity: " in alert
        shared = "annotations: *" in alert
        assert shared or all(f" {key}: " in alert for key in ("summary", "description", "action")), alert


async def test_dashboard_and_alerts_ask_for_what_there_is(site: Site) -> None:
    """Metrics, labels, words: a query for any other is always empty, and an empty alert looks as if all were well."""
    site.ca.write_crl(site.directory, site.ca.crl())
    labels: dict[str, set[str]] = {}
    async with scraped(site, crl=True) as (relay, scrape):
        await some_of_everything(site, relay)
        for family in text.text_string_to_metric_families(await scrape.text()):
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    # Only a supervisor has these; test_workers.py asks it for them.
    labels |= {name: set(also) for name, (_, also) in WITH_WORKERS.items()}
    used = ALERTS.read_text() + DASHBOARD.read_text().replace(r"\"", '"')
    assert set(NAME.findall(used)) <= set(labels)
    for name, matchers in SELECTOR.findall(used):
        for label, value in MATCHER.findall(matchers):
            assert label in labels[name] | SCRAPED_ALONG, (name, label)
            if label in WORDS and not value.startswith("$"):
                assert set(value.split("|")) <= WORDS[label], (name, value)


def test_the_dashboard_shows_every_metric() -> None:
    shown = set(NAME.findall(DASHBOARD.read_text()))
    for name, (kind, _) in CONTRACT.items():
        assert (f"{name}_bucket" if kind == "histogram" else name) in shown


def test_the_document_explains_every_metric() -> None:
    rows = re.findall(
        r"^\| `(frelay_\w+)` \| (.*?) \|", (DEPLOY.parent / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    explained = {name: frozenset(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert explained == {name: labels for name, (_, labels) in {**CONTRACT, **WITH_WORKERS}.items()}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """Grafana imports it unchanged: it has no ids of another Grafana, takes any Prometheus, and no panels overlap."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert (dashboard["uid"], dashboard["id"]) == ("frelay", None)
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query", "instance": "query", "route": "query"}
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
