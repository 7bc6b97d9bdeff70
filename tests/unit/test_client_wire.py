"""A Wire ends in good order: each direction alone, nothing lost, nothing forged, and no cut taken for an end.

The two functions share one TCP connection on loopback, without a relay, so the kernel's behaviour is tested too.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from frelay.client.contexts import inner_context
from frelay.client.peer import check_peer, read_peer, read_selectors
from frelay.client.wire import Wire
from frelay.errors import PeerIdentityMismatch
from support.certs import TestAuthority

TIMEOUT: Final = 20.0


class Pair:
    """A client's and a server's wire, joined by one TCP connection."""

    def __init__(self, directory: Path) -> None:
        ca = TestAuthority()
        self.ca = ca.write(directory)
        self.paths = {name: ca.party(dns=[f"{name}.demo"]).write(directory, name) for name in ("client", "server")}
        self.client, self.server = self._handshake(*_tcp_pair())

    def _handshake(self, one: socket.socket, two: socket.socket) -> tuple[Wire, Wire]:
        client = inner_context("client", *self.paths["client"], self.ca)
        server = inner_context("server", *self.paths["server"], self.ca)
        wires: list[ssl.SSLSocket] = []
        thread = threading.Thread(
            target=lambda: wires.append(server.wrap_socket(two, server_side=True, suppress_ragged_eofs=False))
        )
        thread.start()
        try:
            wires.append(client.wrap_socket(one, suppress_ragged_eofs=False))
        finally:
            thread.join()
        ends = {wire.server_side: wire for wire in wires if isinstance(wire, Wire)}
        return ends[False], ends[True]

    def close(self) -> None:
        self.client.abandon()
        self.server.abandon()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=TIMEOUT)
        two, _ = listener.accept()
    two.settimeout(TIMEOUT)
    return one, two


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def read_to_end(wire: ssl.SSLSocket) -> bytes:
    return b"".join(iter(lambda: wire.recv(65536), b""))


@contextmanager
def running(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run ``function`` in a thread meanwhile; after the block the list has its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    yield results
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def duplicate(sock: socket.socket) -> socket.socket:
    """The same connection without its TLS."""
    raw = socket.socket(fileno=socket.dup(sock.fileno()))
    raw.settimeout(TIMEOUT)
    return raw


def wait_readable(sock: socket.socket, count: int) -> None:
    """Wait until the kernel has ``count`` bytes or more to read, and leave them there."""
    deadline = time.monotonic() + TIMEOUT
    with duplicate(sock) as raw:
        while len(raw.recv(count, socket.MSG_PEEK)) < count:
            assert time.monotonic() < deadline


HALF_CLOSES: Final[dict[str, Callable[[Wire], None]]] = {
    "send_eof": Wire.send_eof,
    "shutdown(SHUT_WR)": lambda wire: wire.shutdown(socket.SHUT_WR),
}
with_both_half_closes = pytest.mark.parametrize("half_close", HALF_CLOSES.values(), ids=HALF_CLOSES.keys())


# --- half-close -------------------------------------------------------------------------------------------------------


@with_both_half_closes
def test_the_reply_comes_after_the_end_of_the_question(pair: Pair, half_close: Callable[[Wire], None]) -> None:
    """TESTPLAN 25."""
    pair.client.sendall(b"question")
    half_close(pair.client)
    assert read_to_end(pair.server) == b"question"
    pair.server.sendall(b"answer")
    half_close(pair.server)
    assert read_to_end(pair.client) == b"answer"
    assert pair.client.recv(1) == b"", "an end stays an end"
    assert pair.server.recv(1) == b""


@pytest.mark.load
@with_both_half_closes
def test_what_was_already_under_way_survives_the_half_close(pair: Pair, half_close: Callable[[Wire], None]) -> None:
    """``SSLSocket.unwrap`` would find the other side's data and break TLS ("application data after close notify")."""
    data = bytes(range(256)) * 300
    pair.server.sendall(data)
    wait_readable(pair.client, 60000)
    half_close(pair.client)
    assert read_to_end(pair.server) == b""
    pair.server.send_eof()
    assert read_to_end(pair.client) == data


def test_a_record_read_in_part_survives_the_half_close(pair: Pair) -> None:
    """OpenSSL has decrypted it already, but we have not read it yet."""
    data = bytes(range(256)) * 64  # one record, which the first read decrypts as a whole
    pair.server.sendall(data)
    assert pair.client.recv(100) == data[:100]
    before = pair.client.pending()
    assert before == len(data) - 100
    pair.client.send_eof()
    assert pair.client.pending() == before
    assert pair.client.recv(100) == data[100:200]
    buffer = bytearray(50)
    assert pair.client.recv_into(buffer, 1000) == 50
    assert buffer == data[200:250]
    assert pair.client.recv_into(memoryview(buffer)[:20]) == 20
    assert buffer[:20] == data[250:270]
    assert pair.client.recv_into(buffer, 5) == 5, "no more than was asked for, room or not"
    assert buffer[:7] == data[270:275] + data[255:257]
    pair.server.sendall(b"more")
    pair.server.send_eof()
    assert read_to_end(pair.client) == data[275:] + b"more"


@pytest.mark.load
def test_a_record_that_came_in_half_survives_the_half_close(tmp_path: Path) -> None:
    """OpenSSL has read the header and some of the body; the rest comes after our end."""
    one, two = _tcp_pair()
    near, far = _tcp_pair()
    relayed = _Relayed(two, near)
    pair = Pair.__new__(Pair)
    base = Pair(tmp_path)
    pair.paths, pair.ca = base.paths, base.ca
    base.close()
    with relayed:
        pair.client, pair.server = pair._handshake(one, far)
        relayed.hold_back(from_server=10)
        pair.server.sendall(b"half of this is late")
        pair.client.settimeout(0)
        wait_readable(pair.client, 10)
        with pytest.raises(ssl.SSLWantReadError):
            pair.client.recv(100)
        pair.client.settimeout(TIMEOUT)
        pair.client.send_eof()
        relayed.let_go()
        assert pair.client.recv(100) == b"half of this is late"
        pair.server.send_eof()
        assert read_to_end(pair.client) == b""
        pair.close()


class _Relayed:
    """Copies bytes between two sockets, and can hold back the last bytes of the server."""

    def __init__(self, one: socket.socket, two: socket.socket) -> None:
        self._one, self._two = one, two
        self._limit: int | None = None
        self._held = b""
        self._came = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> _Relayed:
        self._threads = [
            threading.Thread(target=self._carry, args=ends, daemon=True)
            for ends in ((self._one, self._two), (self._two, self._one))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._one.close()
        self._two.close()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                with self._lock:
                    if source is self._two and self._limit is not None:
                        data, self._held = data[: self._limit], data[self._limit :]
                        self._limit = None
                        sink.sendall(data)
                        self._came.set()
                    else:
                        sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def hold_back(self, *, from_server: int) -> None:
        self._limit = from_server

    def let_go(self) -> None:
        with self._lock:
            self._one.sendall(self._held)


def test_ending_twice_is_ending_once(pair: Pair) -> None:
    pair.client.send_eof()
    pair.client.send_eof()
    pair.client.shutdown(socket.SHUT_WR)
    assert read_to_end(pair.server) == b""
    pair.server.sendall(b"x")
    assert pair.client.recv(1) == b"x"


def test_nothing_can_be_sent_after_the_end(pair: Pair) -> None:
    pair.client.send_eof()
    with pytest.raises(OSError, match=r".+"):
        pair.client.sendall(b"too late")
    pair.server.send_eof()
    assert read_to_end(pair.client) == b""
    with pytest.raises(OSError, match=r".+"):
        pair.client.sendall(b"and in the clear at that")
    assert read_to_end(pair.server) == b""


@pytest.mark.load
def test_the_wire_stays_in_tls_after_both_ends(pair: Pair) -> None:
    """``unwrap`` leaves TLS silently: we would take bytes that a relay forges for the other function's."""
    with duplicate(pair.server) as raw:
        # close_notify without FIN, as from a function that still owns its socket; the relay adds its own bytes.
        pair.server._unsent_close_notify = pair.server._make_close_notify(pair.server._sslobj)
        raw.sendall(pair.server._unsent_close_notify + b"made up by a relay")
        wait_readable(pair.client, 30)
        pair.client.send_eof()
        assert read_to_end(pair.client) == b""
        assert pair.client.recv(100) == b""
        assert pair.client.version() == "TLSv1.3"


@pytest.mark.load
def test_shutdown_of_both_directions_tells_the_other_side(pair: Pair) -> None:
    """``SSLSocket.shutdown`` would only send FIN, and read TLS records as if they were data."""
    pair.server.sendall(b"never read")
    wait_readable(pair.client, 10)
    pair.client.shutdown(socket.SHUT_RDWR)
    assert read_to_end(pair.server) == b""
    assert pair.client.recv(100) in (b"never read", b"")


def test_the_end_waits_for_room(pair: Pair) -> None:
    """A full socket has no room for a close_notify; without it the reader would see a cut."""
    junk = _fill(pair.client)
    with pytest.raises(ssl.SSLWantWriteError):
        pair.client.send_eof()
    pair.client.settimeout(0.05)
    with pytest.raises(TimeoutError):
        pair.client.send_eof()
    pair.client.settimeout(TIMEOUT)
    with duplicate(pair.server) as raw:
        with running(lambda: b"".join(iter(lambda: raw.recv(65536), b""))) as received:
            pair.client.send_eof()
        assert len(received[0]) > junk
        # One record, which looks like application data as every record of TLS 1.3, and then FIN.
        assert received[0][junk:][:3] == b"\x17\x03\x03"


def _fill(wire: Wire) -> int:
    """Fill the connection with zeros outside of TLS, and leave ``wire`` non-blocking; returns how many."""
    wire.settimeout(0)
    sent = 0
    while select.select([], [wire], [], 0.1)[1]:
        with suppress(BlockingIOError):
            while True:
                sent += socket.socket.send(wire, bytes(1024))
    # "Writable" means more than room for one byte.
    with suppress(BlockingIOError):
        while True:
            sent += socket.socket.send(wire, bytes(1))
    return sent


def test_a_send_given_up_in_mid_record_is_a_cut(pair: Pair) -> None:
    """The written part of the record cannot be taken back, so no clean end may follow."""
    pair.client.settimeout(0)
    with pytest.raises(ssl.SSLWantWriteError):
        pair.client.sendall(bytes(64 * 1024 * 1024))
    with pytest.raises(ssl.SSLWantWriteError):
        pair.client.send_eof()
    pair.client.close()
    with pytest.raises(OSError, match=r"EOF occurred in violation of protocol|reset"):
        read_to_end(pair.server)


# --- close ------------------------------------------------------------------------------------------------------------


def test_close_is_an_end_and_not_a_cut(pair: Pair) -> None:
    pair.client.sendall(b"all that I have")
    pair.client.close()
    assert read_to_end(pair.server) == b"all that I have"


def test_leaving_the_with_block_is_an_end(pair: Pair) -> None:
    with pair.client as wire:
        wire.sendall(b"x")
    assert read_to_end(pair.server) == b"x"
    assert pair.client.fileno() == -1
    pair.client.close()


def test_a_missing_close_notify_is_an_error(pair: Pair) -> None:
    """A crash, or an attacker in the network, sends FIN alone."""
    pair.client.sendall(b"the first half")
    pair.client.abandon()
    assert pair.server.recv(100) == b"the first half"
    with pytest.raises(ssl.SSLEOFError):
        pair.server.recv(100)


def test_a_missing_close_notify_is_an_error_after_our_own_end_too(pair: Pair) -> None:
    pair.server.send_eof()
    pair.client.sendall(b"the first half")
    assert pair.server.recv(100) == b"the first half"
    socket.socket.shutdown(pair.client, socket.SHUT_WR)
    with pytest.raises(ssl.SSLEOFError):
        pair.server.recv(100)


def test_a_reset_is_an_error(pair: Pair) -> None:
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.client.abandon()
    # Some versions of the ssl module raise ConnectionResetError, others SSLEOFError.
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        pair.server.recv(100)


BULK: Final = bytes(range(256)) * 4096


@pytest.mark.parametrize("writer", ["client", "server"])
def test_a_writer_that_never_reads_loses_nothing_at_close(pair: Pair, writer: str) -> None:
    """Its socket holds no unread session ticket, which would turn the close into RST and destroy the last bytes."""
    one, two = (pair.client, pair.server) if writer == "client" else (pair.server, pair.client)
    two.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    with running(lambda: read_to_end(two)) as received:
        one.sendall(BULK)
        one.close()
    assert received == [BULK]


@pytest.mark.load
@pytest.mark.parametrize("what", ["data", "end", "data and end"])
def test_what_nobody_read_costs_the_writer_nothing(pair: Pair, what: str) -> None:
    """The other side has sent data, or only its close_notify; to close with that unread would be an RST."""
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    if "data" in what:
        pair.server.sendall(bytes(5000))
    if "end" in what:
        pair.server.send_eof()
    wait_readable(pair.client, 20)
    with running(lambda: read_to_end(pair.server)) as received:
        pair.client.sendall(BULK)
        pair.client.close()
    assert received == [BULK]


def test_there_are_no_session_tickets(pair: Pair) -> None:
    pair.server.sendall(b"x")
    assert pair.client.recv(1) == b"x"
    session = pair.client.session
    assert session is None or not session.has_ticket


def test_closing_one_owner_of_two_ends_nothing(pair: Pair) -> None:
    """``makefile`` makes a second owner, as it does for any socket."""
    stream = pair.client.makefile("wb")
    pair.client.close()
    stream.write(b"written after close()")
    stream.close()
    assert read_to_end(pair.server) == b"written after close()"
    assert pair.client.fileno() == -1


def test_closing_does_not_wait_long_for_a_peer_that_stays(pair: Pair) -> None:
    """It waits a moment for the other side's end, not for ever."""
    with running(pair.client.close):
        pass
    assert pair.client.fileno() == -1
    assert pair.server.recv(1) == b""


def test_closing_does_not_wait_for_a_peer_that_is_gone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead connection will never acknowledge the rest."""
    monkeypatch.setattr("frelay.client.wire.LINGER_QUIET", TIMEOUT * 10)
    monkeypatch.setattr("frelay.client.wire.LINGER_LIMIT", TIMEOUT * 10)
    pair.server.abandon()
    with running(pair.client.close):
        pass
    assert pair.client.fileno() == -1


def test_a_socket_that_does_not_block_does_not_at_close_either(pair: Pair) -> None:
    pair.client.settimeout(0)
    pair.client.close()
    assert read_to_end(pair.server) == b""


# --- who the peer is --------------------------------------------------------------------------------------------------


def test_the_peers_names_are_read_from_its_certificate(pair: Pair) -> None:
    names = read_peer(pair.client.getpeercert(), pair.client.getpeercert(True))
    texts = [str(name) for name in names]
    assert texts[0] == "dns:server.demo"
    assert texts[1].startswith("spki:sha256:")
    assert check_peer(read_selectors(["dns:other.demo", texts[1]]), names) == names[1]
    assert check_peer(read_selectors("dns:*.demo"), names) == names[0]
    with pytest.raises(PeerIdentityMismatch, match=r"dns:server\.demo.*where dns:a\.demo or dns:b\.demo") as caught:
        check_peer(read_selectors(["dns:a.demo", "dns:b.demo"]), names)
    assert caught.value.found == tuple(texts)


def test_no_selector_at_all_is_an_error_and_not_everybody() -> None:
    with pytest.raises(ValueError, match="peer= names nobody"):
        read_selectors([])
    with pytest.raises(ValueError, match="is not a selector"):
        read_selectors("func2.demo")
