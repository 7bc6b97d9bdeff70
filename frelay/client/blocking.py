"""Joining a route from ordinary blocking code: :func:`connect`.

A shell of :mod:`frelay.client.joining`, which says what is to be done; here it is done on a blocking socket with a
time-out. The inner TLS is the one thing that this shell does by itself, because its result is a real ``SSLSocket``
(:class:`~frelay.client.wire.Wire`), which code that was written for sockets can use. Standard library only.
"""

from __future__ import annotations

import queue
import socket
import ssl
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

__all__ = ["connect", "split_address"]

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
) -> Wire:
    """Join a route, wait for the other function, and give the wire to it: end-to-end mTLS, ready for use.

    Args:
        address: the relay's ``host:port``; every address that the name resolves to is tried.
        cert: PEM file of this function's certificate (and intermediates).
        key: PEM file of its private key; left out if ``cert`` holds it.
        ca: PEM file of the CAs that vouch for the relay, and for the other function unless ``inner_ca`` is given.
        peer: who the other function must be, e.g. ``"dns:func2.acme"``; of several any will do. It is checked
            against the certificate that the other function itself shows, whatever the relay says.
        wait: seconds for all of it together, looking up the relay's name included; None leaves the waiting to the
            relay's limit.
        route: the route's name, needed where several share the address.
        party: ``"func1"`` or ``"func2"``, needed where the certificate fits both.
        server_name: the name in the relay's certificate, where it is not the host of ``address``.
        inner_cert: certificate for the other function, where it is another one; ``inner_key`` and ``inner_ca`` alike.
        alpn: application protocols to agree on with the other function.
        mode: how to leave the TLS to the relay: ``"handoff"`` makes this connection a raw one and is the fastest;
            ``"ticket"`` does the same on a second connection; ``"tunnel"`` stays in it, for networks that let only
            TLS out, and costs a thread that carries the bytes between the wire and the relay.
        on_status: called with each WAITING, PING and PAIRED as it comes.
        proxy: ``http://[user:password@]host:port`` of an HTTP proxy to go through; None takes HTTPS_PROXY and
            NO_PROXY from the environment, ``""`` goes directly.
        retry: join again after a failure that may pass: True, a number of tries, or a :class:`~frelay.Retry`.
        traceparent: the W3C trace context of the caller, for the relay's log; ignored if it is ill-formed.

    Raises:
        RelayUnreachable: no connection, or the relay's certificate is not to be trusted.
        Refused: the relay said no; see its ``code`` and ``retry_after``. ``wait-timeout``: nobody came.
        HandOffFailed: the outer TLS did not end as it should.
        PeerGone: the other function went away before its TLS was up.
        CertificateRefused: it refused this function's own certificate; a PeerGone, too.
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
    )
    joining = Joining(plan, time.monotonic, inner_tls_on_socket=True)
    shell = _Shell()
    try:
        drive(joining.steps(), shell.perform, on_status)
        return shell.take_wire()
    finally:
        shell.close(joining)


class _Shell:
    """Performs steps on blocking sockets."""

    def __init__(self) -> None:
        self._connections = Connections()
        self._wire: Wire | None = None

    def take_wire(self) -> Wire:
        """The wire, no longer ours to close."""
        wire, self._wire = self._wire, None
        if wire is None:
            raise AssertionError("the joining is done, and nobody was met")
        wire.settimeout(None)
        return wire

    def close(self, joining: Joining) -> None:
        """Close all that was not taken."""
        try:
            if self._wire is not None:
                # Nothing more is owed to a peer that is not the right one, not even close_notify.
                self._wire.abandon()
        finally:
            self._connections.close_all(joining.final_bytes)

    def perform(self, step: Step) -> Any:
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
                return _look_up(host, port, timeout)
            case Open(connection, endpoint, timeout):
                sock = self._connections.add(connection, endpoint)
                sock.settimeout(timeout)
                return sock.connect(endpoint.sockaddr)
            case Close(connection, final_bytes):
                if self._wire is not None:
                    self._wire.abandon()
                    self._wire = None
                return self._connections.close(connection, final_bytes)
            case Pause(seconds):
                return time.sleep(seconds)
            case InnerHandshake():
                return self._inner_handshake(step)
            case _:
                raise AssertionError(f"{step} is not for this shell")

    def _inner_handshake(self, step: InnerHandshake) -> tuple[str | None, list[Name]]:
        sock = self._connections.take(step.connection)
        pump = None
        if step.tunnel is not None:
            near, far = socket.socketpair()
            pump = TunnelPump(far, sock, step.tunnel)
            pump.start()
            sock = near
        try:
            sock.settimeout(step.timeout)
            # wrap_socket would find out, too, but only after it has taken the descriptor, which it then does not close.
            sock.getpeername()
            wire = step.context.wrap_socket(
                sock, server_side=step.server_side, suppress_ragged_eofs=False, do_handshake_on_connect=False
            )
        except BaseException:
            # A reset by a peer that is already gone, for one: it got here before its TLS could.
            sock.close()
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


def _look_up(host: str, port: int, timeout: float) -> list[Endpoint]:
    found = numeric(host, port)
    if found is not None:
        return found
    answer: queue.SimpleQueue[list[Endpoint] | OSError] = queue.SimpleQueue()
    look_up_in_thread(host, port, answer.put)
    try:
        result = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError("the look-up timed out") from None
    if isinstance(result, OSError):
        raise result
    return result
