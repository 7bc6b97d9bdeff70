"""Joining a route from ordinary blocking code: :func:`connect`. Standard library only.

This is a shell of :mod:`frelay.client.joining`: it performs the steps on blocking sockets with a timeout. The shell
does the inner TLS handshake itself, because its result must be a real ``SSLSocket``
(:class:`~frelay.client.wire.Wire`), which code written for sockets can use.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from frelay.client.contexts import StrPath
from frelay.client.joining import Joining
from frelay.client.options import JoinPlan, split_address
from frelay.client.peer import agreed_protocol, names_of_peer
from frelay.client.retry import Retry
from frelay.client.sockets import Connections, look_up_in_thread, numeric
from frelay.client.steps import Close, Endpoint, InnerHandshake, Open, Pause, Receive, Resolve, Send, Step, drive
from frelay.client.tunnel import TunnelPump
from frelay.client.wire import Wire
from frelay.protocol.identity import Name
from frelay.protocol.messages import Message, Mode, PartyName

__all__ = ["Interrupted", "Shell", "connect", "split_address"]

_READ = 65536


def connect(
    address: str,
    *,
    cert: StrPath,
    key: StrPath | None = None,
    ca: StrPath,
    peer: str | Sequence[str],
    wait: float | None = None,
    route: str | None = None,
    party: PartyName | None = None,
    server_name: str | None = None,
    inner_cert: StrPath | None = None,
    inner_key: StrPath | None = None,
    inner_ca: StrPath | None = None,
    alpn: Sequence[str] | None = None,
    mode: Mode = "handoff",
    on_status: Callable[[Message], None] | None = None,
    proxy: str | None = None,
    retry: Retry | bool | int | None = None,
    traceparent: str | None = None,
    meet: str | None = None,
    partner: str | Sequence[str] | None = None,
) -> Wire:
    """Join a route, wait for the other function, and give the wire to it: end-to-end mTLS, ready for use.

    Args:
        address: the relay's ``host:port``; every address that the name resolves to is tried.
        cert: PEM file of this function's certificate (and intermediates).
        key: PEM file of its private key; left out if ``cert`` holds it.
        ca: PEM file of the CAs that issue the relay's certificate, and the other function's unless ``inner_ca`` is
            given.
        peer: the name that the other function must have, e.g. ``"dns:func2.acme"``, or a list of such names, of which
            it must have one. It is checked against the certificate that the other function itself shows, whatever the
            relay says.
        wait: seconds for everything together, including the look-up of the relay's name; with None the relay's limit
            ends the waiting.
        route: the route's name, needed where several share the address.
        party: ``"func1"`` or ``"func2"``, needed where the certificate fits both.
        server_name: the name in the relay's certificate, where it is not the host of ``address``.
        inner_cert: the certificate to show to the other function, if it is not ``cert``; ``inner_key`` and
            ``inner_ca`` go with it.
        alpn: application protocols to agree on with the other function.
        mode: how to leave the TLS to the relay. ``"handoff"`` makes this connection a raw one and is the fastest.
            ``"ticket"`` does the same on a second connection. ``"tunnel"`` keeps the TLS, for networks that let only
            TLS out, and needs a thread that copies the bytes between the wire and the relay.
        on_status: called with each WAITING, PING and PAIRED message when it arrives.
        proxy: ``http://[user:password@]host:port`` of an HTTP proxy to go through; None takes HTTPS_PROXY and
            NO_PROXY from the environment, ``""`` goes directly.
        retry: join again after a failure that may pass: True, a number of tries, or a :class:`~frelay.Retry`.
        traceparent: the W3C trace context of the caller, for the relay's log; ignored if it is ill-formed.
        meet: a key: the relay pairs this function only with one that joins the route with the same key. 1 to 128
            characters of visible ASCII. It is a name and no secret. A certificate that fits both parties needs no
            ``party`` then.
        partner: the name that the relay must have verified in the other function's certificate, or a list of up to 16
            names: the relay passes over all others and lets this function wait on. Only with ``meet``.

    Raises:
        RelayUnreachable: no connection, or the relay's certificate is not trusted.
        Refused: the relay refused; see its ``code`` and ``retry_after``. ``wait-timeout``: nobody came.
        RelayTooOld: the relay does not know ``meet`` and ``partner``; this function has left it.
        HandOffFailed: the outer TLS did not end as it should.
        PeerGone: the other function went away before its TLS was up.
        CertificateRefused: the other function refused this function's own certificate; it is a PeerGone too.
        PeerIdentityMismatch: the other function is not ``peer``; nothing was sent to it.
        CertificateError: a file is missing or unreadable.
        ValueError: ``address``, ``peer`` or another argument cannot be read.
    """
    plan = JoinPlan.make(
        address,
        cert=cert,
        key=key,
        ca=ca,
        peer=peer,
        wait=wait,
        route=route,
        party=party,
        server_name=server_name,
        inner_cert=inner_cert,
        inner_key=inner_key,
        inner_ca=inner_ca,
        alpn=alpn,
        mode=mode,
        on_status=on_status,
        proxy=proxy,
        retry=retry,
        traceparent=traceparent,
        meet=meet,
        partner=partner,
    )
    joining = Joining(plan, time.monotonic, inner_tls_on_socket=True)
    shell = Shell()
    try:
        drive(joining.steps(), shell.perform, on_status)
        return shell.take_wire()
    finally:
        shell.close(joining)


class Interrupted(Exception):
    """A signal inside the client: another thread has interrupted this shell."""


class Shell:
    """Performs steps on blocking sockets. Another thread may interrupt it."""

    def __init__(self) -> None:
        self._connections = Connections()
        self._wire: Wire | None = None
        self._answer: queue.SimpleQueue[list[Endpoint] | OSError] = queue.SimpleQueue()
        self._is_interrupted = False
        self._lock = threading.Lock()
        """Held to close a socket: its number may be another socket's at once, which must not be shut down instead."""

    def interrupt(self) -> None:
        """From another thread: the step that runs now, and each later one, raises Interrupted.

        A connection that has been opened just now may miss it. So call it again until the other thread is done.
        """
        self._is_interrupted = True
        self._answer.put(InterruptedError())
        with self._lock:
            for sock in self._connections.sockets.values():
                _shut_down(sock, socket.SHUT_RD)  # LEAVE can still be sent
            if self._wire is not None:
                _shut_down(self._wire, socket.SHUT_RDWR)

    def take_wire(self) -> Wire:
        """The wire; the caller closes it from now on."""
        with self._lock:
            wire, self._wire = self._wire, None
        if wire is None:
            raise AssertionError("the joining is done without an inner handshake")
        wire.settimeout(None)
        return wire

    def close(self, joining: Joining) -> None:
        """Close everything that was not taken."""
        try:
            self._abandon_wire()
        finally:
            with self._lock:
                self._connections.close_all(joining.final_bytes)

    def _abandon_wire(self) -> None:
        """Cut a wire whose handshake failed, or that leads to a wrong peer: it sees no close_notify."""
        with self._lock:
            wire, self._wire = self._wire, None
        if wire is not None:
            wire.abandon()

    def perform(self, step: Step) -> Any:
        """Perform one step; raises OSError or Interrupted."""
        self._check_not_interrupted()
        try:
            answer = self._perform(step)
        except OSError:
            self._check_not_interrupted()
            raise
        # What a socket that was shut down has given is no answer of the relay.
        self._check_not_interrupted()
        return answer

    def _check_not_interrupted(self) -> None:
        if self._is_interrupted:
            raise Interrupted

    def _perform(self, step: Step) -> Any:
        match step:
            case Receive(connection, timeout):
                sock = self._connections.sockets[connection]
                sock.settimeout(timeout)
                return sock.recv(_READ)
            case Send(connection, data, timeout):
                sock = self._connections.sockets[connection]
                sock.settimeout(timeout)
                return sock.sendall(data)
            case Resolve(host, port, timeout):
                return self._look_up(host, port, timeout)
            case Open(connection, endpoint, timeout):
                with self._lock:
                    sock = self._connections.add(connection, endpoint)
                sock.settimeout(timeout)
                return sock.connect(endpoint.sockaddr)
            case Close(connection, final_bytes):
                self._abandon_wire()
                with self._lock:
                    return self._connections.close(connection, final_bytes)
            case Pause(seconds):
                return time.sleep(seconds)
            case InnerHandshake():
                return self._inner_handshake(step)
            case _:
                raise AssertionError(f"{step} is not for this shell")

    def _look_up(self, host: str, port: int, timeout: float) -> list[Endpoint]:
        found = numeric(host, port)
        if found is not None:
            return found
        answer = self._answer = queue.SimpleQueue()  # a new one: the answer of an earlier look-up may come late
        look_up_in_thread(host, port, answer.put)
        try:
            result = answer.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("the look-up timed out") from None
        if isinstance(result, OSError):
            raise result
        return result

    def _inner_handshake(self, step: InnerHandshake) -> tuple[str | None, list[Name]]:
        with self._lock:
            sock = self._connections.take(step.connection)
        pump = None
        if step.tunnel is not None:
            near, far = socket.socketpair()
            pump = TunnelPump(far, sock, step.tunnel)
            pump.start()
            sock = near
        try:
            sock.settimeout(step.timeout)
            # If the peer is gone, fail here: wrap_socket fails only after it took the descriptor, and never closes it.
            sock.getpeername()
            wire = step.context.wrap_socket(
                sock, server_side=step.server_side, suppress_ragged_eofs=False, do_handshake_on_connect=False
            )
        except BaseException:
            sock.close()  # for example, the peer reset the connection before its TLS began
            raise
        assert isinstance(wire, Wire)  # noqa: S101  the context's sslsocket_class
        self._wire = wire
        wire.pump = pump
        try:
            wire.do_handshake()
        except ssl.SSLCertVerificationError:
            wire.see_alert_off()
            raise
        return agreed_protocol(wire), names_of_peer(wire)


def _shut_down(sock: socket.socket, how: int) -> None:
    try:
        socket.socket.shutdown(sock, how)  # not the method of a Wire, which would send close_notify
    except OSError:
        pass  # it is not connected
