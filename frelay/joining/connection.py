"""An incoming connection: what happens to it from accept until a route takes it, or it is refused or gone.

``accept`` > PROXY header > first bytes > turn > outer TLS > identity > JOIN > route. Then
:mod:`frelay.joining.partner_search` finds it a partner. Each stage can only refuse or pass on. All of it runs in the
connection's own task under absolute deadlines: handshake_timeout from accept, join_timeout from the end of the
handshake, then what the leg may wait. The time for which the relay itself holds a connection back is added to its
handshake_timeout, and has a limit of its own.

``route_selection`` decides for which route a leg is, and what its function is told if there is none.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import trio

from frelay.config.plan import listener_keys
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.joining.accept_context import AcceptContext
from frelay.joining.connection_log import ConnectionLog, refuse
from frelay.joining.first_bytes import Opening, take_proxy_header, wait_for_end, wait_for_opening
from frelay.joining.frameless_legs import BareLeg, HelloLeg, PlainLeg
from frelay.joining.legs import LINGER_TIME, FramedLeg, TlsLeg
from frelay.joining.partner_search import PartnerSearch
from frelay.joining.route import LiveRoute
from frelay.joining.route_selection import NotAdmitted, not_authorised, select_route
from frelay.joining.tickets import TICKET_LINE_LENGTH, TicketIssuer, parse_ticket_line
from frelay.journal import HandshakeDone
from frelay.net.slots import Slot
from frelay.net.sockets import close, close_after_linger, format_address, tune
from frelay.net.strangers import Stage, Stranger
from frelay.net.streams import TlsFault
from frelay.net.tcp import is_open
from frelay.pairing.leg import Leg
from frelay.protocol.acceptance import Acceptance
from frelay.protocol.identity import Name
from frelay.protocol.messages import Join, Mode
from frelay.protocol.refusal import Refusal
from frelay.tls.context import ALPN
from frelay.tls.stream import TlsStream
from frelay.tls.trust import FailedVerification, VerifiedPeer, verified_peer

__all__ = ["IncomingConnection"]

T = TypeVar("T")

# The modes that this relay offers, best first: a raw leg costs it a tenth of a tunnelled one.
_MODES: Final[tuple[Mode, ...]] = ("handoff", "ticket", "tunnel")
# A fatal alert, unexpected_message: what OpenSSL answers to first bytes that are no TLS record.
_ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x0a"
# For how many times handshake_timeout a connection may be held back for its turn.
_HELD_BACK: Final = 3


class IncomingConnection:
    """One accepted connection. It owns ``sock`` and ``slot`` until a leg has them, and the leg until a pairing has it.

    ``source`` is the host and port that the connection comes from.
    """

    def __init__(self, sock: socket.socket, source: tuple[str, int], context: AcceptContext, slot: Slot) -> None:
        self._sock = sock
        self._source = source
        self._address = format_address(source)
        self._listener = context.listener
        self._settings, self._shared = context.settings, context.shared
        self._slot = slot
        """The connection's slot until there is a leg; from then on only the leg's own counts."""
        self._stranger: Stranger | None = None
        self._lacks_address = False
        """Whether a balancer opened the connection and did not say for which address."""
        self._accepted_at = trio.current_time()
        self._leg: Leg | None = None
        self._is_ticket_taken = False
        """Whether the connection brought a ticket: it belongs to the leg that the ticket is for."""
        self._log = ConnectionLog(self._address, context.settings.routes.only_name, context.shared)

    async def run(self) -> None:
        """Serve the connection; returns once it is paired, refused or gone. Raises only bugs and cancellations."""
        try:
            await self._run_as_stranger()
        except (ConnectionBroken, OSError) as error:
            self._log.info("connection lost", reason=str(error))
        finally:
            self._close()

    def _close(self) -> None:
        leg = self._leg
        if leg is None and not self._is_ticket_taken:
            close(self._sock)
            self._slot.release()
        elif leg is not None and not leg.is_paired:
            leg.close()
            leg.slot.release()

    async def _run_as_stranger(self) -> None:
        """Go through all stages. Until the connection is admitted, a newer stranger may take its place."""
        with trio.CancelScope() as scope:
            too_many = self._slot.enter(self._source[0], lambda: scope.cancel(reason="a newer stranger took its place"))
            if too_many is not None:
                # A refusal could only be told inside TLS, which has not begun. So the connection is just closed.
                self._log.note_refusal(Refusal("limit", too_many))
                return
            self._stranger = self._slot.stranger
            await self._run_stages()
        if scope.cancelled_caught and self._stranger is not None and self._stranger.evicted_because is not None:
            self._log.note_refusal(Refusal("limit", self._stranger.evicted_because))

    async def _run_stages(self) -> None:
        tune(self._sock, self._settings.tcp)
        plain = self._settings.routes.plain
        opening: Opening | None = None
        limit = self._settings.limits.handshake_timeout
        comes_by_proxy = self._settings.routes.come_by_proxy(self._source[0])
        missing = "PROXY header" if comes_by_proxy else "TLS handshake"
        try:
            with trio.move_on_at(self._accepted_at + limit) as timeout:
                if comes_by_proxy:
                    await self._take_proxy_header()
                    missing = "TLS handshake"
                if plain is None:
                    opening = await wait_for_opening(self._sock)
        except RemoteProtocolError as error:
            await self._refuse_first_bytes(str(error), alert=b"" if missing == "PROXY header" else _ALERT)
            return
        if timeout.cancelled_caught:
            self._log.note_refusal(Refusal("protocol-error", f"no {missing} within {limit:g} s"))
        elif plain is not None:
            await self._run_plain(plain)
        elif opening is Opening.TICKET:
            await self._run_with_ticket()
        elif await self._wait_for_turn():
            await self._run_tls()

    # --- before the handshake ----------------------------------------------------------------------------------

    async def _take_proxy_header(self) -> None:
        header = await take_proxy_header(self._sock)
        if header.source is None:
            self._lacks_address = True
            return
        self._source = header.source
        self._address = format_address(header.source)
        self._log.note_address(self._address)
        if self._slot.stranger is not None:
            self._shared.admission.strangers.move_to_host(self._slot.stranger, header.source[0])

    async def _refuse_first_bytes(self, why: str, *, alert: bytes) -> None:
        """Refuse a connection that begins with bytes of no protocol that is spoken here."""
        self._log.note_refusal(Refusal("protocol-error", why))
        self._slot.note_refused()
        with suppress(OSError):
            self._sock.send(alert)
        # Closing now would send an RST because of the unread bytes, and that could destroy the alert on its way.
        await close_after_linger(self._sock, LINGER_TIME)

    async def _wait_for_turn(self) -> bool:
        """Wait until the handshake of this connection may begin; False if its turn does not come in time."""
        strangers, stranger = self._shared.admission.strangers, self._slot.stranger
        if stranger is None:
            raise AssertionError("a handshake of nobody")
        began = trio.current_time()
        longest = _HELD_BACK * self._settings.limits.handshake_timeout
        with trio.CancelScope(deadline=began + longest) as scope:
            if strangers.request_turn(stranger, lambda: scope.cancel(reason="its turn has come")):
                return True
            await wait_for_end(self._sock)
        if stranger.stage is not Stage.RUNNING:
            keys = "limits.max_pre_auth, limits.max_pre_auth_per_ip"
            text = f"held back for {longest:g} s, because too many handshakes were running ({keys})"
            self._log.note_refusal(Refusal("limit", text))
            return False
        if not is_open(self._sock):
            raise ConnectionBroken("the client ended it while it was held back")
        # The relay held the connection back, so that time does not count against its handshake_timeout.
        self._accepted_at += trio.current_time() - began
        return True

    # --- without outer TLS -------------------------------------------------------------------------------------

    async def _run_plain(self, route: LiveRoute) -> None:
        objection = None if route.admits_address(self._source[0]) else "address not in allow_from"
        if self._lacks_address:
            objection = "the PROXY header names no address, so allow_from cannot admit it"
        if objection is not None:
            self._log.note_refusal(Refusal("not-authorised", objection))
            return
        leg = self._leg = PlainLeg(self._sock, route.party_by_arrival(), self._address, self._slot)
        await self._search_partner(leg, route)

    async def _run_with_ticket(self) -> None:
        """Take a second connection, on which a party brings its ticket; a wrong ticket gets no answer."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # Not a byte more than the line: what follows belongs to the functions.
        line = self._sock.recv(TICKET_LINE_LENGTH)
        ticket = parse_ticket_line(line)
        if ticket is None or not self._shared.tickets.redeem(ticket, self._listener, self._sock, self._slot):
            self._log.note_refusal(Refusal("not-authorised", "the ticket is unknown, used or expired"))
            return
        self._slot.admit()
        self._is_ticket_taken = True

    # --- outer TLS ---------------------------------------------------------------------------------------------

    async def _run_tls(self) -> None:
        trust = self._settings.trust
        if trust is None:
            raise AssertionError("an mTLS route without [tls]; the configuration should not have loaded")
        stream = TlsStream(self._sock, trust.context)
        if not await self._shake_hands(stream):
            return
        if self._slot.stranger is not None:
            self._shared.admission.strangers.note_progress(self._slot.stranger)
        connection = stream.connection
        peer = verified_peer(connection, trust)
        self._log.note_certificate(peer.identity.describe())
        server_name = (connection.get_servername() or b"").decode("ascii", "replace")
        if connection.get_alpn_proto_negotiated() != ALPN:
            await self._run_frameless(stream, peer, server_name)
            return
        framed = self._leg = FramedLeg(stream, peer, self._address, self._slot)
        join = await self._receive_first(framed, framed.receive_join, "JOIN")
        if join is not None:
            await self._select_route(framed, join, server_name)

    async def _shake_hands(self, stream: TlsStream) -> bool:
        limit = self._settings.limits.handshake_timeout
        try:
            with trio.move_on_at(self._accepted_at + limit) as timeout:
                await stream.do_handshake()
        except TlsFault as fault:
            failure = stream.connection.get_app_data()
            if isinstance(failure, FailedVerification):
                self._log.note_certificate(failure.certificate)
                self._log.note_refusal(failure.refusal)
            else:
                self._log.note_refusal(Refusal("protocol-error", f"TLS handshake: {fault}"))
            # OpenSSL has written its alert; closing now could send an RST and destroy the alert on its way.
            stream.leave_without_close_notify()
            self._slot.note_refused()
            await close_after_linger(self._sock, LINGER_TIME)
            return False
        if timeout.cancelled_caught:
            self._log.note_refusal(Refusal("protocol-error", f"no TLS handshake within {limit:g} s"))
            return False
        self._shared.journal.note(HandshakeDone(seconds=trio.current_time() - self._accepted_at))
        return True

    async def _run_frameless(self, stream: TlsStream, peer: VerifiedPeer, server_name: str) -> None:
        hello = self._settings.routes.hello
        if hello is None:
            bare = self._leg = BareLeg(stream, peer, self._address, self._slot)
            await self._select_route(bare, None, server_name)
            return
        settle = hello.config.hello_settle
        greeted = self._leg = HelloLeg(stream, peer, self._address, self._slot, settle=settle)
        if await self._receive_first(greeted, greeted.receive_line, "line") is not None:
            await self._select_route(greeted, None, server_name)

    async def _receive_first(self, leg: TlsLeg, receive: Callable[[], Awaitable[T]], what: str) -> T | None:
        """The first message of a leg, within join_timeout; None if the leg was refused instead."""
        limit = self._settings.limits.join_timeout
        try:
            with trio.fail_after(limit):
                return await receive()
        except trio.TooSlowError:
            text = f"no {what} within {limit:g} s"
        except RemoteProtocolError as error:
            text = str(error)
        await refuse(leg, Refusal("protocol-error", text), self._log)
        return None

    # --- the route ---------------------------------------------------------------------------------------------

    async def _select_route(self, leg: TlsLeg, join: Join | None, server_name: str) -> None:
        """Find the route that the leg is for; ``join`` is None for a leg without frames."""
        if join is not None and join.traceparent is not None:
            leg.traceparent = join.traceparent
            self._log.note_trace(join.traceparent)
        routes = self._settings.routes
        try:
            if leg.peer is None:
                raise AssertionError("a leg in outer TLS whose certificate nobody has verified")
            identity = leg.peer.identity
            if identity.objection is not None:
                raise not_authorised(identity.objection)
            name, matches = select_route(routes.parties, identity.names, join, server_name)
            route = routes[name]
            leg.admit_as({match.party: str(match.name) for match in matches})
            if join is not None:
                leg.attempt, leg.wait, leg.mode = join.attempt, join.wait, _choose_mode(join)
                if join.meet is not None:
                    _take_key(leg, join, route, identity.names)
            if isinstance(leg, FramedLeg):
                timeout = route.config.ticket_timeout
                listeners = (self._listener, *listener_keys(route.config))
                leg.ticket_issuer = TicketIssuer(self._shared.tickets, listeners, timeout)
        except NotAdmitted as error:
            await refuse(leg, error.refusal, self._log)
            return
        await self._search_partner(leg, route)

    async def _search_partner(self, leg: Leg, route: LiveRoute) -> None:
        self._log.note_route(leg, route.name)
        await PartnerSearch(leg, route, self._settings, self._shared, self._log).run()


def _take_key(leg: TlsLeg, join: Join, route: LiveRoute, names: tuple[Name, ...]) -> None:
    if route.service is not None:
        text = "the relay dials the other party of this route, so nobody can be met by a key: leave out JOIN.meet"
        raise NotAdmitted(Refusal("protocol-error", text))
    leg.meet = join.meet
    leg.acceptance = Acceptance(names, join.partner)


def _choose_mode(join: Join) -> Mode:
    for mode in _MODES:
        if mode in join.modes:
            return mode
    text = f"none of the modes asked for is known here; this relay has {', '.join(_MODES)}"
    raise NotAdmitted(Refusal("protocol-error", text))
