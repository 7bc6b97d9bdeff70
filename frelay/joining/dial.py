"""Services: a party that is an address, which the relay dials when the other party is here.

A route with ``func2 = { dial = "HOST:PORT" }`` has callers on one side only. A caller comes in like any function: the
relay verifies its certificate, reads its JOIN and lets it wait in the lobby. Only then the relay dials the service,
once for each caller, so a stranger cannot make the relay open a connection. The target stands in the route file, so a
caller cannot choose it. While the relay dials, the caller is an ordinary waiting leg: it is pinged, it may leave, its
retry replaces it, and a reload may evict it. Each of these ends the dialling.

The connection to the service is matched like a function's leg, with two differences. It is matched with the caller that
it was opened for, not with the one that has waited longest, because each caller has a connection of its own. And it
never waits: it is paired as soon as it is open, or closed.

The relay sends nothing of its own to the service. The bytes on that leg are raw from the first one, and with
``require_inner_tls`` the service must answer in TLS, too.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final

import structlog
import trio

from frelay.config.model import Address, TcpSection, UnixAddress
from frelay.joining.frameless_legs import PlainLeg
from frelay.joining.lobby import Waiter
from frelay.joining.route import LiveRoute, Service
from frelay.journal import Journal, PairingEnded
from frelay.net.slots import Admission, Slot
from frelay.net.sockets import format_address, tune
from frelay.net.unix import connect_unix
from frelay.pairing.pairing import Pairing, log_record, new_pairing_id
from frelay.protocol.outcome import Outcome, Record
from frelay.protocol.refusal import Refusal

__all__ = ["DialledLeg", "bring_service"]

# Only the operator may know where the service is and what is wrong with it: the log says it, the caller is not told.
_UNREACHABLE: Final = Refusal("wait-timeout", "the service of this route cannot be reached", retry_after=1.0)


class DialledLeg(PlainLeg):
    """The connection to a service: a bare socket that the relay opened itself."""

    def __init__(self, sock: socket.socket, service: Service, address: str, slot: Slot) -> None:
        super().__init__(sock, service.party, address, slot)
        self.identity = service.identity


class _Unreachable(Exception):
    """Control flow: the service could not be reached; the text says why, for the log."""


class _TooLate(Exception):
    """Control flow: the caller could not wait longer, which says nothing about the service."""


async def bring_service(
    caller: Waiter,
    route: LiveRoute,
    service: Service,
    *,
    limit: float,
    tcp: TcpSection,
    admission: Admission,
    journal: Journal,
) -> Pairing | None:
    """Dial ``service`` for ``caller``, which waits; gives the pairing of both, which nobody runs yet.

    None if there is no pairing: the service did not answer within ``limit`` seconds, or policy or a limit forbids the
    pairing. Then ``caller`` was evicted with the reason, and the connection to the service is closed.

    A service that failed, or did not answer in the time that the route gives it, gets a record with the outcome
    ``dial-failed``. If only the caller could not wait that long, there is no record: the caller counts as refused.
    """
    log: Any = structlog.get_logger("frelay.dial").bind(route=route.name, service=service.identity)
    # Checked before the relay dials, and again when the service has answered.
    if (refusal := route.lack_of_room(caller.leg)) is not None:
        route.lobby.evict(caller, refusal)
        return None
    slot = admission.slot_for_dialled(route.charges.in_relay(caller.leg))
    if isinstance(slot, str):
        route.lobby.evict(caller, Refusal("limit", slot, retry_after=10.0))
        return None
    began = trio.current_time()
    leg: DialledLeg | None = None
    try:
        target = service.target.address
        sock = await _reach(target, limit, tcp, is_callers_limit=limit < route.longest_wait)
        leg = DialledLeg(sock, service, _where(sock, target), slot)
        log.info("dialled", address=leg.address, seconds=round(trio.current_time() - began, 3))
        return _match(leg, caller, route)
    except _TooLate:
        text = f"the service did not answer within the {limit:g} s that this function could wait"
        route.lobby.evict(caller, Refusal("wait-timeout", text, retry_after=0.0))
        return None
    except _Unreachable as error:
        record = _record(caller, route, service, str(error), trio.current_time() - began)
        log_record(record)
        journal.note(PairingEnded(record=record))
        route.lobby.evict(caller, _UNREACHABLE)
        return None
    finally:
        if leg is None:
            slot.release()
        elif not leg.is_paired:
            leg.close()
            slot.release()


def _match(leg: DialledLeg, caller: Waiter, route: LiveRoute) -> Pairing | None:
    """Pair the service with its caller, if the caller still waits and both may be paired."""
    if caller.verdict is not None:
        return None  # its verdict was decided at the moment when the service answered
    found = route.match_with(caller, leg)
    if isinstance(found, Refusal):
        # The refusal is about the service's leg; but that leg exists only for the caller, so the caller is told.
        route.lobby.evict(caller, found)
        return None
    return found


def _record(caller: Waiter, route: LiveRoute, service: Service, detail: str, duration: float) -> Record:
    """The record of a service that could not be reached, so that an operator who watches the outcomes sees it."""
    identities = {caller.leg.party: caller.leg.identity, service.party: service.identity}
    return Record(
        pairing=new_pairing_id(),
        route=route.name,
        func1=identities["func1"],
        func2=identities["func2"],
        outcome=Outcome.DIAL_FAILED,
        side=service.party,
        detail=detail,
        bytes_func1_to_func2=0,
        bytes_func2_to_func1=0,
        duration=duration,
    )


# --- the connection ------------------------------------------------------------------------------------------------


async def _reach(
    address: Address | UnixAddress, limit: float, tcp: TcpSection, *, is_callers_limit: bool
) -> socket.socket:
    """A connected, tuned, non-blocking socket within ``limit`` seconds, which include the look-up of the name.

    Raises _Unreachable, or _TooLate if the limit was the caller's own.
    """
    with trio.move_on_after(limit):
        if isinstance(address, UnixAddress):
            try:
                return await connect_unix(address.path)
            except PermissionError as error:
                text = f"{_text(error)}: user {os.geteuid()} needs write permission on the socket"
                raise _Unreachable(text) from error
            except OSError as error:
                raise _Unreachable(_text(error)) from error
        try:
            # All addresses of the name, each with a head start over the next (RFC 8305).
            stream = await trio.open_tcp_stream(address.host, address.port)
        except socket.gaierror as error:
            raise _Unreachable(f"the name does not resolve: {error.strerror}") from error
        except OSError as error:
            raise _Unreachable(_why(error)) from error
        # Taken out of Trio's wrapper: from here on it is a leg's socket like one from accept().
        sock = socket.socket(fileno=stream.socket.detach())
        try:
            sock.setblocking(False)
            tune(sock, tcp)
        except OSError as error:
            sock.close()
            raise _Unreachable(_text(error)) from error
        return sock
    raise _TooLate if is_callers_limit else _Unreachable(f"no answer within {limit:g} s")


def _where(sock: socket.socket, target: Address | UnixAddress) -> str:
    """The address that answered; the name may have several."""
    if isinstance(target, UnixAddress):
        return str(target)
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "gone already"
    return format_address((host, port))


def _why(error: OSError) -> str:
    """Why each attempt failed; the cause of Trio's error holds the errors of all addresses."""
    attempts = error.__cause__.exceptions if isinstance(error.__cause__, BaseExceptionGroup) else (error,)
    return ", ".join(dict.fromkeys(_text(attempt) for attempt in attempts if isinstance(attempt, OSError)))


def _text(error: OSError) -> str:
    # Not str(error): it may repeat the address, so the text would grow with the number of addresses.
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]
