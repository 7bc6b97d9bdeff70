"""The joining without a network, with a relay of a few lines that does one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from frelay.client.contexts import inner_context
from frelay.client.joining import Joining
from frelay.client.options import JoinPlan
from frelay.client.peer import agreed_protocol
from frelay.client.proxy import Proxy
from frelay.client.retry import Retry
from frelay.client.steps import Close, Open, Receive, Send, Step, drive
from frelay.client.tls_engine import Engine
from frelay.errors import HandOffFailed, PeerGone, Refused, RelayTooOld, RelayUnreachable
from frelay.protocol import messages
from frelay.protocol.messages import Join, Leave, Message, Mode, Paired, Pong, Waiting
from support.fake_relay import PAIRED, WAITING, FakeRelay, join, make_plan, pair_at_once, peer
from support.site import Site


@pytest.fixture
def plan(site: Site) -> JoinPlan:
    return make_plan(site)


@pytest.mark.parametrize("chunk", [65536, 100, 1])
def test_it_joins_whatever_the_pieces(site: Site, plan: JoinPlan, chunk: int) -> None:
    relay = FakeRelay(site, pair_at_once)
    relay.chunk, relay.peer = chunk, peer(site)
    _, joined = join(plan, relay)
    assert joined.engine is not None
    while (data := joined.engine.read(100)) is None:
        joined.engine.feed(relay.perform(Receive("outer", 1.0)))
    assert data == b"hello"


def test_a_ping_is_answered(site: Site, plan: JoinPlan) -> None:
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


def test_the_other_functions_bytes_may_follow_paired_at_once(site: Site, plan: JoinPlan) -> None:
    """In a tunnel, and even in the same TLS record as PAIRED."""

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


def test_a_raw_byte_before_our_close_notify_is_a_fault(site: Site, plan: JoinPlan) -> None:
    """The TLS library would lose it. The relay promises to send none; we check that all the same."""

    class Hasty(FakeRelay):
        def _take(self, data: bytes) -> None:
            super()._take(data)
            if self.tls.eof_was_sent:
                self.out += b"\x16\x03\x01"

    with pytest.raises(HandOffFailed, match="raw bytes before"):
        join(plan, Hasty(site, pair_at_once))


def test_application_data_after_paired_is_a_fault(site: Site, plan: JoinPlan) -> None:
    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(WAITING, PAIRED)
        relay.tls.write(b"x")

    with pytest.raises(HandOffFailed, match="application data"):
        join(plan, FakeRelay(site, answer))


def test_another_mode_than_asked_for_is_a_fault(site: Site, plan: JoinPlan) -> None:
    mode: Mode = "tunnel"

    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(WAITING, replace(PAIRED, mode=mode))

    with pytest.raises(HandOffFailed, match="mode tunnel"):
        join(plan, FakeRelay(site, answer))


def test_the_close_notify_that_never_comes_is_bounded(site: Site, plan: JoinPlan) -> None:
    relay = FakeRelay(site, lambda relay, message: relay.say(WAITING, PAIRED))
    with pytest.raises(HandOffFailed, match="did not come"):
        join(plan, relay)
    assert relay.now == pytest.approx(30.0)


def test_all_addresses_share_the_time(site: Site, plan: JoinPlan) -> None:
    """An address that drops every SYN leaves half of the time to the next one, and the error names both."""
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


def test_a_retry_keeps_its_attempt_until_it_has_met_somebody(site: Site, plan: JoinPlan) -> None:
    """By the attempt the relay recognises a stale leg of this function; after a pairing it is a new one."""
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


def test_a_retry_ends_with_the_wait(site: Site, plan: JoinPlan) -> None:
    """If the pause would be longer than the rest of ``wait``, the last error is raised at once."""

    def answer(relay: FakeRelay, message: Message) -> None:
        relay.say(messages.Refused("queue-full", "try later", 60.0))

    relay = FakeRelay(site, answer)
    with pytest.raises(Refused, match="queue-full"):
        join(replace(plan, retry=Retry(), wait=50.0), relay)
    assert relay.pauses == []


def test_wait_may_end_when_paired(site: Site, plan: JoinPlan) -> None:
    """A listener's ``wait`` ends the waiting of a leg, and not the handshake of a caller that came at its end."""

    class Slow(FakeRelay):
        def _meet(self, data: bytes) -> None:
            self.now = 25.0
            super()._meet(data)

    for ends_when_paired in (True, False):
        relay = Slow(site, pair_at_once)
        relay.peer = peer(site)
        changed = replace(plan, wait=20.0, wait_ends_when_paired=ends_when_paired)
        if ends_when_paired:
            join(changed, relay)
        else:
            with pytest.raises(PeerGone, match="no time is left"):
                join(changed, relay)


def test_a_function_that_gives_up_while_it_waits_says_leave(site: Site, plan: JoinPlan) -> None:
    relay = FakeRelay(site, lambda relay, message: relay.say(WAITING) if isinstance(message, Join) else None)
    joining = Joining(replace(plan, wait=5.0), lambda: relay.now)
    assert joining.final_bytes("outer") == b""
    with pytest.raises(Refused, match="wait-timeout: nobody came within 5 s"):
        drive(joining.steps(), relay.perform, None)
    relay.perform(Send("outer", joining.final_bytes("outer"), 1.0))
    assert relay.heard[-1] == Leave()
    assert joining.final_bytes("outer") == b"", "a last word is said once"


@pytest.mark.parametrize("delay", [0.3, 0.7])
@pytest.mark.parametrize("retry", [None, Retry(tries=None, first=0.01)])
def test_the_relay_may_say_at_the_end_of_the_wait_why_nobody_came(
    site: Site, plan: JoinPlan, delay: float, retry: Retry | None
) -> None:
    """Its clock begins a little later than ours, and it knows of partner lists. But it gets half a second only."""

    class Late(FakeRelay):
        def perform(self, step: Step) -> Any:
            if isinstance(step, Receive) and not self.out and self.heard:
                if self.now + step.timeout < 5.0 + delay:
                    self.now += step.timeout
                    raise TimeoutError("timed out")
                self.now = 5.0 + delay
                self.say(messages.Refused("wait-timeout", "nobody came within 5 s; 1 leg was excluded", 0.0))
                self.out = self.tls.take()
            return super().perform(step)

    relay = Late(site, lambda relay, message: relay.say(WAITING) if isinstance(message, Join) else None)
    with pytest.raises(Refused) as caught:
        join(replace(plan, wait=5.0, retry=retry), relay)
    assert caught.value.reason == "nobody came within 5 s" + ("; 1 leg was excluded" if delay < 0.5 else "")
    assert relay.now == pytest.approx(5.0 + min(delay, 0.5))
    assert relay.pauses == [], "the wait is over, so nothing is tried again"


# --- answers in single bytes, and absurd numbers ----------------------------------------------------------------------


class Slow(FakeRelay):
    """Answers one byte at a time, each after nearly the whole timeout."""

    def perform(self, step: Step) -> Any:
        if isinstance(step, Receive):
            self.chunk = 1
            self.now += 20.0
            if self.now > 1000.0:
                raise AssertionError("nobody ends this")
        return super().perform(step)


def test_a_handshake_in_single_bytes_has_one_timeout(site: Site, plan: JoinPlan) -> None:
    relay = Slow(site, pair_at_once)
    with pytest.raises(RelayUnreachable, match="no TLS with localhost:9001: timed out"):
        join(plan, relay)
    assert relay.now <= 60.0


@pytest.mark.parametrize(("wait", "error"), [(None, RelayUnreachable), (25.0, Refused)])
def test_an_answer_of_a_proxy_in_single_bytes_has_one_timeout(
    site: Site, plan: JoinPlan, wait: float | None, error: type[Exception]
) -> None:
    """And ``wait`` ends it, which is for everything together."""

    class Proxying(Slow):
        def _take(self, data: bytes) -> None:
            self.out += b"HTTP/1.1 200 OK\r\nX-Filler: x\r\n\r\n"

    relay = Proxying(site, pair_at_once)
    with pytest.raises(error, match=r"no answer from the proxy|nobody came within 25 s"):
        join(replace(plan, proxy=Proxy("proxy", 3128), wait=wait), relay)
    assert relay.now <= 60.0


@pytest.mark.parametrize("retry_after", [1e308, 1e9, 2.0**63])
def test_an_absurd_retry_after_is_a_day(site: Site, plan: JoinPlan, retry_after: float) -> None:
    """time.sleep() does not accept such a number, and no service should sleep for thirty years."""
    said = iter([True, False])

    def answer(relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join) and next(said):
            relay.say(messages.Refused("draining", "much later", retry_after))
        elif isinstance(message, Join):
            pair_at_once(relay, message)

    relay = FakeRelay(site, answer)
    relay.peer = peer(site)
    join(replace(plan, retry=Retry()), relay)
    assert [86400 <= pause < 86401 for pause in relay.pauses] == [True]


def test_a_protocol_that_is_no_text_is_none_of_ours() -> None:
    """Some versions of OpenSSL give a client any octets that the server chose, without comparing them."""

    class Odd:
        def selected_alpn_protocol(self) -> str:
            return b"\xff".decode()

    assert agreed_protocol(Odd()) == ""  # type: ignore[arg-type]


# --- the first connection of a ticket ---------------------------------------------------------------------------------


class Ticketing(FakeRelay):
    """Sends a ticket, and receives it on the raw connection; then ``breaks`` happens to the first connection."""

    def __init__(self, site: Site, breaks: bytes | OSError | None) -> None:
        super().__init__(site, self._give)
        self.breaks = breaks
        self.peer = peer(site)
        self.took: bytes | None = None
        self.closed: list[str] = []

    def _give(self, relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            relay.say(WAITING, replace(PAIRED, mode="ticket", ticket="00" * 32))

    def perform(self, step: Step) -> Any:
        match step:
            case Open("raw"):
                return None
            case Send("raw", data) if self.took is None:
                self.took = data
                self.is_raw = True
                return None
            case Receive("outer") if self.took is not None:
                if isinstance(self.breaks, OSError):
                    raise self.breaks
                if self.breaks is not None:
                    return self.breaks
                self.tls.send_eof()
                return self.tls.take()
            case Close(connection):
                self.closed.append(connection)
                return None
            case _:
                return super().perform(step)


@pytest.mark.parametrize(
    "breaks",
    [
        None,
        b"",
        b"no TLS at all",
        b"\x17\x03\x03\x00\x20" + bytes(32),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(110, "Connection timed out"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_it_may_break_once_the_ticket_is_on_its_way(site: Site, plan: JoinPlan, breaks: bytes | OSError | None) -> None:
    relay = Ticketing(site, breaks)
    _, joined = join(replace(plan, mode="ticket"), relay)
    assert relay.took == b"FRELAY/1 " + b"00" * 32 + b"\n"
    assert joined.connection == "raw"
    assert relay.closed == ["outer"]


def test_where_the_relay_has_gone_with_it_the_raw_connection_fails_too(site: Site, plan: JoinPlan) -> None:
    class Gone(Ticketing):
        def perform(self, step: Step) -> Any:
            if isinstance(step, Receive) and step.connection == "raw":
                return b""
            return super().perform(step)

    with pytest.raises(PeerGone, match="went away before its TLS was up"):
        join(replace(plan, mode="ticket"), Gone(site, b""))


def test_a_relay_that_says_nothing_more_has_not_taken_it(site: Site, plan: JoinPlan) -> None:
    with pytest.raises(HandOffFailed, match="did not take its own ticket in time"):
        join(replace(plan, mode="ticket"), Ticketing(site, TimeoutError("timed out")))


def test_what_breaks_before_the_ticket_is_sent_is_a_fault(site: Site, plan: JoinPlan) -> None:
    class Unreachable(Ticketing):
        def perform(self, step: Step) -> Any:
            if isinstance(step, Send) and step.connection == "raw":
                raise BrokenPipeError(32, "Broken pipe")
            return super().perform(step)

    with pytest.raises(HandOffFailed, match=r"could not be sent: .*Broken pipe"):
        join(replace(plan, mode="ticket"), Unreachable(site, None))


@pytest.mark.parametrize("said", [WAITING, PAIRED], ids=["waiting", "paired"])
@pytest.mark.parametrize("echo", [None, "another", "job"])
def test_a_relay_that_does_not_know_keys_is_left(
    site: Site, plan: JoinPlan, echo: str | None, said: Waiting | Paired
) -> None:
    """It would pair with any function. The last relay knows keys and no partner lists."""

    def answer(relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            relay.say(replace(said, meet=echo))

    relay = FakeRelay(site, answer)
    keyed = replace(plan, meet="job", partner=("dns:func2.demo",), retry=Retry(tries=3))
    joining = Joining(keyed, lambda: relay.now)
    with pytest.raises(RelayTooOld, match="update the relay"):
        drive(joining.steps(), relay.perform, None)
    assert len(relay.heard) == 1, "it did not try again"
    assert bool(joining.final_bytes("outer")) is (said is WAITING), "LEAVE, where a place waits for it"


def test_a_relay_that_repeats_the_key_is_trusted_with_it(site: Site, plan: JoinPlan) -> None:
    def answer(relay: FakeRelay, message: Message) -> None:
        if isinstance(message, Join):
            assert (message.meet, message.partner) == ("job", ("dns:func2.demo",))
            relay.say(replace(WAITING, party=None, meet="job", partner=True))
            relay.hand_off(replace(PAIRED, meet="job", partner=True))

    relay = FakeRelay(site, answer)
    relay.peer = peer(site)
    _, joined = join(replace(plan, meet="job", partner=("dns:func2.demo",)), relay)
    assert joined.paired.meet == "job"
