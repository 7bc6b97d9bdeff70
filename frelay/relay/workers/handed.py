"""The resources of a worker: the supervisor has read the files and bound the addresses, and hands both over."""

from __future__ import annotations

import socket
from typing import Final

import trio

from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan
from frelay.errors import ConfigError, Problem
from frelay.joining.listener import Listener
from frelay.net.channel import Received
from frelay.relay.backend import Prepared
from frelay.relay.prepare import TlsFiles, prepare
from frelay.relay.workers.codec import key_from_json, tls_files_from_json
from frelay.tls.trust import OuterTls

__all__ = ["HandedResources"]


class HandedResources:
    """What the last message of the supervisor brought for the configuration that came with it."""

    def __init__(self) -> None:
        self._tls_files = TlsFiles({}, 0.0)
        self._sockets: Final[dict[ListenerKey, list[socket.socket]]] = {}
        """Sockets that nothing listens on yet."""

    def take(self, received: Received, config: Config) -> None:
        """Take over the files and sockets of a message; raises ConfigError for ``config`` if sockets are missing."""
        if not received.is_complete:
            received.close()
            text = "a worker has no room for more sockets: raise the limit of descriptors"
            raise ConfigError([Problem(config.path, text, is_conflict=True)])
        rest = iter(received.sockets)
        for key, count in received.message["listeners"]:
            self._sockets[key_from_json(key)] = [next(rest) for _ in range(count)]
        self._tls_files = tls_files_from_json(received.message["tls_files"])

    def let_go(self) -> None:
        """Close the sockets that nothing listens on."""
        for sockets in self._sockets.values():
            for sock in sockets:
                sock.close()
        self._sockets.clear()

    async def prepare(self, config: Config) -> Prepared:
        """Load what ``config`` refers to, from the bytes that the supervisor has read; raises ConfigError."""
        files = self._tls_files
        trust = await trio.to_thread.run_sync(lambda: prepare(config, contents=dict(files.contents), now=files.at))
        return Prepared(trust, files)

    async def open_listeners(self, new: Config, changes: Plan) -> dict[ListenerKey, Listener]:
        """Listeners at what ``changes`` bind, on the sockets that were handed over for that."""
        return {key: Listener(key.address, self._sockets.pop(key)) for key in sorted(changes.bind)}

    def report(self, config: Config, trust: OuterTls | None, opened: dict[ListenerKey, Listener]) -> None:
        """Log nothing: the supervisor has logged it."""
