"""A relay without a network: it answers the steps of one joining. Tests make it do one thing wrong.

:func:`join` runs the steps of the clients (:mod:`frelay.client.joining`) against it, with a simulated clock::

    relay = FakeRelay(site, pair_at_once)
    relay.peer = peer(site)
    joining, joined = join(make_plan(site), relay)
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any

from frelay.client.contexts import inner_context
from frelay.client.joining import Joined, Joining
from frelay.client.options import JoinPlan
from frelay.client.steps import Close, Endpoint, Open, Pause, Receive, Resolve, Send, Step, drive
from frelay.client.tls_engine import Engine
from frelay.protocol.messages import Join, Message, Paired, Waiting
from frelay.protocol.session import RelaySession
from support.site import Site

__all__ = ["PAIRED", "WAITING", "FakeRelay", "join", "make_plan", "pair_at_once", "peer"]

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

    def hand_off(self, paired: Paired = PAIRED) -> None:
        self.say(paired)
        self.tls.send_eof()

    def perform(self, step: Step) -> Any:
        match step:
            case Resolve(_, port, _):
                return [Endpoint(socket.AF_INET, (host, port)) for host in ("192.0.2.1", "192.0.2.2")]
            case Open(_, endpoint, timeout):
                self.opened.append(endpoint)
                if endpoint.sockaddr[0] in self.refusing:
                    self.now += timeout
                    raise TimeoutError("timed out")
                return self._connect()
            case Send(_, data, _):
                return self._take(data)
            case Receive(_, timeout):
                data, self.out = self.out[: self.chunk], self.out[self.chunk :]
                if not data:
                    self.now += timeout
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


def make_plan(site: Site) -> JoinPlan:
    """What func1 calls ``connect`` with."""
    cert, key = site.paths["func1"]
    return JoinPlan.make("localhost:9001", cert=cert, key=key, ca=site.ca_path, peer="dns:func2.demo")


def peer(site: Site, below: Engine | None = None) -> Engine:
    return Engine(inner_context("server", *site.paths["func2"], site.ca_path), server_side=True, below=below)


def join(plan: JoinPlan, relay: FakeRelay) -> tuple[Joining, Joined]:
    joining = Joining(plan, lambda: relay.now)
    return joining, drive(joining.steps(), relay.perform, None)


def pair_at_once(relay: FakeRelay, message: Message) -> None:
    if isinstance(message, Join):
        relay.say(WAITING)
        relay.hand_off()
