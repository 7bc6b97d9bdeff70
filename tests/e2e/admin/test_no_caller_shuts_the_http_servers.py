"""The admin API and /healthz answer the next caller, whatever other callers do with their connections."""

from __future__ import annotations

import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import httpx
import pytest
import trio

from frelay.relay.control import RelayControl
from frelay.tls.trust import OuterTls
from support.admin import ADMIN, admin, events
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

METRICS: Final = '[metrics]\nlisten = "127.0.0.1:0"\n'
DOOR: Final = '[admin]\nlisten = "127.0.0.1:0"\nallow = ["dns:operator.demo"]\n'
GET: Final = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
FLOOD: Final = 60
SLOTS: Final = 12


def port_of(relay: RelayInProcess, server: str) -> int:
    return int(relay.relay.served[server][0].rpartition(":")[2])


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers get few slots, so that a flood needs fewer descriptors."""
    monkeypatch.setattr("frelay.net.slots._MOST_HTTP_CONNECTIONS", SLOTS)


async def is_healthy(relay: RelayInProcess) -> None:
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:
        answer = await http.get(f"http://127.0.0.1:{port_of(relay, 'metrics')}/healthz")
    assert answer.text == "ok\n"


@asynccontextmanager
async def caller(site: Site, relay: RelayInProcess, name: str = "operator") -> AsyncIterator[httpx.AsyncClient]:
    context = ssl.create_default_context(cafile=str(site.ca_path))
    context.load_cert_chain(*site.paths[name])
    url = f"https://localhost:{port_of(relay, 'admin')}"
    async with httpx.AsyncClient(verify=context, base_url=url, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def site(site: Site) -> Site:
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    return site


# --- floods ---------------------------------------------------------------------------------------------------------

Way = Callable[[trio.SocketStream], Awaitable[None]]


async def says_nothing(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def one_byte(stream: trio.SocketStream) -> None:
    await stream.send_all(b"G")


async def a_head_byte_by_byte(stream: trio.SocketStream) -> None:
    for byte in b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 10_000:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.05)


async def half_a_body(stream: trio.SocketStream) -> None:
    await stream.send_all(b"POST /metrics HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nhalf")


async def asks_and_never_reads(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(GET)


async def asks_once(stream: trio.SocketStream) -> None:
    await stream.send_all(GET)


async def half_a_client_hello(stream: trio.SocketStream) -> None:
    await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))


async def http2(stream: trio.SocketStream) -> None:
    await stream.send_all(PREFACE)


@asynccontextmanager
async def flood(port: int, way: Way) -> AsyncIterator[None]:
    """Callers that never disconnect, and connect again at once when they are disconnected."""

    async def one() -> None:
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                async with stream, trio.open_nursery() as nursery:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    nursery.start_soon(way, stream)
                    if way is not asks_and_never_reads:
                        while await stream.receive_some():
                            pass
                        nursery.cancel_scope.cancel()
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(FLOOD):
            nursery.start_soon(one)
        # Long enough that all have connected, and the first of them were disconnected.
        await trio.sleep(0.5)
        yield
        nursery.cancel_scope.cancel()


WAYS: Final = (says_nothing, one_byte, a_head_byte_by_byte, half_a_body, asks_and_never_reads, asks_once, http2)


@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_healthz_is_answered_in_a_flood(site: Site, way: Way) -> None:
    async with site.relay(sections=METRICS) as relay, flood(port_of(relay, "metrics"), way):
        for _ in range(2):
            await is_healthy(relay)


@pytest.mark.usefixtures("few_slots")
@pytest.mark.parametrize("way", [says_nothing, one_byte, half_a_client_hello, http2], ids=lambda way: way.__name__)
async def test_the_admin_api_is_answered_in_a_flood(site: Site, way: Way) -> None:
    async with site.relay(sections=DOOR) as relay, flood(port_of(relay, "admin"), way), caller(site, relay) as api:
        assert (await api.get("/v1/status")).status_code == 200


@pytest.mark.usefixtures("few_slots")
async def test_idle_callers_of_the_unix_socket_shut_nobody_out(site: Site) -> None:
    """Idle connections lose their slots, and a connection that the relay works for keeps its slot."""
    async with (
        site.relay(sections=ADMIN) as relay,
        admin(site) as first,
        events(first) as seen,
        AsyncExitStack() as all_,
    ):
        for _ in range(FLOOD):
            stream = await trio.open_unix_socket(str(site.directory / "a.sock"))
            all_.push_async_callback(trio.aclose_forcefully, stream)
        async with admin(site) as api:
            assert (await api.post("/v1/reload")).status_code == 200
        await seen.wait("reloaded")
        assert relay.logged("HTTP connections closed to make room", address="unix")


@pytest.mark.usefixtures("few_slots")
async def test_event_streams_are_bounded_and_shut_nobody_out(site: Site) -> None:
    """A reader of events keeps its slot, so one address gets only a part of all event streams."""
    async with site.relay(sections=ADMIN), AsyncExitStack() as all_:
        open_ = []
        while True:
            api = await all_.enter_async_context(admin(site))
            answer = await all_.enter_async_context(api.stream("GET", "/v1/events"))
            if answer.status_code != 200:
                break
            open_.append(answer)
            assert len(open_) < SLOTS
        await answer.aread()
        assert (answer.status_code, answer.json()["error"]) == (429, "too-many")
        assert len(open_) == SLOTS // 4
        async with admin(site) as api:
            assert (await api.get("/v1/status")).status_code == 200
        await open_.pop().aclose()

        async def again() -> int:
            api = await all_.enter_async_context(admin(site))
            return (await all_.enter_async_context(api.stream("GET", "/v1/events"))).status_code

        with trio.fail_after(TIMEOUT):
            while await again() != 200:
                await trio.lowlevel.checkpoint()


# --- scrapes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


class Looks:
    """Counts the snapshots that scrapes take, and delays them while ``go`` is not set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.cancelled = 0
        self.go = trio.Event()
        original = RelayControl.counts
        looks = self

        async def counts(self: RelayControl) -> Any:
            looks.begun += 1
            try:
                await looks.go.wait()
            except trio.Cancelled:
                looks.cancelled += 1
                raise
            return await original(self)

        monkeypatch.setattr(RelayControl, "counts", counts)


@pytest.mark.parametrize("how", ["reset", "close", "close with more requests"])
async def test_a_scrape_that_nobody_waits_for_is_dropped(site: Site, looks: Looks, how: str) -> None:
    """64 connections send pipelined requests and disconnect: no scrape is made for them."""
    async with site.relay(sections=METRICS) as relay:
        streams = []
        for _ in range(64):
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(relay, "metrics"))
            await stream.send_all(GET * (1 if how == "close" else 100))
            streams.append(stream)
        await eventually(lambda: looks.begun == 1, "one scrape for all")
        for stream in streams:
            if how == "reset":
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await trio.aclose_forcefully(stream)
        await eventually(lambda: looks.cancelled == looks.begun, "it is dropped")
        # A queued scrape may have begun just before the relay saw that its client had disconnected.
        assert looks.begun <= 3
        looks.go.set()
        await is_healthy(relay)


async def test_all_who_scrape_at_a_time_share_one(site: Site, looks: Looks) -> None:
    async with site.relay(sections=METRICS) as relay, httpx.AsyncClient(timeout=TIMEOUT) as http:
        answers = []

        async def scrape() -> None:
            answers.append(await http.get(f"http://127.0.0.1:{port_of(relay, 'metrics')}/metrics"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrape)
            await eventually(lambda: looks.begun == 1, "the first")
            for _ in range(30):
                nursery.start_soon(scrape)
            await is_healthy(relay)
            looks.go.set()
        assert [answer.status_code for answer in answers] == [200] * 31
        assert 2 <= looks.begun <= 4


# --- only HTTP/1.1 --------------------------------------------------------------------------------------------------


async def said(relay: RelayInProcess, data: bytes, server: str = "metrics") -> bytes:
    """All that the server answers to ``data`` until it ends the connection."""
    stream = await trio.open_tcp_stream("127.0.0.1", port_of(relay, server))
    answer = b""
    with trio.fail_after(TIMEOUT):
        async with stream:
            await stream.send_all(data)
            while piece := await stream.receive_some():
                answer += piece
    return answer


CLOSE: Final = b"host: localhost\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (PREFACE, 505),
        (b"GET /healthz HTTP/3.0\r\n" + CLOSE, 505),
        (
            b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close, Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
            b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
            200,
        ),
        (
            b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close, Upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n",
            200,
        ),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n" + CLOSE, 200),
        (b"GET http://localhost/healthz HTTP/1.1\r\n" + CLOSE, 200),
        (b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n" + CLOSE, 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(5000)) + CLOSE, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"CONNECT localhost:1 HTTP/1.1\r\n" + CLOSE, 404),
        (b"OPTIONS * HTTP/1.1\r\n" + CLOSE, 404),
    ],
)
async def test_only_http_1_is_spoken(site: Site, data: bytes, status: int) -> None:
    async with site.relay(sections=METRICS) as relay:
        answer = await said(relay, data)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
        assert answer.lower().count(b"content-length: ") == 1


async def test_requests_one_behind_the_other_are_answered_in_turn(site: Site) -> None:
    """Each request gets its own answer, HEAD gets no body, and bytes after the last request are ignored."""
    async with site.relay(sections=METRICS) as relay:
        one = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
        head = one.replace(b"GET", b"HEAD")
        last = one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        answer = await said(relay, one + head + one.replace(b"healthz", b"readyz") + last + one)
        assert answer.count(b"HTTP/1.1 200") == 4
        assert answer.count(b"ok\n") == 2
        assert answer.count(b"ready\n") == 1


async def test_a_client_that_offers_http_2_alone_gets_no_tls(site: Site) -> None:
    async with site.relay(sections=DOOR) as relay:
        context = site.context("operator", alpn=["h2"])
        party = await site.connect(port_of(relay, "admin"), "operator", context=context)
        assert "NO_APPLICATION_PROTOCOL" in await party.alert()
        context = site.context("operator", alpn=["h2", "http/1.1"])
        party = await site.connect(port_of(relay, "admin"), "operator", context=context)
        await party.handshake()
        assert party.tls.selected_alpn_protocol() == "http/1.1"


async def test_half_a_body_is_not_acted_upon(site: Site) -> None:
    """Not even if the received part is valid."""
    body = json.dumps({"listen": "127.0.0.1:0", "func1": "dns:a.b", "func2": "dns:c.d"}).encode()
    head = b"PUT /v1/routes/half HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    async with site.relay(sections=ADMIN) as relay:
        for length in (b"content-length: %d\r\n\r\n" % (len(body) + 10), b"transfer-encoding: chunked\r\n\r\n"):
            stream = await trio.open_unix_socket(str(site.directory / "a.sock"))
            chunk = body if b"content" in length else b"%x\r\n%s\r\n" % (len(body), body)
            await stream.send_all(head + length + chunk)
            await stream.send_eof()
            answer = await stream.receive_some()
            assert b" 20" not in answer[:13]
            await stream.aclose()
        assert list(relay.relay.routes) == ["demo"]


# --- who may call, request by request -------------------------------------------------------------------------------


async def revoke(site: Site, relay: RelayInProcess) -> None:
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["operator"]], number=2))
    await relay.relay.reload()


async def take_off_the_list(site: Site, relay: RelayInProcess) -> None:
    site.write(DEMO, sections=DOOR.replace("operator", "another"), crl=True)
    await relay.relay.reload()


@pytest.mark.parametrize("change", [revoke, take_off_the_list, None])
async def test_policy_is_judged_for_each_request(
    site: Site, change: Callable[[Site, RelayInProcess], Awaitable[None]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An admitted connection gets 403 and is closed, and its event stream ends without another event."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(sections=DOOR, crl=True) as relay, caller(site, relay) as api, caller(site, relay) as other:
        assert (await api.get("/v1/status")).status_code == 200
        async with other.stream("GET", "/v1/events") as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == ": frelay events"
            if change is None:
                # Nothing was reloaded: the revocation list has expired.
                monkeypatch.setattr(OuterTls, "has_expired_list", lambda self, now=None: True)
            else:
                await change(site, relay)
            answer = await api.put(
                "/v1/routes/evil", json={"listen": "127.0.0.1:0", "func1": "dns:a.b", "func2": "dns:c.d"}
            )
            assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
            assert answer.headers["connection"] == "close"
            with pytest.raises(httpx.TransportError):
                await api.get("/v1/status")
            with trio.fail_after(TIMEOUT):
                assert [line async for line in lines if line] == []
        assert list(relay.relay.routes) == ["demo"]
        assert relay.logged("admin refused")


async def test_policy_is_judged_when_the_request_is_whole(site: Site) -> None:
    """Not only at its head: the certificate may be revoked while the body arrives."""
    site.ca.write_crl(site.directory, site.ca.crl())
    body = json.dumps({"listen": "127.0.0.1:0", "func1": "dns:a.b", "func2": "dns:c.d"}).encode()
    async with site.relay(sections=DOOR, crl=True) as relay:
        context = site.context("operator", alpn=["http/1.1"])
        party = await site.connect(port_of(relay, "admin"), "operator", context=context)
        await party.handshake()
        head = "PUT /v1/routes/late HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        await party.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:10])
        await relay.log("admin connected")
        await revoke(site, relay)
        await party.send(body[10:])
        with trio.fail_after(TIMEOUT):
            assert b" 403 " in await party.receive()
        assert list(relay.relay.routes) == ["demo"]


async def test_who_is_still_allowed_stays_connected(site: Site) -> None:
    """A reload as such ends no connection and no stream."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(sections=DOOR, crl=True) as relay, caller(site, relay) as api, events(api) as seen:
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func1"]], number=2))
        await relay.relay.reload()
        await relay.relay.reload()
        await seen.wait("reloaded", 2)
        assert (await api.get("/v1/status")).status_code == 200
