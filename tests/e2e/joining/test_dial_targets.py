"""A party may be a service. The relay dials it only when a caller has been let in."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from support.certs import TestAuthority
from support.descriptors import open_descriptors, opened_since
from support.party import TLS_HEADER, Party, pair
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.rounds import settled
from support.services import CALLERS, Caller, EndStream, black_hole, call, dialling, echo, nobody, serving, tls_echo
from support.site import DEMO, Site
from support.tools import skip_or_fail
from support.waiting import eventually

OPEN = "require_inner_tls = false"
SOON = ", connect_timeout = 0.4"


async def joined(site: Site, relay: RelayInProcess, **fields: Any) -> Party:
    party = await site.party(relay, "func1")
    await party.join(**fields)
    await party.expect("WAITING")
    return party


async def nothing_is_left(relay: RelayInProcess) -> None:
    await eventually(lambda: relay.legs == 0 and relay.waiting() == (0, 0), "no leg and no place is left")


def inner_contexts(site: Site) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a service and its client, under a CA that the relay does not know."""
    ca = TestAuthority("the service's own CA")
    root = ca.write(site.directory, "inner-ca")
    certificate, key = ca.relay(dns=["service.internal"]).write(site.directory, "service")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(root))
    return server, client


@contextmanager
def resolving(*addresses: str, first_waits_for: trio.Event | None = None) -> Iterator[None]:
    """Within the context every name has these addresses; without any address it does not resolve."""
    delays = [first_waits_for] if first_waits_for is not None else []

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
            if delays:
                await delays.pop().wait()
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise AssertionError("nobody asks for this")

    before = trio.socket.set_custom_hostname_resolver(Resolver())
    try:
        yield
    finally:
        trio.socket.set_custom_hostname_resolver(before)


# --- reached --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS)
async def test_the_callers_tls_ends_at_the_service(site: Site, caller: Caller) -> None:
    """End to end: the relay does not know the inner certificates, and the bytes arrive."""
    server, client = inner_contexts(site)
    more = 'handoff = "hello"\nhello_settle = 0.05\n' if caller == "hello" else ""
    async with serving(tls_echo(server)) as service, site.relay(dialling(service, more=more)) as relay:
        end = await call(site, relay, caller)
        with trio.fail_after(20):
            inner = EndStream.inner_tls(end, client, "service.internal")
            for size in (1, 100_000):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(inner.send_all, bytes(size))
                    got = 0
                    while got < size:
                        got += len(await inner.receive_some(65536))
            await inner.aclose()
        record = await relay.outcome()
        assert (record["func1"], record["func2"]) == ("dns:func1.demo", f"dial:{service.address}")
        assert record["bytes_func1_to_func2"] > 100_000 < record["bytes_func2_to_func1"]
        assert service.connections == 1
        await nothing_is_left(relay)


async def test_paired_names_the_service(site: Site) -> None:
    """`peer` is the address, because nobody has verified a name; the role comes from the route as always."""
    async with serving(echo) as service, site.relay(dialling(service)) as relay:
        party = await joined(site, relay)
        paired = await party.expect("PAIRED")
        assert (paired["peer"], paired["role"], paired["mode"]) == (f"dial:{service.address}", "client", "handoff")


async def test_func1_may_be_the_service(site: Site) -> None:
    """Then the caller is func2, and the TLS server."""

    async def speak_first(stream: trio.SocketStream) -> None:
        await stream.send_all(TLS_HEADER + b"hello")
        await echo(stream)

    async with serving(speak_first) as service, site.relay(dialling(service, party="func1")) as relay:
        party = await site.party(relay, "func2")
        await party.join()
        await party.expect("WAITING")
        paired = await party.expect("PAIRED")
        assert (paired["peer"], paired["role"]) == (f"dial:{service.address}", "server")
        await party.hand_off()
        assert await party.receive_exactly(8) == TLS_HEADER + b"hello"


async def test_ipv6(site: Site) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        skip_or_fail(f"there is no IPv6 here: {error}")
    async with serving(echo, "::1") as service, site.relay(dialling(service, more=OPEN)) as relay:
        end = await call(site, relay)
        await end.send(b"six")
        assert await end.receive_exactly(3) == b"six"
        assert service.address.startswith("[::1]:")
        assert (await relay.log("dialled"))["address"] == service.address


async def test_a_name_with_several_addresses(site: Site) -> None:
    """If the first address refuses, the relay tries the next; the identity stays the name."""
    async with serving(echo, "127.0.0.2") as service:
        port = service.address.rpartition(":")[2]
        with resolving("127.0.0.3", "127.0.0.2"):
            async with site.relay(dialling(f"service.invalid:{port}", more=OPEN)) as relay:
                party = await joined(site, relay)
                assert (await party.expect("PAIRED"))["peer"] == f"dial:service.invalid:{port}"
                assert (await relay.log("dialled"))["address"] == service.address


async def test_callers_at_once_have_a_call_each(site: Site) -> None:
    """Each is paired with the connection that was opened for it, in whatever order they came."""
    async with serving(echo) as service, site.relay(dialling(service, more=OPEN)) as relay:

        async def one(number: int) -> None:
            end = await call(site, relay, CALLERS[number % 3])
            await end.send(b"%03d" % number)
            assert await end.receive_exactly(3) == b"%03d" % number

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(one, number)
        assert service.connections == 12
        assert len(relay.relay.pairings) == 12
        site.hang_up()
        await nothing_is_left(relay)


async def test_the_quicker_call_is_its_own_callers(site: Site) -> None:
    """The connection is for the caller that it was opened for, not for the one that has waited longest."""
    may_go_on = trio.Event()
    async with serving(echo) as service:
        port = service.address.rpartition(":")[2]
        with resolving("127.0.0.1", first_waits_for=may_go_on):
            async with site.relay(dialling(f"service.invalid:{port}", more=OPEN)) as relay:
                slow = await joined(site, relay)
                quick = await joined(site, relay)
                await quick.expect("PAIRED")
                assert relay.waiting() == (1, 0)
                may_go_on.set()
                await slow.expect("PAIRED")
                assert service.connections == 2


async def test_routes_that_share_an_address(site: Site) -> None:
    """One route has a service, the other a function; JOIN.route chooses."""
    with reserved_port() as port:
        async with serving(echo) as service:
            called = dialling(service, more=OPEN).replace(":0", f":{port}").replace('"demo"', '"called"')
            plain = f"""
[[route]]
name = "demo"
listen = "127.0.0.1:{port}"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
"""
            async with site.relay(called + plain) as relay:
                party = await joined(site, relay, route="called")
                assert (await party.expect("PAIRED"))["peer"] == f"dial:{service.address}"
                one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
                paired, _ = await pair(one, two, route="demo")
                assert paired["peer"] == "dns:func2.demo"
                assert service.connections == 1


async def test_the_connection_is_tuned(site: Site) -> None:
    sections = "[tcp]\nkeepalive = [11, 7, 2]\nuser_timeout = 130\n"
    async with serving(echo) as service, site.relay(dialling(service), sections=sections) as relay:
        await call(site, relay)
        (pairing,) = relay.relay.pairings
        sock = pairing.legs["func2"].sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 11
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 130_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getblocking()


# --- bytes and ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS[:4])
async def test_the_caller_ends_first(site: Site, caller: Caller) -> None:
    """TESTPLAN 25: the service sees the end; then its whole answer arrives at the caller, and its end."""

    async def answer(stream: trio.SocketStream) -> None:
        question = b""
        while data := await stream.receive_some(65536):
            question += data
        await stream.send_all(question[::-1])

    async with serving(answer) as service, site.relay(dialling(service, more=OPEN)) as relay:
        end = await call(site, relay, caller)
        await end.send(b"question")
        await end.send_eof()
        assert await end.receive_to_end() == b"noitseuq"
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("closed", "both")
        await nothing_is_left(relay)


@pytest.mark.parametrize("caller", CALLERS[:4])
async def test_the_service_ends_first(site: Site, caller: Caller) -> None:
    """TESTPLAN 25, the other way round."""
    heard: list[bytes] = []

    async def tell(stream: trio.SocketStream) -> None:
        await stream.send_all(b"news")
        await stream.send_eof()
        while data := await stream.receive_some(65536):
            heard.append(data)

    async with serving(tell) as service, site.relay(dialling(service, more=OPEN)) as relay:
        end = await call(site, relay, caller)
        assert await end.receive_to_end() == b"news"
        await end.send(b"thanks")
        await end.send_eof()
        assert (await relay.outcome())["outcome"] == "closed"
        await eventually(lambda: b"".join(heard) == b"thanks", "the reply arrives")
        await nothing_is_left(relay)


async def test_a_service_that_speaks_no_tls(site: Site) -> None:
    """TESTPLAN 20: require_inner_tls holds for the service, too: no byte of it is forwarded."""

    async def banner(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 welcome\r\n")
        await echo(stream)

    async with serving(banner) as service, site.relay(dialling(service)) as relay:
        end = await call(site, relay)
        assert await end.ended() == "reset"
        record = await relay.outcome()
        assert (record["outcome"], record["side"], record["bytes_func2_to_func1"]) == ("not-tls", "func2", 0)
        await nothing_is_left(relay)


@pytest.mark.parametrize("caller", CALLERS[:4])
async def test_the_service_resets(site: Site, caller: Caller) -> None:
    """TESTPLAN 48: the caller is cut, and cannot take the cut for an end."""

    async def reset(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.socket.close()

    async with serving(reset) as service, site.relay(dialling(service, more=OPEN)) as relay:
        end = await call(site, relay, caller)
        await end.send(b"x")
        assert await end.ended() in ("reset", "truncated")
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("reset", "func2")
        await nothing_is_left(relay)


# --- not reached ----------------------------------------------------------------------------------------------------


async def refused_for_the_service(relay: RelayInProcess, party: Party) -> str:
    """The caller is refused and told no more; gives the detail of the record."""
    assert await party.refusal() == {
        "code": "wait-timeout",
        "reason": "the service of this route cannot be reached",
        "retry_after": 1.0,
    }
    record = await relay.outcome()
    assert (record["outcome"], record["side"]) == ("dial-failed", "func2")
    assert (record["func1"], record["bytes_func1_to_func2"]) == ("dns:func1.demo", 0)
    assert record["func2"].startswith("dial:")
    assert not relay.relay.pairings
    party.close()
    await nothing_is_left(relay)
    detail: str = record["detail"]
    return detail


async def test_a_refused_connection(site: Site) -> None:
    with nobody() as address:
        async with site.relay(dialling(address)) as relay:
            party = await joined(site, relay)
            assert await refused_for_the_service(relay, party) == "connection refused"
            assert len(relay.logged("pairing ended")) == 1


@pytest.mark.load
async def test_a_service_that_never_answers(site: Site) -> None:
    """connect_timeout bounds the wait, and WAITING has said so."""
    with black_hole() as address:
        async with site.relay(dialling(address, options=SOON)) as relay:
            party = await site.party(relay, "func1")
            began = trio.current_time()
            await party.join()
            assert (await party.expect("WAITING"))["deadline"] == 0.4
            assert await refused_for_the_service(relay, party) == "no answer within 0.4 s"
            assert trio.current_time() - began >= 0.4


async def test_a_name_that_does_not_resolve(site: Site) -> None:
    with resolving():
        async with site.relay(dialling("service.invalid:443")) as relay:
            party = await joined(site, relay)
            assert "the name does not resolve" in await refused_for_the_service(relay, party)


async def test_a_name_whose_addresses_all_refuse(site: Site) -> None:
    with nobody() as address, resolving("127.0.0.1", "127.0.0.1"):
        port = address.rpartition(":")[2]
        async with site.relay(dialling(f"service.invalid:{port}")) as relay:
            party = await joined(site, relay)
            assert await refused_for_the_service(relay, party) == "connection refused"


@pytest.mark.parametrize("caller", ["bare", "hello"])
async def test_who_has_no_frames_gets_the_close(site: Site, caller: Caller) -> None:
    more = 'handoff = "hello"\n' if caller == "hello" else ""
    with nobody() as address:
        async with site.relay(dialling(address, more=more)) as relay:
            party = await site.party(relay, "func1", alpn=())
            if caller == "hello":
                await party.send(b"Hello\n")
            assert await party.receive() == b""
            assert (await relay.outcome())["outcome"] == "dial-failed"
            party.close()
            await nothing_is_left(relay)


# --- while it dials -------------------------------------------------------------------------------------------------


@pytest.mark.load
@pytest.mark.parametrize("how", ["LEAVE", "close_notify", "FIN", "RST"])
async def test_the_caller_leaves_meanwhile(site: Site, how: str) -> None:
    """The dialling ends with it: no descriptor is left, and there is no record, because nothing failed."""
    with black_hole() as address:
        async with site.relay(dialling(address, options=", connect_timeout = 60")) as relay:
            before = open_descriptors()
            party = await joined(site, relay)
            # The party's end, the relay's, and the socket that is connecting.
            await eventually(lambda: len(opened_since(before)) == 3, "the relay dials")
            assert relay.legs == 2
            assert relay.waiting() == (1, 0)
            if how == "LEAVE":
                await party.send_frame("LEAVE")
            elif how == "close_notify":
                await party.stream.send_all(party.close_notify())
            elif how == "FIN":
                party.take_in()
                await party.send_eof()
            else:
                party.reset()
            await nothing_is_left(relay)
            party.close()
            await eventually(lambda: not opened_since(before), "their descriptors are closed")
            assert not relay.logged("pairing ended")


async def test_the_caller_is_pinged_meanwhile(site: Site) -> None:
    with black_hole() as address:
        limits = "[limits]\nping_interval = 0.05\npong_timeout = 0.2\n"
        async with site.relay(dialling(address, options=", connect_timeout = 60"), sections=limits) as relay:
            party = await joined(site, relay)
            await party.expect("PING")
            assert (await party.expect("REFUSED", pong=False))["code"] == "pong-timeout"


async def test_the_callers_retry_replaces_it(site: Site) -> None:
    """The relay stops dialling for the stale leg, and dials for the new one."""
    with black_hole() as address:
        async with site.relay(dialling(address, options=SOON)) as relay:
            stale = await joined(site, relay)
            fresh = await site.party(relay, "func1")
            fresh.attempt = stale.attempt
            await fresh.join()
            await fresh.expect("WAITING")
            assert (await stale.refusal())["code"] == "replaced"
            assert await refused_for_the_service(relay, fresh) == "no answer within 0.4 s"
            assert len(relay.logged("pairing ended")) == 1


async def test_the_route_goes_meanwhile(site: Site) -> None:
    with black_hole() as address, nobody() as other:
        async with site.relay(dialling(address, options=", connect_timeout = 60")) as relay:
            party = await joined(site, relay)
            site.write(dialling(other))
            await relay.relay.reload()
            assert (await party.refusal())["code"] == "route-removed"
            await nothing_is_left(relay)
            assert not relay.logged("pairing ended")


async def test_the_relay_drains_meanwhile(site: Site) -> None:
    with black_hole() as address:
        async with site.relay(dialling(address, options=", connect_timeout = 60")) as relay:
            party = await joined(site, relay)
            relay.relay.drain(reason="a test")
            await party.expect("DRAINING")
            assert (await party.refusal())["code"] == "draining"


# --- who and how many -----------------------------------------------------------------------------------------------


async def test_not_for_a_stranger(site: Site) -> None:
    """A certificate of another CA, one that fits no party, a wrong route, a JOIN as the service: no dialling."""
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    site.add("foreigner", TestAuthority("other CA").party(dns=["func1.demo"]))
    async with serving(echo) as service, site.relay(dialling(service)) as relay:
        foreigner = await site.connect(relay, "foreigner")
        assert await foreigner.alert() == "TLSV1_ALERT_UNKNOWN_CA"
        for name, fields in (("stranger", {}), ("func1", {"route": "other"}), ("func1", {"party": "func2"})):
            party = await site.party(relay, name)
            await party.join(**fields)
            assert (await party.refusal())["code"] in ("not-authorised", "unknown-route")
        silent = await site.party(relay, "func1")
        await settled(0.05)
        assert service.connections == 0
        # Only the JOIN makes the relay dial.
        await silent.join()
        await silent.expect("WAITING")
        await silent.expect("PAIRED")
        assert service.connections == 1


async def test_max_pairings(site: Site) -> None:
    """Above the limit the relay does not dial at all."""
    async with serving(echo) as service, site.relay(dialling(service, more=f"{OPEN}\nmax_pairings = 1\n")) as relay:
        first = await call(site, relay)
        second = await joined(site, relay)
        assert (await second.refusal())["code"] == "limit"
        assert service.connections == 1
        await first.send(b"on")
        assert await first.receive_exactly(2) == b"on"
        first.party.close()
        await relay.outcome()
        await call(site, relay)


async def test_two_callers_for_the_last_place(site: Site) -> None:
    """The relay dials for both; one is paired, the other is told the limit and its connection is closed."""
    async with serving(echo) as service, site.relay(dialling(service, more=f"{OPEN}\nmax_pairings = 1\n")) as relay:
        parties = [await site.party(relay, "func1") for _ in range(2)]
        for party in parties:
            await party.join()
            await party.expect("WAITING")
        answers = []
        for party in parties:
            found = await party.next_frame()
            assert found is not None
            answers.append(found[0] if found[0] == "PAIRED" else found[1]["code"])
        assert sorted(answers) == ["PAIRED", "limit"]
        site.hang_up()
        await nothing_is_left(relay)


async def test_a_dialled_connection_counts_in_the_descriptor_budget(site: Site) -> None:
    """If no descriptor is left for it, the caller is told so, and the relay does not dial."""
    limits = "[limits]\nfd_budget = 0.000001\n"  # the smallest budget: two legs
    other = DEMO.replace('"demo"', '"other"')
    async with serving(echo) as service, site.relay(dialling(service, more=OPEN) + other, sections=limits) as relay:
        waiter = await site.party(relay, "func1", route="other")
        await waiter.join()
        await waiter.expect("WAITING")
        party = await joined(site, relay)
        assert (await party.refusal())["code"] == "limit"
        assert service.connections == 0
        waiter.close()
        party.close()
        await nothing_is_left(relay)
        end = await call(site, relay)
        assert relay.legs == 2
        await end.send(b"now")
        assert await end.receive_exactly(3) == b"now"
