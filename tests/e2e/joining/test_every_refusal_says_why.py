"""Every REFUSED code of the protocol can be provoked, says why in a sentence, ends TLS in order and frees the slot."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from frelay.pki.authority import Authority
from frelay.protocol.messages import REFUSAL_CODES
from support.certs import Credential, TestAuthority, self_signed
from support.der import san_der
from support.handoffs import relay_has_read
from support.party import Party, frame, pair
from support.relay import RelayInProcess, address_seen
from support.site import DEMO, Site
from support.waiting import before_it_expires, eventually

OTHER: Final = DEMO.replace('"demo"', '"other"')


async def joined(site: Site, relay: RelayInProcess, name: str = "func1", **fields: Any) -> Party:
    party = await site.party(relay, name)
    await party.join(**fields)
    await party.expect("WAITING")
    return party


def ending(site: Site) -> Callable[[float], datetime]:
    """For ``before_it_expires``: func1's certificate under the name "ending"."""

    def make(seconds: float) -> datetime:
        credential = site.add("ending", site.ca.ending(seconds, dns=["func1.demo"]))
        return credential.certificate.not_valid_after_utc

    return make


# --- one way to provoke each code: a relay in which the yielded party is about to be refused ------------------------

Provocation = Callable[[Site], AbstractAsyncContextManager[tuple[RelayInProcess, Party]]]


@asynccontextmanager
async def not_authorised(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    async with site.relay() as relay:
        party = await site.party(relay, "stranger")
        await party.join()
        yield relay, party


@asynccontextmanager
async def unknown_route(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.join(route="dmeo")
        yield relay, party


@asynccontextmanager
async def protocol_error(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.send_frame("JOIN", {"attempt": "not a UUID"})
        yield relay, party


@asynccontextmanager
async def wait_timeout(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay() as relay:
        yield relay, await joined(site, relay, wait=0.1)


@asynccontextmanager
async def pong_timeout(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay(sections="[limits]\nping_interval = 0.1\npong_timeout = 0.1\n") as relay:
        party = await joined(site, relay)
        await party.expect("PING")
        yield relay, party


@asynccontextmanager
async def queue_full(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay(sections="[limits]\nmax_waiting_per_party = 2\n") as relay:
        for count in (1, 2):
            await joined(site, relay)
            await eventually(lambda count=count: relay.waiting() == (count, 0), "a place")  # type: ignore[misc]
        party = await site.party(relay, "func1")
        await party.join()
        yield relay, party


@asynccontextmanager
async def replaced(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay() as relay:
        stale = await joined(site, relay)
        await joined(site, relay, attempt=stale.attempt)
        yield relay, stale


@asynccontextmanager
async def route_removed(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay(DEMO + OTHER) as relay:
        party = await joined(site, relay)
        site.write(OTHER)
        await relay.relay.reload()
        yield relay, party


@asynccontextmanager
async def certificate_expired(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    """It waited beyond its notAfter: when the other one comes, the relay checks the certificate again."""
    async with site.relay() as relay:
        party, ends = await before_it_expires(ending(site), partial(joined, site, relay, "ending"))
        await trio.sleep(ends - time.time() + 0.1)
        await joined(site, relay, "func2")
        yield relay, party


@asynccontextmanager
async def revoked(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    """It was revoked while it waited."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        party = await joined(site, relay)
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func1"]], number=2))
        await relay.relay.reload()
        await joined(site, relay, "func2")
        yield relay, party


@asynccontextmanager
async def limit(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay(sections="[limits]\nmax_pairings = 1\n") as relay:
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        await joined(site, relay)
        yield relay, await joined(site, relay, "func2")


@asynccontextmanager
async def draining(site: Site) -> AsyncIterator[tuple[RelayInProcess, Party]]:
    async with site.relay() as relay:
        party = await joined(site, relay)
        relay.relay.drain(reason="maintenance")
        assert await party.expect("DRAINING") == {"reconnect_in": 1.0}
        yield relay, party


PROVOCATIONS: Final[dict[str, tuple[Provocation, float | None]]] = {
    "not-authorised": (not_authorised, None),
    "unknown-route": (unknown_route, None),
    "protocol-error": (protocol_error, None),
    "wait-timeout": (wait_timeout, 0.0),
    "pong-timeout": (pong_timeout, 0.0),
    "queue-full": (queue_full, 5.0),
    "replaced": (replaced, None),
    "route-removed": (route_removed, 1.0),
    "certificate-expired": (certificate_expired, None),
    "revoked": (revoked, None),
    "limit": (limit, 10.0),
    "draining": (draining, 1.0),
}


def test_every_code_is_here() -> None:
    assert set(PROVOCATIONS) == REFUSAL_CODES


@pytest.mark.parametrize("code", sorted(REFUSAL_CODES))
async def test_a_refusal_says_why_and_leaves_nothing(site: Site, code: str) -> None:
    provoke, retry_after = PROVOCATIONS[code]
    async with provoke(site) as (relay, party):
        legs = relay.legs
        refusal = await party.refusal()  # ... and then the orderly end of TLS
        assert refusal.keys() == {"code", "reason", "retry_after"}
        assert refusal["code"] == code
        assert refusal["retry_after"] == retry_after
        assert refusal["reason"].isprintable()
        assert re.fullmatch(r"[^\[\]{}<>]{10,200}", refusal["reason"]), "a sentence for a person"
        assert relay.logged("refused", code=code, address=address_seen(relay, party))
        party.close()
        await eventually(lambda: relay.legs < legs or relay.legs == 0, "its slot free")


# --- details of some codes --------------------------------------------------------------------------------------------


@pytest.mark.load
async def test_a_new_leg_is_judged_between_its_handshake_and_its_join(site: Site) -> None:
    """TESTPLAN 12: expired, revoked, and a route removed, each after the handshake and before JOIN."""
    site.add("revoked", site.ca.party(dns=["func1.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(DEMO + OTHER, sections="[limits]\njoin_timeout = 60\n", crl=True) as relay:

        async def shake_hands() -> Party:
            party = await site.party(relay, "ending")
            await relay_has_read(relay)  # a client's handshake is over before the relay has judged its certificate
            return party

        late, ends = await before_it_expires(ending(site), shake_hands)
        out = await site.party(relay, "revoked")
        homeless = await site.party(relay, "func1", route="other")
        # A connection keeps the certificates and routes with which it was accepted, so nothing more must end.
        await eventually(lambda: relay.legs >= 3, "three legs")
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["revoked"]], number=2))
        site.write(DEMO, sections="[limits]\njoin_timeout = 60\n", crl=True)
        await relay.relay.reload()
        await out.join()
        assert (await out.refusal())["code"] == "revoked"
        await homeless.join()
        assert (await homeless.refusal())["code"] == "route-removed"
        await trio.sleep(ends - time.time() + 0.1)
        await late.join()
        assert (await late.refusal())["code"] == "certificate-expired"
        assert relay.waiting() == (0, 0)


async def test_one_bad_waiter_does_not_cost_the_newcomer_its_peer(site: Site) -> None:
    """The first waiter was revoked meanwhile: it is refused, and the next in the queue is paired instead."""
    bad = site.add("bad", site.ca.party(dns=["func1.demo"]))
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        first = await joined(site, relay, "bad")
        await eventually(lambda: relay.waiting() == (1, 0), "the first place")
        second = await joined(site, relay, "func1")
        await eventually(lambda: relay.waiting() == (2, 0), "the second place")
        site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad], number=2))
        await relay.relay.reload()
        two = await joined(site, relay, "func2")
        paired, paired2 = await second.expect("PAIRED"), await two.expect("PAIRED")
        assert paired["pairing"] == paired2["pairing"]
        assert (await first.refusal())["code"] == "revoked"


async def test_a_full_queue_of_one_party_leaves_the_other_alone(site: Site) -> None:
    async with site.relay(sections="[limits]\nmax_waiting_per_party = 1\n") as relay:
        one = await joined(site, relay)
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        other = await site.party(relay, "func1")
        await other.join()
        assert (await other.refusal())["code"] == "queue-full"
        await joined(site, relay, "func2")
        await one.expect("PAIRED")


async def test_the_limit_of_pairings_spares_the_waiter(site: Site) -> None:
    """Only the newcomer is refused; the waiter keeps its place, and is paired once a pairing has ended."""
    async with site.relay(sections="[limits]\nmax_pairings = 1\n") as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        waiter = await joined(site, relay)
        turned_away = await joined(site, relay, "func2")
        assert (await turned_away.refusal())["code"] == "limit"
        assert relay.waiting() == (1, 0)
        one.reset()
        await relay.outcome()
        await joined(site, relay, "func2")
        await waiter.expect("PAIRED")


async def test_a_replaced_route_sends_its_waiters_away_and_takes_them_back(site: Site) -> None:
    """Other selectors make another route: legs that waited under the old ones must join again."""
    async with site.relay() as relay:
        framed = await joined(site, relay)
        bare = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (2, 0), "both places")
        site.write(DEMO.replace("dns:func2.demo", "dns:other.demo"))
        await relay.relay.reload()
        assert (await framed.refusal())["code"] == "route-removed"
        assert await bare.receive() == b""
        again = await joined(site, relay)
        await eventually(lambda: relay.waiting() == (1, 0), "its new place")
        again.close()


async def test_a_function_that_comes_while_draining_is_told_so(site: Site) -> None:
    """A handshake that was under way when the drain began still gets its answer, on the old address."""
    async with site.relay() as relay:
        slow = await site.party(relay, "func1")
        await eventually(lambda: relay.legs == 1, "the leg")
        keeper1, keeper2 = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(keeper1, keeper2)
        port = relay.own_port()
        relay.relay.drain(reason="maintenance")
        await slow.join()
        assert (await slow.refusal())["code"] == "draining"
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        # Pairings continue.
        await keeper1.hand_off()
        await keeper2.hand_off()
        await keeper1.send_raw(b"\x16\x03\x01still here")
        assert await keeper2.receive_exactly(13) == b"\x16\x03\x01still here"


async def test_a_bare_waiter_is_drained_by_an_orderly_end(site: Site) -> None:
    async with site.relay() as relay:
        bare = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        relay.relay.drain(reason="maintenance")
        with trio.fail_after(20):
            assert await bare.receive() == b""


# --- the refused one in the log ---------------------------------------------------------------------------------------


UNVERIFIED: Final[dict[str, tuple[Callable[[Site], Credential], str]]] = {
    "wrong CA": (
        lambda site: TestAuthority("other CA").party(dns=["func1.demo"], uris=["spiffe://demo/func1"]),
        "unable to get local issuer certificate",
    ),
    "self-signed": (lambda site: self_signed(dns=["func1.demo"]), "self-signed certificate"),
    "expired": (lambda site: site.ca.expired(dns=["func1.demo"]), "certificate has expired"),
    "serverAuth only": (lambda site: site.ca.server_only(dns=["func1.demo"]), "unsuitable certificate purpose"),
    "revoked": (lambda site: site.credentials["func1"], "certificate revoked"),
    "no SAN": (lambda site: TestAuthority("other CA").cn_only("func1.demo"), "unable to get local issuer certificate"),
    "a SAN that cannot be read": (
        lambda site: TestAuthority("other CA").odd(san_der(dns=[b"\xff\x1b[2J"])),
        "unable to get local issuer certificate",
    ),
}


@pytest.mark.parametrize("kind", UNVERIFIED)
async def test_a_refused_handshake_says_whose_certificate_it_was_and_what_is_wrong(site: Site, kind: str) -> None:
    """Subject, names, issuer, serial, address and the failed check: enough to find the function and correct it."""
    make, check = UNVERIFIED[kind]
    bad = site.add("bad", make(site))
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[bad] if kind == "revoked" else []))
    async with site.relay(crl=True) as relay:
        party = await site.connect(relay, "bad")
        await party.alert()
        refused = await relay.log("refused", address=address_seen(relay, party))
        assert refused["reason"] == f"{check} (at depth 0 of the chain)"
        leaf = bad.certificate
        described = refused["certificate"]
        assert described.startswith(f"unverified: {leaf.subject.rfc4514_string()}; names ")
        assert described.endswith(f"; issuer {leaf.issuer.rfc4514_string()}; serial {leaf.serial_number:x}")
        if kind == "wrong CA":
            assert "names uri:spiffe://demo/func1, dns:func1.demo; " in described
        elif "SAN" not in kind:
            assert "names dns:func1.demo; " in described
        assert described.isprintable()


async def test_a_fault_above_the_leaf_names_the_certificate_that_has_it(tmp_path: Path) -> None:
    """OpenSSL checks from the root on and stops at the first fault, so it has not reached the leaf."""
    site = Site(tmp_path, TestAuthority.root_for_intermediates())
    middle = site.ca.party(dns=["middle.demo"])
    above = (site.ca.authority.certificate,)
    site.add("bad", TestAuthority(authority=Authority(middle.certificate, middle.private_key, above)).party())
    async with site.relay() as relay:
        await (await site.connect(relay, "bad")).alert()
        refused = await relay.log("refused")
        assert refused["reason"] == "invalid CA certificate (at depth 1 of the chain)"
        assert refused["certificate"].startswith("unverified: CN=middle.demo; names dns:middle.demo; ")


BAD_JOINS: Final[dict[str, bytes]] = {
    "no attempt": frame("JOIN", {}),
    "attempt null": frame("JOIN", {"attempt": None}),
    "attempt a number": frame("JOIN", {"attempt": 1}),
    "attempt no UUID": frame("JOIN", {"attempt": "x" * 36}),
    "route empty": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "route": ""}),
    "route null": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "route": None}),
    "route with a line end": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "route": "demo\n"}),
    "party unknown": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "party": "func3"}),
    "wait negative": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "wait": -1}),
    "wait text": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "wait": "10"}),
    "wait true": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "wait": True}),
    "wait NaN": frame("JOIN", b'{"attempt": "00000000-0000-0000-0000-000000000000", "wait": NaN}'),
    "wait beyond floats": frame("JOIN", b'{"attempt": "00000000-0000-0000-0000-000000000000", "wait": 1e999}'),
    "modes empty": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "modes": []}),
    "modes text": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "modes": "handoff"}),
    "modes unknown": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "modes": ["carrier-pigeon"]}),
    "traceparent no text": frame("JOIN", {"attempt": "00000000-0000-0000-0000-000000000000", "traceparent": 1}),
    "a key twice": frame("JOIN", b'{"attempt": "00000000-0000-0000-0000-000000000000", "wait": 1, "wait": 2}'),
    "not JSON": frame("JOIN", b"hello"),
    "not an object": frame("JOIN", b"[]"),
    "not UTF-8": frame("JOIN", b'{"attempt": "\xff"}'),
    "too deep": frame("JOIN", b"[" * 4096),
    "too long": b"\x01\x00\xff\xff",
    "second byte": b"\x01\x01\x00\x02{}",
    "type 0": b"\x00\x00\x00\x00",
    "unknown type": b"\x04\x00\x00\x02{}",
    "PONG first": frame("PONG", {"n": 1}),
    "LEAVE first": frame("LEAVE"),
    "the relay's own WAITING": frame("WAITING", {}),
    "HTTP": b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
    "many advisory frames": b"\x80\x00\x00\x00" * 65,
}


@pytest.mark.parametrize("join", BAD_JOINS.values(), ids=BAD_JOINS)
async def test_a_bad_join_is_a_protocol_error(site: Site, join: bytes) -> None:
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        await party.send(join)
        refusal = await party.refusal()
        assert refusal["code"] == "protocol-error"
        assert refusal["retry_after"] is None
        assert refusal["reason"].isprintable()
        assert relay.waiting() == (0, 0)


@pytest.mark.parametrize("has_joined", [False, True])
async def test_who_goes_before_it_has_come_in_is_in_the_log(site: Site, has_joined: bool) -> None:
    """It never waited, with a JOIN or without; the log says whether there was one."""
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        if has_joined:
            await party.send(frame("JOIN", {"attempt": party.attempt}) + frame("LEAVE"))
        else:
            await party.send_raw(party.close_notify())
        refused = await relay.log("refused")
        assert refused["code"] == "protocol-error"
        assert refused["reason"] == ("LEAVE came together with JOIN" if has_joined else "the party left without a JOIN")


@pytest.mark.load
@pytest.mark.parametrize("start", [b"", frame("JOIN", {"attempt": "x"})[:-1], b"\x01"], ids=["silence", "half", "byte"])
async def test_a_join_that_does_not_come_in_time_is_refused(site: Site, start: bytes) -> None:
    async with site.relay(sections="[limits]\njoin_timeout = 0.3\n") as relay:
        began = trio.current_time()
        party = await site.party(relay, "func1")
        if start:
            await party.send(start)
        assert await party.refusal() == {
            "code": "protocol-error",
            "reason": "no JOIN within 0.3 s",
            "retry_after": None,
        }
        assert trio.current_time() - began >= 0.3


async def test_a_join_drop_by_drop_gains_no_time(site: Site) -> None:
    """join_timeout is absolute: arriving bytes do not restart it."""
    async with site.relay(sections="[limits]\njoin_timeout = 0.5\n") as relay:
        party = await site.party(relay, "func1")

        async def drip() -> None:
            for byte in frame("JOIN", {"attempt": party.attempt, "padding": "x" * 3000}):
                await party.send(bytes([byte]))
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            assert (await party.refusal())["reason"] == "no JOIN within 0.5 s"
            nursery.cancel_scope.cancel()
