"""TESTPLAN 9: an exception while a connection is checked ends that leg alone; it is not let in, and the relay goes on.

The tests make frelay's own functions raise, at every step from OpenSSL's callbacks to the lobby, and in a pairing.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

import frelay.joining.connection
import frelay.joining.legs
import frelay.joining.route
import frelay.pairing.pairing
import frelay.pairing.raw_pump
import frelay.tls.context
import frelay.tls.trust
from support.certs import Credential, TestAuthority, self_signed
from support.ends import join_ends
from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually


class Fault(Exception):
    """An exception that no code of frelay expects."""


STEPS: Final[dict[str, tuple[object, str]]] = {
    "verify callback": (frelay.tls.context._VerifyCallback, "__call__"),
    "ALPN callback": (frelay.tls.context, "_select_protocol"),
    "reading the chain": (frelay.joining.connection, "verified_peer"),
    "reading the names": (frelay.tls.trust, "identities"),
    "choosing the route": (frelay.joining.connection, "select_route"),
    "policy": (frelay.tls.trust.OuterTls, "recheck"),
    "matching": (frelay.joining.route.LiveRoute, "match"),
    "WAITING": (frelay.joining.legs.FramedLeg, "welcome"),
    "attending": (frelay.joining.legs.FramedLeg, "attend"),
}


@pytest.fixture
def armed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Make one step raise while ``armed[0]`` is True."""
    # The facts of a certificate chain are cached, so they would not be read again.
    monkeypatch.setattr(frelay.tls.trust, "_read", frelay.tls.trust._read.__wrapped__)
    owner, name = STEPS[request.param]
    original: Any = getattr(owner, name)
    armed = [False]

    def raise_if_armed(*args: Any, **kwargs: Any) -> Any:
        if armed[0]:
            raise Fault(f"in {name}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, raise_if_armed)
    return armed


async def ended(party: Party) -> None:
    """The relay ends the connection without a frame that admits the party."""
    with trio.fail_after(20):
        try:
            await party.handshake()
            await party.join()
            while found := await party.next_frame():
                assert found[0] not in ("PAIRED", "PING"), found
        except (OSError, trio.BrokenResourceError):
            pass  # an alert (SSLError is an OSError), a truncation, a reset: it is over


def forgive_bugs(relay: RelayInProcess) -> list[str]:
    """Remove the entries about bugs from the log, since they would fail the test; returns their exceptions."""
    bugs = [event for event in relay.events if "a bug in frelay" in event["event"]]
    for event in bugs:
        relay.events.remove(event)
    return [event["event"] for event in bugs]


@pytest.mark.parametrize("armed", STEPS, indirect=True, ids=STEPS)
async def test_a_fault_at_any_step_ends_that_leg_alone(site: Site, armed: list[bool]) -> None:
    async with site.relay() as relay:
        keeper1, keeper2 = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(keeper1, keeper2)
        for _ in range(2):
            armed[0] = True
            for _ in range(2):
                await ended(await site.connect(relay, "func1"))
            await eventually(lambda: relay.legs == 2, "nothing held of the dead legs")
            assert relay.waiting() == (0, 0)
            armed[0] = False
            # ... and the relay serves the next ones as before.
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await pair(one, two)
            one.reset()
            two.reset()
            await eventually(lambda: relay.legs == 2, "the pair gone")
        await keeper1.hand_off()
        await keeper2.hand_off()
        await keeper1.send_raw(b"\x16\x03\x01unharmed")
        assert await keeper2.receive_exactly(11) == b"\x16\x03\x01unharmed"
        assert len(forgive_bugs(relay)) == 4


@pytest.mark.parametrize("step", ["hand-off", "pumps", "watch"])
async def test_a_fault_in_a_pairing_ends_that_pairing_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Outcome ``internal-error``: both functions are cut, the record names the side, and other pairings go on."""
    owner, name = {
        "hand-off": (frelay.joining.legs.FramedLeg, "begin"),
        "pumps": (frelay.pairing.raw_pump.RawPump, "run"),
        "watch": (frelay.pairing.pairing.Pairing, "_watch"),
    }[step]

    async def fault(*args: Any, **kwargs: Any) -> None:
        raise Fault(f"in {name}")

    async with site.relay() as relay:
        keeper1, keeper2 = await join_ends(site, relay)
        await relay.log("handed off")  # their pumps run before the test breaks those of others
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            for party in (one, two):
                await party.join()
                await party.expect("WAITING")
            if step != "hand-off":
                for party in (one, two):
                    await party.expect("PAIRED")
                    await party.hand_off()
            record = await relay.outcome()
            assert (record["outcome"], record["side"]) == ("internal-error", "relay")
            assert await one.ended() == await two.ended() == "reset"
        await keeper1.send(b"\x16\x03\x01unharmed")
        assert await keeper2.receive_exactly(11) == b"\x16\x03\x01unharmed"
        assert forgive_bugs(relay) == ["a bug in frelay ended this pairing"]


async def test_a_foreign_protocol_is_not_taken_for_a_bug(site: Site) -> None:
    """An exception in the ALPN callback makes OpenSSL send the alert. The log must not call that a bug."""
    async with site.relay() as relay:
        party = await site.connect(relay, "func1", alpn=("h2",))
        assert "NO_APPLICATION_PROTOCOL" in await party.alert()
        refused = await relay.log("refused", code="protocol-error")
        assert "ALPN" in refused["reason"]
        assert not forgive_bugs(relay)


def with_subject(*attributes: x509.NameAttribute[str]) -> Credential:
    """A self-signed certificate, which anybody can make."""
    good = self_signed(dns=["func1.demo"])
    name = x509.Name(attributes)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(good.private_key.public_key())
        .serial_number(1)
        .not_valid_before(good.certificate.not_valid_before_utc)
        .not_valid_after(good.certificate.not_valid_after_utc)
        .sign(good.private_key, hashes.SHA256())
    )
    return Credential("odd", certificate, good.private_key, (certificate,))


def common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


@pytest.mark.parametrize(
    "odd",
    [
        with_subject(common_name("\x1b[2J\r\nlevel=info event=admitted \u202e")),
        with_subject(*(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "y" * 60) for _ in range(200))),
        with_subject(common_name("PATCHME!")),
    ],
    ids=["control characters", "very long", "unreadable"],
)
async def test_what_a_stranger_writes_into_a_certificate_is_harmless(site: Site, odd: Credential) -> None:
    """No CA has signed it: frelay must not believe it, fill the log with it, or raise in the verify callback."""
    site.add("odd", odd)
    # A PrintableString with octets that it may not have: OpenSSL accepts it, a stricter parser raises.
    octets = odd.certificate.public_bytes(Encoding.DER)
    octets = octets.replace(b"\x0c\x08PATCHME!", b"\x13\x08" + b"\xff" * 8)
    site.paths["odd"][0].write_text(ssl.DER_cert_to_PEM_cert(octets))
    async with site.relay() as relay:
        party = await site.connect(relay, "odd")
        await party.handshake()
        assert "ALERT" in await party.alert()
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot free")
        assert not forgive_bugs(relay)
        refused = await relay.log("refused", code="not-authorised")
        assert str(refused["certificate"]).isprintable()
        # At most 256 characters each of the subject, the issuer and up to eight names.
        assert len(refused["certificate"]) < 1000


async def test_the_verify_callback_never_turns_a_failure_into_a_success(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that notes the reason raises, and a certificate of another CA is refused all the same."""
    site.add("wrong", TestAuthority("other CA").party(dns=["func1.demo"]))

    def broken(*args: object) -> object:
        raise Fault("while noting")

    monkeypatch.setattr(frelay.tls.context, "refusal_for", broken)
    async with site.relay() as relay:
        await ended(await site.connect(relay, "wrong"))
        assert not relay.logged("waiting")
        await eventually(lambda: relay.legs == 0, "its slot free")
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        assert relay.waiting() == (0, 0)
        forgive_bugs(relay)
