"""Two functions that call ``frelay.connect`` are paired: end-to-end mTLS, and each has checked the other's name."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import frelay
from frelay.client.wire import Wire
from frelay.protocol.messages import Message, Paired, Ping, Waiting
from support.ends import block
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually
from support.wires import connect, in_thread, meet, options, read_to_end

SIZE = 4 * 1024 * 1024 + 1


async def exchange(one: Wire, two: Wire) -> None:
    """Bulk in one direction, then in the other: an SSLSocket is for one direction at a time."""
    for sender, receiver, seed in ((one, two, 1), (two, one, 2)):
        data = block(SIZE, seed)
        digest = hashlib.sha256()

        def receive(receiver: Wire = receiver, digest: hashlib._Hash = digest) -> None:
            left = SIZE
            while left:
                chunk = receiver.recv(min(left, 65536))
                assert chunk, f"the end came with {left} bytes missing"
                digest.update(chunk)
                left -= len(chunk)

        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, sender.sendall, data)
                nursery.start_soon(in_thread, receive)
        assert digest.digest() == hashlib.sha256(data).digest()


async def end_in_order(relay: RelayInProcess, one: Wire, two: Wire) -> None:
    await in_thread(one.send_eof)
    assert await in_thread(read_to_end, two) == b""
    await in_thread(two.close)
    assert await in_thread(read_to_end, one) == b""
    await in_thread(one.close)
    record = await relay.outcome()
    assert (record["outcome"], record["side"]) == ("closed", "both")


@pytest.mark.parametrize("first", ["func1", "func2"])
async def test_two_functions_meet_in_either_order(site: Site, first: str) -> None:
    """The order in which they come does not decide the TLS roles."""
    second = "func2" if first == "func1" else "func1"
    wires: dict[str, Wire] = {}

    async def join(name: str) -> None:
        wires[name] = await connect(site, relay, name)

    async with site.relay() as relay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, first)
            await relay.log("waiting", party=first)
            nursery.start_soon(join, second)
        one, two = wires["func1"], wires["func2"]
        assert (one.server_side, two.server_side) == (False, True)
        assert isinstance(one, ssl.SSLSocket)
        assert one.version() == two.version() == "TLSv1.3"
        await exchange(one, two)
        await end_in_order(relay, one, two)


async def test_the_wire_blocks_without_a_limit_of_its_own(site: Site) -> None:
    """``wait`` is for joining; afterwards the socket has no timeout."""
    async with site.relay() as relay, meet(site, relay) as (one, _):
        assert one.gettimeout() == TIMEOUT, "set by meet"
        wires: list[Wire] = []

        async def join(name: str) -> None:
            wires.append(
                await in_thread(frelay.connect, f"127.0.0.1:{relay.port()}", **options(site, name, wait=TIMEOUT))
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, "func1")
            nursery.start_soon(join, "func2")
        for wire in wires:
            assert wire.gettimeout() is None
            wire.abandon()


async def test_the_caller_is_told_each_step(site: Site) -> None:
    told: dict[str, list[Message]] = {"func1": [], "func2": []}
    async with site.relay(sections="[limits]\nping_interval = 0.1\n") as relay, trio.open_nursery() as nursery:
        for name in told:

            async def join(name: str = name) -> None:
                wire = await connect(site, relay, name, on_status=told[name].append)
                wire.abandon()

            nursery.start_soon(join)
            if name == "func1":
                await relay.log("waiting", party="func1")
                await eventually(lambda: len(told["func1"]) >= 3, "WAITING and two PINGs")
    waiting, *pings, paired = told["func1"]
    assert isinstance(waiting, Waiting)
    assert (waiting.route, waiting.party, waiting.identity) == ("demo", "func1", "dns:func1.demo")
    assert 0 < waiting.deadline <= TIMEOUT
    assert len(pings) >= 2
    assert all(isinstance(ping, Ping) for ping in pings)
    assert isinstance(paired, Paired)
    assert (paired.role, paired.peer, paired.mode) == ("client", "dns:func2.demo", "handoff")
    waiting, paired2 = told["func2"]
    assert isinstance(waiting, Waiting)
    assert waiting.peer_seen == 0
    assert isinstance(paired2, Paired)
    assert (paired2.role, paired2.peer, paired2.pairing) == ("server", "dns:func1.demo", paired.pairing)


def _pin(site: Site, name: str) -> str:
    """The public-key pin of ``name``, made as a person would: by cryptography, not by frelay."""
    key = site.credentials[name].certificate.public_key()
    return (
        "spki:sha256:" + hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    )


@pytest.mark.parametrize("how", ["list", "tuple", "wildcard", "pin", "pin in capitals"])
async def test_the_peer_may_be_named_in_several_ways(site: Site, how: str) -> None:
    def peer(name: str) -> str | Sequence[str]:
        pin = _pin(site, name)
        ways: dict[str, str | Sequence[str]] = {
            "list": ["dns:somebody.else", f"dns:{name}.demo"],
            "tuple": ("uri:spiffe://acme/jobs/*", pin),
            "wildcard": "dns:*.demo",
            "pin": pin,
            "pin in capitals": "spki:sha256:" + pin.rpartition(":")[2].upper(),
        }
        return ways[how]

    wires: dict[str, Wire] = {}

    async def join(name: str, other: str) -> None:
        wires[name] = await connect(site, relay, name, peer=peer(other))

    async with site.relay() as relay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, "func1", "func2")
            nursery.start_soon(join, "func2", "func1")
        await in_thread(wires["func1"].sendall, b"x")
        assert await in_thread(wires["func2"].recv, 1) == b"x"
        for wire in wires.values():
            wire.abandon()


async def test_the_peer_may_be_a_spiffe_id(site: Site) -> None:
    for name in ("func1", "func2"):
        site.add(name, site.ca.party(uris=[f"spiffe://acme/jobs/{name}"]))
    routes = DEMO.replace("dns:func1.demo", "uri:spiffe://acme/jobs/func1").replace(
        "dns:func2.demo", "uri:spiffe://acme/jobs/func2"
    )
    async with site.relay(routes) as relay, meet(site, relay, peer="uri:spiffe://acme/jobs/*") as (one, two):
        await in_thread(two.sendall, b"x")
        assert await in_thread(one.recv, 1) == b"x"


async def test_the_inner_certificates_may_be_others_of_another_ca(site: Site) -> None:
    """One CA issues the certificates for the relay, and another one those for the functions' own TLS."""
    inner = type(site.ca)("inner CA")
    (site.directory / "inner").mkdir()
    inner_ca = inner.write(site.directory / "inner")
    wires: dict[str, Wire] = {}

    async def join(name: str, other: str) -> None:
        cert, key = inner.party(dns=[f"{name}.inner"]).write(site.directory / "inner", name)
        wires[name] = await connect(
            site, relay, name, peer=f"dns:{other}.inner", inner_cert=cert, inner_key=key, inner_ca=inner_ca
        )

    async with site.relay() as relay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, "func1", "func2")
            nursery.start_soon(join, "func2", "func1")
        certificate = wires["func1"].getpeercert()
        assert certificate is not None
        assert certificate["subjectAltName"] == (("DNS", "func2.inner"),)
        for wire in wires.values():
            wire.abandon()


async def test_the_functions_may_agree_on_a_protocol_of_their_own(site: Site) -> None:
    async with site.relay() as relay, meet(site, relay, alpn=["acme/2", "acme/1"]) as (one, two):
        assert one.selected_alpn_protocol() == two.selected_alpn_protocol() == "acme/2"


async def test_paths_may_be_text(site: Site) -> None:
    async with site.relay() as relay, meet(site, relay, ca=str(site.ca_path)) as (one, two):
        assert one.getpeercert() != two.getpeercert()


async def test_the_route_and_the_party_can_be_said(site: Site) -> None:
    """Two routes share an address, and one certificate fits both parties."""
    routes = """
[[route]]
name = "one"
listen = "127.0.0.1:PORT"
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"

[[route]]
name = "two"
listen = "127.0.0.1:PORT"
func1 = "dns:*.demo"
func2 = "dns:*.demo"
"""
    wires: dict[str, Wire] = {}

    async def join(name: str, party: str) -> None:
        wires[party] = await connect(site, relay, name, route="two", party=party, peer="dns:*.demo")

    with reserved_port() as port:
        routes = routes.replace("PORT", str(port))
        async with site.relay(routes) as relay:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(join, "func2", "func1")
                nursery.start_soon(join, "func1", "func2")
            assert (wires["func1"].server_side, wires["func2"].server_side) == (False, True)
            handed_off = await relay.log("handed off")
            assert handed_off["route"] == "two"
            for wire in wires.values():
                wire.abandon()


async def test_the_relay_may_be_reached_by_ipv6(site: Site) -> None:
    wires: list[Wire] = []
    async with site.relay(DEMO.replace("127.0.0.1:0", "[::1]:0")) as relay:

        async def join(name: str) -> None:
            wires.append(await in_thread(frelay.connect, f"[::1]:{relay.port()}", **options(site, name)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, "func1")
            nursery.start_soon(join, "func2")
        for wire in wires:
            wire.abandon()


async def test_the_relays_certificate_may_have_another_name_than_its_address(site: Site) -> None:
    async with site.relay() as relay, meet(site, relay, server_name="relay.test") as (one, two):
        await in_thread(one.sendall, b"x")
        assert await in_thread(two.recv, 1) == b"x"


async def test_a_function_with_connect_meets_one_without(site: Site) -> None:
    """The other side is written from the protocol, byte by byte (``party.Party``); its TLS is the test's."""
    wires: list[Wire] = []
    async with site.relay() as relay:
        other = await site.party(relay, "func2")

        async def join() -> None:
            wires.append(await connect(site, relay, "func1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            await relay.log("waiting", party="func1")
            await other.join()
            await other.expect("WAITING")
            assert (await other.expect("PAIRED"))["role"] == "server"
            await other.hand_off()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*site.paths["func2"])
            context.load_verify_locations(site.ca_path)
            context.verify_mode = ssl.CERT_REQUIRED
            inner = trio.SSLStream(other.stream, context, server_side=True, https_compatible=False)
            with trio.fail_after(TIMEOUT):
                await inner.do_handshake()
        await inner.send_all(b"hello")
        assert await in_thread(wires[0].recv, 5) == b"hello"
        await in_thread(wires[0].close)
        with trio.fail_after(TIMEOUT):
            assert await inner.receive_some() == b"", "a clean end of TLS"
