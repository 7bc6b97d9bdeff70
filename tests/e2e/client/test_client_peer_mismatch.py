"""The function itself checks ``peer=``: if the other one's certificate does not match, it sends no byte to it."""

from __future__ import annotations

import pytest
import trio

import frelay
from frelay.protocol.messages import Mode
from support.clients import CLIENTS, Client, ask, options, run_function
from support.site import Site
from support.waiting import TIMEOUT, eventually

SECRET = b"for somebody else" * 1000


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_nothing_is_sent_to_a_peer_that_was_not_expected(site: Site, client: Client, mode: Mode) -> None:
    """The relay has admitted both, each with a good certificate; but func1 expects another function than func2.

    func1 plays the TLS client, which finishes its handshake first and could send at once. The bytes that the
    relay counted from func1 are its handshake alone, fewer than the data that it would have sent.
    """
    heard: list[bytes] = []

    async def other() -> None:
        try:
            heard.append(await run_function("trio", address, ask(b""), options(site, "func2", "func1")))
        except (frelay.FrelayError, trio.BrokenResourceError):
            pass  # func1 cuts it off, before or after its own handshake

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            given = options(site, "func1", "somebody", mode=mode)
            with pytest.raises(frelay.PeerIdentityMismatch, match=r"func2\.demo") as caught:
                await run_function(client, address, ask(SECRET), given)
        assert caught.value.expected == "dns:somebody.demo"
        assert "dns:func2.demo" in caught.value.found
        assert heard in ([], [b""])
        record = await relay.outcome()
        assert record["bytes_func1_to_func2"] < len(SECRET)
        with trio.fail_after(TIMEOUT):
            await eventually(lambda: relay.legs == 0, "nothing is held")


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_certificate_of_another_authority_is_a_mismatch(site: Site, client: Client) -> None:
    """The CA of the other function is not in ``inner_ca``; that the relay trusts it does not matter."""
    stranger = type(site.ca)("another CA").write(site.directory, "another-ca")

    async def other() -> None:
        with pytest.raises((frelay.FrelayError, trio.BrokenResourceError)):
            await run_function("trio", address, ask(b""), options(site, "func1", "func2"))

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            given = options(site, "func2", "func1", inner_ca=stranger)
            with pytest.raises(frelay.PeerIdentityMismatch, match="not to be trusted"):
                await run_function(client, address, ask(SECRET), given)
