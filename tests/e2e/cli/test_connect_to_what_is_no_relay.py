"""``frelay.connect`` at a server that is no relay, or at a relay that breaks the protocol: typed errors, and no hang.

Each of them is a small real server with one odd habit.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

import frelay
from frelay.client import blocking, joining
from frelay.client.contexts import inner_context
from frelay.client.steps import Send, Step
from frelay.protocol.messages import Message, Paired, Ping, Waiting
from support.certs import TestAuthority
from support.party import frame
from support.site import Site
from support.waiting import TIMEOUT
from support.wires import PAIRED, WAITING, fake_relay, options, read_frame, read_to_end


def connect(address: str, site: Site, **changes: Any) -> ssl.SSLSocket:
    return frelay.connect(address, **options(site, "func1", **changes))


@contextmanager
def plain_server(site: Site, script: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server without TLS."""

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(TIMEOUT)
            try:
                script(sock)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(TIMEOUT)
    assert not thread.is_alive()


# --- nobody, or somebody else -----------------------------------------------------------------------------------------


def test_a_closed_port(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(frelay.RelayUnreachable, match=rf"no connection to {address}: .*refused"):
        connect(address, site)


def test_a_server_without_tls(site: Site) -> None:
    def script(sock: socket.socket) -> None:
        sock.recv(10)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        while sock.recv(65536):
            pass

    with plain_server(site, script) as address, pytest.raises(frelay.RelayUnreachable, match="no TLS with"):
        connect(address, site)


def test_a_server_that_hangs_up_at_once(site: Site) -> None:
    with plain_server(site, lambda sock: None) as address, pytest.raises(frelay.RelayUnreachable, match="no TLS with"):
        connect(address, site)


@pytest.mark.load
def test_a_server_that_is_silent_from_the_start(site: Site) -> None:
    done = threading.Event()
    with plain_server(site, lambda sock: (sock.recv(1), done.wait(TIMEOUT), None)[-1]) as address:
        began = time.monotonic()
        with pytest.raises(frelay.RelayUnreachable, match=r"no TLS with .*timed out"):
            connect(address, site, wait=0.3)
        assert 0.25 < time.monotonic() - began < TIMEOUT
        done.set()


def test_a_relay_of_another_ca(site: Site) -> None:
    """We send it nothing before that check, not even our certificate."""
    stranger = TestAuthority("other CA")
    site.relay_paths = stranger.relay().write(site.directory, "other-relay")
    with (
        fake_relay(site, lambda tls: None) as address,
        pytest.raises(frelay.RelayUnreachable, match=r"is not to be trusted: .*local issuer"),
    ):
        connect(address, site)


@pytest.mark.parametrize("server_name", ["relay.example", "127.0.0.2"])
def test_a_relay_of_another_name(site: Site, server_name: str) -> None:
    with (
        fake_relay(site, lambda tls: None) as address,
        pytest.raises(frelay.RelayUnreachable, match=r"is not to be trusted: .*mismatch"),
    ):
        connect(address, site, server_name=server_name)


def test_an_expired_relay(site: Site) -> None:
    site.relay_paths = site.ca.expired(dns=["localhost"]).write(site.directory, "expired-relay")
    with (
        fake_relay(site, lambda tls: None) as address,
        pytest.raises(frelay.RelayUnreachable, match=r"is not to be trusted: certificate has expired"),
    ):
        connect(address, site, server_name="localhost")


def test_a_server_with_tls_1_2_at_best(site: Site) -> None:
    def change(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    with (
        fake_relay(site, lambda tls: None, change=change) as address,
        pytest.raises(frelay.RelayUnreachable, match="no TLS with"),
    ):
        connect(address, site)


def test_a_tls_server_that_knows_nothing_of_frelay(site: Site) -> None:
    """It would wait for a request while we wait for WAITING."""
    with (
        fake_relay(site, lambda tls: None, alpn=()) as address,
        pytest.raises(frelay.RelayUnreachable, match="is not a relay: it speaks TLS, but not frelay/1"),
    ):
        connect(address, site, wait=None)


# --- a relay that breaks its word before PAIRED -----------------------------------------------------------------------


def test_a_server_that_answers_join_with_something_else(site: Site) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        tls.recv(1)

    with (
        fake_relay(site, script) as address,
        pytest.raises(frelay.RelayUnreachable, match="no relay that speaks frelay/1"),
    ):
        connect(address, site)


@pytest.mark.parametrize("said", [b"", WAITING], ids=["before WAITING", "after WAITING"])
def test_a_relay_that_ends_without_a_verdict(site: Site, said: bytes) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(said)
        tls.unwrap()

    with (
        fake_relay(site, script) as address,
        pytest.raises(frelay.RelayUnreachable, match="ended the connection without an answer"),
    ):
        connect(address, site)


@pytest.mark.parametrize("linger", [False, True], ids=["FIN", "RST"])
def test_a_relay_that_dies_while_we_wait(site: Site, linger: bool) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(WAITING)
        if linger:
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with (
        fake_relay(site, script) as address,
        pytest.raises(frelay.RelayUnreachable, match="the connection to the relay broke"),
    ):
        connect(address, site)


@pytest.mark.parametrize("said", [b"", WAITING.replace(b'"deadline": 60', b'"deadline": 0')], ids=["JOIN", "WAITING"])
def test_a_relay_that_falls_silent_does_not_hold_us_for_ever(
    site: Site, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``wait=None`` the relay ends the waiting. But a relay that lost its power sends nothing, not even FIN."""
    monkeypatch.setattr(joining, "_STEP_TIMEOUT", 0.5)
    done = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(said)
        done.wait(TIMEOUT)

    with fake_relay(site, script) as address:
        with pytest.raises(frelay.RelayUnreachable, match=r"the relay was silent for 0\.5 s"):
            connect(address, site, wait=None)
        done.set()


@pytest.mark.load
def test_the_callers_wait_ends_before_the_relays(site: Site) -> None:
    done = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        _, join = read_frame(tls)
        assert 0 < join["wait"] <= 0.4
        tls.sendall(WAITING)
        done.wait(TIMEOUT)

    with fake_relay(site, script) as address:
        began = time.monotonic()
        with pytest.raises(frelay.Refused, match=r"nobody came within 0\.4 s") as caught:
            connect(address, site, wait=0.4)
        assert 0.35 < time.monotonic() - began < TIMEOUT
        assert (caught.value.code, caught.value.retry_after) == ("wait-timeout", 0.0)
        done.set()


def test_an_absurd_deadline_of_a_relay_is_no_error_of_ours(site: Site) -> None:
    """More seconds than a socket's timeout can hold."""
    absurd = {"route": "demo", "party": "func1", "identity": "dns:func1.demo", "deadline": 1e300, "peer_seen": None}

    told = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(frame("WAITING", absurd))
        # If the end came together with WAITING, the client would find it without waiting again.
        assert told.wait(TIMEOUT)
        tls.unwrap()

    with fake_relay(site, script) as address, pytest.raises(frelay.RelayUnreachable, match="without an answer"):
        connect(address, site, wait=None, on_status=lambda message: told.set())


def test_an_error_of_on_status_is_the_callers_own(site: Site) -> None:
    """An error of any type from ``on_status`` is not taken for an error of the network."""

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(WAITING)
        assert tls.recv(4)[0] == 3  # LEAVE

    def on_status(message: Message) -> None:
        raise TimeoutError("the caller's notification service timed out")

    with fake_relay(site, script) as address, pytest.raises(TimeoutError, match="the caller's notification"):
        connect(address, site, on_status=on_status)


# --- a relay that breaks its word after PAIRED ------------------------------------------------------------------------


def _after_paired(*, record: bytes = PAIRED, then: Callable[[ssl.SSLSocket], Any]) -> Callable[[ssl.SSLSocket], None]:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(WAITING)
        tls.sendall(record)
        then(tls)

    return script


def _reset(tls: ssl.SSLSocket) -> None:
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


HALF_A_FRAME: Final = frame("PING", {"n": 1})[:5]


@pytest.mark.parametrize(
    ("script", "match"),
    [
        (_after_paired(then=lambda tls: None), "the outer TLS broke instead of ending"),
        (_after_paired(then=_reset), "the outer TLS broke instead of ending"),
        (_after_paired(then=lambda tls: tls.sendall(b"x")), "application data after PAIRED"),
        (_after_paired(then=lambda tls: tls.sendall(frame("PING", {"n": 1}))), "application data after PAIRED"),
        (_after_paired(record=PAIRED + HALF_A_FRAME, then=lambda tls: tls.recv(1)), "application data after PAIRED"),
    ],
    ids=["FIN", "RST", "data", "frame", "half a frame in one breath"],
)
def test_no_clean_end_after_paired_is_a_failed_hand_off(
    site: Site, script: Callable[[ssl.SSLSocket], None], match: str
) -> None:
    """TESTPLAN 16, from the function's side: a truncation never counts as the relay's close_notify."""
    with fake_relay(site, script) as address, pytest.raises(frelay.HandOffFailed, match=match):
        connect(address, site)


def test_a_close_notify_that_does_not_come(site: Site) -> None:
    done = threading.Event()
    with fake_relay(site, _after_paired(then=lambda tls: done.wait(TIMEOUT))) as address:
        with pytest.raises(frelay.HandOffFailed, match="close_notify did not come"):
            connect(address, site, wait=0.4)
        done.set()


@pytest.mark.parametrize("verdict", ["PAIRED", "REFUSED"])
def test_a_verdict_in_one_breath_with_a_ping(site: Site, verdict: str) -> None:
    """A relay may write both at once. It gets its PONG, as when the two cross (docs/protocol.md, 4.3)."""
    refused = frame("REFUSED", {"code": "draining", "reason": "going away", "retry_after": 2})
    told: list[type[Message]] = []

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(WAITING + frame("PING", {"n": 7}) + (PAIRED if verdict == "PAIRED" else refused))
        assert read_frame(tls) == (2, {"n": 7})  # PONG
        try:
            tls.unwrap()
        except OSError:
            assert verdict == "REFUSED"

    with fake_relay(site, script) as address:
        if verdict == "REFUSED":
            with pytest.raises(frelay.Refused) as caught:
                connect(address, site, on_status=lambda message: told.append(type(message)))
            assert (caught.value.code, caught.value.reason, caught.value.retry_after) == ("draining", "going away", 2)
        else:
            with pytest.raises(frelay.PeerGone):
                connect(address, site, on_status=lambda message: told.append(type(message)))
            assert told == [Waiting, Ping, Paired]


def test_an_unknown_code_of_a_later_relay_reaches_the_caller(site: Site) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        tls.sendall(frame("REFUSED", {"code": "payment-required", "reason": "ask your bank", "retry_after": None}))

    with fake_relay(site, script) as address, pytest.raises(frelay.Refused, match="ask your bank") as caught:
        connect(address, site)
    assert (caught.value.code, caught.value.retry_after) == ("payment-required", None)


# --- the other function, seen from here -------------------------------------------------------------------------------


def _handed_off(then: Callable[[socket.socket], Any]) -> Callable[[ssl.SSLSocket], None]:
    """Act as a correct relay, and then as the other function."""
    return _after_paired(then=lambda tls: then(tls.unwrap()))


@pytest.mark.parametrize(
    "then",
    [
        lambda raw: None,
        _reset,
        lambda raw: raw.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
        lambda raw: raw.sendall(b"\x15\x03\x03\x00\x02\x02\x28"),
    ],
    ids=["FIN", "RST", "no TLS", "alert"],
)
def test_a_peer_that_is_gone_before_its_tls_is_up(site: Site, then: Callable[[socket.socket], Any]) -> None:
    with (
        fake_relay(site, _handed_off(then)) as address,
        pytest.raises(frelay.PeerGone, match=r"dns:func2\.demo went away before its TLS was up: .+"),
    ):
        connect(address, site)


def test_a_peer_that_is_silent_is_waited_for_within_the_callers_time(site: Site) -> None:
    done = threading.Event()
    with fake_relay(site, _handed_off(lambda raw: done.wait(TIMEOUT))) as address:
        with pytest.raises(frelay.PeerGone, match="timed out"):
            connect(address, site, wait=0.5)
        done.set()


def test_the_callers_time_may_run_out_between_the_hand_off_and_the_inner_tls(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer had come, so the error is that it was too slow, not that nobody came."""
    now, is_paired = [1000.0], threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    perform = blocking.Shell.perform

    def slowly(shell: blocking.Shell, step: Step) -> Any:
        result = perform(shell, step)
        if is_paired.is_set() and isinstance(step, Send):
            now[0] += TIMEOUT * 2  # this is our close_notify, the last record of the outer TLS
        return result

    monkeypatch.setattr(blocking.Shell, "perform", slowly)
    with (
        fake_relay(site, _handed_off(lambda raw: raw.recv(1))) as address,
        pytest.raises(frelay.PeerGone, match="no time is left"),
    ):
        connect(address, site, on_status=lambda message: isinstance(message, Paired) and is_paired.set())  # type: ignore[func-returns-value]


def test_a_peer_whose_certificate_nobody_vouches_for_gets_not_a_byte(site: Site) -> None:
    """Even if the relay trusts it: only we decide which function we talk to."""
    stranger = TestAuthority("other CA").party(dns=["func2.demo"]).write(site.directory, "stranger")
    received: list[bytes | str | None] = []

    def then(raw: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*stranger)
        context.num_tickets = 0
        try:
            with context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=False) as wire:
                received.append(wire.recv(1))
        except ssl.SSLError as error:
            received.append(error.reason)

    with fake_relay(site, _handed_off(then)) as address:
        with pytest.raises(frelay.PeerIdentityMismatch, match="not to be trusted") as caught:
            connect(address, site)
        assert caught.value.expected == "dns:func2.demo"
    assert received == ["TLSV1_ALERT_UNKNOWN_CA"]


def test_what_the_relay_says_about_the_peer_is_not_what_counts(site: Site) -> None:
    """PAIRED has dns:func2.demo, the certificate has dns:func3.demo: the certificate counts."""
    site.add("func3", site.ca.party(dns=["func3.demo"]))
    received: list[bytes | str | None] = []

    def then(raw: socket.socket) -> None:
        cert, key = site.paths["func3"]
        context = inner_context("server", cert, key, site.ca_path)
        with context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=False) as wire:
            try:
                received.append(wire.recv(1))
            except ssl.SSLError as error:
                received.append(type(error).__name__)

    with fake_relay(site, _handed_off(then)) as address:
        with pytest.raises(frelay.PeerIdentityMismatch, match=r"showed dns:func3\.demo") as caught:
            connect(address, site)
        assert caught.value.found[0] == "dns:func3.demo"
    # Neither a byte nor a clean end: for the other side this must not look like an empty stream.
    assert received == ["SSLEOFError"]


def test_a_relay_as_it_should_be_is_no_error_at_all(site: Site) -> None:
    """Without this test the servers above would prove nothing."""

    def then(raw: socket.socket) -> None:
        cert, key = site.paths["func2"]
        context = inner_context("server", cert, key, site.ca_path)
        with context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=False) as wire:
            assert read_to_end(wire) == b"question"
            wire.sendall(b"answer")

    with fake_relay(site, _handed_off(then)) as address, connect(address, site) as wire:
        wire.sendall(b"question")
        wire.shutdown(socket.SHUT_WR)
        assert read_to_end(wire) == b"answer"
