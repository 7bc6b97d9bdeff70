"""The control: what the servers in this room may ask of a relay, and nothing more of it.

The relay stands above this room and is not known here. It gives the servers an :class:`Control`, and the tests give
them another one.
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
from frelay.journal import Distribution, Journal
from frelay.protocol.messages import PartyName

__all__ = [
    "Conflict",
    "Control",
    "ControlError",
    "Counts",
    "Invalid",
    "PreconditionFailed",
    "Stopping",
    "Unknown",
    "Unwritable",
]


class ControlError(Exception):
    """Something that was asked for and not done; nothing has changed."""

    def __init__(self, message: str, problems: list[ProblemView] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.problems = problems or []


class Unknown(ControlError):
    """There is no such route."""


class Invalid(ControlError):
    """What was asked for can never be done: its values are wrong in themselves."""


class Conflict(ControlError):
    """What was asked for cannot be done beside what is there."""


class PreconditionFailed(ControlError):
    """The route is no longer as the caller believes, or there is one where the caller wants a new one."""


class Unwritable(ControlError):
    """The disk did not take it."""


class Stopping(ControlError):
    """The relay drains, and takes nothing over any more."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The relay in numbers, all of one moment, and nobody's to change: it may be read in another thread.

    Routes are those in force, and the removed ones that still have pairings. By columns and not by routes, because a
    thousand small objects at each look are a thousand for the garbage collector.
    """

    pairings: Mapping[str, int]
    """How many run, by route."""
    waiting: Mapping[tuple[str, PartyName], int]
    """By route and party."""
    bytes_moved: Mapping[tuple[str, PartyName], int]
    """All that was delivered, the bytes of running pairings included, by route and sender."""
    outcomes: Mapping[tuple[str, str], int]
    """Pairings that have ended, by route and outcome."""
    refusals: Mapping[tuple[str, str], int]
    """By route, which is ``""`` where there is none (:attr:`frelay.journal.Journal.totals`), and code."""
    reloaded_at: float
    """When a configuration was last put in force or refused, in seconds since the epoch."""
    reload_was_accepted: bool
    certificates: tuple[CertificateView, ...]
    durations: Mapping[str, Distribution]
    """As :attr:`frelay.journal.Journal.durations`."""
    loop_lag: float = 0.0
    """The most that the loops of other processes than this one were late, in seconds."""
    tasks: int = 0
    """Those in the loops of other processes."""
    workers: tuple[int, ...] = ()
    """The process numbers of the workers that run, where there are any."""
    restarts: Mapping[int, int] | None = None
    """How often each worker was started again after it had died; None where there are none."""


class Control(abc.ABC):
    """What may be asked of a relay. Looks tell what is so when they are answered, after all changes that were answered
    before; a relay answers at once, and one with workers asks them. Changes raise :class:`ControlError`.
    """

    journal: Journal

    @property
    @abc.abstractmethod
    def why_not_ready(self) -> str | None:
        """Why no function should be sent here now, in one line; None if the relay is there for them.

        A refused reload is no reason: the configuration before it is whole, and serves.
        """

    @property
    @abc.abstractmethod
    def is_draining(self) -> bool:
        """Whether the relay takes nothing new any more."""

    @abc.abstractmethod
    async def counts(self) -> Counts:
        """The relay in numbers: cheaper than any view, for whoever asks every few seconds."""

    @abc.abstractmethod
    async def status(self) -> StatusView:
        """The relay as a whole."""

    @abc.abstractmethod
    async def routes(self) -> RoutesView:
        """All routes in force."""

    @abc.abstractmethod
    async def route(self, name: str) -> RouteView:
        """One route in force; raises Unknown."""

    @abc.abstractmethod
    async def traffic(self) -> TrafficView:
        """What goes on at all routes; much cheaper than :meth:`routes`."""

    @abc.abstractmethod
    async def pairings(self) -> PairingsView:
        """All pairings that run."""

    @abc.abstractmethod
    def configuration(self) -> dict[str, Any]:
        """The configuration in force, in the shape of a route file: sections, groups, and all routes."""

    @abc.abstractmethod
    async def put_route(
        self, name: str, table: Mapping[str, Any], *, if_match: frozenset[str] | None, must_be_new: bool
    ) -> tuple[RouteView, bool]:
        """Add or replace a route: it listens, and is on disk, when this returns. Whether it is new, as the second.

        ``table`` are the keys of its file. With ``if_match`` it is only done if the route has one of these etags.
        """

    @abc.abstractmethod
    async def delete_route(self, name: str, *, if_match: frozenset[str] | None) -> None:
        """Remove a route: nothing listens for it any more, and its file is gone, when this returns."""

    @abc.abstractmethod
    async def reload(self) -> ReloadedView:
        """Read the files again."""
