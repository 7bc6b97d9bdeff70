"""The reception: what happens to one accepted connection until it is paired or gone.

``accept`` > outer TLS > identity > JOIN > lobby. Each stage can only refuse or pass on, and all of it runs in the
connection's own task under absolute deadlines: handshake_timeout from accept, join_timeout from the handshake, then
what the leg may wait.

Which route a leg is for, and what it is told if there is none for it, is decided in ``choice``.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import structlog
import trio

from frelay.admission import Admission, Slot
from frelay.choice import Table, TurnedAway, choose, stranger
from frelay.config.model import Limits, TcpSection
from frelay.dial import bring_service
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.frameless import BareLeg, HelloLeg, PlainLeg
from frelay.journal import HandshakeDone, Journal, LegRefused, LegWaits
from frelay.leg import LINGER_TIME, Departure, FramedLeg, Leg, TlsLeg
from frelay.lobby import Place, Taken, Withdrawn
from frelay.pairing import Pairing
from frelay.protocol.messages import Join, Mode, Refused, Waiting
from frelay.route import UNFINISHED, LiveRoute, Service, Unfinished
from frelay.sockets import TlsFault, close, close_after_linger, format_address, tune
from frelay.tickets import TICKET_LINE_LENGTH, TicketDesk, TicketOffice, parse_ticket_line
from frelay.tls.context import ALPN, EXPIRED, OuterTls, Rejection, VerifiedPeer, verified_peer
from frelay.tls.stream import TlsStream

__all__ = ["Door", "receive"]

T = TypeVar("T")

# The modes that this relay can give, best first: a raw leg costs it a tenth of a tunnelled one.
_MODES: Final[tuple[Mode, ...]] = ("handoff", "ticket", "tunnel")


@dataclass(frozen=True, slots=True)
class Door:
    """What a connection meets behind a listener; made anew for each, so that a reload counts from the next one on."""

    routes: Table[LiveRoute]
    """The routes that share the listener's address, by name."""
    limits: Limits
    tcp: TcpSection
    trust: OuterTls | None
    start_pairing: Callable[[Pairing, LiveRoute], None]
    """Gives a pairing the task that it runs in."""
    listener: Hashable
    """Which listener it is; a ticket is good at the one where it was issued."""
    tickets: TicketOffice
    journal: Journal
    admission: Admission
    """Where a connection to a service gets its slot."""


async def receive(sock: socket.socket, place: tuple[str, int], door: Door, slot: Slot) -> None:
    """Look after one accepted connection; returns once it is paired, refused or gone.

    Owns ``sock`` and ``slot`` until a pairing takes them over. Raises nothing but bugs and cancellations.
    """
    guest = _Guest(sock, place, door, slot)
    try:
        await guest.visit()
    except (ConnectionBroken, OSError) as error:
        guest.log.info("connection lost", reason=str(error))
    finally:
        if guest.is_given_away:
            pass
        elif guest.leg is None:
            close(sock)
            slot.gone()
        elif not guest.leg.is_paired:
            guest.leg.close()
            slot.gone()


class _Guest:
    """One connection on its way through the reception."""

    def __init__(self, sock: socket.socket, place: tuple[str, int], door: Door, slot: Slot) -> None:
        self._sock = sock
        self._place = place
        self._address = format_address(place)
        self._door = door
        self._slot = slot
        self._accepted_at = trio.current_time()
        self._certificate: str | None = None
        self.leg: Leg | None = None
        self._route: LiveRoute | None = None
        """Set once the leg is let in to it; only then its party and its name are settled."""
        self.is_given_away = False
        """Whether somebody else owns the connection now, and closes it."""
        self.log: Any = structlog.get_logger("frelay.reception").bind(address=self._address)

    async def visit(self) -> None:
        """Go through all the stages."""
        too_many = self._slot.occupy(self._place[0])
        if too_many is not None:
            # Nothing was spoken yet, and TLS would have to be spoken to say no in it: the close has to do.
            self._note_refusal("limit", too_many)
            return
        tune(self._sock, self._door.tcp)
        plain = self._door.routes.plain
        if plain is not None:
            await self._visit_plain(plain)
        else:
            await self._visit_tls()

    # --- without outer TLS -------------------------------------------------------------------------------------

    async def _visit_plain(self, route: LiveRoute) -> None:
        if not route.admits_address(self._place[0]):
            self.log = self.log.bind(route=route.name)
            self._note_refusal("not-authorised", "address not in allow_from")
            return
        leg = PlainLeg(self._sock, route.party_by_arrival(), self._address)
        await self._stay(leg, route)

    # --- outer TLS ---------------------------------------------------------------------------------------------

    async def _visit_tls(self) -> None:
        door, trust = self._door, self._door.trust
        if trust is None:
            raise AssertionError("an mTLS route without [tls]; the configuration should not have loaded")
        with trio.move_on_at(self._accepted_at + door.limits.handshake_timeout):
            if await self._first_byte() == b"F":
                # 0x16 opens a TLS handshake, F a ticket line.
                await self._visit_with_ticket()
                return
        stream = TlsStream(self._sock, trust.context)
        if not await self._shake_hands(stream):
            return
        connection = stream.connection
        peer = verified_peer(connection, trust)
        self._certificate = peer.identity.describe()
        self.log = self.log.bind(certificate=self._certificate)
        server_name = (connection.get_servername() or b"").decode("ascii", "replace")
        if connection.get_alpn_proto_negotiated() != ALPN:
            await self._visit_frameless(stream, peer, server_name)
            return
        framed = self.leg = FramedLeg(stream, peer, self._address)
        join = await self._hear(framed, framed.receive_join, "JOIN")
        if join is not None:
            await self._admit(framed, join, server_name)

    async def _visit_frameless(self, stream: TlsStream, peer: VerifiedPeer, server_name: str) -> None:
        hello = self._door.routes.hello
        if hello is None:
            bare = self.leg = BareLeg(stream, peer, self._address)
            await self._admit(bare, None, server_name)
            return
        old = self.leg = HelloLeg(stream, peer, self._address, settle=hello.config.hello_settle)
        if await self._hear(old, old.receive_line, "line") is not None:
            await self._admit(old, None, server_name)

    async def _hear(self, leg: TlsLeg, receive: Callable[[], Awaitable[T]], what: str) -> T | None:
        """The first thing that a leg has to say, within join_timeout; None if it was refused for what it said."""
        limit = self._door.limits.join_timeout
        try:
            with trio.fail_after(limit):
                return await receive()
        except trio.TooSlowError:
            text = f"no {what} within {limit:g} s"
        except RemoteProtocolError as error:
            text = str(error)
        await self._refuse(leg, Refused("protocol-error", text), text)
        return None

    # --- tickets -----------------------------------------------------------------------------------------------

    async def _first_byte(self) -> bytes:
        """The first byte of the connection, left in the kernel; ``b""`` at its end."""
        while True:
            try:
                return self._sock.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)

    async def _visit_with_ticket(self) -> None:
        """A second connection, on which a party brings its ticket; what is wrong with it gets no answer."""
        line = b""
        while len(line) < TICKET_LINE_LENGTH:
            await trio.lowlevel.wait_readable(self._sock)
            # Not a byte more than the line: what follows belongs to the functions.
            data = self._sock.recv(TICKET_LINE_LENGTH - len(line))
            if not data:
                break
            line += data
        ticket = parse_ticket_line(line)
        if ticket is None or not self._door.tickets.redeem(ticket, self._door.listener, self._sock, self._slot):
            self._note_refusal("not-authorised", "no such ticket, or no longer")
            return
        self._slot.admitted()
        self.is_given_away = True

    async def _shake_hands(self, stream: TlsStream) -> bool:
        deadline = self._accepted_at + self._door.limits.handshake_timeout
        try:
            with trio.move_on_at(deadline) as patience:
                await stream.do_handshake()
        except TlsFault as fault:
            rejection = stream.connection.get_app_data()
            if isinstance(rejection, Rejection):
                self._certificate = rejection.certificate
                self.log = self.log.bind(certificate=rejection.certificate)
                self._note_refusal(rejection.code, rejection.reason)
            else:
                self._note_refusal("protocol-error", f"TLS handshake: {fault}")
            # The alert is written; an RST on unread input would destroy it under way.
            await close_after_linger(self._sock, LINGER_TIME)
            return False
        if patience.cancelled_caught:
            limit = self._door.limits.handshake_timeout
            self._note_refusal("protocol-error", f"no TLS handshake within {limit:g} s")
            return False
        self._door.journal.note(HandshakeDone(seconds=trio.current_time() - self._accepted_at))
        return True

    # --- identity and route ------------------------------------------------------------------------------------

    async def _admit(self, leg: TlsLeg, join: Join | None, server_name: str) -> None:
        if join is not None and join.traceparent is not None:
            leg.traceparent = join.traceparent
            self.log = self.log.bind(traceparent=join.traceparent)
        try:
            if leg.peer is None:
                raise AssertionError("a leg in outer TLS whose certificate nobody has verified")
            identity = leg.peer.identity
            if identity.objection is not None:
                raise stranger(identity.objection)
            route, fit = choose(self._door.routes, identity.names, join, server_name)
            leg.admit_as(fit.party, str(fit.name))
            if join is not None:
                leg.attempt, leg.wait, leg.mode = join.attempt, join.wait, _choose_mode(join)
            if isinstance(leg, FramedLeg):
                timeout = route.config.ticket_timeout
                leg.ticket_desk = TicketDesk(self._door.tickets, self._door.listener, timeout)
        except TurnedAway as turned:
            await self._refuse(leg, turned.refusal, turned.why)
            return
        await self._stay(leg, route)

    # --- lobby -------------------------------------------------------------------------------------------------

    async def _stay(self, leg: Leg, route: LiveRoute) -> None:
        """Wait in the lobby, or pair at once."""
        self.leg, leg.slot, self._route = leg, self._slot, route
        self.log = self.log.bind(route=route.name, party=leg.party, identity=leg.identity)
        objection = route.objection(leg) or self._lack_of_descriptors(leg, route)
        if objection is not None:
            # Still in its stranger's slot: a function that is refused by the thousand must not hold thousands of
            # descriptors while it takes its time to hear it.
            await self._withdraw(leg, objection)
            return
        self._slot.admitted()
        self._slot.charge([route.charges.waiting(leg)])
        limit = route.wait_limit(leg)
        with trio.move_on_after(self._door.limits.join_timeout) as patience:
            await leg.welcome(
                Waiting(
                    route=route.name,
                    party=leg.party,
                    identity=leg.identity,
                    deadline=limit,
                    peer_seen=route.lobby.peer_seen(leg.party),
                )
            )
        if patience.cancelled_caught:
            self.log.info("left", reason="took no WAITING")
            return
        # Others had their turn while WAITING was written, so all is asked again, now without a pause between. That is
        # also why the stale leg goes only here: two legs of one attempt at one moment would not have found each other.
        found = self._match(leg, route)
        while found is UNFINISHED:
            await trio.lowlevel.checkpoint()
            found = self._match(leg, route)
        if isinstance(found, Withdrawn):
            await self._withdraw(leg, found)
        elif isinstance(found, Pairing):
            self._door.start_pairing(found, route)
        else:
            await self._wait(leg, route, limit)

    def _lack_of_descriptors(self, leg: Leg, route: LiveRoute) -> Withdrawn | None:
        if route.lobby.has_stale(leg):
            return None  # it takes the place of its own
        text = self._door.admission.objection(route.charges.waiting(leg))
        return None if text is None else Withdrawn(Refused("limit", text, retry_after=10.0))

    def _match(self, leg: Leg, route: LiveRoute) -> Pairing | Withdrawn | Unfinished | None:
        objection = route.objection(leg)
        if objection is not None:
            return objection
        route.lobby.replace_stale(leg)
        return route.match(leg)

    async def _wait(self, leg: Leg, route: LiveRoute, limit: float) -> None:
        departure: Departure | None = None
        self.log.info("waiting", seconds=limit, mode=leg.mode)
        self._door.journal.note(
            LegWaits(route=route.name, party=leg.party, identity=leg.identity, address=leg.address, mode=leg.mode)
        )
        # A call to a service ends by itself at the same limit, and can say why it came to nothing.
        patience = math.inf if route.service else trio.current_time() + limit
        with trio.CancelScope() as scope:

            def reckon_expiry() -> None:
                scope.deadline = min(patience, leg.expires_at())

            reckon_expiry()
            seat = route.lobby.enter(
                leg,
                lambda: scope.cancel(reason="a verdict about this leg has fallen"),
                reckon_expiry=reckon_expiry,
            )
            try:
                departure = await self._attend(seat, route, limit)
            finally:
                route.lobby.leave(seat)
                if isinstance(seat.verdict, Taken):
                    seat.verdict.pairing.release()
        if isinstance(seat.verdict, Taken):
            return
        if isinstance(seat.verdict, Withdrawn):
            await self._withdraw(leg, seat.verdict)
        elif departure is None and scope.deadline < patience:
            await self._refuse(leg, Refused(EXPIRED.code, EXPIRED.reason), EXPIRED.reason)
        elif departure is None:
            text = f"nobody came within {limit:g} s"
            await self._refuse(leg, Refused("wait-timeout", text, retry_after=0.0), text)
        elif departure.refusal is not None:
            await self._refuse(leg, departure.refusal, departure.detail)
        elif route.service is not None:
            # Counted, or a service that never answers would not show where all its callers are impatient.
            self._note_refusal("wait-timeout", f"{departure.detail}, before the service answered")
        else:
            self.log.info("left", reason=departure.detail)

    async def _attend(self, seat: Place, route: LiveRoute, limit: float) -> Departure:
        """Look after the leg while it waits, and dial the service that it waits for, if its route has one."""
        limits, service = self._door.limits, route.service
        attend = partial(seat.leg.attend, ping_interval=limits.ping_interval, pong_timeout=limits.pong_timeout)
        if service is None:
            return await attend()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._call, service, seat, route, limit)
            departure = await attend()
            beside.cancel_scope.cancel(reason="the caller has gone")
        return departure

    async def _call(self, service: Service, seat: Place, route: LiveRoute, limit: float) -> None:
        door = self._door
        pairing = await bring_service(
            seat, route, service, limit=limit, tcp=door.tcp, admission=door.admission, journal=door.journal
        )
        if pairing is not None:
            door.start_pairing(pairing, route)

    # --- refusals ----------------------------------------------------------------------------------------------

    async def _withdraw(self, leg: Leg, verdict: Withdrawn) -> None:
        await self._refuse(leg, verdict.refusal, verdict.refusal.reason, reconnect_in=verdict.reconnect_in)

    async def _refuse(self, leg: Leg, refusal: Refused, why: str, *, reconnect_in: float | None = None) -> None:
        self._note_refusal(refusal.code, why)
        await leg.refuse(refusal, reconnect_in=reconnect_in)

    def _note_refusal(self, code: str, why: str) -> None:
        self.log.warning("refused", code=code, reason=why)
        self._door.journal.note(
            LegRefused(
                code=code,
                reason=why,
                address=self._address,
                route=self._route_name(),
                party=None if self._route is None or self.leg is None else self.leg.party,
                identity=None if self._route is None or self.leg is None else self.leg.identity,
                certificate=self._certificate,
            )
        )

    def _route_name(self) -> str | None:
        """The route that this is about: the one it was let in to, or the only one that it can have wanted."""
        if self._route is not None:
            return self._route.name
        routes = self._door.routes
        return next(iter(routes)) if len(routes) == 1 else None


def _choose_mode(join: Join) -> Mode:
    for mode in _MODES:
        if mode in join.modes:
            return mode
    text = f"none of the modes asked for is known here; this relay has {', '.join(_MODES)}"
    raise TurnedAway(Refused("protocol-error", text), text)
