"""PUT and DELETE of a route are in force and on disk when they are answered."""

from __future__ import annotations

import json
import tomllib

import pytest
import trio

from support.admin import ADMIN, admin, can_bind, keys, route_body
from support.ends import OPEN, block, join_ends
from support.party import pair
from support.ports import reserved_port
from support.site import DEMO, Site


async def test_a_route_is_served_before_the_answer_is_read(site: Site) -> None:
    """Two functions meet on it at once, without a second try."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        answer = await api.put("/v1/routes/two", json=route_body())
        assert answer.status_code == 201
        one = await site.party(relay, "func1", route="two")
        two = await site.party(relay, "func2", route="two")
        paired, _ = await pair(one, two)
        assert paired["route"] == "two"
        assert answer.json()["bound"] == [f"127.0.0.1:{relay.own_port('two')}"]
        assert answer.headers["etag"] == answer.json()["etag"]


async def test_it_is_on_disk_and_survives_a_kill(site: Site) -> None:
    """After kill -9 right behind the answer and a restart, the route is served and the operator's file is unchanged."""
    async with site.process(DEMO, sections=ADMIN) as relay, admin(site) as api:
        before = site.config.read_bytes()
        assert (await api.put("/v1/routes/two", json=route_body(wait_timeout=7))).status_code == 201
        relay.process.kill()
        assert site.config.read_bytes() == before
        written = tomllib.loads((site.directory / "routes.d" / "two.toml").read_text())
        assert written == {"name": "two", **route_body(wait_timeout=7.0)}
    # The socket file of the killed relay is still there and does no harm.
    assert (site.directory / "a.sock").exists()
    async with site.process(DEMO, sections=ADMIN) as relay, admin(site) as api:
        assert (await api.get("/v1/routes/two")).json()["limits"]["wait_timeout"] == 7
        await pair(
            await site.party(relay, "func1", route="two"),
            await site.party(relay, "func2", route="two"),
        )
    assert not (site.directory / "a.sock").exists() or relay.process.returncode != 0


async def test_to_put_it_twice_is_to_put_it_once(site: Site) -> None:
    """PUT is idempotent: the second one changes nothing, and waiting functions do not notice it."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        first = await api.put("/v1/routes/two", json=route_body())
        one = await site.party(relay, "func1", route="two")
        await one.join()
        await one.expect("WAITING")
        second = await api.put("/v1/routes/two", json=route_body())
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.headers["etag"] == second.headers["etag"]
        assert second.json()["waiting"]["func1"][0]["identity"] == "dns:func1.demo"
        two = await site.party(relay, "func2", route="two")
        await two.join()
        await two.expect("WAITING")
        await one.expect("PAIRED")


async def test_a_deleted_route_gives_its_port_back_and_others_never_notice(site: Site) -> None:
    """The port is free when DELETE is answered, a waiting leg is told, and a pairing of another route goes on."""
    async with site.relay(OPEN, sections=ADMIN) as relay, admin(site) as api:
        one, two = await join_ends(site, relay)
        await api.put("/v1/routes/two", json=route_body())
        port = relay.own_port("two")
        waiting = await site.party(relay, "func1", route="two")
        await waiting.join()
        await waiting.expect("WAITING")
        assert not can_bind(("127.0.0.1", port))
        assert (await api.delete("/v1/routes/two")).status_code == 204
        assert can_bind(("127.0.0.1", port))
        assert not (site.directory / "routes.d" / "two.toml").exists()
        assert (await waiting.refusal())["code"] == "route-removed"
        data = block(100_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, data)
            assert await two.receive_exactly(len(data)) == data
        assert (await api.delete("/v1/routes/two")).status_code == 404
        assert (await api.get("/v1/routes/two")).status_code == 404


async def test_a_replaced_route_keeps_its_port(site: Site) -> None:
    """With other parties at the same address, the socket stays, and so do the connections in its queue."""
    with reserved_port() as port:
        async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
            listen = f"127.0.0.1:{port}"
            await api.put("/v1/routes/two", json=route_body(listen=listen, func1="dns:somebody.else"))
            queued = await site.connect(relay, "func1", route="two")
            answer = await api.put("/v1/routes/two", json=route_body(listen=listen))
            assert answer.status_code == 200
            assert answer.json()["func1"] == ["dns:func1.demo"]
            late = await site.party(relay, "func1", route="two")
            await late.join()
            await late.expect("WAITING")
            queued.close()


async def test_groups_and_limits_of_the_file_hold_for_it(site: Site) -> None:
    """It is a route like those in the file: it can name groups, and [limits] has its defaults."""
    sections = '[limits]\nwait_timeout = 11\n[[group]]\nname = "workers"\nparties = ["dns:func1.demo", "dns:x.demo"]\n'
    async with site.relay(DEMO, sections=ADMIN + sections), admin(site) as api:
        answer = await api.put("/v1/routes/two", json=route_body(func1="group:workers"))
        assert answer.json()["func1"] == ["dns:func1.demo", "dns:x.demo"]
        assert answer.json()["limits"]["wait_timeout"] == 11


# --- requests that are refused --------------------------------------------------------------------------------------


async def test_a_route_of_the_file_is_not_for_the_api(site: Site) -> None:
    """409, the message names both files, and the operator's file is byte-identical."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        before = site.config.read_bytes()
        for answer in (await api.put("/v1/routes/demo", json=route_body()), await api.delete("/v1/routes/demo")):
            assert answer.status_code == 409
            assert str(site.config) in answer.json()["message"]
            assert "routes.d/demo.toml" in answer.json()["message"]
        assert site.config.read_bytes() == before
        assert not (site.directory / "routes.d").exists()


async def test_a_port_in_use_is_a_conflict(site: Site) -> None:
    """A port of another process, and one of another route; nothing is written."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        (other,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = other.socket.getsockname()[1]
        answer = await api.put("/v1/routes/two", json=route_body(listen=f"127.0.0.1:{port}"))
        assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
        assert "in use" in answer.json()["problems"][0]["message"]
        assert "two" not in relay.relay.routes
        assert not (site.directory / "routes.d" / "two.toml").exists()
        await other.aclose()
        assert (await api.put("/v1/routes/two", json=route_body(listen=f"127.0.0.1:{port}"))).status_code == 201
        wide = await api.put("/v1/routes/three", json=route_body(listen=f"0.0.0.0:{port}"))
        assert wide.status_code == 409
        assert "overlaps" in wide.json()["problems"][0]["message"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"func1": "func1.demo"}, {"func1"}),
        ({"func2": ["dns:a", "nonsense"], "wait_timeout": -1}, {"func2[1]", "wait_timeout"}),
        ({"listen": "nowhere"}, {"listen"}),
        ({"listen": 9001}, {"listen"}),
        ({"max_pairings": 2**70}, {"max_pairings"}),
        ({"max_pairings": 1.5}, {"max_pairings"}),
        ({"outer": "tls"}, {"outer"}),
        ({"outer": "none"}, {"func1", "func2", "allow_from"}),
        ({"unknown": 1}, {"unknown"}),
        ({"name": "three"}, {"name"}),
        ({"func1": "group:nobody"}, {"func1"}),
        ({"func1": "dns:\ud800"}, {None, "func1"}),
        ({"require_inner_tls": "sometimes"}, {"require_inner_tls"}),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
async def test_bad_input_names_every_key(site: Site, changes: dict[str, object], found: set[str | None]) -> None:
    """422 names each wrong key by its path; nothing is written and nothing is bound."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        text = json.dumps(route_body(**changes))  # in ASCII, so that a lone surrogate can be sent
        answer = await api.put("/v1/routes/two", content=text, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]) == (422, "invalid")
        assert keys(answer) <= found
        assert keys(answer)
        assert list(relay.relay.routes) == ["demo"]
        assert not (site.directory / "routes.d").exists()


async def test_a_file_with_mistakes_on_disk_is_said_and_not_worked_around(site: Site) -> None:
    """The API adds no route to files that could not be loaded after a restart."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        whole = site.config.read_text()
        site.config.write_text(whole + "\nnonsense = \n")
        answer = await api.put("/v1/routes/two", json=route_body())
        assert answer.status_code == 409
        assert "files on disk" in answer.json()["message"]
        assert answer.json()["problems"][0]["file"] == str(site.config)
        assert relay.relay.last_reload_error is None
        site.config.write_text(whole)
        assert (await api.put("/v1/routes/two", json=route_body())).status_code == 201


# --- several editors ------------------------------------------------------------------------------------------------


async def test_etags_keep_editors_apart(site: Site) -> None:
    """If-Match makes a change conditional on the route being unchanged, If-None-Match on it being new."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        url = "/v1/routes/two"
        assert (await api.put(url, json=route_body(), headers={"if-match": "*"})).status_code == 412
        first = (await api.put(url, json=route_body(), headers={"if-none-match": "*"})).headers["etag"]
        assert (await api.put(url, json=route_body(), headers={"if-none-match": "*"})).status_code == 412
        assert (await api.put(url, json=route_body(), headers={"if-none-match": first})).status_code == 422
        changed = await api.put(url, json=route_body(wait_timeout=5), headers={"if-match": f'"x", {first}'})
        assert changed.status_code == 200
        stale = await api.put(url, json=route_body(wait_timeout=6), headers={"if-match": first})
        assert (stale.status_code, stale.json()["error"]) == (412, "precondition-failed")
        assert (await api.get(url)).json()["limits"]["wait_timeout"] == 5
        assert (await api.delete(url, headers={"if-match": first})).status_code == 412
        assert (await api.delete(url, headers={"if-match": changed.headers["etag"]})).status_code == 204


async def test_fifty_editors_lose_no_update(site: Site) -> None:
    """Each adds one to the same number with If-Match; at the end it has grown by fifty."""
    editors = 50
    url = "/v1/routes/two"
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        await api.put(url, json=route_body(max_pairings=1))
        refused = 0

        async def edit() -> None:
            nonlocal refused
            while True:
                known = (await api.get(url)).json()
                body = route_body(max_pairings=known["limits"]["max_pairings"] + 1)
                answer = await api.put(url, json=body, headers={"if-match": known["etag"]})
                if answer.status_code == 200:
                    return
                assert answer.status_code == 412
                refused += 1

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for _ in range(editors):
                    nursery.start_soon(edit)
        assert (await api.get(url)).json()["limits"]["max_pairings"] == 1 + editors
        assert refused, "they never met; this has shown nothing"
    assert tomllib.loads((site.directory / "routes.d" / "two.toml").read_text())["max_pairings"] == 1 + editors


async def test_many_routes_at_one_time(site: Site) -> None:
    """After twenty PUTs at once, all routes are served and on disk."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:

        async def add(number: int) -> None:
            assert (await api.put(f"/v1/routes/r{number}", json=route_body())).status_code == 201

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(add, number)
        assert len(relay.relay.routes) == 21
        assert len(list((site.directory / "routes.d").glob("*.toml"))) == 20
        assert not list((site.directory / "routes.d").glob(".*"))
