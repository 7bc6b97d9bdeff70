"""Whatever a relay, a proxy or another function sends: a wire, or a FrelayError with a harmless text. Nothing else.

The core of the clients runs against a relay without a network (``fake_relay``), so that thousands of conversations take
seconds. What the three shells make of the same is in tests/e2e/client/test_whatever_reaches_a_client_is_typed.py.
"""

from __future__ import annotations

import json
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frelay.client.contexts import inner_context
from frelay.client.joining import Joined
from frelay.client.options import JoinPlan
from frelay.client.peer import check_peer, names_of_peer, read_selectors
from frelay.client.proxy import Proxy
from frelay.client.retry import Retry
from frelay.client.steps import Open, Receive, Send, Step
from frelay.client.tls_engine import Engine
from frelay.errors import FrelayError, PeerIdentityMismatch, Refused, Truncated
from frelay.protocol.messages import Join, Message, Mode, Role
from support.certs import Credential
from support.der import der, san_der
from support.fake_relay import PAIRED, WAITING, FakeRelay, join, make_plan, peer
from support.site import Site

# Each conversation has its handshakes, and a machine under load takes its time for them.
UNHURRIED: Final = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One for all examples: they change nothing in it."""
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def plan(site: Site) -> JoinPlan:
    return replace(make_plan(site), retry=Retry(tries=1), wait=10 * 86400.0)


@contextmanager
def typed_errors_only() -> Iterator[None]:
    try:
        yield
    except FrelayError as error:
        texts = [str(error)]
        if isinstance(error, Refused):
            texts += [error.code, error.reason]
        if isinstance(error, PeerIdentityMismatch):
            texts += error.found
        assert all(text.isprintable() and len(text) < 5000 for text in texts), texts


# --- bytes ------------------------------------------------------------------------------------------------------------


class Babble(FakeRelay):
    """Says the same bytes on every connection, whatever it is asked, and ends."""

    def __init__(self, site: Site, says: bytes, chunk: int) -> None:
        self.says = says
        super().__init__(site, lambda relay, message: None)
        self.chunk = chunk

    def _connect(self) -> None:
        self.out = self.says

    def perform(self, step: Step) -> Any:
        match step:
            case Receive():
                data, self.out = self.out[: self.chunk], self.out[self.chunk :]
                return data
            case Send():
                return None
            case _:
                return super().perform(step)


@UNHURRIED
@given(st.binary(max_size=3000), st.integers(1, 3000))
@example(b"HTTP/1.1 200 OK\r\n\r\n", 1)
@example(b"\x16\x03\x03\x40\x00" + bytes(16384), 3000)
@example(b"\x15\x03\x03\x00\x02\x02\x30", 7)
def test_bytes_of_what_is_no_relay(site: Site, plan: JoinPlan, says: bytes, chunk: int) -> None:
    for one in (plan, replace(plan, proxy=Proxy("proxy", 3128))):
        with typed_errors_only():
            join(one, Babble(site, says, chunk))


class Garbling(FakeRelay):
    """A good relay, and a good function behind it, on a line that changes, loses or ends what comes at one place."""

    def __init__(self, site: Site, mode: Mode, role: Role, at: int, change: bytes | OSError) -> None:
        self.mode, self.role = mode, role
        self.at, self.change = at, change
        self.passed = 0
        super().__init__(site, self._pair)

    def _connect(self) -> None:
        super()._connect()
        other: Role = "client" if self.role == "server" else "server"
        context = inner_context(other, *self.site.paths["func2"], self.site.ca_path)
        below = self.tls if self.mode == "tunnel" else None
        self.function = Engine(context, server_side=self.role == "client", below=below)
        self.met = self.took_ticket = False

    def _pair(self, relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            ticket = "00" * 32 if self.mode == "ticket" else None
            relay.say(WAITING, replace(PAIRED, mode=self.mode, role=self.role, ticket=ticket))
            self.met = self.mode != "ticket"
            if self.mode == "handoff":
                relay.tls.send_eof()
            elif self.mode == "tunnel":
                self._talk(b"")

    def _talk(self, data: bytes) -> None:
        """What the other function says to this."""
        if data and self.function._below is None:
            self.function.feed(data)
        if self.function.handshake() and not self.function.eof_was_sent:
            self.function.write(b"hello")
            self.function.send_eof()
        self.out += self.function.take()

    def _good(self, step: Step) -> Any:
        match step:
            case Open("raw"):
                return None
            case Send("raw", data) if not self.took_ticket:
                self.took_ticket = True
                assert data.startswith(b"FRELAY/1 ")
                self.tls.send_eof()
                self.out += self.tls.take()
                return None
            case Send("raw", data):
                return self._talk(data)
            case Send(_, data) if self.mode == "tunnel" and self.met:
                self.tls.feed(data)
                return self._talk(b"")
            case Send(_, data) if self.mode == "handoff" and self.is_raw:
                return self._talk(data)
            case Receive("raw") if self.role == "server" and not self.out:
                self._talk(b"")
                return super().perform(step)
            case Receive() if self.mode == "handoff" and self.is_raw and self.role == "server" and not self.out:
                self._talk(b"")
                return super().perform(step)
            case _:
                return super().perform(step)

    def perform(self, step: Step) -> Any:
        try:
            data = self._good(step)
        except (ssl.SSLError, FrelayError) as error:
            raise ConnectionResetError(104, "the other side found a fault and is gone") from error
        if not isinstance(step, Receive):
            return data
        start, self.passed = self.passed, self.passed + len(data)
        if not start <= self.at < self.passed:
            return data
        if isinstance(self.change, OSError):
            raise self.change
        place = self.at - start
        return data[:place] + (self.change + data[place + len(self.change) :] if self.change else b"")


def read_all(joined: Joined, relay: FakeRelay) -> bytes:
    """To the end, or to the error of a broken wire."""
    assert joined.engine is not None
    heard = b""
    with suppress(Truncated, OSError):
        while (data := joined.engine.read(100)) != b"":
            if data is None:
                joined.engine.feed(relay.perform(Receive(joined.connection, 1.0)))
            heard += data or b""
    return heard


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_line_that_changes_nothing(site: Site, plan: JoinPlan, mode: Mode, role: Role) -> None:
    """Or the next test would show little: the conversation goes to its end."""
    relay = Garbling(site, mode, role, -1, b"")
    _, joined = join(plan_for(plan, mode), relay)
    assert read_all(joined, relay) == b"hello"
    assert relay.passed > 2000


def plan_for(plan: JoinPlan, mode: Mode) -> JoinPlan:
    return replace(plan, mode=mode, retry=None)


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("mode", get_args(Mode))
@UNHURRIED
@given(
    at=st.integers(0, 2600),
    change=st.one_of(
        st.binary(max_size=8), st.sampled_from([ConnectionResetError(104, "reset"), TimeoutError(), OSError(113, "x")])
    ),
)
def test_a_line_that_changes_something(
    site: Site, plan: JoinPlan, mode: Mode, role: Role, at: int, change: bytes | OSError
) -> None:
    relay = Garbling(site, mode, role, at, change)
    with typed_errors_only():
        _, joined = join(plan_for(plan, mode), relay)
        read_all(joined, relay)


# --- frames -----------------------------------------------------------------------------------------------------------

STRANGE_TEXT: Final = [
    "",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "x" * 3000,
    "\0",
    "dns:func2.demo",
    "demo",
    "client",
    "server",
]
STRANGE_NUMBERS: Final = [0, -1, 2**63, 10**300, 10**400, 1e308, float("inf"), float("nan"), 0.5, True]
ANYTHING: Final = st.recursive(
    st.none() | st.booleans() | st.sampled_from(STRANGE_NUMBERS) | st.sampled_from(STRANGE_TEXT) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS: Final = (
    *(
        "route",
        "party",
        "identity",
        "deadline",
        "peer_seen",
        "n",
        "pairing",
        "peer",
        "role",
        "mode",
        "ticket",
        "limits",
    ),
    *("code", "reason", "retry_after", "reconnect_in"),
)
GOOD: Final[dict[int, dict[str, Any]]] = {
    0x11: {"route": "demo", "party": "func1", "identity": "dns:func1.demo", "deadline": 60, "peer_seen": None},
    0x12: {"n": 1},
    0x13: {
        "pairing": "0",
        "route": "demo",
        "peer": "dns:func2.demo",
        "role": "client",
        "mode": "handoff",
        "limits": {},
    },
    0x14: {"code": "limit", "reason": "why", "retry_after": 1},
    0x15: {"reconnect_in": 1},
}


def framed(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body) & 0xFFFF) + body[:0xFFFF]


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """One frame, right but for what is drawn."""
    kind = draw(st.sampled_from(sorted(GOOD)) | st.integers(0, 255))
    body = dict(GOOD.get(kind, {}))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        body[key] = draw(ANYTHING)
    return framed(kind, json.dumps(body).encode())


NESTED: Final = b'{"n":' * 680
TWICE: Final = b'{"n": 1, "n": 2}'


@UNHURRIED
@given(st.lists(frames() | st.binary(max_size=40), min_size=1, max_size=5), st.booleans())
@example([framed(0x13, b"[" * 4096)], False)
@example([framed(0x12, NESTED)], False)
@example([framed(0x12, TWICE)], True)
@example([framed(0x12, b'{"n": ' + b"9" * 4000 + b"}")], True)
@example([framed(0x11, b"\xff\xfe")], True)
@example([framed(0x14, json.dumps({"code": "limit", "reason": "x", "retry_after": 1e308}).encode())], True)
@example([framed(0x13, json.dumps({**GOOD[0x13], "mode": "ticket", "ticket": "\u00e9"}).encode())], True)
def test_frames_of_any_kind(site: Site, plan: JoinPlan, said: list[bytes], then_ends: bool) -> None:
    def answer(relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            relay.tls.write(b"".join(said))
            if then_ends:
                relay.tls.send_eof()

    with typed_errors_only():
        for mode in get_args(Mode):
            relay = FakeRelay(site, answer)
            relay.peer = peer(site)
            with typed_errors_only():
                join(replace(plan, mode=mode), relay)


# --- certificates -----------------------------------------------------------------------------------------------------


def meet(site: Site, credential: Credential, role: Role) -> Engine:
    """The inner TLS of func1 in ``role`` with a function that shows ``credential``; raises ssl.SSLError."""
    cert, key = credential.write(site.directory, "strange")
    mine = Engine(inner_context(role, *site.paths["func1"], site.ca_path), server_side=role == "server")
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "client" else ssl.PROTOCOL_TLS_CLIENT)
    other.check_hostname = False
    other.verify_mode = ssl.CERT_NONE
    other.load_cert_chain(cert, key)
    if role == "client":
        other.verify_mode = ssl.CERT_REQUIRED
        other.load_verify_locations(site.ca_path)
    theirs = Engine(other, server_side=role == "client")
    for _ in range(4):
        mine_done, theirs_done = mine.handshake(), False
        if data := mine.take():
            theirs.feed(data)
        theirs_done = theirs.handshake()
        if data := theirs.take():
            mine.feed(data)
        if mine_done and theirs_done:
            return mine
    raise AssertionError("no handshake")


ODD: Final = [
    b"\xff.demo",
    b"func2.demo\0.evil",
    b"",
    b"\x1b[2J",
    b"*.demo",
    b"func2.demo.",
    "größe.demo".encode(),
    b"\n",
]


@pytest.mark.parametrize("role", get_args(Role))
@settings(deadline=None, max_examples=60)
@given(
    dns=st.lists(st.sampled_from(ODD) | st.binary(max_size=20), max_size=3),
    uris=st.lists(st.sampled_from(ODD) | st.binary(max_size=20), max_size=2),
    emails=st.lists(st.binary(max_size=10), max_size=1),
    raw=st.binary(max_size=10),
)
@example(dns=[b"\xff.demo"], uris=[], emails=[], raw=b"")
@example(dns=[], uris=[b"\xff"], emails=[b"\xff"], raw=b"")
@example(dns=[b"func2.demo"], uris=[], emails=[], raw=der(0x87, b"\1\2\3"))
@example(dns=[b"x%d.demo" % number for number in range(3500)], uris=[], emails=[], raw=b"")
def test_names_of_any_octets(
    site: Site, role: Role, dns: list[bytes], uris: list[bytes], emails: list[bytes], raw: bytes
) -> None:
    credential = site.ca.odd(san_der(dns=dns, uris=uris, emails=emails, raw=raw))
    try:
        engine = meet(site, credential, role)
    except ssl.SSLError:
        return  # OpenSSL itself wants nothing of it, which the core translates
    expected = "dns:other.demo" if b"func2.demo" in [one.lower() for one in dns] else "dns:func2.demo"
    with pytest.raises(PeerIdentityMismatch) as caught:
        check_peer(read_selectors(expected), names_of_peer(engine.tls))
    with typed_errors_only():
        raise caught.value


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("field", ["AIA", "CRL points", "subject"])
def test_octets_elsewhere_than_in_names(site: Site, role: Role, field: str) -> None:
    """ssl decodes those, too, whether somebody asks for them or not."""
    from cryptography import x509

    uri = b"\x86\x04\xff\xfe\xfd\xfc"
    values = {
        "AIA": ("1.3.6.1.5.5.7.1.1", der(0x30, der(0x30, bytes.fromhex("06082b06010505073002") + uri))),
        "CRL points": ("2.5.29.31", der(0x30, der(0x30, der(0xA0, der(0xA0, uri))))),
    }
    credential = site.ca.party(dns=["func2.demo"])
    if field in values:
        oid, value = values[field]
        extra = [x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)]
        credential = site.ca.odd([x509.DNSName("func2.demo")], extra=extra)
    else:
        strange = der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403") + der(0x0C, b"\xff\xfe"))))

        def edit(parts: list[bytes]) -> None:
            parts[5] = strange

        octets = site.ca.rework(credential, edit)
        certificate = x509.load_der_x509_certificate(octets)
        credential = replace(credential, certificate=certificate, chain=(certificate, *credential.chain[1:]))
    try:
        engine = meet(site, credential, role)
    except ssl.SSLError:
        return
    with pytest.raises(PeerIdentityMismatch, match="no usable name"):
        check_peer(read_selectors("dns:func2.demo"), names_of_peer(engine.tls))
