"""64 MiB each way at once arrive byte for byte, in every combination of modes."""

from __future__ import annotations

import ssl
from functools import partial

import pytest
import trio

from support.ends import OPEN, PLAIN, Channel, Digests, Mode, exchange, join_ends, thread_socket
from support.relay import RelayProcess
from support.site import DEMO, Site

SIZE = 64 * 1024 * 1024


async def exchange_both_ways(
    site: Site, relay: RelayProcess, mode1: Mode, mode2: Mode, inner: tuple[Channel, Channel] | None = None
) -> list[Digests]:
    ends = await join_ends(site, relay, mode1, mode2)
    if inner is not None:
        for end, channel in zip(ends, inner, strict=True):
            channel.below = Channel.of(end)
    found: list[Digests] = [Digests("", "", 0), Digests("", "", 0)]

    async def one_end(index: int) -> None:
        end = ends[index]
        channel = inner[index] if inner is not None else Channel.of(end)
        work = partial(exchange, thread_socket(end), channel, SIZE, index, handshake=inner is not None)
        found[index] = await trio.to_thread.run_sync(work)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_end, 0)
        nursery.start_soon(one_end, 1)
    return found


def check(found: list[Digests]) -> None:
    assert [digests.count for digests in found] == [SIZE, SIZE]
    assert found[1].received == found[0].sent
    assert found[0].received == found[1].sent
    assert found[0].sent != found[1].sent


@pytest.mark.parametrize(
    ("mode1", "mode2"),
    [("raw", "raw"), ("raw", "tunnel"), ("tunnel", "raw"), ("tunnel", "tunnel"), ("bare", "bare")],
)
async def test_64_mib_each_way_at_once(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 23: handed off, tunnelled and mixed, with SHA-256."""
    async with site.process(OPEN) as relay:
        check(await exchange_both_ways(site, relay, mode1, mode2))
        ended = await relay.log("pairing ended")
    assert ended["outcome"] == "closed"
    assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("mode1", "mode2"),
    [("raw", "raw"), ("tunnel", "tunnel"), ("raw", "tunnel"), ("bare", "raw"), ("plain", "plain")],
)
async def test_64_mib_of_inner_mtls_each_way(site: Site, mode1: Mode, mode2: Mode) -> None:
    """TESTPLAN 23: the functions' own mTLS end to end, through a route that demands it in tunnels too."""
    context1 = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context2 = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context2.verify_mode = ssl.CERT_REQUIRED
    for name, context in (("func1", context1), ("func2", context2)):
        context.load_cert_chain(*site.paths[name])
        context.load_verify_locations(site.ca_path)
    inner = (
        Channel.over(context1, server_side=False, server_hostname="func2.demo"),
        Channel.over(context2, server_side=True),
    )
    route = PLAIN.replace("require_inner_tls = false\n", "") if mode1 == "plain" else DEMO
    async with site.process(route + 'require_inner_tls = "always"\n') as relay:
        check(await exchange_both_ways(site, relay, mode1, mode2, inner))
        ended = await relay.log("pairing ended")
    assert ended["outcome"] == "closed"
    assert ended["bytes_func1_to_func2"] > SIZE
    certificate = inner[1].tls.getpeercert()
    assert certificate is not None
    assert certificate["subjectAltName"] == (("DNS", "func1.demo"),)
