"""Status, routes, pairings and events: the API shows the same state that the functions see at that moment."""

from __future__ import annotations

import signal

import trio

from frelay.journal import LegRefused
from support.admin import ADMIN, admin, events, route_body
from support.ends import OPEN, block, join_ends
from support.relay import address_seen
from support.site import DEMO, Site
from support.waiting import eventually


async def test_a_waiting_leg_is_shown_with_its_identity_and_since_when(site: Site) -> None:
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        one = await site.party(relay, "func1")
        await one.join(modes=["tunnel"])
        await one.expect("WAITING")
        await eventually(lambda: relay.waiting() == (1, 0), "it waits")
        now = (await api.get("/v1/status")).json()["now"]
        (leg,) = (await api.get("/v1/routes/demo")).json()["waiting"]["func1"]
        assert leg["identity"] == "dns:func1.demo"
        assert leg["mode"] == "tunnel"
        assert leg["address"] == address_seen(relay, one)
        assert 0 <= now - leg["since"] < 60
        assert (await api.get("/v1/status")).json()["waiting"] == 1


async def test_a_pairing_is_shown_with_both_identities_and_its_bytes_while_they_move(site: Site) -> None:
    """The bytes grow while it runs, and the sum stays when it has ended."""
    async with site.relay(OPEN, sections=ADMIN) as relay, admin(site) as api:
        one, two = await join_ends(site, relay, "raw", "tunnel")
        data = block(300_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, data)
            await two.receive_exactly(len(data))
        await two.send(b"answer")
        await one.receive_exactly(6)

        (pairing,) = (await api.get("/v1/pairings")).json()["pairings"]
        assert (pairing["func1"]["identity"], pairing["func2"]["identity"]) == ("dns:func1.demo", "dns:func2.demo")
        assert (pairing["func1"]["mode"], pairing["func2"]["mode"]) == ("handoff", "tunnel")
        assert pairing["is_handed_off"]
        assert (pairing["bytes_func1_to_func2"], pairing["bytes_func2_to_func1"]) == (len(data), 6)
        assert (await api.get("/v1/routes/demo")).json()["bytes_func1_to_func2"] == len(data)

        await one.send_eof()
        await two.send_eof()
        await relay.outcome()
        await eventually(lambda: not relay.relay.pairings, "the pairing is over")
        route = (await api.get("/v1/routes/demo")).json()
        assert (route["bytes_func1_to_func2"], route["bytes_func2_to_func1"]) == (len(data), 6)
        assert route["outcomes"] == {"closed": 1}
        assert (await api.get("/v1/pairings")).json() == {"pairings": []}


async def test_a_refusal_is_shown_with_who_and_why(site: Site) -> None:
    """Newest first, with the certificate in one line, which is enough to find the mistake."""
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        for name in ("stranger", None):
            party = await site.connect(relay, name)
            try:
                await party.handshake()
                await party.join()
                await party.receive()
            except Exception:
                pass
        await eventually(lambda: len(relay.logged("refused")) == 2, "two refusals")
        first, second = (await api.get("/v1/status")).json()["refusals"]
        assert first["route"] == "demo"
        assert (second["code"], second["route"]) == ("not-authorised", "demo")
        assert "stranger.demo" in second["certificate"]
        assert "serial" in second["certificate"]
        assert second["address"].startswith("127.0.0.1:")
        assert (await api.get("/v1/routes/demo")).json()["refusals"]["not-authorised"] >= 1


async def test_a_refused_reload_is_in_the_status_with_every_problem(site: Site) -> None:
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        whole = site.config.read_text()
        site.config.write_text(whole.replace("func1 = ", "funk1 = ") + "\nwait_timeout = 0\n")
        answer = await api.post("/v1/reload")
        assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
        status = (await api.get("/v1/status")).json()["last_reload"]
        assert status["ok"] is False
        assert status["problems"] == answer.json()["problems"]
        assert {problem["key"] for problem in status["problems"]} >= {"route[demo].funk1", "route[demo].wait_timeout"}
        assert all(problem["line"] for problem in status["problems"])
        site.config.write_text(whole)
        assert (await api.post("/v1/reload")).json()["kept"] == 1
        assert (await api.get("/v1/status")).json()["last_reload"]["ok"] is True
        assert relay.logged("reload refused, the old configuration stays")


async def test_events_come_as_it_happens(site: Site) -> None:
    """Several readers get waiting, paired, ended, refused and reloaded, in the order in which they happen."""
    async with site.relay(OPEN, sections=ADMIN) as relay, admin(site) as api:
        async with events(api) as mine, events(api) as another:
            one, two = await join_ends(site, relay)
            assert (await mine.wait("waiting"))["identity"] == "dns:func1.demo"
            paired = await mine.wait("paired")
            assert (paired["func1"], paired["func2"]) == ("dns:func1.demo", "dns:func2.demo")
            await one.send_eof()
            await two.send_eof()
            ended = await mine.wait("ended")
            assert (ended["pairing"], ended["outcome"]) == (paired["pairing"], "closed")
            await api.put("/v1/routes/two", json=route_body())
            assert (await mine.wait("reloaded"))["added"] == ["two"]
            site.config.write_text("nonsense")
            await api.post("/v1/reload")
            assert (await mine.wait("reload-refused"))["problems"]
            await another.wait("reload-refused")
            assert [event["id"] for event in another.seen] == [event["id"] for event in mine.seen]
        last = mine.seen[0]["id"]
        async with events(api, **{"last-event-id": str(last)}) as later:
            await later.wait("reload-refused")
            assert [event["id"] for event in later.seen] == [event["id"] for event in mine.seen[1:]]


async def test_a_reader_that_does_not_read_costs_nothing(site: Site) -> None:
    """The relay does not wait for it, and keeps a limited number of events for it."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        stream = await trio.open_unix_socket(str(site.directory / "a.sock"))
        await stream.send_all(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await stream.receive_some(10)
        for _ in range(5_000):
            relay.relay.journal.note(LegRefused(code="limit", reason="x" * 500, address="127.0.0.1:1"))
        assert (await api.get("/v1/status")).status_code == 200
        got = b""
        with trio.fail_after(20):
            while not got.endswith(b"0\r\n\r\n"):  # the last chunk: the answer is over
                piece = await stream.receive_some(65536)
                assert piece
                got += piece
        assert b"id: 1\n" in got
        assert b"id: 5000\n" not in got
        await stream.aclose()


async def test_the_drain_can_be_watched(site: Site) -> None:
    """The API answers until the last pairing has ended, and refuses changes meanwhile."""
    async with site.process(OPEN, sections=ADMIN) as relay, admin(site) as api:
        one, two = await join_ends(site, relay)
        async with events(api) as seen:
            relay.process.terminate()
            await seen.wait("draining")
            status = (await api.get("/v1/status")).json()
            assert (status["state"], status["pairings"]) == ("draining", 1)
            refused = await api.put("/v1/routes/two", json=route_body())
            assert (refused.status_code, refused.json()["error"]) == (503, "draining")
            assert not (site.directory / "routes.d").exists()
            await one.send_eof()
            await two.send_eof()
        assert await relay.exit_code() == 0
        assert not (site.directory / "a.sock").exists()


async def test_a_reader_that_does_not_read_keeps_no_relay_from_its_end(site: Site) -> None:
    """After SIGTERM the relay ends at once although an answer is stuck in a full socket."""
    async with site.process(OPEN, sections=ADMIN) as relay:
        for number in range(40):
            with (site.directory / "relay.toml").open("a") as file:
                file.write(f'[[route]]\nname = "r{number}"\nlisten = "127.0.0.1:0"\nfunc1 = "dns:a"\nfunc2 = "dns:b"\n')
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded", kept=1)
        stuck = await trio.open_unix_socket(str(site.directory / "a.sock"))
        request = b"GET /v1/routes HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with trio.move_on_after(1):
            await stuck.send_all(request * 200)
        relay.process.terminate()
        assert await relay.exit_code() == 0
        await stuck.aclose()
