"""The door of the admin API where it listens on TCP: mutual TLS, and a list of who may come in.

The same TLS as on a route, with the same certificates, CA and revocation list, which a reload replaces in the same
way: nothing here has to be rotated on its own. Anyone who is not verified, or not on the list, gets the close and no
byte of HTTP, and the log a line that says who it was. Who was let in is judged again for each request, because a
connection may live for days: by the certificates, lists and ``allow`` that are in force then.
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
from frelay.tls.context import OuterTls, Rejection, VerifiedPeer, verified_peer
from frelay.tls.stream import TlsStream

__all__ = ["TlsDoor"]

_HANDSHAKE_TIME: Final = 5.0
_LINGER_TIME: Final = 1.0


class TlsDoor:
    """Admits those who show a certificate of the list; ``trust`` and ``allow`` give what is in force."""

    def __init__(self, trust: Callable[[], OuterTls], allow: Callable[[], Sequence[Selector]]) -> None:
        self._trust: Final = trust
        self._allow: Final = allow

    async def __call__(self, sock: socket.socket) -> Admitted | None:
        """The caller in ``sock``, or None."""
        trust = self._trust()
        if trust.http_context is None:
            raise AssertionError("an admin API on TCP whose certificates were loaded without it")
        log = structlog.get_logger("frelay.admin").bind(address=format_address(sock.getpeername()[:2]))
        stream = TlsStream(sock, trust.http_context)
        try:
            with trio.move_on_after(_HANDSHAKE_TIME) as patience:
                await stream.do_handshake()
        except TlsFault as fault:
            rejection = stream.connection.get_app_data()
            if isinstance(rejection, Rejection):
                log.warning("admin refused", reason=rejection.reason, certificate=rejection.certificate)
            else:
                log.warning("admin refused", reason=f"TLS handshake: {fault}")
            # The alert is written; an RST on unread input would destroy it under way.
            await close_after_linger(sock, _LINGER_TIME)
            return None
        except (ConnectionBroken, RemoteProtocolError) as error:
            log.info("admin connection lost", reason=str(error))
            return None
        if patience.cancelled_caught:
            log.warning("admin refused", reason=f"no TLS handshake within {_HANDSHAKE_TIME:g} s")
            return None
        peer = verified_peer(stream.connection, trust)
        log = log.bind(certificate=peer.identity.describe())
        caller = _Caller(peer, self._trust, self._allow, log)
        # The handshake asked OpenSSL about revocation; that the list itself has run out since is ours to see.
        if caller.objection() is not None:
            return None
        log.info("admin connected", identity=str(caller.name))
        return Admitted(stream, caller.objection)


class _Caller:
    """A verified certificate, and whether it may call: judged anew by what is in force, whenever it is asked."""

    def __init__(
        self, peer: VerifiedPeer, trust: Callable[[], OuterTls], allow: Callable[[], Sequence[Selector]], log: Any
    ) -> None:
        self._peer = peer
        self._trust: Final = trust
        self._allow: Final = allow
        self._log: Final = log
        self._told: str | None = None

    @property
    def name(self) -> object:
        """The name under which it is on the list, or None."""
        return match(self._allow(), self._peer.identity.names)

    def objection(self) -> str | None:
        """Why it may not call, or None; the log is told when that changes."""
        found = self._judge()
        if found is not None and found != self._told:
            self._log.warning("admin refused", reason=found)
        self._told = found
        return found

    def _judge(self) -> str | None:
        trust = self._trust()
        rejection = trust.judge(self._peer)
        if rejection is not None:
            return rejection.reason
        # Verified by the files in force now: from here on clocks alone can change that, until other files come.
        self._peer = replace(self._peer, trust=trust)
        return "not in admin.allow" if self.name is None else None
