"""A listener serves all its callers: each finds a leg that waits, and no caller hurts another."""

from __future__ import annotations

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding

import frelay
from frelay.protocol.identity import spki_of_certificate
from support.certs import TestAuthority
from support.clients import CLIENTS, Client, options
from support.descriptors import open_descriptors, opened_since
from support.listeners import call, serving_many
from support.ports import reserved_port
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

CALLS = 60
AT_ONCE = 12


async def call_many(address: str, site: Site, count: int = CALLS) -> None:
    places = trio.CapacityLimiter(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            text = f"call {number}".encode()
            assert await call(address, options(site, "func1", "func2", wait=TIMEOUT * 4), text) == text

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)


@pytest.mark.load
@pytest.mark.parametrize("client", CLIENTS)
async def test_sixty_calls_and_none_is_refused(site: Site, client: Client) -> None:
    """By the default limits of a route; and afterwards nothing is open that was not open before."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        # The first call loads modules and makes thread pools.
        async with serving_many(client, address, options(site, "func2", "func1")):
            await call(address, options(site, "func1", "func2"))
        await eventually(lambda: relay.legs == 0, "the first listener has left")
        before = open_descriptors()
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            await call_many(address, site)
            await eventually(lambda: server.served == CALLS, "all are served")
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
        assert not relay.logged("refused")
        assert not server.errors
        await eventually(lambda: relay.legs == 0, "nothing is held")
        pipes = relay.relay.parts.forwarding.pipes
        await eventually(lambda: not opened_since(before, pipes=pipes), "all descriptors are closed")


@pytest.mark.parametrize("standing", [1, 2, 5])
@pytest.mark.parametrize("client", CLIENTS)
async def test_so_many_legs_stand(site: Site, client: Client, standing: int) -> None:
    """Also after the relay's wait_timeout, which the program does not see."""
    async with site.relay(DEMO + "wait_timeout = 0.5\n") as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1"), standing=standing) as server:
            await eventually(lambda: relay.waiting() == (0, standing), "all legs stand")
            await eventually(lambda: len(relay.logged("refused", code="wait-timeout")) > standing, "all were refused")
            await eventually(lambda: relay.waiting() == (0, standing), "all legs stand again")
            assert not server.errors
        await eventually(lambda: relay.waiting() == (0, 0), "they have left")


@pytest.mark.parametrize("client", CLIENTS)
async def test_it_may_be_on_either_side(site: Site, client: Client) -> None:
    """A listener that is func1 plays the TLS client, and still answers."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func1", "func2")):
            assert (
                await call(address, options(site, "func2", "func1"), b"the other way round") == b"the other way round"
            )


@pytest.mark.parametrize("client", CLIENTS)
async def test_by_a_key(site: Site, client: Client) -> None:
    """Two listeners on one route with a key each: a caller gets the one that it names."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        given = options(site, "func2", "func1", partner="dns:func1.demo")
        async with (
            serving_many(client, address, {**given, "meet": "blue"}) as blue,
            serving_many(client, address, {**given, "meet": "red"}) as red,
        ):
            for count in range(1, 4):
                assert await call(address, options(site, "func1", "func2", meet="red")) == b"question"
                await eventually(lambda count=count: red.served == count, "red has served it")  # type: ignore[misc]
            assert blue.served == 0
            assert not red.errors


@pytest.mark.parametrize("mode", ["ticket", "tunnel"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_in_the_other_modes(site: Site, client: Client, mode: str) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1", mode=mode)) as server:
            await call_many(address, site, 6)
        assert not server.errors


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_relay_with_room_for_one_leg(site: Site, client: Client) -> None:
    """The listener keeps what fits, and is told nothing."""
    async with site.relay(DEMO + "max_waiting_per_party = 1\n") as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1"), standing=3) as server:
            await relay.log("refused", code="queue-full")
            for _ in range(3):
                await call(address, options(site, "func1", "func2"))
            assert not server.errors


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_relay_that_restarts_in_the_middle(site: Site, client: Client) -> None:
    """The listener is back by itself; its user is told that the relay was gone."""
    with reserved_port() as port:
        routes, address = DEMO.replace(":0", f":{port}"), f"127.0.0.1:{port}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            async with site.process(routes) as relay:
                assert await call(address, options(site, "func1", "func2")) == b"question"
                relay.process.kill()
                await relay.process.wait()
            await eventually(
                lambda: any(isinstance(one, frelay.RelayUnreachable) for one in server.errors), "it is told"
            )
            async with site.process(routes):
                given = options(site, "func1", "func2", wait=TIMEOUT * 3)
                assert await call(address, given, b"again") == b"again"
            assert not server.has_ended


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_relay_that_restarts_in_the_middle_of_sixty_calls(site: Site, client: Client) -> None:
    """A call that was cut fails with an error for its caller, who makes it again, and the listener is there."""
    places, is_down, cut = trio.CapacityLimiter(AT_ONCE), trio.Event(), 0

    async def ask(address: str, number: int) -> None:
        nonlocal cut
        text = f"call {number}".encode()
        async with places:
            while True:
                try:
                    assert await call(address, options(site, "func1", "func2", wait=TIMEOUT * 4), text) == text
                    return
                except (frelay.FrelayError, trio.BrokenResourceError):
                    cut += 1
                    await is_down.wait()
                    await trio.sleep(0.05)

    with reserved_port() as port:
        routes, address = DEMO.replace(":0", f":{port}"), f"127.0.0.1:{port}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            async with trio.open_nursery() as nursery:
                async with site.process(routes) as relay:
                    for number in range(CALLS):
                        nursery.start_soon(ask, address, number)
                    await eventually(lambda: server.served >= CALLS // 3, "a third of the calls is served")
                    relay.process.kill()
                    await relay.process.wait()
                    await eventually(lambda: cut >= AT_ONCE, "all callers under way are cut")
                is_down.set()
                async with site.process(routes):
                    await eventually(lambda: not nursery.child_tasks, "all calls are answered", timeout=TIMEOUT * 4)
            assert not server.has_ended
            assert any(isinstance(error, frelay.RelayUnreachable) for error in server.errors)


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_relay_that_drains(site: Site, client: Client) -> None:
    with reserved_port() as port:
        routes, address = DEMO.replace(":0", f":{port}"), f"127.0.0.1:{port}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            async with site.relay(routes) as relay:
                await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
                relay.relay.drain(reason="the test wants it")
            async with site.relay(routes) as relay:
                await eventually(lambda: relay.waiting() == (0, 2), "two legs stand again")
            assert not server.has_ended


# --- callers that are at fault ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_caller_with_another_name_ends_nothing(site: Site, client: Client) -> None:
    """``on_error`` hears of it, and the next caller is served."""
    site.add("other", site.ca.party(dns=["other.demo"]))
    cert, key = site.paths["other"]
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            wrong = options(site, "func1", "func2", inner_cert=cert, inner_key=key)
            with pytest.raises((trio.BrokenResourceError, frelay.PeerGone)):
                await call(address, wrong)
            await eventually(lambda: len(server.errors) == 1, "it is told")
            assert isinstance(server.errors[0], frelay.PeerIdentityMismatch)
            assert "dns:other.demo" in server.errors[0].found
            assert await call(address, options(site, "func1", "func2")) == b"question"
            await eventually(lambda: server.served == 1, "it is served, and nobody else was")


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_caller_that_refuses_the_listener_ends_nothing(site: Site, client: Client) -> None:
    """It trusts another authority."""
    other = TestAuthority("other CA").write(site.directory, "other")
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            with pytest.raises(frelay.PeerIdentityMismatch, match="not to be trusted"):
                await call(address, options(site, "func1", "func2", inner_ca=other))
            await eventually(lambda: len(server.errors) == 1, "it is told")
            assert isinstance(server.errors[0], frelay.CertificateRefused)
            assert await call(address, options(site, "func1", "func2")) == b"question"


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_caller_that_goes_before_its_tls_ends_nothing(site: Site, client: Client) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            party = await site.party(relay, "func1")
            await party.join()
            await party.expect("WAITING")
            await party.expect("PAIRED")
            await party.hand_off()
            party.close()
            await eventually(lambda: len(server.errors) == 1, "it is told")
            assert isinstance(server.errors[0], frelay.PeerGone)
            assert await call(address, options(site, "func1", "func2")) == b"question"


@pytest.mark.parametrize("client", CLIENTS)
async def test_callers_that_stop_in_their_handshake_delay_nobody(site: Site, client: Client) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            for _ in range(6):
                slow = await site.party(relay, "func1")
                await slow.join()
                await slow.expect("WAITING")
                await slow.expect("PAIRED")
                await slow.hand_off()
            assert await call(address, options(site, "func1", "func2")) == b"question"
            assert not server.errors


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_revoked_certificate_ends_it(site: Site, client: Client) -> None:
    """After some tries, for each of which the files are read again."""
    site.ca.write_crl(site.directory, site.ca.crl(number=1))
    async with site.relay(crl=True) as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
            site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func2"]], number=2))
            await relay.relay.reload()
            await eventually(lambda: server.has_ended, "it has ended", TIMEOUT * 2)
            assert isinstance(server.ended, frelay.Refused)
            assert server.ended.code == "revoked"
            assert {one.code for one in server.errors if isinstance(one, frelay.Refused)} == {"revoked"}
            assert len(server.errors) == 3


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_revoked_certificate_that_is_renewed(site: Site, client: Client) -> None:
    """The listener reads the new one, and goes on."""
    site.ca.write_crl(site.directory, site.ca.crl(number=1))
    async with site.relay(crl=True) as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
            site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func2"]], number=2))
            reloaded = trio.Event()

            async def renew() -> None:
                await eventually(lambda: bool(server.errors), "it is told")
                site.ca.party(dns=["func2.demo"]).write(site.directory, "func2")
                reloaded.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(renew)
                await relay.relay.reload()
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand again")
            assert await call(address, options(site, "func1", "func2")) == b"question"
            assert not server.has_ended


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_certificate_that_is_renewed_before_its_end_is_seen_by_callers(site: Site, client: Client) -> None:
    """No fault is seen: the next leg shows the new certificate."""
    async with site.relay(DEMO + "wait_timeout = 0.5\n") as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
            renewed = site.add("func2", site.ca.party(dns=["func2.demo"]))
            refused = len(relay.logged("refused", code="wait-timeout"))
            await eventually(
                lambda: len(relay.logged("refused", code="wait-timeout")) >= refused + 3, "all legs are new"
            )
            given = options(
                site, "func1", "func2", peer=str(spki_of_certificate(renewed.certificate.public_bytes(Encoding.DER)))
            )
            assert await call(address, given) == b"question"
            assert not server.errors


@pytest.mark.parametrize("client", CLIENTS)
async def test_files_that_are_away_for_a_moment(site: Site, client: Client) -> None:
    async with site.relay(DEMO + "wait_timeout = 0.5\n") as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")) as server:
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
            for path in site.paths["func2"]:
                path.unlink()
            await eventually(lambda: any(isinstance(one, frelay.CertificateError) for one in server.errors), "told")
            site.credentials["func2"].write(site.directory, "func2")
            await eventually(lambda: relay.waiting() == (0, 2), "two legs stand again")
            assert not server.has_ended
