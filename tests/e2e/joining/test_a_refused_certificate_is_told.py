"""A function whose own certificate the other one refuses learns that, and why: by client, role and mode.

The TLS server learns it from ``connect``. The handshake of a TLS 1.3 client ends before its server has checked the
client's certificate, so the client learns it when it first reads, by an error of frelay that is also an error of its
kind of stream.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

import pytest
import trio

import frelay
from frelay.protocol.messages import Mode, Role
from support.certs import Credential, TestAuthority
from support.clients import CLIENTS, Client, ask, options, run_function
from support.site import Site
from support.waiting import TIMEOUT, eventually

# What the stream of each client raises if a connection breaks.
BROKEN: Final[dict[Client, type[Exception]]] = {
    "blocking": OSError,
    "trio": trio.BrokenResourceError,
    "asyncio": ConnectionResetError,
}
ME: Final[dict[Role, tuple[str, str]]] = {"client": ("func1", "func2"), "server": ("func2", "func1")}

Make = Callable[[Site, Role, str], Credential]
WRONG: Final[dict[str, tuple[str, Make]]] = {
    "purpose": (
        r"plays the TLS (server|client).*(serverAuth|clientAuth)",
        lambda site, role, dns: (site.ca.client_only if role == "server" else site.ca.server_only)(dns=[dns]),
    ),
    "expired": ("has expired", lambda site, _, dns: site.ca.expired(dns=[dns])),
    "not yet valid": ("not valid yet", lambda site, _, dns: site.ca.not_yet_valid(dns=[dns])),
    "another CA": ("does not know the CA", lambda _site, _, dns: TestAuthority("another CA").party(dns=[dns])),
}


async def is_told(site: Site, me: Client, role: Role, other: Client, mode: Mode, what: str) -> None:
    text, make = WRONG[what]
    mine, theirs = ME[role]
    cert, key = make(site, role, f"{mine}.demo").write(Path(site.directory), "refused")
    refusals: list[frelay.FrelayError] = []

    async def refuse() -> None:
        with pytest.raises(frelay.PeerIdentityMismatch, match="not to be trusted") as caught:
            await run_function(other, address, ask(b""), options(site, theirs, mine, mode=mode))
        refusals.append(caught.value)

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            given = options(site, mine, theirs, mode=mode, inner_cert=cert, inner_key=key)
            with pytest.raises(frelay.CertificateRefused, match=f"own certificate.*{text}") as caught:
                await run_function(me, address, ask(b"question"), given)
        assert isinstance(caught.value, frelay.PeerGone)
        assert isinstance(caught.value, BROKEN[me]) is (role == "client")
        assert refusals
        with trio.fail_after(TIMEOUT):
            await eventually(lambda: relay.legs == 0, "nothing is held")


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("me", CLIENTS)
async def test_a_function_is_told_that_its_certificate_was_refused(
    site: Site, me: Client, role: Role, mode: Mode
) -> None:
    await is_told(site, me, role, "trio", mode, "purpose")


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("other", ["blocking", "asyncio"])
async def test_whatever_the_other_one_is_written_on(site: Site, other: Client, role: Role, mode: Mode) -> None:
    """The alert arrives, although this function is still sending when the other one closes."""
    await is_told(site, "trio", role, other, mode, "purpose")


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("what", ["expired", "not yet valid", "another CA"])
async def test_the_reason_is_told(site: Site, role: Role, what: str) -> None:
    await is_told(site, "blocking", role, "blocking", "handoff", what)


@pytest.mark.parametrize("other", CLIENTS)
@pytest.mark.parametrize("me", CLIENTS)
async def test_a_function_that_is_not_the_one_expected_is_told_what_may_be(
    site: Site, me: Client, other: Client
) -> None:
    """TLS has no alert for a wrong name after the handshake: the other one cuts, and the error says where to look."""

    async def expect_another() -> None:
        with pytest.raises(frelay.PeerIdentityMismatch):
            await run_function(other, address, ask(b""), options(site, "func2", "somebody"))

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_another)
            with pytest.raises(BROKEN[me], match=r"before the other function said anything.*its peer= may not be"):
                await run_function(me, address, ask(b"question"), options(site, "func1", "func2"))
