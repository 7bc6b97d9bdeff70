"""The control: the interface through which the servers in this room query and change a relay.

This room does not know the relay. The relay gives the servers its own :class:`Control`, and tests may give another.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frelay.admin.model import (
    CertificateView,
    PairingsView,
    ProblemView,
    ReloadedView,
    RoutesView,
    RouteView,
    StatusView,
    TrafficView,
)
from frelay.errors import FrelayError
from frelay.journal import Distribution, Journal
from frelay.protocol.messages import LegParty, PartyName

__all__ = [
    "Conflict",
    "Control",
    "ControlError",
    "Counts",
    "InvalidRequest",
    "PreconditionFailed",
    "RelayDraining",
    "UnknownRoute",
    "Unwritable",
]


class ControlError(FrelayError):
    """A request that was not carried out; nothing has changed. The API answers it with a status of its own."""

    def __init__(self, message: str, problems: list[ProblemView] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.problems = problems or []


class UnknownRoute(ControlError):
    """There is no such route."""


class InvalidRequest(ControlError):
    """The request has wrong values: no relay could carry it out."""


class Conflict(ControlError):
    """The request conflicts with another route, or with the files on disk."""


class PreconditionFailed(ControlError):
    """The route changed since the caller read it, or exists although the caller wants to add it."""


class Unwritable(ControlError):
    """The route file could not be written."""


class RelayDraining(ControlError):
    """The relay is draining and takes no changes."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The relay in numbers, all of the same moment. Nobody changes it, so another thread may read it.

    It covers the routes in force, and removed routes that still have pairings. It has one mapping for each figure and
    not one object for each route, because a thousand new objects at each scrape would be work for the garbage
    collector.
    """

    pairings: Mapping[str, int]
    """Running pairings, by route."""
    waiting: Mapping[tuple[str, LegParty], int]
    """Waiting legs, by route and party."""
    keys: Mapping[str, int]
    """How many keys have a waiting leg, by route."""
    bytes_moved: Mapping[tuple[str, PartyName], int]
    """Delivered bytes, those of running pairings included, by route and sender."""
    outcomes: Mapping[tuple[str, str], int]
    """Ended pairings, by route and outcome."""
    refusals: Mapping[tuple[str, str], int]
    """Refused connections, by route and code. The route is ``""`` where there is none
    (:attr:`frelay.journal.Journal.totals`)."""
    reloaded_at: float
    """When a configuration was last put in force or refused, in seconds since the epoch."""
    reload_was_accepted: bool
    certificates: tuple[CertificateView, ...]
    durations: Mapping[str, Distribution]
    """As :attr:`frelay.journal.Journal.durations`."""
    loop_lag: float = 0.0
    """The longest delay of the event loops in other processes, in seconds."""
    tasks: int = 0
    """Tasks in the event loops of other processes."""
    workers: tuple[int, ...] = ()
    """The process ids of the running workers."""
    restarts: Mapping[int, int] | None = None
    """How often each worker was started again after it had died; None without workers."""


class Control(abc.ABC):
    """Queries and changes of one relay. A query tells the state at the time of its answer, and includes every change
    that was answered before. A relay with workers asks them for it. Changes raise :class:`ControlError`.
    """

    journal: Journal

    @property
    @abc.abstractmethod
    def why_not_ready(self) -> str | None:
        """Why functions should not be sent to this relay now, in one line; None if it is ready.

        A refused reload is no reason: the previous configuration stays in force, whole.
        """

    @property
    @abc.abstractmethod
    def is_draining(self) -> bool:
        """Whether the relay takes no new connections any more."""

    @abc.abstractmethod
    async def counts(self) -> Counts:
        """The relay in numbers; cheaper than any view, for scrapes every few seconds."""

    @abc.abstractmethod
    async def status(self) -> StatusView:
        """The relay as a whole."""

    @abc.abstractmethod
    async def routes(self) -> RoutesView:
        """All routes in force."""

    @abc.abstractmethod
    async def route(self, name: str) -> RouteView:
        """One route in force; raises UnknownRoute."""

    @abc.abstractmethod
    async def traffic(self) -> TrafficView:
        """The traffic of all routes; much cheaper than :meth:`routes`."""

    @abc.abstractmethod
    async def pairings(self) -> PairingsView:
        """All running pairings."""

    @abc.abstractmethod
    def configuration(self) -> dict[str, Any]:
        """The configuration in force, in the shape of a route file: sections, groups, and all routes."""

    @abc.abstractmethod
    async def put_route(
        self, name: str, table: Mapping[str, Any], *, if_match: frozenset[str] | None, must_be_new: bool
    ) -> tuple[RouteView, bool]:
        """Add or replace a route, and return it and whether it is new. When this returns, the route listens and its
        file is on disk.

        ``table`` holds the keys of its file. With ``if_match`` the route is changed only if it has one of these etags.
        """

    @abc.abstractmethod
    async def delete_route(self, name: str, *, if_match: frozenset[str] | None) -> None:
        """Remove a route. When this returns, its port is free and its file is removed."""

    @abc.abstractmethod
    async def reload(self) -> ReloadedView:
        """Read the configuration files again and put them in force."""
