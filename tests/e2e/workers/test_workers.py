"""Many cores: several processes are one relay, and the end of one of them does not end another."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import prometheus_client.parser as text
import pytest
import trio

from support.admin import ADMIN, admin, can_bind, events, route_body
from support.descriptors import open_descriptors
from support.ends import block, end_in_order, join_ends
from support.party import pair
from support.relay import RelayProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

# Two workers have them by turns: the first has one and three, the second two and four.
NAMES: Final = ("one", "two", "three", "four")
METRICS: Final = '[metrics]\nlisten = "127.0.0.1:0"\n'


def written(*names: str) -> str:
    """Routes of these names, each on an address of its own."""
    return "".join(
        f'[[route]]\nname = "{name}"\nlisten = "127.0.0.1:0"\nfunc1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'
        "require_inner_tls = false\n"
        for name in names
    )


ROUTES: Final = written(*NAMES)
MORE: Final = tuple(f"more-{name}" for name in NAMES)


@asynccontextmanager
async def two_workers(site: Site, *, sections: str = "", routes: str = ROUTES) -> AsyncIterator[RelayProcess]:
    async with site.process(routes, sections=sections, workers=2) as relay:
        yield relay
    bugs = [entry for entry in relay.events if "a bug in frelay" in entry["event"]]
    assert not bugs, bugs


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and is still a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def kill(pid: int) -> None:
    """Kill it as the kernel does when memory runs out; when this returns, it serves nobody any more."""
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not is_there(pid), "the process is gone")


async def metrics(relay: RelayProcess) -> dict[str, float]:
    """The sum of all series of each name."""
    place = relay.logged("serving")[-1]["metrics"]
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:
        answer = await http.get(f"http://{place}/metrics")
    assert answer.status_code == 200
    found: dict[str, float] = {}
    for family in text.text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


async def becomes(relay: RelayProcess, value: float, name: str) -> dict[str, float]:
    """Wait until a metric has this value: a party may see an event a moment before the relay counts it."""
    with trio.fail_after(TIMEOUT):
        while True:
            found = await metrics(relay)
            if found.get(name) == value:
                return found
            await trio.sleep(0.02)


async def speak(one: Any, two: Any, size: int = 50_000) -> None:
    """Send bytes each way, and check that they arrive."""
    for source, sink in ((one, two), (two, one)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.send, block(size))
            assert await sink.receive_exactly(size) == block(size)


async def owners(api: httpx.AsyncClient) -> dict[str, int]:
    """The process number of the worker of each route."""
    status = (await api.get("/v1/status")).json()
    return {route: worker["pid"] for worker in status["workers"] for route in worker["routes"]}


# --- one relay ---------------------------------------------------------------------------------------------------


async def test_both_serve_and_the_api_tells_of_all(site: Site) -> None:
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        assert set((await owners(api)).values()) == {relay.worker(1), relay.worker(2)}
        async with events(api) as seen:
            ends = {name: await join_ends(site, relay, route=name) for name in NAMES}
            for one, two in ends.values():
                await speak(one, two)
            waiter = await site.party(relay, "func1", route="four")
            await waiter.join()
            await waiter.expect("WAITING")
            await seen.wait("paired", count=4)
            assert {event["route"] for event in seen.of("paired")} == set(NAMES)
            found = (await api.get("/v1/pairings")).json()["pairings"]
            assert sorted(pairing["route"] for pairing in found) == sorted(NAMES)
            status = (await api.get("/v1/status")).json()
            assert (status["pairings"], status["waiting"], status["routes"]) == (4, 1, 4)
            assert status["descriptors"]["legs"] == 9
            assert status["pid"] == relay.process.pid
            for path in ("/v1/routes", "/v1/traffic"):
                routes = (await api.get(path)).json()["routes"]
                assert [route["name"] for route in routes] == list(NAMES)
                assert [route["pairings"] for route in routes] == [1, 1, 1, 1]
                assert [len(route["waiting"]["func1"]) for route in routes] == [0, 0, 0, 1]
                assert [route["bytes_func1_to_func2"] for route in routes] == [50_000] * 4
            for one, two in ends.values():
                await end_in_order(one, two)
            await seen.wait("ended", count=4)
            assert (await api.get("/v1/routes/three")).json()["outcomes"] == {"closed": 1}


async def test_a_refusal_is_told_by_the_supervisor(site: Site) -> None:
    """The refusal is in the status and an event, once each, although another process refused."""
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api, events(api) as seen:
        site.add("stranger", site.ca.party(dns=["stranger.demo"]))
        party = await site.party(relay, "stranger", route="two")
        await party.join()
        assert (await party.refusal())["code"] == "not-authorised"
        refusals = (await api.get("/v1/status")).json()["refusals"]
        assert [refusal["code"] for refusal in refusals] == ["not-authorised"]
        assert (await seen.wait("refused"))["code"] == "not-authorised"
        assert (await relay.log("refused", worker=2))["code"] == "not-authorised"


async def test_routes_come_and_go_by_the_api(site: Site) -> None:
    """A new route is served when the answer comes, and a removed one is closed when it comes."""
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        kept = await join_ends(site, relay, route="one")
        for name in ("five", "six"):
            answer = await api.put(f"/v1/routes/{name}", json=route_body(require_inner_tls=False))
            assert answer.status_code == 201, answer.text
            host, _, port = answer.json()["bound"][0].rpartition(":")
            ends = await pair(await site.party(int(port), "func1"), await site.party(int(port), "func2"))
            assert ends[0]["route"] == name
            assert (await api.get(f"/v1/routes/{name}")).json()["pairings"] == 1
            assert (await api.delete(f"/v1/routes/{name}")).status_code == 204
            assert can_bind((host, int(port)))
            assert (await api.get(f"/v1/routes/{name}")).status_code == 404
        await speak(*kept)


# --- reload ------------------------------------------------------------------------------------------------------


async def test_a_reload_moves_nothing_that_stays(site: Site) -> None:
    """Pairings and waiting legs of kept routes go on in the same worker and on the same socket."""
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        before = await owners(api)
        ends = [await join_ends(site, relay, route=name) for name in NAMES[1:]]
        waiter = await site.party(relay, "func1", route="four")
        await waiter.join()
        await waiter.expect("WAITING")
        site.write(written("first", *NAMES[1:], "last"), sections=ADMIN)
        answer = await api.post("/v1/reload")
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["kept"], told["removed"], told["added"]) == (3, ["one"], ["first", "last"])
        after = await owners(api)
        assert {name: after[name] for name in NAMES[1:]} == {name: before[name] for name in NAMES[1:]}
        for one, two in ends:
            await speak(one, two)
        late = await site.party(relay, "func2", route="four")
        await late.join()
        await late.expect("WAITING")
        assert (await late.expect("PAIRED"))["route"] == (await waiter.expect("PAIRED"))["route"] == "four"


@pytest.mark.load
async def test_what_one_worker_cannot_take_nobody_has(site: Site) -> None:
    """The second worker has no room for one more socket; then the first must not take the change over alone."""
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        kept = await join_ends(site, relay, route="two")
        pid = relay.worker(2)
        before = open_descriptors(relay.worker(1)).keys()
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        lowest_free = min(set(range(hard)) - open_descriptors(pid).keys())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
        site.write(written(*NAMES, *MORE), sections=ADMIN)
        answer = await api.post("/v1/reload")
        assert answer.status_code == 409, answer.text
        assert "limit of descriptors" in answer.text
        assert [route["name"] for route in (await api.get("/v1/routes")).json()["routes"]] == list(NAMES)
        assert open_descriptors(relay.worker(1)).keys() == before
        await speak(*kept)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        answer = await api.post("/v1/reload")
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["added"]) == 4
        await relay.log("listening", route="more-two")
        await join_ends(site, relay, route="more-two")
        await speak(*kept)


@pytest.mark.load
async def test_many_reloads_leave_no_descriptor(site: Site) -> None:
    """Neither the supervisor nor a worker keeps any; routes come and go with each reload, and some are refused."""
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        processes = [relay.process.pid, relay.worker(1), relay.worker(2)]

        async def reload(routes: str, status: int) -> None:
            site.write(routes, sections=ADMIN)
            assert (await api.post("/v1/reload")).status_code == status

        async def round_trip() -> None:
            await reload(written(*NAMES, *MORE), 200)
            await reload(ROUTES + '[[route]]\nname = "bad"\n', 409)
            await reload(ROUTES, 200)

        await round_trip()
        before = [len(open_descriptors(pid)) for pid in processes]
        for _ in range(7):
            await round_trip()
        await eventually(lambda: [len(open_descriptors(pid)) for pid in processes] == before, "no more descriptors")


async def test_a_storm_of_signals_loses_nothing(site: Site) -> None:
    async with two_workers(site) as relay:
        ends = [await join_ends(site, relay, route=name) for name in NAMES]
        for _ in range(200):
            relay.signal(signal.SIGHUP)
            await trio.lowlevel.checkpoint()
        for one, two in ends:
            await speak(one, two, 1_000_000)
        await relay.log("reloaded")
        for one, two in ends:
            await speak(one, two)
        relay.signal(signal.SIGHUP)
        for one, two in ends:
            await end_in_order(one, two)


# --- the end of a worker -------------------------------------------------------------------------------------------


async def test_a_worker_that_dies_is_started_again(site: Site) -> None:
    """Its pairings end; a function that dials meanwhile is served later; other routes go on; and no counter falls."""
    async with two_workers(site, sections=ADMIN + METRICS) as relay, admin(site) as api:
        stays = await join_ends(site, relay, route="one")
        for name in NAMES:
            ends = await join_ends(site, relay, route=name)
            await speak(*ends)
            await end_in_order(*ends)
        before = await becomes(relay, 4, "frelay_pairings_total")
        assert before["frelay_worker_restarts_total"] == 0
        dies = await join_ends(site, relay, route="two")
        await becomes(relay, 2, "frelay_pairings_active")
        await kill(relay.worker(2))
        # These dial while the worker is down.
        one, two = await join_ends(site, relay, route="two")
        await speak(one, two)
        assert await dies[0].ended() in ("reset", "eof")
        died = await relay.log("worker died")
        assert (died["worker"], died["how"]) == (2, "killed by SIGKILL")
        await relay.log("worker started", worker=2, count=2)
        await speak(*stays)
        after = await metrics(relay)
        assert after["frelay_worker_restarts_total"] == 1
        assert after["frelay_pairings_active"] == 2
        for name, value in before.items():
            if name.endswith(("_total", "_count", "_bucket", "_sum")):
                assert after[name] >= value, name
        assert after["frelay_bytes_total"] >= before["frelay_bytes_total"] + 100_000
        await end_in_order(one, two)
        await becomes(relay, 5, "frelay_pairings_total")
        routes = {route["name"]: route for route in (await api.get("/v1/routes")).json()["routes"]}
        assert routes["two"]["outcomes"] == {"closed": 2}
        assert (await api.get("/v1/status")).json()["workers"][1]["restarts"] == 1


async def test_a_worker_comes_back_with_what_is_in_force(site: Site) -> None:
    """It does not read the disk: a mistake in a file that no reload took over does no harm later."""
    async with two_workers(site, sections=ADMIN), admin(site) as api:
        answer = await api.put("/v1/routes/five", json=route_body(require_inner_tls=False))
        port = int(answer.json()["bound"][0].rpartition(":")[2])
        pid = (await owners(api))["five"]
        site.relay_paths[0].write_text("nonsense")
        site.config.write_text("nonsense")
        assert (await api.post("/v1/reload")).status_code == 409
        await kill(pid)
        ends = await pair(await site.party(port, "func1"), await site.party(port, "func2"))
        assert ends[0]["route"] == "five"
        assert (await api.get("/v1/status")).json()["last_reload"]["ok"] is False


async def test_a_reload_while_a_worker_is_down_reaches_it(site: Site) -> None:
    async with two_workers(site, sections=ADMIN) as relay, admin(site) as api:
        for number in (1, 2):
            await kill(relay.worker(number))
        answer = await api.put("/v1/routes/five", json=route_body(require_inner_tls=False))
        assert answer.status_code == 201, answer.text
        port = int(answer.json()["bound"][0].rpartition(":")[2])
        await pair(await site.party(port, "func1"), await site.party(port, "func2"))
        for name in NAMES:
            await join_ends(site, relay, route=name)


async def test_no_orphan_outlives_its_supervisor(site: Site) -> None:
    async with two_workers(site) as relay:
        workers, port = [relay.worker(1), relay.worker(2)], relay.own_port("one")
        one, _ = await join_ends(site, relay, route="one")
        relay.signal(signal.SIGKILL)
        assert await relay.exit_code() == -signal.SIGKILL
        await eventually(lambda: not any(map(is_there, workers)), "no worker is left")
        assert await one.ended() in ("reset", "eof")
        assert can_bind(("127.0.0.1", port))


# --- drain -------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_pairings_of_all_workers_finish(site: Site) -> None:
    async with two_workers(site, sections=METRICS) as relay:
        ends = [await join_ends(site, relay, route=name) for name in NAMES]
        waiter = await site.party(relay, "func1", route="two")
        await waiter.join()
        await waiter.expect("WAITING")
        relay.signal(signal.SIGTERM)
        assert (await relay.log("draining"))["pairings"] == 4
        await waiter.expect("DRAINING")
        for name in NAMES:
            assert can_bind(("127.0.0.1", relay.own_port(name)))
        for one, two in ends:
            await speak(one, two)
        for done, (one, two) in enumerate(ends, start=1):
            await end_in_order(one, two)
            if done < len(ends):
                await becomes(relay, done, "frelay_pairings_total")
        assert await relay.exit_code() == 0
        assert (await relay.log("stopped"))["clean"] is True


@pytest.mark.parametrize("route", ["one", "two"])
async def test_a_worker_that_cuts_a_pairing_makes_the_exit_code_1(site: Site, route: str) -> None:
    """In either worker."""
    async with two_workers(site, sections="[relay]\ndrain_timeout = 0.5\n") as relay:
        await join_ends(site, relay, route=route)
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() == 1
        assert relay.logged("pairing ended")[-1]["outcome"] == "drained"


async def test_a_second_signal_ends_it_now(site: Site) -> None:
    async with two_workers(site, sections="[relay]\ndrain_timeout = 600\n") as relay:
        for name in NAMES:
            await join_ends(site, relay, route=name)
        relay.signal(signal.SIGTERM)
        await relay.log("draining")
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() == 1
        assert len(relay.logged("pairing ended")) == 4
