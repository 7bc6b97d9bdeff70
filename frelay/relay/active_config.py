"""The active configuration: the one in force, its certificates, and the listeners that are bound for it.

It is replaced as a whole, and only by :meth:`ActiveConfig.take_over`. Which addresses a new configuration binds and
closes is said by its :class:`~frelay.config.plan.Plan`, and nowhere else.
"""

from __future__ import annotations

from frelay.config.model import Config
from frelay.config.plan import ListenerKey, Plan, listener_keys
from frelay.joining.listener import Listener
from frelay.tls.trust import OuterTls

__all__ = ["ActiveConfig"]


class ActiveConfig:
    """The configuration in force; at first ``config``, for which nothing is loaded or bound yet."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.trust: OuterTls | None = None
        self.listeners: dict[ListenerKey, Listener] = {}

    def take_over(
        self, new: Config, trust: OuterTls | None, changes: Plan, opened: dict[ListenerKey, Listener]
    ) -> dict[ListenerKey, Listener]:
        """Put ``new`` in force, which cannot fail; gives the listeners to close now."""
        self.config, self.trust = new, trust
        self.listeners |= opened
        return {key: self.listeners.pop(key) for key in sorted(changes.close)}

    def bound(self, route: str) -> list[str]:
        """The addresses on which ``route`` really listens, ``host:port``."""
        keys = listener_keys(self.config.routes_by_name[route])
        return [address for key in keys for address in self.listeners[key].bound]

    def describe(self) -> str:
        """How many routes and addresses it has, in half a line for systemctl."""
        routes, addresses = len(self.config.routes), len(self.listeners)
        return f"{routes} route{'' if routes == 1 else 's'} on {addresses} address{'' if addresses == 1 else 'es'}"
