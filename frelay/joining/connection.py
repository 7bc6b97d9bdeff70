"""The reception: what happens to one accepted connection until it is paired or gone.

``accept`` > PROXY header > first bytes > turn > outer TLS > identity > JOIN > lobby. Each stage can only refuse or pass
on, and all of it runs in the connection's own task under absolute deadlines: handshake_timeout from accept,
join_timeout from the handshake, then what the leg may wait. The time for which we hold a connection back is ours, and
is added to its handshake_timeout; it has a limit of its own.

Which route a leg is for, and what it is told if there is none for it, is decided in ``choice``.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import structlog
import trio

from frelay.config.plan import listener_keys
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.accept_context import AcceptContext
from frelay.joining.dial import bring_service
from frelay.joining.first_bytes import Opening, take_proxy_header, wait_for_departure, wait_for_opening
from frelay.joining.frameless_legs import BareLeg, HelloLeg, PlainLeg
from frelay.joining.legs import LINGER_TIME, FramedLeg, TlsLeg
from frelay.joining.lobby import Matched, Waiter
from frelay.joining.route import UNFINISHED, LiveRoute, Service, Unfinished
from frelay.joining.route_selection import NotAdmitted, choose, not_authorised
from frelay.joining.tickets import TICKET_LINE_LENGTH, TicketIssuer, parse_ticket_line
from frelay.journal import HandshakeDone, LegRefused, LegWaits
from frelay.net.slots import Slot
from frelay.net.sockets import close, close_after_linger, format_address, tune
from frelay.net.strangers import Stage, Stranger
from frelay.net.streams import TlsFault
from frelay.net.tcp import is_open
from frelay.pairing.leg import Leg, LegGone
from frelay.pairing.pairing import Pairing
from frelay.protocol.messages import Join, Mode, Waiting
from frelay.protocol.refusal import Refusal
from frelay.tls.context import ALPN, EXPIRED, FailedVerification, VerifiedPeer, verified_peer
from frelay.tls.stream import TlsStream

__all__ = ["IncomingConnection", "receive"]

T = TypeVar("T")

# The modes that this relay can give, best first: a raw leg costs it a tenth of a tunnelled one.
_MODES: Final[tuple[Mode, ...]] = ("handoff", "ticket", "tunnel")
# Fatal, unexpected_message: what OpenSSL says of a first record that is none.
_ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x0a"
# For how many times handshake_timeout a connection may be held back for its turn.
_HELD_BACK: Final = 3


async def receive(sock: socket.socket, place: tuple[str, int], context: AcceptContext, slot: Slot) -> None:
    """Look after one accepted connection; returns once it is paired, refused or gone.

    Owns ``sock`` and ``slot`` until a pairing takes them over. Raises nothing but bugs and cancellations.
    """
    connection = IncomingConnection(sock, place, context, slot)
    try:
        await connection.run()
    except (ConnectionBroken, OSError) as error:
        connection.log.info("connection lost", reason=str(error))
    finally:
        if connection.is_given_away:
            pass
        elif connection.leg is None:
            close(sock)
            slot.release()
        elif not connection.leg.is_paired:
            connection.leg.close()
            slot.release()


class IncomingConnection:
    """One connection on its way through the reception."""

    def __init__(self, sock: socket.socket, place: tuple[str, int], context: AcceptContext, slot: Slot) -> None:
        self._sock = sock
        self._place = place
        self._address = format_address(place)
        self._settings, self._shared = context.settings, context.shared
        self._listener = context.listener
        self._slot = slot
        self._stranger: Stranger | None = None
        self._is_unnamed = False
        """Whether it came by a balancer that did not say for whom."""
        self._accepted_at = trio.current_time()
        self._certificate: str | None = None
        self.leg: Leg | None = None
        self._route: LiveRoute | None = None
        """Set once the leg is let in to it; only then its party and its name are settled."""
        self.is_given_away = False
        """Whether somebody else owns the connection now, and closes it."""
        self.log: Any = structlog.get_logger("frelay.reception").bind(address=self._address)

    async def run(self) -> None:
        """Go through all the stages."""
        with trio.CancelScope() as scope:
            too_many = self._slot.enter(self._place[0], lambda: scope.cancel(reason="it gave way to another"))
            if too_many is not None:
                # Nothing was spoken yet, and TLS would have to be spoken to say no in it: the close has to do.
                self._note_refusal(Refusal("limit", too_many))
                return
            self._stranger = self._slot.stranger
            await self._run_stages()
        if scope.cancelled_caught and self._stranger is not None and self._stranger.evicted_because is not None:
            self._note_refusal(Refusal("limit", self._stranger.evicted_because))

    async def _run_stages(self) -> None:
        tune(self._sock, self._settings.tcp)
        plain = self._settings.routes.plain
        opening: Opening | None = None
        limit = self._settings.limits.handshake_timeout
        comes_by_proxy = self._comes_by_proxy()
        missing = "PROXY header" if comes_by_proxy else "TLS handshake"
        try:
            with trio.move_on_at(self._accepted_at + limit) as patience:
                if comes_by_proxy:
                    await self._learn_address()
                    missing = "TLS handshake"
                if plain is None:
                    opening = await wait_for_opening(self._sock)
        except RemoteProtocolError as error:
            await self._turn_away(str(error), alert=b"" if missing == "PROXY header" else _ALERT)
            return
        if patience.cancelled_caught:
            self._note_refusal(Refusal("protocol-error", f"no {missing} within {limit:g} s"))
        elif plain is not None:
            await self._run_plain(plain)
        elif opening is Opening.TICKET:
            await self._run_with_ticket()
        elif await self._await_turn():
            await self._run_tls()

    # --- who comes, and when it is served --------------------------------------------------------------------------

    async def _turn_away(self, why: str, *, alert: bytes) -> None:
        """Refuse what is none of the protocols that are spoken here."""
        self._note_refusal(Refusal("protocol-error", why))
        self._slot.note_refused()
        with suppress(OSError):
            self._sock.send(alert)
        # An RST on what it has sent would destroy the alert under way.
        await close_after_linger(self._sock, LINGER_TIME)

    def _comes_by_proxy(self) -> bool:
        """Whether a balancer opened this connection, which must say for whom."""
        # All routes of an address say the same.
        route = next(iter(self._settings.routes.values()), None)
        return route is not None and route.comes_by_proxy(self._place[0])

    async def _learn_address(self) -> None:
        header = await take_proxy_header(self._sock)
        if header.source is None:
            self._is_unnamed = True
            return
        self._place = header.source
        self._address = format_address(header.source)
        self.log = self.log.bind(address=self._address)
        if self._slot.stranger is not None:
            self._shared.admission.strangers.move_to_host(self._slot.stranger, header.source[0])

    async def _await_turn(self) -> bool:
        """Wait until this connection's handshake may begin; False if that is never."""
        strangers, stranger = self._shared.admission.strangers, self._slot.stranger
        if stranger is None:
            raise AssertionError("a handshake of nobody")
        began = trio.current_time()
        longest = _HELD_BACK * self._settings.limits.handshake_timeout
        with trio.CancelScope(deadline=began + longest) as scope:
            if strangers.request_turn(stranger, lambda: scope.cancel(reason="its turn has come")):
                return True
            await wait_for_departure(self._sock)
        if stranger.stage is not Stage.RUNNING:
            text = f"held back for {longest:g} s, and no turn came (limits.max_pre_auth, limits.max_pre_auth_per_ip)"
            self._note_refusal(Refusal("limit", text))
            return False
        if not is_open(self._sock):
            raise ConnectionBroken("it went while it was held back")
        # It was we who let it wait.
        self._accepted_at += trio.current_time() - began
        return True

    # --- without outer TLS -------------------------------------------------------------------------------------

    async def _run_plain(self, route: LiveRoute) -> None:
        objection = None if route.admits_address(self._place[0]) else "address not in allow_from"
        if self._is_unnamed:
            objection = "the PROXY header names no address, so none that is in allow_from"
        if objection is not None:
            self.log = self.log.bind(route=route.name)
            self._note_refusal(Refusal("not-authorised", objection))
            return
        leg = PlainLeg(self._sock, route.party_by_arrival(), self._address)
        await self._stay(leg, route)

    # --- outer TLS ---------------------------------------------------------------------------------------------

    async def _run_tls(self) -> None:
        trust = self._settings.trust
        if trust is None:
            raise AssertionError("an mTLS route without [tls]; the configuration should not have loaded")
        stream = TlsStream(self._sock, trust.context)
        if not await self._shake_hands(stream):
            return
        self._note_progress()
        connection = stream.connection
        peer = verified_peer(connection, trust)
        self._certificate = peer.identity.describe()
        self.log = self.log.bind(certificate=self._certificate)
        server_name = (connection.get_servername() or b"").decode("ascii", "replace")
        if connection.get_alpn_proto_negotiated() != ALPN:
            await self._run_frameless(stream, peer, server_name)
            return
        framed = self.leg = FramedLeg(stream, peer, self._address)
        join = await self._hear(framed, framed.receive_join, "JOIN")
        if join is not None:
            await self._admit(framed, join, server_name)

    async def _run_frameless(self, stream: TlsStream, peer: VerifiedPeer, server_name: str) -> None:
        hello = self._settings.routes.hello
        if hello is None:
            bare = self.leg = BareLeg(stream, peer, self._address)
            await self._admit(bare, None, server_name)
            return
        old = self.leg = HelloLeg(stream, peer, self._address, settle=hello.config.hello_settle)
        if await self._hear(old, old.receive_line, "line") is not None:
            await self._admit(old, None, server_name)

    async def _hear(self, leg: TlsLeg, receive: Callable[[], Awaitable[T]], what: str) -> T | None:
        """The first thing that a leg has to say, within join_timeout; None if it was refused for what it said."""
        limit = self._settings.limits.join_timeout
        try:
            with trio.fail_after(limit):
                return await receive()
        except trio.TooSlowError:
            text = f"no {what} within {limit:g} s"
        except RemoteProtocolError as error:
            text = str(error)
        await self._refuse(leg, Refusal("protocol-error", text))
        return None

    # --- tickets -----------------------------------------------------------------------------------------------

    async def _run_with_ticket(self) -> None:
        """A second connection, on which a party brings its ticket; what is wrong with it gets no answer."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # Not a byte more than the line: what follows belongs to the functions.
        line = self._sock.recv(TICKET_LINE_LENGTH)
        ticket = parse_ticket_line(line)
        if ticket is None or not self._shared.tickets.redeem(ticket, self._listener, self._sock, self._slot):
            self._note_refusal(Refusal("not-authorised", "no such ticket, or no longer"))
            return
        self._slot.admit()
        self.is_given_away = True

    async def _shake_hands(self, stream: TlsStream) -> bool:
        deadline = self._accepted_at + self._settings.limits.handshake_timeout
        try:
            with trio.move_on_at(deadline) as patience:
                await stream.do_handshake()
        except TlsFault as fault:
            failure = stream.connection.get_app_data()
            if isinstance(failure, FailedVerification):
                self._certificate = failure.certificate
                self.log = self.log.bind(certificate=failure.certificate)
                self._note_refusal(failure.refusal)
            else:
                self._note_refusal(Refusal("protocol-error", f"TLS handshake: {fault}"))
            # The alert is written; an RST on unread input would destroy it under way.
            stream.leave_without_close_notify()
            self._slot.note_refused()
            await close_after_linger(self._sock, LINGER_TIME)
            return False
        if patience.cancelled_caught:
            limit = self._settings.limits.handshake_timeout
            self._note_refusal(Refusal("protocol-error", f"no TLS handshake within {limit:g} s"))
            return False
        self._shared.journal.note(HandshakeDone(seconds=trio.current_time() - self._accepted_at))
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
                raise not_authorised(identity.objection)
            route, fit = choose(self._settings.routes, identity.names, join, server_name)
            leg.admit_as(fit.party, str(fit.name))
            if join is not None:
                leg.attempt, leg.wait, leg.mode = join.attempt, join.wait, _choose_mode(join)
            if isinstance(leg, FramedLeg):
                timeout = route.config.ticket_timeout
                listeners = (self._listener, *listener_keys(route.config))
                leg.ticket_issuer = TicketIssuer(self._shared.tickets, listeners, timeout)
        except NotAdmitted as error:
            await self._refuse(leg, error.refusal)
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
            await self._refuse(leg, objection)
            return
        # One that gave way in this very moment is not let in.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._slot.admit()
        self._slot.charge([route.charges.waiting(leg)])
        limit = route.wait_limit(leg)
        with trio.move_on_after(self._settings.limits.join_timeout) as patience:
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
        if isinstance(found, Refusal):
            await self._refuse(leg, found)
        elif isinstance(found, Pairing):
            self._shared.runner.start(found, route)
        else:
            await self._wait(leg, route, limit)

    def _lack_of_descriptors(self, leg: Leg, route: LiveRoute) -> Refusal | None:
        if route.lobby.has_stale(leg):
            return None  # it takes the place of its own
        text = self._shared.admission.objection([route.charges.waiting(leg)])
        return None if text is None else Refusal("limit", text, retry_after=10.0)

    def _match(self, leg: Leg, route: LiveRoute) -> Pairing | Refusal | Unfinished | None:
        objection = route.objection(leg)
        if objection is not None:
            return objection
        route.lobby.replace_stale(leg)
        return route.match(leg)

    async def _wait(self, leg: Leg, route: LiveRoute, limit: float) -> None:
        end: LegGone | Refusal | None = None
        self.log.info("waiting", seconds=limit, mode=leg.mode)
        self._shared.journal.note(
            LegWaits(route=route.name, party=leg.party, identity=leg.identity, address=leg.address, mode=leg.mode)
        )
        # A call to a service ends by itself at the same limit, and can say why it came to nothing.
        patience = math.inf if route.service else trio.current_time() + limit
        with trio.CancelScope() as scope:

            def recompute_expiry() -> None:
                scope.deadline = min(patience, leg.expires_at())

            recompute_expiry()
            waiter = route.lobby.enter(
                leg,
                lambda: scope.cancel(reason="the lobby has decided about this leg"),
                recompute_expiry=recompute_expiry,
            )
            try:
                end = await self._attend(waiter, route, limit)
            finally:
                route.lobby.leave(waiter)
                if isinstance(waiter.verdict, Matched):
                    waiter.verdict.pairing.release()
        if isinstance(waiter.verdict, Matched):
            return
        if isinstance(waiter.verdict, Refusal):
            await self._refuse(leg, waiter.verdict)
        elif end is None and scope.deadline < patience:
            await self._refuse(leg, EXPIRED)
        elif end is None:
            await self._refuse(leg, Refusal("wait-timeout", f"nobody came within {limit:g} s", retry_after=0.0))
        elif isinstance(end, Refusal):
            await self._refuse(leg, end)
        elif route.service is not None:
            # Counted as a refusal: a service that never answers would otherwise not show where all callers give up.
            self._note_refusal(Refusal("wait-timeout", f"{end.detail}, before the service answered"))
        else:
            self.log.info("left", reason=end.detail)

    async def _attend(self, waiter: Waiter, route: LiveRoute, limit: float) -> LegGone | Refusal:
        """Look after the leg while it waits, and dial the service that it waits for, if its route has one."""
        limits, service = self._settings.limits, route.service
        attend = partial(waiter.leg.attend, ping_interval=limits.ping_interval, pong_timeout=limits.pong_timeout)
        if service is None:
            return await attend()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._call, service, waiter, route, limit)
            end = await attend()
            beside.cancel_scope.cancel(reason="the caller has gone")
        return end

    async def _call(self, service: Service, waiter: Waiter, route: LiveRoute, limit: float) -> None:
        shared = self._shared
        pairing = await bring_service(
            waiter,
            route,
            service,
            limit=limit,
            tcp=self._settings.tcp,
            admission=shared.admission,
            journal=shared.journal,
        )
        if pairing is not None:
            shared.runner.start(pairing, route)

    # --- refusals ----------------------------------------------------------------------------------------------

    async def _refuse(self, leg: Leg, refusal: Refusal) -> None:
        self._note_refusal(refusal)
        self._slot.note_refused()
        await leg.refuse(refusal)

    def _note_refusal(self, refusal: Refusal) -> None:
        entry = LegRefused(
            code=refusal.code,
            reason=refusal.logged,
            address=self._address,
            route=self._route_name(),
            party=None if self._route is None or self.leg is None else self.leg.party,
            identity=None if self._route is None or self.leg is None else self.leg.identity,
            certificate=self._certificate,
        )
        if self._certificate is None and self._route is None:
            self._shared.strangers_refused.note(entry)
            return
        self.log.warning("refused", code=refusal.code, reason=refusal.logged)
        self._shared.journal.note(entry)

    def _note_progress(self) -> None:
        if self._slot.stranger is not None:
            self._shared.admission.strangers.note_progress(self._slot.stranger)

    def _route_name(self) -> str | None:
        """The route that this is about: the one it was let in to, or the only one that it can have wanted."""
        if self._route is not None:
            return self._route.name
        routes = self._settings.routes
        return next(iter(routes)) if len(routes) == 1 else None


def _choose_mode(join: Join) -> Mode:
    for mode in _MODES:
        if mode in join.modes:
            return mode
    text = f"none of the modes asked for is known here; this relay has {', '.join(_MODES)}"
    raise NotAdmitted(Refusal("protocol-error", text))
