"""A leg: one party's connection to the relay, once a route has let it in. What all kinds of leg have in common.

The kinds are in :mod:`frelay.joining.legs` (frelay/1 in TLS) and :mod:`frelay.joining.frameless_legs`.

One task at a time uses a leg: first its own (JOIN, waiting, refusal), and from PAIRED on the task of its pairing. The
task that has it last closes it.
"""

from __future__ import annotations

import abc
import math
import socket
import time
from collections.abc import Hashable
from dataclasses import dataclass

import trio

from frelay.net.slots import Slot
from frelay.net.sockets import close_after_delivery, close_with_reset
from frelay.net.streams import RawStream
from frelay.protocol.messages import Mode, Paired, PartyName, Refused, Waiting
from frelay.tls.context import Credential, VerifiedPeer
from frelay.tls.stream import TlsStream

__all__ = ["Leg", "LegGone"]


@dataclass(frozen=True, slots=True)
class LegGone:
    """Why a waiting leg is no longer there: with a REFUSED to send if its connection still can carry one."""

    detail: str
    refusal: Refused | None = None


class Leg(abc.ABC):
    """One party's connection, admitted to a route."""

    identity: str
    """The name that the route's selectors matched, e.g. ``dns:func1.acme``; for a plain leg its address."""
    party: PartyName
    attempt: str | None = None
    """The JOIN's ``attempt``; None for legs without frames."""
    wait: float | None = None
    """How long the function itself can wait, in seconds."""
    mode: Mode = "tunnel"
    traceparent: str | None = None
    """The trace that this leg is a part of, as its function said."""
    peer: VerifiedPeer | None = None
    """The verified certificate and all its names, until the leg is paired; None for a leg without outer TLS."""
    credential: Credential | None = None
    """What it takes to judge the certificate again, for as long as the leg lives; None without outer TLS."""
    address: str
    """Where the party dials from, ``host:port``."""
    slot: Slot
    """Its share of the relay's descriptors, given back once it is closed."""
    is_paired: bool = False
    """Whether a pairing owns it now, and closes it."""

    @property
    @abc.abstractmethod
    def sock(self) -> socket.socket:
        """The socket under it."""

    @property
    def is_raw(self) -> bool:
        """Whether its bytes are on a bare socket once it is paired."""
        return self.mode != "tunnel"

    async def welcome(self, message: Waiting) -> None:  # noqa: B027  not every leg can be told
        """Tell the party that it is admitted, where it can be told."""

    @abc.abstractmethod
    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone:
        """Look after the leg while it waits; returns only once it has gone. Safe to cancel."""

    @property
    def holder(self) -> str:
        """Whom its place is charged to where places are shared."""
        return self.identity

    def marks(self) -> tuple[Hashable, ...]:
        """What tells an attempt of a function: legs with a mark in common are connections for the same attempt of it.

        A certificate may be one party by one of its names and the other party by another: the name is not all.
        """
        if self.attempt is None:
            return ()
        by_name = (self.attempt, self.identity)
        return (by_name,) if self.credential is None else (by_name, (self.attempt, self.credential.leaf))

    def is_retry_of(self, other: Leg) -> bool:
        """Whether the same function opened both connections for the same attempt."""
        return not set(self.marks()).isdisjoint(other.marks())

    def expires_at(self) -> float:
        """When its certificate does, on Trio's clock; infinity without one."""
        if self.credential is None:
            return math.inf
        return trio.current_time() + self.credential.not_after - time.time()

    def is_gone(self) -> bool:
        """A final look before it is paired: whether its connection has ended without anyone noticing yet."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def patience(self, handoff_timeout: float) -> float:
        """How long :meth:`begin` may take, in seconds."""
        return handoff_timeout

    def forget_admission(self) -> None:
        """Let go of what only mattered until it was paired: the names of the certificate above all, some KiB a leg."""
        self.peer = self.attempt = self.wait = None

    async def begin(self, message: Paired) -> None:  # noqa: B027  a leg without frames has nothing to do
        """Tell the party that it is paired and bring its end to the pumps, hand-off included.

        Raises ConnectionBroken, Truncated or RemoteProtocolError.
        """

    @abc.abstractmethod
    async def refuse(self, refusal: Refused, *, reconnect_in: float | None = None) -> None:
        """Tell the party no, where it can be told, and close in order."""

    @abc.abstractmethod
    def stream(self) -> TlsStream | RawStream:
        """The leg's end as a stream, after :meth:`begin`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close in order. Idempotent."""

    async def close_after_delivery(self, patience: float) -> None:
        """Close once all that was written has arrived, or no more of it does for ``patience`` seconds."""
        try:
            await close_after_delivery(self.sock, patience)
        finally:
            self.close()

    def cut(self) -> None:
        """Close by RST, so that the party cannot mistake it for an end. Idempotent."""
        try:
            sock = self.sock
        except trio.ClosedResourceError:
            return
        close_with_reset(sock)
        self.close()
