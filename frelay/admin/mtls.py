"""The gate of an admin API that listens on TCP: mutual TLS, and ``admin.allow`` with the identities that may call.

It uses the TLS of the routes: the same certificates, CA and revocation list, which a reload replaces for both. A caller
whose certificate is not verified or not in ``admin.allow`` is disconnected before any HTTP, and the log says who it
was. An admitted caller is checked again for each request, with the certificates, lists and ``allow`` in force then,
because its connection may last for days.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog
import trio

from frelay.admin.server import Admitted
from frelay.errors import ConnectionBroken, RemoteProtocolError
from frelay.net.sockets import close_after_linger, format_address
from frelay.net.streams import TlsFault
from frelay.protocol.identity import Selector, match
from frelay.tls.stream import TlsStream
from frelay.tls.trust import FailedVerification, OuterTls, VerifiedPeer, verified_peer

__all__ = ["MutualTlsGate"]

_HANDSHAKE_TIMEOUT: Final = 5.0
_LINGER_TIME: Final = 1.0


class MutualTlsGate:
    """Admits callers with a certificate in ``allow``; ``trust`` and ``allow`` give the values in force."""

    def __init__(self, trust: Callable[[], OuterTls], allow: Callable[[], Sequence[Selector]]) -> None:
        self._trust: Final = trust
        self._allow: Final = allow

    async def __call__(self, sock: socket.socket) -> Admitted | None:
        """The caller on ``sock``, or None if it is refused or lost."""
        trust = self._trust()
        if trust.http_context is None:
            raise AssertionError("an admin API on TCP whose certificates were loaded without it")
        log = structlog.get_logger("frelay.admin").bind(address=format_address(sock.getpeername()[:2]))
        stream = TlsStream(sock, trust.http_context)
        try:
            with trio.move_on_after(_HANDSHAKE_TIMEOUT) as timeout:
                await stream.do_handshake()
        except TlsFault as fault:
            failure = stream.connection.get_app_data()
            if isinstance(failure, FailedVerification):
                log.warning("admin refused", reason=failure.refusal.reason, certificate=failure.certificate)
            else:
                log.warning("admin refused", reason=f"TLS handshake: {fault}")
            # The TLS alert is written. Closing with unread input would send RST, which could destroy the alert.
            await close_after_linger(sock, _LINGER_TIME)
            return None
        except (ConnectionBroken, RemoteProtocolError) as error:
            log.info("admin connection lost", reason=str(error))
            return None
        if timeout.cancelled_caught:
            log.warning("admin refused", reason=f"no TLS handshake within {_HANDSHAKE_TIMEOUT:g} s")
            return None
        peer = verified_peer(stream.connection, trust)
        log = log.bind(certificate=peer.identity.describe())
        caller = _VerifiedCaller(peer, self._trust, self._allow, log)
        # OpenSSL checked revocation in the handshake. Whether the list itself has expired since, we check here.
        if caller.objection() is not None:
            return None
        log.info("admin connected", identity=str(caller.name))
        return Admitted(stream, caller.objection)


class _VerifiedCaller:
    """A caller with a verified certificate; each check uses the certificates and ``allow`` in force."""

    def __init__(
        self, peer: VerifiedPeer, trust: Callable[[], OuterTls], allow: Callable[[], Sequence[Selector]], log: Any
    ) -> None:
        self._peer = peer
        self._trust: Final = trust
        self._allow: Final = allow
        self._log: Final = log
        self._logged: str | None = None

    @property
    def name(self) -> object:
        """The name of the certificate that is in ``allow``, or None."""
        return match(self._allow(), self._peer.identity.names)

    def objection(self) -> str | None:
        """Why it may not call, or None; logs a reason when it is new."""
        found = self._check()
        if found is not None and found != self._logged:
            self._log.warning("admin refused", reason=found)
        self._logged = found
        return found

    def _check(self) -> str | None:
        trust = self._trust()
        refusal = trust.recheck(self._peer)
        if refusal is not None:
            return refusal.reason
        # The files in force now accept it. Until a reload replaces them, only time can change that.
        self._peer = replace(self._peer, trust=trust)
        return "not in admin.allow" if self.name is None else None
