"""The core of the clients without a network: a relay of a few lines that is right in everything but one."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from frelay.client.core import Joined, Joining, Plan
from frelay.client.engine import Engine
from frelay.client.retry import Retry
from frelay.client.steps import Close, Endpoint, Open, Pause, Receive, Resolve, Send, Step, drive
from frelay.client.wire import inner_context
from frelay.errors import HandOffFailed, Refused, RelayUnreachable
from frelay.protocol import messages
from frelay.protocol.messages import Join, Leave, Message, Mode, Paired, Pong, Waiting
from frelay.protocol.session import RelaySession
from rig import Site

WAITING = Waiting("demo", "func1", "dns:func1.demo", 60.0, None)
PAIRED = Paired("0", "demo", "dns:func2.demo", "client", "handoff")


class FakeRelay:
    """Answers the steps of one joining; ``answer`` is called for each message, and may call :meth:`say`."""

    def __init__(self, site: Site, answer: Callable[[FakeRelay, Message], None]) -> None:
        self.site = site
        self.answer = answer
        self.chunk = 65536
        self.now = 0.0
        self.heard: list[Message] = []
        self.opened: list[Endpoint] = []
        self.refusing: set[str] = set()
        self.pauses: list[float] = []
        self.peer: Engine | None = None
        self._connect()

    def _connect(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.site.relay_paths)
        context.set_alpn_protocols(["frelay/1"])
        context.num_tickets = 0
        self.tls = Engine(context, server_side=True)
        self.session = RelaySession()
        self.is_raw = self.is_up = False
        self.out = b""

    def say(self, *said: Message) -> None:
        """Several messages in one TLS record."""
        self.tls.write(b"".join(self.session.send(message) for message in said))

    def hand_off(self) -> None:
        self.say(PAIRED)
        self.tls.send_eof()

    def perform(self, step: Step) -> Any:
        match step:
            case Resolve(_, port, _):
                return [Endpoint(socket.AF_INET, (host, port)) for host in ("192.0.2.1", "192.0.2.2")]
            case Open(_, endpoint, patience):
                self.opened.append(endpoint)
                if endpoint.sockaddr[0] in self.refusing:
                    self.now += patience
                    raise TimeoutError("timed out")
                return self._connect()
            case Send(_, data, _):
                return self._take(data)
            case Receive(_, patience):
                data, self.out = self.out[: self.chunk], self.out[self.chunk :]
                if not data:
                    self.now += patience
                    raise TimeoutError("timed out")
                return data
            case Close():
                return None
            case Pause(seconds):
                self.pauses.append(seconds)
                self.now += seconds
                return None
            case _:
                raise AssertionError(step)

    def _take(self, data: bytes) -> None:
        if self.is_raw and self.peer is not None:
            self._meet(data)
            return
        self.tls.feed(data)
        if not self.is_up:
            self.is_up = self.tls.handshake()
        said: bytes | None = None
        while self.is_up and (said := self.tls.read(65536)):
            for message in self.session.receive(said):
                self.heard.append(message)
                self.answer(self, message)
        self.out += self.tls.take()
        self.is_raw = said == b""  # its close_notify

    def _meet(self, data: bytes) -> None:
        assert self.peer is not None
        self.peer.feed(data)
        if self.peer.handshake():
            self.peer.write(b"hello")
        self.out += self.peer.take()


@pytest.fixture
def plan(site: Site) -> Plan:
    cert, key = site.paths["func1"]
    return Plan.make("localhost:9001", cert=cert, key=key, ca=site.ca_path, peer="dns:func2.demo")


def peer(site: Site, below: Engine | None = None) -> Engine:
    return Engine(inner_context("server", *site.paths["func2"], site.ca_path), server_side=True, below=below)


def join(plan: Plan, relay: FakeRelay) -> tuple[Joining, Joined]:
    joining = Joining(plan, lambda: relay.now)
    return joining, drive(joining.steps(), relay.perform, None)


def pair_at_once(relay: FakeRelay, message: Message) -> None:
    if isinstance(message, Join):
        relay.say(WAITING)
        relay.hand_off()


@pytest.mark.parametrize("chunk", [65536, 100, 1])
def test_it_joins_whatever_the_pieces(site: Site, plan: Plan, chunk: int) -> None:
    relay = FakeRelay(site, pair_at_once)
    relay.chunk, relay.peer = chunk, peer(site)
    _, joined = join(plan, relay)
    assert joined.engine is not None
    while (data := joined.engine.read(100)) is None:
        joined.engine.feed(relay.perform(Receive("outer", 1.0)))
    assert data == b"hello"


def test_a_ping_is_answered(site: Site, plan: Plan) -> None:
    def answer(relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            relay.say(WAITING)
            relay.tls.write(relay.session.ping())
        elif isinstance(message, Pong):
            relay.hand_off()

    relay = FakeRelay(site, answer)
    relay.peer = peer(site)
    join(plan, relay)
    assert relay.heard[1:] == [Pong(1)]


def test_the_other_functions_bytes_may_follow_paired_at_once(site: Site, plan: Plan) -> None:
    """In a tunnel: in the very record that PAIRED came in."""

    def answer(relay: FakeRelay, message: Message) -> None:
        assert isinstance(message, Join)
        said = relay.session.send(WAITING) + relay.session.send(replace(PAIRED, mode="tunnel", role="server"))
        client = Engine(inner_context("client", *site.paths["func2"], site.ca_path))
        client.handshake()
        relay.tls.write(said + client.take())
        relay.peer = client

    class Tunnel(FakeRelay):
        def _take(self, data: bytes) -> None:
            if self.peer is None:
                super()._take(data)
                return
            self.tls.feed(data)
            while said := self.tls.read(65536):
                self.peer.feed(said)
            self.peer.handshake()
            self.tls.write(self.peer.take())
            self.out += self.tls.take()

    _, joined = join(replace(plan, mode="tunnel"), Tunnel(site, answer))
    assert joined.engine is not None
    assert not joined.engine.ends_with_fin


def test_a_raw_byte_before_our_close_notify_is_a_fault(site: Site, plan: Plan) -> None:
    """It would be lost in the TLS library; the promise that none comes is looked at, not relied on."""

    class Hasty(FakeRelay):
        def _take(self, data: bytes) -> None:
            super()._take(data)
            if self.tls.eof_was_sent:
                self.out += b"\x16\x03\x01"

    with pytest.raises(HandOffFailed, match="raw bytes before"):
        join(plan, Hasty(site, pair_at_once))


def test_application_data_after_paired_is_a_fault(site: Site, plan: Plan) -> None:
    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(WAITING, PAIRED)
        relay.tls.write(b"x")

    with pytest.raises(HandOffFailed, match="application data"):
        join(plan, FakeRelay(site, answer))


def test_another_mode_than_asked_for_is_a_fault(site: Site, plan: Plan) -> None:
    mode: Mode = "tunnel"

    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(WAITING, replace(PAIRED, mode=mode))

    with pytest.raises(HandOffFailed, match="mode tunnel"):
        join(plan, FakeRelay(site, answer))


def test_the_close_notify_that_never_comes_is_bounded(site: Site, plan: Plan) -> None:
    relay = FakeRelay(site, lambda relay, message: relay.say(WAITING, PAIRED))
    with pytest.raises(HandOffFailed, match="did not come"):
        join(plan, relay)
    assert relay.now == pytest.approx(30.0)


def test_all_addresses_share_the_time(site: Site, plan: Plan) -> None:
    """One that swallows every SYN leaves half of it to the next, and the error names both."""
    relay = FakeRelay(site, pair_at_once)
    relay.refusing = {"192.0.2.1"}
    relay.peer = peer(site)
    join(replace(plan, wait=20.0), relay)
    assert relay.now == pytest.approx(10.0)

    relay = FakeRelay(site, pair_at_once)
    relay.refusing = {"192.0.2.1", "192.0.2.2"}
    with pytest.raises(RelayUnreachable, match=r"192\.0\.2\.1:9001: timed out; 192\.0\.2\.2:9001: timed out"):
        join(replace(plan, wait=20.0), relay)
    assert relay.now == pytest.approx(20.0)


def test_a_retry_keeps_its_attempt_until_it_has_met_somebody(site: Site, plan: Plan) -> None:
    """The relay then knows that a stale leg is this function's own; once paired, the next try is another."""
    said = iter(["timeout", "timeout", "broken hand-off", "pair"])

    def answer(relay: FakeRelay, message: Message) -> None:
        if not isinstance(message, Join):
            return
        match next(said):
            case "timeout":
                relay.say(WAITING, messages.Refused("wait-timeout", "nobody came", 7.0))
            case "broken hand-off":
                relay.say(WAITING, PAIRED)
                relay.tls.write(b"x")
            case _:
                pair_at_once(relay, message)

    relay = FakeRelay(site, answer)
    relay.peer = peer(site)
    join(replace(plan, retry=Retry(first=1.0)), relay)
    attempts = [message.attempt for message in relay.heard if isinstance(message, Join)]
    assert attempts[0] == attempts[1] == attempts[2] != attempts[3]
    assert [pause > 7.0 for pause in relay.pauses] == [True, True, False]


def test_a_retry_ends_with_the_wait(site: Site, plan: Plan) -> None:
    """A pause that would outlast it is not begun: the last error comes now."""

    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(messages.Refused("queue-full", "try later", 60.0))

    relay = FakeRelay(site, answer)
    with pytest.raises(Refused, match="queue-full"):
        join(replace(plan, retry=Retry(), wait=50.0), relay)
    assert relay.pauses == []


def test_a_function_that_gives_up_while_it_waits_says_leave(site: Site, plan: Plan) -> None:
    relay = FakeRelay(site, lambda relay, message: relay.say(WAITING) if isinstance(message, Join) else None)
    joining = Joining(replace(plan, wait=5.0), lambda: relay.now)
    assert joining.last_words("outer") == b""
    with pytest.raises(Refused, match="wait-timeout: nobody came within 5 s"):
        drive(joining.steps(), relay.perform, None)
    relay.perform(Send("outer", joining.last_words("outer"), 1.0))
    assert relay.heard[-1] == Leave()
    assert joining.last_words("outer") == b"", "a last word is said once"
