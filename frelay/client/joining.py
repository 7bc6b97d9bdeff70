"""Joining a route, without I/O: from the relay's address to a peer whose certificate is checked.

Theory of operation. Three clients (blocking, Trio, asyncio) must take the same steps in the same order and give the
same meaning to each error. So the steps are written once, as a generator. It yields a step that a client has to perform
(:mod:`frelay.client.steps`) and is sent the result. The shell, one in each client, adds only sockets and a clock:

1. look up the relay's name (or the proxy's), try each address, send CONNECT if there is a proxy;
2. do the outer TLS handshake, send JOIN, and answer PINGs until PAIRED or REFUSED comes;
3. mode ``handoff``: read the outer TLS to the relay's close_notify and answer it; then the connection is raw. The
   relay sends no raw byte before it has read our close_notify (docs/protocol.md, section 4), so our BIO can hold
   nothing of the inner TLS. We check that anyway, because a byte there would be lost.
   Mode ``ticket``: send the ticket on a second connection, and wait until the relay ends the first one.
   Mode ``tunnel``: keep the outer TLS, and run the inner TLS inside it;
4. do the inner TLS handshake, and compare the names in the peer's certificate with ``peer=``.

Each step ends at the deadline of ``wait``, and has a time limit of its own as well. Without that limit an unanswered
SYN would hold a function for two minutes, and a relay that lost its power would hold it for ever. A cancelled shell
sends what :meth:`Joining.final_bytes` gives, and closes.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from frelay.client.alerts import certificate_alert, refusal_of_certificate
from frelay.client.contexts import ALPN
from frelay.client.deadline import Deadline, OutOfTime
from frelay.client.options import JoinPlan
from frelay.client.peer import agreed_protocol, check_peer, names_of_peer
from frelay.client.proxy import connect_through
from frelay.client.retry import NoRelay
from frelay.client.steps import (
    Close,
    Connection,
    Endpoint,
    InnerHandshake,
    Open,
    Pause,
    Receive,
    Resolve,
    Send,
    Status,
    Steps,
)
from frelay.client.tls_engine import Engine
from frelay.errors import (
    CertificateRefused,
    FrelayError,
    HandOffFailed,
    PeerGone,
    PeerIdentityMismatch,
    Refused,
    RelayTooOld,
    RelayUnreachable,
    RemoteProtocolError,
    Truncated,
)
from frelay.protocol import messages
from frelay.protocol.messages import Paired, Ping, Pong, Waiting
from frelay.protocol.session import PartySession, State

__all__ = ["Joined", "Joining"]

# For each stage by itself: reaching the relay, waiting for its next message, the inner handshake.
_STEP_TIMEOUT: Final = 30.0
# With several addresses, each gets a share of the time, and at least this much.
_SHORTEST_TRY: Final = 2.0
# We wait at most this long for a relay, whatever it announces: poll(2) takes an int of milliseconds, 24 days at most.
_LONGEST_SILENCE: Final = 20 * 86400.0
# After our own deadline the relay's refusal may still come: its clock began when it had our JOIN, and it knows
# more, for example that a partner list excluded all that waited.
_LAST_WORD: Final = 0.5
# For sending an alert before we close. It is a courtesy and must not delay our own error for long.
_ALERT_TIMEOUT: Final = 2.0
# The protocol's codes for the alerts by which a relay refuses a certificate; "not-authorised" for all others.
_CODES: Final = {
    "CERTIFICATE_EXPIRED": "certificate-expired",
    "CERTIFICATE_REVOKED": "revoked",
}


@dataclass(frozen=True, slots=True)
class Joined:
    """The result: a pairing whose peer has been checked."""

    paired: Paired
    connection: Connection
    """The connection that the inner TLS is on."""
    engine: Engine | None
    """The inner TLS; None if the shell did the inner handshake on a socket."""


class Joining:
    """One call of ``connect``; :meth:`steps` is the generator that a shell drives."""

    def __init__(self, plan: JoinPlan, clock: Callable[[], float], *, inner_tls_on_socket: bool = False) -> None:
        self._plan: Final = plan
        self._inner_tls_on_socket: Final = inner_tls_on_socket
        self._clock: Final = clock
        self._deadline = Deadline(plan.wait, clock)
        # By this id the relay recognises a retry, and drops the leg of the earlier try if it still keeps one.
        self._attempt = str(uuid.uuid4())
        self._session: PartySession | None = None
        self._outer: Engine | None = None
        self._was_accepted = False

    def final_bytes(self, connection: Connection) -> bytes:
        """What to send on ``connection`` when it is given up now: LEAVE if the relay keeps a place for us."""
        outer, session = self._outer, self._session
        if connection != "outer" or outer is None or session is None:
            return b""
        if session.state in (State.JOINED, State.WAITING):
            try:
                outer.write(session.send(messages.Leave()))
                outer.send_eof()
                return outer.take()
            except ssl.SSLError:
                return b""  # the outer TLS is broken, so no LEAVE can be sent
        return b""

    def steps(self) -> Steps[Joined]:
        """Join, retry as the plan says, and do the inner handshake with the other function."""
        retry = self._plan.retry
        tries = failures = 0
        while True:
            self._session = self._outer = None
            self._was_accepted = False
            try:
                return (yield from self._once())
            except FrelayError as error:
                failures = 0 if self._was_accepted else failures
                pause = None if retry is None else retry.pause_after(error, tries, failures)
                if pause is None or self._deadline.is_within(pause):
                    raise
            yield Close("raw")
            yield Close("outer", self.final_bytes("outer"))
            yield Pause(pause)
            tries, failures = tries + 1, failures + 1

    def _once(self) -> Steps[Joined]:
        try:
            yield from self._reach("outer")
            tls = yield from self._outer_tls()
            paired = yield from self._join(tls)
            if self._plan.wait_ends_when_paired:
                self._deadline = Deadline(None, self._clock)
            self._attempt = str(uuid.uuid4())  # this attempt is paired; a later try is a new one
            connection: Connection = "outer"
            tunnel = None
            if paired.mode == "handoff":
                yield from self._hand_off(tls)
            elif paired.mode == "ticket":
                connection = yield from self._send_ticket(tls, paired)
            else:
                tunnel = tls
        except OutOfTime:
            wait = self._plan.wait
            raise Refused("wait-timeout", f"nobody came within {wait:g} s", retry_after=0.0) from None
        return (yield from self._inner_tls(connection, tunnel, paired))

    # --- reaching the relay ------------------------------------------------------------------------------------

    @property
    def _relay_address(self) -> str:
        host = f"[{self._plan.host}]" if ":" in self._plan.host else self._plan.host
        return f"{host}:{self._plan.port}"

    def _reach(self, connection: Connection) -> Steps[None]:
        """Open ``connection`` to the relay, through the proxy if there is one."""
        plan = self._plan
        proxy = plan.proxy
        host, port = (plan.host, plan.port) if proxy is None else (proxy.host, proxy.port)
        what = self._relay_address if proxy is None else f"the proxy {proxy}"
        try:
            endpoints: list[Endpoint] = yield Resolve(host, port, self._deadline.bound(_STEP_TIMEOUT))
        except OSError as error:
            raise RelayUnreachable(f"no address of {host} is known: {_text(error)}") from error
        failures: list[str] = []
        for position, endpoint in enumerate(endpoints):
            share = max(self._deadline.bound(_STEP_TIMEOUT) / (len(endpoints) - position), _SHORTEST_TRY)
            try:
                yield Open(connection, endpoint, self._deadline.bound(share))
                break
            except OSError as error:
                failures.append(f"{endpoint}: {_text(error)}" if len(endpoints) > 1 else _text(error))
        else:
            raise RelayUnreachable(f"no connection to {what}: {'; '.join(failures) or 'it has no address'}")
        if proxy is not None:
            try:
                yield from connect_through(connection, proxy, plan.host, plan.port, self._deadline.stage(_STEP_TIMEOUT))
            except OSError as error:
                raise RelayUnreachable(f"no answer from the proxy {proxy}: {_text(error)}") from error

    def _outer_tls(self) -> Steps[Engine]:
        tls = self._outer = Engine(self._plan.outer, server_hostname=self._plan.server_name)
        try:
            yield from self._shake_hands("outer", tls)
        except ssl.SSLCertVerificationError as error:
            yield from self._send_alert("outer", tls)
            raise NoRelay(
                f"the certificate of {self._relay_address} is not to be trusted: {error.verify_message}"
            ) from error
        except (OSError, Truncated) as error:
            raise RelayUnreachable(f"no TLS with {self._relay_address}: {_text(error)}") from error
        if agreed_protocol(tls.tls) != ALPN:
            # A relay always agrees on it. Another server would not understand JOIN, and might never answer.
            raise NoRelay(f"{self._relay_address} is not a relay: it speaks TLS, but not {ALPN}")
        return tls

    def _shake_hands(self, connection: Connection, tls: Engine) -> Steps[None]:
        time_left = self._deadline.stage(_STEP_TIMEOUT)
        while not tls.handshake():
            yield from self._flush(connection, tls, time_left)
            tls.feed((yield Receive(connection, time_left())))
        yield from self._flush(connection, tls, time_left)

    def _flush(self, connection: Connection, tls: Engine, time_left: Callable[[], float]) -> Steps[None]:
        data = tls.take()
        if data:
            yield Send(connection, data, time_left())

    def _send_alert(self, connection: Connection, tls: Engine, tunnel: Engine | None = None) -> Steps[None]:
        """Send the TLS alert that tells the other side what is wrong with its certificate, if that still works."""
        try:
            data = tls.take()
            if tunnel is not None:
                # Send close_notify to the relay after the alert. Otherwise it sees a cut, and passes that on first.
                tunnel.send_eof()
                data += tunnel.take()
            if data:
                yield Send(connection, data, _ALERT_TIMEOUT)
        except OSError:
            pass  # the other side is gone; the caller needs our own error

    # --- waiting -----------------------------------------------------------------------------------------------

    def _join(self, tls: Engine) -> Steps[Paired]:
        plan = self._plan
        session = self._session = PartySession()
        yield from self._send_frame(tls, session.send(plan.join(self._attempt, self._deadline.left())))
        silence = _STEP_TIMEOUT
        deadline = self._deadline
        while True:
            # Read no byte behind the frame: in a tunnel the other function's bytes may follow PAIRED at once.
            try:
                data = yield from self._receive(tls, session.missing, silence, deadline)
            except OutOfTime:
                if deadline is not self._deadline or session.state is not State.WAITING:
                    raise
                # For reading only: nothing else may begin after our own deadline, and so no retry.
                deadline = Deadline(_LAST_WORD, self._clock)
                continue
            try:
                received = session.receive(data)
            except RemoteProtocolError as error:
                raise NoRelay(f"this is no relay that speaks frelay/1: {error}") from error
            for message in received:
                if isinstance(message, messages.Refused):
                    raise Refused(message.code, message.reason, message.retry_after)
                if isinstance(message, Waiting | Paired) and not plan.is_echoed_by(message):
                    raise RelayTooOld(
                        "this relay does not know meet and partner, and would pair this function with any other: "
                        "update the relay"
                    )
                if isinstance(message, Waiting):
                    self._was_accepted = True
                    # The relay may be silent until this deadline, and then sends wait-timeout.
                    silence = min(message.deadline, _LONGEST_SILENCE) + _STEP_TIMEOUT
                if isinstance(message, Ping):
                    yield from self._send_frame(tls, session.send(Pong(message.n)))
                if isinstance(message, Waiting | Ping | Paired):
                    yield Status(message)
                if isinstance(message, Paired):
                    self._was_accepted = True
                    if message.mode != plan.mode:
                        raise HandOffFailed(f"the relay chose mode {message.mode}, where {plan.mode} was asked for")
                    return message

    def _send_frame(self, tls: Engine, data: bytes) -> Steps[None]:
        try:
            tls.write(data)
            yield from self._flush("outer", tls, self._deadline.stage(_STEP_TIMEOUT))
        except OSError as error:
            self._raise_lost(error, _STEP_TIMEOUT, self._deadline)

    def _receive(self, tls: Engine, size: int, silence: float, deadline: Deadline) -> Steps[bytes]:
        """The next bytes from the relay, which may be silent for at most ``silence`` seconds."""
        try:
            while (data := tls.read(size)) is None:
                tls.feed((yield Receive("outer", deadline.bound(silence))))
        except (OSError, Truncated) as error:
            self._raise_lost(error, silence, deadline)
        if not data:
            raise RelayUnreachable("the relay ended the connection without an answer")
        return data

    def _raise_lost(self, error: OSError | Truncated, silence: float, deadline: Deadline) -> NoReturn:
        """Raise what a failure to send to the relay or read from it means: our time is over, or the relay is lost."""
        if not _is_our_timeout(error):
            alert = certificate_alert(error)
            if alert is not None:
                code = _CODES.get(alert, "not-authorised")
                text = str(getattr(error, "reason", None) or alert).lower().replace("_", " ")
                raise Refused(code, f"the relay did not accept the certificate ({text})") from None
            raise RelayUnreachable(f"the connection to the relay broke: {_text(error)}") from error
        deadline.left()
        raise RelayUnreachable(f"the relay was silent for {silence:g} s") from None

    # --- leaving the outer TLS ---------------------------------------------------------------------------------

    def _hand_off(self, tls: Engine) -> Steps[None]:
        """Read up to the relay's close_notify and answer it; then ``outer`` is a raw connection."""
        time_left = self._deadline.stage(_STEP_TIMEOUT)
        try:
            while (data := tls.read(1)) is None:
                tls.feed((yield Receive("outer", time_left())))
            if data:
                raise HandOffFailed("the relay sent application data after PAIRED")
            if tls.unread:
                raise HandOffFailed("the relay sent raw bytes before it had our close_notify")
            tls.send_eof()
            yield from self._flush("outer", tls, time_left)
        except (TimeoutError, OutOfTime):
            raise HandOffFailed("the relay's close_notify did not come") from None
        except (OSError, Truncated) as error:
            raise HandOffFailed(f"the outer TLS broke instead of ending: {_text(error)}") from error
        self._outer = None

    def _send_ticket(self, tls: Engine, paired: Paired) -> Steps[Connection]:
        """Send the ticket on a second connection, which is raw from then on."""
        if paired.ticket is None or not paired.ticket.isascii():
            raise HandOffFailed("the relay chose mode ticket and sent no ticket")
        time_left = self._deadline.stage(_STEP_TIMEOUT)
        try:
            yield from self._reach("raw")
            yield Send("raw", f"FRELAY/1 {paired.ticket}\n".encode("ascii"), time_left())
        except (TimeoutError, OutOfTime):
            raise HandOffFailed("there was no time left to send the ticket") from None
        except (OSError, RelayUnreachable) as error:
            raise HandOffFailed(f"the ticket could not be sent: {_text(error)}") from error
        yield from self._wait_for_end_of_outer(tls)
        self._outer = None
        return "raw"

    def _wait_for_end_of_outer(self, tls: Engine) -> Steps[None]:
        """Wait until the relay ends the first connection, which it does when it has received the ticket."""
        time_left = self._deadline.stage(_STEP_TIMEOUT)
        try:
            while (data := tls.read(1)) is None:
                tls.feed((yield Receive("outer", time_left())))
            if data:
                raise HandOffFailed("the relay sent application data after PAIRED")
            tls.send_eof()
        except (OSError, Truncated, OutOfTime) as error:
            if isinstance(error, OutOfTime) or _is_our_timeout(error):
                raise HandOffFailed("the relay did not take its own ticket in time") from None
            # The ticket is sent, and the relay waits for it also when this connection breaks. If the relay itself is
            # gone, the raw connection fails too.
            yield Close("outer")
            return
        yield Close("outer", tls.take())

    # --- the inner TLS -----------------------------------------------------------------------------------------

    def _inner_tls(self, connection: Connection, tunnel: Engine | None, paired: Paired) -> Steps[Joined]:
        context = self._plan.inner[paired.role]
        is_server = paired.role == "server"
        inner: Engine | None = None
        try:
            if self._inner_tls_on_socket:
                protocol, names = yield InnerHandshake(
                    connection, context, is_server, tunnel, self._deadline.bound(_STEP_TIMEOUT)
                )
            else:
                name = None if is_server else self._plan.inner_name
                inner = Engine(context, server_side=is_server, server_hostname=name, below=tunnel)
                yield from self._shake_hands(connection, inner)
                protocol, names = agreed_protocol(inner.tls), names_of_peer(inner.tls)
        except ssl.SSLCertVerificationError as error:
            if inner is not None:
                yield from self._send_alert(connection, inner, tunnel)
            raise PeerIdentityMismatch(
                " or ".join(map(str, self._plan.expected)),
                [f"a certificate that is not to be trusted ({error.verify_message})"],
            ) from error
        except (OSError, Truncated, OutOfTime) as error:
            refusal = refusal_of_certificate(error, paired.role)
            if refusal is not None:
                raise CertificateRefused(refusal) from error
            text = "no time is left" if isinstance(error, OutOfTime) else _text(error)
            raise PeerGone(f"{paired.peer} went away before its TLS was up: {text}") from error
        check_peer(self._plan.expected, names)
        if protocol not in (None, *self._plan.alpn):
            # Newer versions of OpenSSL check this themselves.
            raise RemoteProtocolError("the other function chose an application protocol that was not offered")
        self._session = self._outer = None
        return Joined(paired, connection, inner)


def _is_our_timeout(error: Exception) -> bool:
    """Whether a step's own timeout passed. A TimeoutError with an errno is the kernel's: the connection is dead."""
    return isinstance(error, TimeoutError) and error.errno is None


def _text(error: Exception) -> str:
    """The text of an error; never empty."""
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
