"""The admin API on HOST:PORT: it uses the certificates and CRL of the routes, and `admin.allow` says who may call."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from support.admin import route_body
from support.certs import TestAuthority, self_signed
from support.party import Party
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT

DOOR = '[admin]\nlisten = "127.0.0.1:0"\nallow = ["dns:operator.demo"]\n'


@asynccontextmanager
async def caller(site: Site, relay: RelayInProcess, name: str | None = "operator") -> AsyncIterator[httpx.AsyncClient]:
    """A client with the certificate of ``name``."""
    context = ssl.create_default_context(cafile=str(site.ca_path))
    if name is not None:
        context.load_cert_chain(*site.paths[name])
    port = relay.relay.served["admin"][0].rpartition(":")[2]
    async with httpx.AsyncClient(verify=context, base_url=f"https://localhost:{port}", timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def site(site: Site) -> Site:
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    return site


async def test_who_is_on_the_list_may_do_everything(site: Site) -> None:
    async with site.relay(DEMO, sections=DOOR) as relay, caller(site, relay) as api:
        assert (await api.get("/v1/status")).json()["state"] == "running"
        assert (await api.put("/v1/routes/two", json=route_body())).status_code == 201
        assert (await api.delete("/v1/routes/two")).status_code == 204
        assert relay.logged("admin connected", identity="dns:operator.demo")


@pytest.mark.parametrize("who", ["nobody", "another", "stranger", "self-signed", "expired", "server-only"])
async def test_anyone_else_gets_no_answer(site: Site, who: str) -> None:
    """With any other certificate, or none, a caller gets not one byte of HTTP, and the log has a line."""
    credentials = {
        "another": lambda: site.ca.party(dns=["func9.demo"]),
        "stranger": lambda: TestAuthority("other CA").party(dns=["operator.demo"]),
        "self-signed": lambda: self_signed(dns=["operator.demo"]),
        "expired": lambda: site.ca.expired(dns=["operator.demo"]),
        "server-only": lambda: site.ca.server_only(dns=["operator.demo"]),
    }
    if who in credentials:
        site.add(who, credentials[who]())
    async with (
        site.relay(DEMO, sections=DOOR) as relay,
        caller(site, relay, None if who == "nobody" else who) as api,
    ):
        for method, url in (("GET", "/v1/status"), ("PUT", "/v1/routes/two"), ("GET", "/")):
            with pytest.raises(httpx.TransportError):
                await api.request(method, url)
        refusal = await relay.log("admin refused")
        assert refusal["reason"]
        assert "address" in refusal
        assert list(relay.relay.routes) == ["demo"]


async def test_a_revoked_operator_is_out_after_the_reload(site: Site) -> None:
    """The revocation list of the routes is that of the API."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(DEMO, sections=DOOR, crl=True) as relay, caller(site, relay) as api:
        assert (await api.get("/v1/status")).status_code == 200
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["operator"]], number=2))
        await relay.relay.reload()
        async with caller(site, relay) as again:
            with pytest.raises(httpx.TransportError):
                await again.get("/v1/status")
        assert "revoked" in (await relay.log("admin refused"))["reason"]


async def test_its_certificate_is_rotated_with_the_relays(site: Site) -> None:
    """The next connection gets the new certificate, and nothing else needs to be changed."""
    async with site.relay(DEMO, sections=DOOR) as relay:

        async def serial() -> int:
            context = ssl.create_default_context(cafile=str(site.ca_path))
            context.load_cert_chain(*site.paths["operator"])
            port = int(relay.relay.served["admin"][0].rpartition(":")[2])
            stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", port), context, server_hostname="localhost")
            await stream.do_handshake()
            certificate = stream.getpeercert()
            await trio.aclose_forcefully(stream)
            return int(certificate["serialNumber"], 16)

        before = await serial()
        site.ca.relay().write(site.directory, "relay")
        await relay.relay.reload()
        assert await serial() != before


async def test_the_allow_list_is_reloaded(site: Site) -> None:
    """An operator that was removed from it is refused at the next connection."""
    async with site.relay(DEMO, sections=DOOR) as relay:
        async with caller(site, relay) as api:
            assert (await api.get("/v1/status")).status_code == 200
        site.write(DEMO, sections=DOOR.replace("operator", "another"))
        await relay.relay.reload()
        async with caller(site, relay) as api:
            with pytest.raises(httpx.TransportError):
                await api.get("/v1/status")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example"])
async def test_a_rebound_name_is_refused_here_too(site: Site, host: str) -> None:
    """TESTPLAN 53: a browser with a client certificate can be steered like any other."""
    async with site.relay(DEMO, sections=DOOR) as relay, caller(site, relay) as api:
        assert (await api.get("/v1/status", headers={"host": host})).status_code == 403
        # A name that the relay's own certificate has is one of its names.
        assert (await api.get("/v1/status", headers={"host": "relay.test:9000"})).status_code == 200


async def test_only_tls_13_and_no_other_protocol(site: Site) -> None:
    """TLS 1.2, plain HTTP, frelay/1 and garbage get nothing, and the next caller is served."""
    async with site.relay(DEMO, sections=DOOR) as relay:
        port = int(relay.relay.served["admin"][0].rpartition(":")[2])
        for data in (b"GET /v1/status HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\x16\x03\x01", b"\0" * 400):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(data)
            await stream.send_eof()
            answer = b""
            try:
                while piece := await stream.receive_some():
                    answer += piece
            except trio.BrokenResourceError:
                pass
            assert b"HTTP" not in answer
            await stream.aclose()
        for alpn, maximum in ((["frelay/1"], None), ([], ssl.TLSVersion.TLSv1_2)):
            context = site.context("operator", alpn=alpn)
            if maximum is not None:
                context.maximum_version = maximum
            party = await site.connect(port, "operator", context=context)
            assert b"HTTP" not in await said_to(party)
        async with caller(site, relay) as api:
            assert (await api.get("/v1/status")).status_code == 200


async def said_to(party: Party) -> bytes:
    """All that the server answers to a request of ``party``, however the connection ends."""
    try:
        await party.handshake()
        await party.send(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        return await party.receive()
    except (ssl.SSLError, trio.BrokenResourceError):
        return b""


async def test_idle_callers_do_not_shut_it(site: Site) -> None:
    """More silent connections than slots: the others wait in the kernel, and are served when a slot is free."""
    async with site.relay(DEMO, sections=DOOR) as relay:
        port = int(relay.relay.served["admin"][0].rpartition(":")[2])
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(70)]
        async with caller(site, relay) as api, trio.open_nursery() as nursery:

            async def ask() -> None:
                assert (await api.get("/v1/status")).status_code == 200

            nursery.start_soon(ask)
            for stream in idle:
                await stream.aclose()
