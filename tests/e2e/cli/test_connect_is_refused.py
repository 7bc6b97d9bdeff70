"""Each failure of ``frelay.connect`` at a real relay has a type, a code, and a sentence that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import trio

import frelay
from frelay.client.wire import Wire
from support.certs import Credential, TestAuthority
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually
from support.wires import connect, in_thread, meet


async def refused(site: Site, relay: RelayInProcess, name: str = "func1", **changes: Any) -> frelay.Refused:
    with pytest.raises(frelay.Refused) as caught:
        await connect(site, relay, name, **changes)
    return caught.value


# --- a wrong certificate: told by TLS ---------------------------------------------------------------------------------

BY_ALERT: Final[dict[str, tuple[str, Callable[[Site], Credential]]]] = {
    "another CA": ("not-authorised", lambda site: TestAuthority("other CA").party(dns=["func1.demo"])),
    "expired": ("certificate-expired", lambda site: site.ca.expired(dns=["func1.demo"])),
    "not yet valid": ("not-authorised", lambda site: site.ca.not_yet_valid(dns=["func1.demo"])),
    "for servers only": ("not-authorised", lambda site: site.ca.server_only(dns=["func1.demo"])),
    "revoked": ("revoked", lambda site: site.ca.party(dns=["func1.demo"])),
}


@pytest.mark.parametrize("what", BY_ALERT)
async def test_a_certificate_that_tls_turns_away(site: Site, what: str) -> None:
    """TESTPLAN 1, from the function's side: the alert comes after the handshake, and still becomes a code."""
    code, make = BY_ALERT[what]
    bad = site.add("bad", make(site))
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad] if what == "revoked" else []))
    async with site.relay(crl=True) as relay:
        error = await refused(site, relay, "bad")
        assert (error.code, error.retry_after) == (code, None)
        assert error.reason.startswith("the relay did not accept the certificate (")
        assert str(error) == f"{code}: {error.reason}"
        assert (await relay.log("refused"))["code"] == code


# --- a wrong certificate and the rest: told by REFUSED ----------------------------------------------------------------


async def test_a_certificate_that_fits_no_party(site: Site) -> None:
    """TESTPLAN 7: and the text names no route and no party."""
    site.add("func3", site.ca.party(dns=["func3.demo"]))
    async with site.relay() as relay:
        error = await refused(site, relay, "func3")
        assert (error.code, error.retry_after) == ("not-authorised", None)
        assert "demo" not in error.reason
        assert "func1" not in error.reason


async def test_a_party_that_the_certificate_is_not(site: Site) -> None:
    async with site.relay() as relay:
        error = await refused(site, relay, "func1", party="func2")
        assert error.code == "not-authorised"


async def test_a_route_that_is_not_there(site: Site) -> None:
    async with site.relay() as relay:
        port = relay.port()
        with pytest.raises(frelay.Refused) as caught:
            await connect(site, port, "func1", route="nowhere")
        assert caught.value.code == "unknown-route"


async def test_nobody_comes_within_the_routes_limit(site: Site) -> None:
    """TESTPLAN 32: without ``wait`` the route's limit counts, and the relay sends the refusal."""
    async with site.relay(DEMO + "wait_timeout = 0.3\n") as relay:
        error = await refused(site, relay, wait=None)
        assert (error.code, error.reason, error.retry_after) == ("wait-timeout", "nobody came within 0.3 s", 0.0)


@pytest.mark.load
async def test_nobody_comes_within_the_functions_own_time(site: Site) -> None:
    """TESTPLAN 32: the error is the same, no matter which side notices first; and the place is free again."""
    async with site.relay() as relay:
        began = trio.current_time()
        error = await refused(site, relay, wait=0.3)
        assert trio.current_time() - began > 0.25
        assert (error.code, error.retry_after) == ("wait-timeout", 0.0)
        await eventually(lambda: relay.waiting() == (0, 0), "the place is free")
        async with meet(site, relay) as (one, two):
            await in_thread(one.sendall, b"x")
            assert await in_thread(two.recv, 1) == b"x"


async def test_no_time_at_all(site: Site) -> None:
    async with site.relay() as relay:
        assert (await refused(site, relay, wait=0)).code == "wait-timeout"


async def test_the_queue_is_full(site: Site) -> None:
    async with site.relay(DEMO + "max_waiting_per_party = 1\n") as relay:
        first = await site.party(relay, "func1")
        await first.join()
        await first.expect("WAITING")
        error = await refused(site, relay)
        assert error.code == "queue-full"
        assert error.retry_after is not None


async def test_the_relay_drains(site: Site) -> None:
    """The function learns when to come again, and is not just cut."""
    async with site.relay() as relay:
        errors: list[frelay.Refused] = []

        async def wait() -> None:
            errors.append(await refused(site, relay))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await relay.log("waiting")
            relay.relay.drain(reason="the test says so")
        assert (errors[0].code, errors[0].retry_after) == ("draining", 1.0)


# --- the relay itself is not to be trusted ----------------------------------------------------------------------------


async def test_a_relay_that_another_ca_vouches_for(site: Site) -> None:
    other = TestAuthority("other CA").write(site.directory, "other-ca")
    async with site.relay() as relay:
        with pytest.raises(frelay.RelayUnreachable, match="is not to be trusted"):
            await connect(site, relay, "func1", ca=other, inner_ca=site.ca_path)
        # It did not even get our certificate.
        assert not relay.logged("waiting")


async def test_a_relay_with_another_name(site: Site) -> None:
    async with site.relay() as relay:
        with pytest.raises(frelay.RelayUnreachable, match="is not to be trusted"):
            await connect(site, relay, "func1", server_name="relay.example")


# --- the other function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("careful", ["func1", "func2"])
async def test_a_peer_of_another_name_gets_not_a_byte(site: Site, careful: str) -> None:
    """The side that finds the wrong name cuts, and the other sees neither data nor a clean end."""
    trusting = "func2" if careful == "func1" else "func1"
    outcomes: dict[str, bytes | Exception] = {}

    async def join_carefully() -> None:
        with pytest.raises(frelay.PeerIdentityMismatch, match=rf"dns:{trusting}\.demo.*dns:other\.demo") as caught:
            await connect(site, relay, careful, peer="dns:other.demo")
        assert caught.value.expected == "dns:other.demo"
        assert f"dns:{trusting}.demo" in caught.value.found

    async def join_trustingly() -> None:
        try:
            wire = await connect(site, relay, trusting)
        except frelay.PeerGone as error:
            outcomes["trusting"] = error
            return
        try:
            outcomes["trusting"] = await in_thread(wire.recv, 1)
        except OSError as error:
            outcomes["trusting"] = error
        wire.abandon()

    async with site.relay() as relay, trio.open_nursery() as nursery:
        nursery.start_soon(join_carefully)
        nursery.start_soon(join_trustingly)
    assert isinstance(outcomes["trusting"], Exception), outcomes


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("role", ["client", "server"])
async def test_a_peer_that_dies_between_the_hand_off_and_its_tls(site: Site, role: str, how: str) -> None:
    name, other = ("func1", "func2") if role == "client" else ("func2", "func1")
    async with site.relay() as relay:
        party = await site.party(relay, other)

        async def join() -> None:
            with pytest.raises(frelay.PeerGone, match=rf"dns:{other}\.demo went away before its TLS was up: .+"):
                await connect(site, relay, name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            await relay.log("waiting", party=name)
            await party.join()
            await party.expect("WAITING")
            await party.expect("PAIRED")
            await party.hand_off()
            await relay.log("handed off")
            if how == "RST":
                party.reset()
            else:
                party.close()


@pytest.mark.parametrize("how", ["FIN", "RST", "silence"])
async def test_a_peer_that_dies_within_its_hand_off(site: Site, how: str) -> None:
    """The relay cuts our leg. At any step of ours this is one of the two errors that mean "join again"."""
    async with site.relay(sections="[limits]\nhandoff_timeout = 0.5\n") as relay:
        party = await site.party(relay, "func2")

        async def join() -> None:
            with pytest.raises((frelay.PeerGone, frelay.HandOffFailed)):
                await connect(site, relay, "func1")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            await relay.log("waiting", party="func1")
            await party.join()
            await party.expect("WAITING")
            await party.expect("PAIRED")
            if how == "RST":
                party.reset()
            elif how == "FIN":
                party.close()
        record = await relay.outcome()
        assert record["outcome"] == ("handoff-timeout" if how == "silence" else "handoff-aborted")
        assert record["side"] == "func2"


async def test_a_peer_that_speaks_no_tls(site: Site) -> None:
    """TESTPLAN 20: ``require_inner_tls`` stops it at the relay; without that setting we stop it."""
    for require in ("true", "false"):
        async with site.relay(DEMO + f"require_inner_tls = {require}\n") as relay:
            party = await site.party(relay, "func2")

            async def join(relay: RelayInProcess = relay) -> None:
                with pytest.raises(frelay.PeerGone):
                    await connect(site, relay, "func1")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(join)
                await relay.log("waiting", party="func1")
                await party.join()
                await party.expect("WAITING")
                await party.expect("PAIRED")
                await party.hand_off(b"220 smtp.example ESMTP\r\n")


async def test_every_refusal_leaves_nothing_open(site: Site, recwarn: pytest.WarningsRecorder) -> None:
    """The code that opens a socket closes it; the garbage collector must not have to."""
    wires: list[Wire] = []
    async with site.relay(DEMO + "wait_timeout = 0.1\n") as relay:
        for changes in ({}, {"party": "func2"}, {"server_name": "relay.example"}):
            with pytest.raises(frelay.FrelayError):
                wires.append(await connect(site, relay, "func1", **changes))
    assert not wires
    assert not recwarn.list
