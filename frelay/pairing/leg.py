"""A leg: one party's connection to the relay, once a route has let it in. What all kinds of leg have in common.

The kinds are in :mod:`frelay.joining.legs` (frelay/1 in TLS) and :mod:`frelay.joining.frameless_legs`.

One task at a time uses a leg: first its own task (JOIN, waiting, refusal), and from PAIRED on the task of its pairing.
The task that uses it last closes it.
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
from frelay.protocol.acceptance import Acceptance
from frelay.protocol.messages import LegParty, Mode, Paired, PartyName, Waiting
from frelay.protocol.refusal import Refusal
from frelay.tls.stream import TlsStream
from frelay.tls.trust import Credential, VerifiedPeer

__all__ = ["Leg", "LegGone"]


@dataclass(frozen=True, slots=True)
class LegGone:
    """A waiting leg whose connection can carry no refusal any more; ``detail`` says how it ended."""

    detail: str


class Leg(abc.ABC):
    """One party's connection, admitted to a route."""

    identity: str
    """The name that the route's selectors matched, e.g. ``dns:func1.acme``; for a plain leg its address."""
    party: LegParty
    """Until it is paired, the leg of a certificate that fits both parties may be "either" (only with a key)."""
    meet: str | None = None
    """The key by which it meets its partner; None if it takes the next leg without a key."""
    acceptance: Acceptance | None = None
    """Which partners it accepts, until it is paired; None for a leg without a key."""
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
    """What a recheck of the certificate needs, kept for as long as the leg lives; None without outer TLS."""
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
        """Tell the party that it is admitted, if its kind of leg can be told."""

    @abc.abstractmethod
    async def attend(self, *, ping_interval: float, pong_timeout: float) -> LegGone | Refusal:
        """Keep the waiting leg alive until it has gone or must be refused; returns only then. May be cancelled."""

    @property
    def has_partner_list(self) -> bool:
        """Whether its JOIN lists the partners that it accepts."""
        return self.acceptance is not None and self.acceptance.has_list

    @property
    def settled_party(self) -> PartyName:
        """Its party, once that is decided."""
        if self.party == "either":
            raise AssertionError("the party of this leg is not decided yet")
        return self.party

    def settle(self, party: PartyName) -> None:
        """Decide which party a leg that may be either is."""
        self.party = party

    @property
    def holder(self) -> str:
        """The name to which its place counts, where a limit is shared among the parties."""
        return self.identity

    def marks(self) -> tuple[Hashable, ...]:
        """Marks of the attempt: two legs with a common mark are connections for the same attempt of one function.

        The identity alone is not enough: one certificate may be func1 by one of its names and func2 by another.
        """
        if self.attempt is None:
            return ()
        by_name = tuple((self.attempt, name) for name in self.identities())
        return by_name if self.credential is None else (*by_name, (self.attempt, self.credential.leaf))

    def identities(self) -> tuple[str, ...]:
        """The names by which its function may be a party here: one, or two while its party is not decided."""
        return (self.identity,)

    def is_retry_of(self, other: Leg) -> bool:
        """Whether the same function opened both connections for the same attempt."""
        return not set(self.marks()).isdisjoint(other.marks())

    def expires_at(self) -> float:
        """When its certificate expires, on Trio's clock; infinity if it has none."""
        if self.credential is None:
            return math.inf
        return trio.current_time() + self.credential.not_after - time.time()

    def is_gone(self) -> bool:
        """Whether its connection has ended and no task has noticed it: the last check before it is paired."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def begin_timeout(self, handoff_timeout: float) -> float:
        """How long :meth:`begin` may take, in seconds."""
        return handoff_timeout

    def forget_admission(self) -> None:
        """Free what was needed only until it was paired: some KiB a leg, most of it the names of the certificate."""
        self.peer = self.attempt = self.wait = self.acceptance = None

    async def begin(self, message: Paired) -> None:  # noqa: B027  a leg without frames has nothing to do
        """Tell the party that it is paired and bring its end to the pumps, hand-off included.

        Raises ConnectionBroken, Truncated or RemoteProtocolError.
        """

    @abc.abstractmethod
    async def refuse(self, refusal: Refusal) -> None:
        """Tell the party that it is refused, if its kind of leg can be told, and close in order."""

    @abc.abstractmethod
    def stream(self) -> TlsStream | RawStream:
        """The leg's end as a stream, after :meth:`begin`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close in order. Idempotent."""

    async def close_after_delivery(self, timeout: float) -> None:
        """Close when all that was written has arrived, or when none of it arrives for ``timeout`` seconds."""
        try:
            await close_after_delivery(self.sock, timeout)
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
