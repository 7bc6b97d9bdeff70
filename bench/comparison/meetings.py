"""Other relays that both ends dial: syncthing's strelaysrv, and the transit relay of magic-wormhole.

They are of the same kind as frelay, so for a pair both ends do what their clients do. With strelaysrv one end asks for
the other over TLS, and both then dial again with the key of their session. With the transit relay both send the same
token.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bench.comparison.strelay import (
    ALPN,
    ALREADY_CONNECTED,
    CONNECT,
    INVITATION,
    JOIN_RELAY,
    JOIN_SESSION,
    PING,
    PONG,
    RESPONSE,
    Frames,
    frame,
    opaque,
    response_of,
    session_key_of,
)
from bench.measuring.load import BenchError, SocketPair
from bench.measuring.subjects import START, Subject, await_listener, dial, listener
from frelay.pki.init import initialise

__all__ = ["Strelaysrv", "TransitRelay"]


# --- strelaysrv ---------------------------------------------------------------------------------------------------


# strelaysrv sends invitations before the session accepts connections, and then refuses the first ones: ask again.
_OPENING: Final = 0.0005


class _Busy(OSError):
    """The session did not listen yet."""


class _Talk:
    """One connection to strelaysrv, in TLS or not, that frames go over."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: Final = sock
        self._frames: Final = Frames()

    def ask(self, kind: int, payload: bytes, answer: int) -> bytes:
        """Send a frame, and wait for the payload of ``answer``."""
        self.sock.sendall(frame(kind, payload))
        return self.await_frame(answer)

    def await_frame(self, wanted: int) -> bytes:
        """Read on until a frame of this kind; raises OSError for a refusal."""
        while True:
            data = self.sock.recv(self._frames.missing)
            if not data:
                raise OSError("strelaysrv closed the connection")
            found = self._frames.receive(data)
            if found is None:
                continue
            kind, payload = found
            if kind == PING:
                self.sock.sendall(frame(PONG))
            if kind == RESPONSE and (refusal := response_of(payload))[0]:
                raise (_Busy if refusal[0] == ALREADY_CONNECTED else OSError)(f"strelaysrv says: {refusal[1]}")
            if kind == wanted:
                return payload


class _Home:
    """A party that has joined the relay, and what another one needs to ask for it."""

    def __init__(self, directory: Path, address: tuple[str, int]) -> None:
        initialise(directory, host_name="localhost")
        self._certs: Final = directory / "certs"
        self._address: Final = address
        certificate = ssl.PEM_cert_to_DER_cert((self._certs / "func1.pem").read_text())
        self._id: Final = hashlib.sha256(certificate).digest()
        self._asking: Final = self._context("func2")
        self._talk: Final = _Talk(self._dial_tls(self._context("func1")))
        self._talk.ask(JOIN_RELAY, b"", RESPONSE)

    def _context(self, party: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Its clients check its id; it has made its own certificate.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols([ALPN])
        context.load_cert_chain(self._certs / f"{party}.pem", self._certs / f"{party}.key")
        return context

    def _dial_tls(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(dial(self._address))

    def invite(self) -> tuple[bytes, bytes]:
        """The two keys of a new session."""
        with self._dial_tls(self._asking) as sock:
            asked = _Talk(sock).ask(CONNECT, opaque(self._id), INVITATION)
        return session_key_of(asked), session_key_of(self._talk.await_frame(INVITATION))

    def close(self) -> None:
        """Leave the relay."""
        self._talk.sock.close()


class Strelaysrv(Subject):
    """syncthing-relaysrv, in no pool, with pings and timeouts too long to matter."""

    name = "strelaysrv"
    legs = 2

    def start(self) -> None:
        self._homes: dict[int, _Home] = {}
        # Bind a port and close it again: strelaysrv cannot take over a socket.
        with listener() as front:
            self._address: tuple[str, int] = front.getsockname()
        patient = [f"{flag}=1h0m0s" for flag in ("-network-timeout", "-message-timeout", "-ping-interval")]
        listen = f"-listen={self._address[0]}:{self._address[1]}"
        self.launch(["strelaysrv", "-pools=", "-status-srv=", f"-keys={self.directory}", listen, *patient])
        await_listener(self, self._address)

    def stop(self) -> None:
        super().stop()
        for home in getattr(self, "_homes", {}).values():
            home.close()

    def connect(self) -> SocketPair:
        return self.arrive()()

    def arrive(self) -> Callable[[], SocketPair]:
        # One for each process of ours: a party reads only the invitations that it caused.
        home = self._homes.get(os.getpid())
        if home is None:
            home = self._homes[os.getpid()] = _Home(self.directory / f"home-{os.getpid()}", self._address)
        asked, answered = home.invite()
        time.sleep(_OPENING)
        try:
            client = self._session(asked)
        except _Busy:
            return self.arrive()

        def complete() -> SocketPair:
            try:
                return SocketPair(client, self._session(answered))
            except _Busy:
                client.close()
                return self.connect()
            except BaseException:
                client.close()
                raise

        return complete

    def _session(self, key: bytes) -> socket.socket:
        sock = dial(self._address)
        try:
            _Talk(sock).ask(JOIN_SESSION, opaque(key), RESPONSE)
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def version(self) -> str:
        done = subprocess.run(["strelaysrv", "-version"], capture_output=True, text=True)
        return " ".join(done.stdout.split()[:2])


# --- magic-wormhole-transit-relay -------------------------------------------------------------------------------------


class TransitRelay(Subject):
    """magic-wormhole-transit-relay under Twisted; ``twist`` is the program of the virtual environment that has it."""

    name = "magic-wormhole-transit-relay"
    legs = 2

    def __init__(self, directory: Path, twist: Path) -> None:
        super().__init__(directory)
        self._twist: Final = twist

    def start(self) -> None:
        self.launch([str(self._twist), "--log-format=text", "transitrelay", "--port=tcp:0:interface=127.0.0.1"])
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            self.must_run()
            if found := re.search(r"starting on (\d+)", self.log_path.read_text()):
                self._address = ("127.0.0.1", int(found[1]))
                return
            time.sleep(0.02)
        raise BenchError(f"{self.name} was not ready within {START:g} s")

    def connect(self) -> SocketPair:
        return self.arrive()()

    def arrive(self) -> Callable[[], SocketPair]:
        token = secrets.token_hex(32)
        client = self._ask(token)

        def complete() -> SocketPair:
            joined = [client]
            try:
                joined.append(self._ask(token))
                for sock in joined:
                    if sock.recv(3, socket.MSG_WAITALL) != b"ok\n":
                        raise OSError("the transit relay did not say ok")
            except BaseException:
                for sock in joined:
                    sock.close()
                raise
            return SocketPair(*joined)

        return complete

    def _ask(self, token: str) -> socket.socket:
        sock = dial(self._address)
        sock.sendall(f"please relay {token} for side {secrets.token_hex(8)}\n".encode())
        return sock

    @contextmanager
    def waiting(self, count: int) -> Iterator[None]:
        """``count`` connections without their partners."""
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(self._ask(secrets.token_hex(32)))
            yield

    @property
    def version(self) -> str:
        code = (
            "from importlib.metadata import version as v; "
            "print('magic-wormhole-transit-relay', v('magic-wormhole-transit-relay') + ', Twisted', v('twisted'))"
        )
        done = subprocess.run([self._twist.with_name("python"), "-c", code], capture_output=True, text=True)
        return done.stdout.strip()
