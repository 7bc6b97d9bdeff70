"""``--to --retry always`` recovers from every fault that an operator corrects, and says meanwhile what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import trio

from support.certs import TestAuthority
from support.commands import arguments, command
from support.connects import dial, port_here, still_echoes
from support.ports import reserved_port
from support.services import echo, serving
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

OTHER: Final = TestAuthority("other CA")


def missing(site: Site) -> None:
    for path in site.paths["func2"]:
        path.unlink()


def expired(site: Site) -> None:
    site.ca.expired(dns=["func2.demo"]).write(site.directory, "func2")


def of_a_stranger(site: Site) -> None:
    site.ca.party(dns=["stranger.demo"]).write(site.directory, "func2")


def of_another_authority(site: Site) -> None:
    OTHER.party(dns=["func2.demo"]).write(site.directory, "func2")


def half_replaced(site: Site) -> None:
    site.paths["func2"][0].write_bytes(site.ca.party(dns=["func2.demo"]).chain_pem)


def half_written(site: Site) -> None:
    site.paths["func2"][0].write_bytes(site.credentials["func2"].chain_pem[:100])


def without_authority(site: Site) -> None:
    site.ca_path.rename(site.directory / "ca.away")


FUNCTIONS_OWN: Final[dict[str, tuple[Callable[[Site], None], str]]] = {
    "missing": (missing, "there is no file"),
    "expired": (expired, "certificate-expired"),
    "of a stranger": (of_a_stranger, "not-authorised"),
    "of another authority": (of_another_authority, "not-authorised"),
    "half replaced": (half_replaced, "are no PEM certificate and its key"),
    "half written": (half_written, "are no PEM certificate and its key"),
    "without the authority's": (without_authority, "there is no file"),
}


@pytest.mark.parametrize("what", FUNCTIONS_OWN)
async def test_its_own_files(site: Site, what: str) -> None:
    """It reads them again before each join, also before the first."""
    spoil, reason = FUNCTIONS_OWN[what]
    authority = site.ca_path.read_bytes()
    async with serving(echo) as service, site.relay() as relay:
        spoil(site)
        line = arguments(site, f"127.0.0.1:{relay.port()}", "func2", "func1", "--to", service.address)
        async with command([*line, "--retry", "always"]) as there:
            await there.say("retrying", 2)
            assert reason in there.said("failed")[-1]["reason"]
            site.ca_path.write_bytes(authority)
            site.credentials["func2"].write(site.directory, "func2")
            await there.say("waiting")
            async with port_here(site, relay) as (_, place), await dial(place) as caller:
                await still_echoes(caller)


async def test_its_own_files_while_it_waits_are_read_at_the_next_join(site: Site) -> None:
    """If a certificate is renewed before it expires, no fault is seen."""
    routes = DEMO + "wait_timeout = 0.3\n"
    async with serving(echo) as service, site.relay(routes) as relay:
        line = arguments(site, f"127.0.0.1:{relay.port()}", "func2", "func1", "--to", service.address)
        async with command([*line, "--retry", "always"]) as there:
            await there.say("waiting")
            missing(site)
            await there.say("failed")
            site.credentials["func2"].write(site.directory, "func2")
            await there.say("waiting", len(there.said("waiting")) + 1)
            assert there.process.returncode is None


def relay_of_another_authority(site: Site) -> None:
    OTHER.relay().write(site.directory, "relay")


def relay_with_another_name(site: Site) -> None:
    site.ca.relay(dns=["elsewhere.demo"], ips=[]).write(site.directory, "relay")


def revoking(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func2"]], number=2))


def renewed(site: Site) -> None:
    site.ca.relay().write(site.directory, "relay")
    site.ca.write_crl(site.directory, site.ca.crl(number=3))


RELAYS_OWN: Final[dict[str, tuple[Callable[[Site], None], str]]] = {
    "another authority": (relay_of_another_authority, "is not to be trusted"),
    "another name": (relay_with_another_name, "is not to be trusted"),
    "a list that revokes it": (revoking, "revoked"),
}


@pytest.mark.parametrize("what", RELAYS_OWN)
async def test_the_relays_files(site: Site, what: str) -> None:
    spoil, reason = RELAYS_OWN[what]
    renewed(site)
    async with serving(echo) as service, site.relay(DEMO + "wait_timeout = 0.5\n", crl=True) as relay:
        line = arguments(site, f"127.0.0.1:{relay.port()}", "func2", "func1", "--to", service.address)
        async with command([*line, "--retry", "always"]) as there:
            await there.say("waiting")
            spoil(site)
            await relay.relay.reload()
            await there.say("retrying", 2)
            assert reason in there.said("failed")[-1]["reason"]
            renewed(site)
            await relay.relay.reload()
            await there.say("waiting", len(there.said("waiting")) + 1)
            async with port_here(site, relay, "--wait", "60") as (_, place), await dial(place) as caller:
                await still_echoes(caller)


async def test_a_route_that_is_taken_away_and_comes_back(site: Site) -> None:
    other = DEMO.replace('"demo"', '"other"').replace("dns:func2", "dns:other")
    async with serving(echo) as service, site.relay(other + DEMO) as relay:
        address = f"127.0.0.1:{relay.port('demo')}"
        with_port = DEMO.replace("127.0.0.1:0", address)
        site.write(other + with_port)
        async with command(
            [*arguments(site, address, "func2", "func1", "--to", service.address), "--retry", "always"]
        ) as there:
            await there.say("waiting")
            site.write(other)
            await relay.relay.reload()
            await there.say("retrying")
            site.write(other + with_port)
            await relay.relay.reload()
            await there.say("waiting", len(there.said("waiting")) + 1)


async def test_what_is_no_relay(site: Site) -> None:
    """Another server uses its port for a while."""

    async def rude(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with reserved_port() as port:
        line = arguments(site, f"127.0.0.1:{port}", "func2", "func1", "--to", "127.0.0.1:9", "--retry", "always")
        async with command(line) as there:
            async with trio.open_nursery() as nursery:
                listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, rude, listeners)
                await eventually(lambda: any("TLS" in one["reason"] for one in there.said("failed")), "it is told")
                nursery.cancel_scope.cancel()
            async with site.process(DEMO.replace(":0", f":{port}")):
                await there.say("waiting")


async def test_without_always_a_refusal_is_the_end(site: Site) -> None:
    """After the running pairings have ended; and the exit code shows the reason."""
    routes = DEMO + "wait_timeout = 0.5\n"
    async with serving(echo) as service, site.relay(routes) as relay, port_here(site, relay) as (_, place):
        line = arguments(site, f"127.0.0.1:{relay.port()}", "func2", "func1", "--to", service.address)
        async with command(line) as there:
            await there.say("waiting")
            async with await dial(place) as caller:
                await still_echoes(caller)
                of_a_stranger(site)
                await there.say("failed")
                await still_echoes(caller)
                assert there.process.returncode is None
            assert await there.exit_code() == 3
            assert not there.said("retrying")


async def test_the_line_for_a_person_says_what_comes(site: Site) -> None:
    with reserved_port() as port:
        line = arguments(site, f"127.0.0.1:{port}", "func2", "func1", "--to", "127.0.0.1:9", "--retry", "1")
        with trio.fail_after(TIMEOUT):
            done = await trio.run_process(line, capture_stderr=True, check=False)
        assert done.returncode == 1
        first, last = done.stderr.decode().splitlines()
        assert first.startswith("frelay: no connection to ")
        assert "; trying again in " in first
        assert "trying" not in last
