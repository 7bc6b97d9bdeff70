"""TESTPLAN 53, 54: neither a page of an attacker nor a hostile body can do anything to the admin API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import trio

from support.admin import ADMIN, admin, forwarded, keys, route_body
from support.site import DEMO, Site

CHANGES = (
    ("PUT", "/v1/routes/two", route_body()),
    ("DELETE", "/v1/routes/demo", None),
    ("POST", "/v1/reload", None),
    ("GET", "/v1/status", None),
)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "rebound.example:80", "127.0.0.1.nip.io", ""]
)
async def test_a_foreign_host_is_refused(site: Site, host: str) -> None:
    """TESTPLAN 53: an attacker's DNS name that points here gets 403 for everything, and changes nothing."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        for method, url, body in CHANGES:
            answer = await api.request(method, url, json=body, headers={"host": host})
            assert answer.status_code in (400, 403), url
        assert list(relay.relay.routes) == ["demo"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "localhost.", "localhost.:8080", "127.0.0.1:9", "[::1]:1234"]
)
async def test_the_names_of_this_machine_are_welcome(site: Site, host: str) -> None:
    """As a browser sends them through `ssh -L`, with any port."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        assert (await api.get("/v1/status", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:8081"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
async def test_a_page_from_elsewhere_is_refused(site: Site, headers: dict[str, str]) -> None:
    """TESTPLAN 53: also a page from another port of the same machine."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        for method, url, body in CHANGES:
            answer = await api.request(method, url, json=body, headers={"host": "localhost:8080", **headers})
            assert (answer.status_code, answer.json()["error"]) == (403, "forbidden"), url
        assert list(relay.relay.routes) == ["demo"]


async def test_a_page_of_our_own_is_welcome(site: Site) -> None:
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        headers = {"host": "localhost:8080", "origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}
        assert (await api.put("/v1/routes/two", json=route_body(), headers=headers)).status_code == 201


async def test_nothing_changes_on_get(site: Site) -> None:
    """TESTPLAN 53: no request that an <img> can make changes anything."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        await api.put("/v1/routes/two", json=route_body())
        before = await api.get("/v1/routes")
        reloaded = relay.relay.last_reload_at
        for url in ("/v1/reload", "/v1/routes/two?_method=DELETE", "/v1/routes/three?listen=127.0.0.1:0", "/v1/routes"):
            for method in ("GET", "HEAD", "OPTIONS"):
                answer = await api.request(method, url, headers={"x-http-method-override": "DELETE"})
                assert answer.status_code in (200, 404, 405), (method, url)
        assert (await api.get("/v1/routes")).json() == before.json()
        assert relay.relay.last_reload_at == reloaded
        refused = await api.get("/v1/reload")
        assert (refused.status_code, refused.json()["error"]) == (405, "method-not-allowed")


async def test_a_form_cannot_put(site: Site) -> None:
    """The content types that any page may send (forms, text/plain) are not accepted as JSON."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        body = json.dumps(route_body())
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            answer = await api.put("/v1/routes/two", content=body, headers={"content-type": kind})
            assert answer.status_code == 422, kind
        assert list(relay.relay.routes) == ["demo"]


# --- hostile bodies and names -------------------------------------------------------------------------------------


async def test_a_body_too_large_is_not_read(site: Site) -> None:
    """TESTPLAN 54: with a Content-Length, and without one."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        large = json.dumps(route_body(func1=["dns:a.b"] * 20_000)).encode()
        assert (await api.put("/v1/routes/two", content=large)).status_code == 413

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 16384):
                yield large[start : start + 16384]

        assert (await api.put("/v1/routes/two", content=pieces())).status_code == 413
        assert (await api.get("/v1/status")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 30_000,
        b'{"listen":' * 5_000,
        b'{"func1": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"listen": "127.0.0.1:0", "listen": 1}',
        b"\xff\xfe",
        b"",
        b"null",
        b'{"max_pairings": 1e999}',
        b'{"max_pairings": ' + b"9" * 5000 + b"}",
        b'{"wait_timeout": NaN, "listen": "127.0.0.1:0", "func1": "dns:a", "func2": "dns:b"}',
        b'{"wait_timeout": Infinity, "listen": "127.0.0.1:0", "func1": "dns:a", "func2": "dns:b"}',
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_a_body_made_to_hurt_is_a_422(site: Site, body: bytes) -> None:
    """TESTPLAN 54: deep nesting, duplicate keys, no UTF-8, bad numbers: each gets an answer, and the relay goes on."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        answer = await api.put("/v1/routes/two", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.json()["error"] == "invalid"
        assert (await api.get("/v1/status")).status_code == 200
        assert list(relay.relay.routes) == ["demo"]


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".hidden",
        "..%2fevil",
        "%2e%2e%2f%2e%2e%2fevil",
        "a%0d%0ab",
        "a%1b[2Jb",
        "a%00",
        "a" * 64,
        "%C3%A9",
        "-x",
        "a b",
    ],
)
async def test_a_name_is_no_path_and_no_escape(site: Site, name: str) -> None:
    """TESTPLAN 54: the name of a route is also a file name, a label and a server name, so others are refused."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        before = sorted(str(path) for path in site.directory.rglob("*"))
        answer = await api.put(f"/v1/routes/{name}", json=route_body())
        assert answer.status_code in (404, 405, 422)
        assert list(relay.relay.routes) == ["demo"]
        assert sorted(str(path) for path in site.directory.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    ['dns:a"\nlisten = "0.0.0.0:1', 'dns:a"""', "dns:a\x1b[31m", "dns:a\r\nx: y", 'dns:a"]\n[[route]]\nname="x"'],
    ids=repr,
)
async def test_toml_cannot_be_injected(site: Site, text: str) -> None:
    """TESTPLAN 54: TOML inside a value stays text. It is refused as a bad value, and never shown raw."""
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        answer = await api.put("/v1/routes/two", json=route_body(func1=text))
        assert answer.status_code == 422
        assert keys(answer) == {"func1"}
        assert "\x1b" not in answer.json()["problems"][0]["message"]
        listen = await api.put("/v1/routes/two", json=route_body(listen=text))
        assert listen.status_code == 422
        assert list(relay.relay.routes) == ["demo"]


async def test_what_is_no_http_is_dropped(site: Site) -> None:
    """After garbage, a TLS hello, an endless header or silence, the next caller is still served."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api, forwarded(site.directory / "a.sock") as port:
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]
        for data in (b"\x16\x03\x01\x02\x00\x01" * 100, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, b"\0" * 1000):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        assert (await api.get("/v1/status")).status_code == 200
        for stream in idle:
            await stream.aclose()
