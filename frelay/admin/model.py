"""The shapes of the admin API, as JSON: what its callers may rely on.

Times are seconds since the epoch, durations seconds, sizes bytes. Keys are only ever added. A value that a route file
can hold is written as it stands there: ``["dns:func1.acme"]``, ``{"dial": "10.0.0.7:5432"}``, ``"127.0.0.1:9001"``.

:class:`RouteBody` is the one shape that comes from outside. It says what types its keys have; whether the values are
any good is judged by the loader of the route file, so that the API and the file have one set of rules.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from frelay.errors import Problem, without_pem

__all__ = [
    "CertificateView",
    "DescriptorView",
    "DialBody",
    "EventView",
    "LegView",
    "PairingView",
    "PairingsView",
    "PartyLimits",
    "ProblemView",
    "Problems",
    "RefusalView",
    "ReloadView",
    "ReloadedView",
    "RouteBody",
    "RouteTrafficView",
    "RouteView",
    "RoutesView",
    "StatusView",
    "TrafficView",
    "WaitingView",
    "WorkerView",
    "problem_view",
]

PartyKey = Literal["func1", "func2"]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- what comes in ---------------------------------------------------------------------------------------------


class DialBody(_Body):
    """A party that is a place: the relay dials it."""

    dial: str
    connect_timeout: float | None = None


# An int beyond this is no TOML integer; what is too large for its key is the loader's to say.
_Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Selectors = str | list[str]


class RouteBody(_Body):
    """A route, with the keys that a ``[[route]]`` has; ``name`` may be left out, as it stands in the path."""

    name: str | None = None
    listen: str | list[str]
    func1: _Selectors | DialBody | None = None
    func2: _Selectors | DialBody | None = None
    outer: Literal["mtls", "none"] | None = None
    allow_from: list[str] | None = None
    proxy_protocol: list[str] | None = None
    handoff: Literal["close-notify", "hello"] | None = None
    require_inner_tls: bool | Literal["always"] | None = None
    hello_settle: float | None = None
    ticket_timeout: float | None = None
    wait_timeout: float | None = None
    half_close_timeout: float | None = None
    idle_timeout: float | None = None
    stall_timeout: float | None = None
    max_lifetime: float | None = None
    certificate_grace: float | None = None
    max_waiting_per_party: _Whole | None = None
    max_pairings: _Whole | None = None
    max_bytes_per_second: _Whole | None = None

    def table(self, name: str) -> dict[str, Any]:
        """The keys that were given, as they go into the route's file."""
        return {"name": name, **self.model_dump(exclude_none=True, exclude={"name"})}


# --- routes ----------------------------------------------------------------------------------------------------


class LegView(_View):
    """A leg that waits in the lobby."""

    identity: str
    address: str
    mode: str
    since: float


class WaitingView(_View):
    """Who waits, longest first."""

    func1: list[LegView]
    func2: list[LegView]


class PartyLimits(_View):
    """The limits in force for a route; ``max_bytes_per_second`` is null where there is none."""

    wait_timeout: float
    half_close_timeout: float
    idle_timeout: float
    stall_timeout: float
    max_lifetime: float
    certificate_grace: float
    max_waiting_per_party: int
    max_pairings: int
    max_bytes_per_second: int | None


class RouteView(_View):
    """A route in force, and what goes on there.

    ``listen`` is text for one address, a list for several; ``bound`` are those that it really listens on. ``file`` is
    where it stands, and ``is_editable`` whether the API may change it there. ``etag`` stands for its configuration: it
    changes exactly when that does. ``outcomes`` counts the pairings that have ended, ``refusals`` who was turned away,
    by code. Bytes include those under way.
    """

    name: str
    listen: str | list[str]
    bound: list[str]
    func1: list[str] | dict[str, Any]
    func2: list[str] | dict[str, Any]
    outer: Literal["mtls", "none"]
    allow_from: list[str]
    proxy_protocol: list[str]
    handoff: Literal["close-notify", "hello"]
    require_inner_tls: bool | Literal["always"]
    hello_settle: float
    ticket_timeout: float
    limits: PartyLimits
    file: str
    is_editable: bool
    etag: str
    waiting: WaitingView
    pairings: int
    outcomes: dict[str, int]
    refusals: dict[str, int]
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int


class RoutesView(_View):
    """All routes in force, in the order of the configuration."""

    routes: list[RouteView]


class RouteTrafficView(_View):
    """What goes on at one route: the part of RouteView that changes by itself, under the same names."""

    name: str
    waiting: WaitingView
    pairings: int
    outcomes: dict[str, int]
    refusals: dict[str, int]
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int


class TrafficView(_View):
    """What goes on at all routes ``now``, to be asked for every other second: a rate is a difference of two of these.

    ``last_reload_at`` changes whenever the rest of ``/v1/routes`` may have.
    """

    now: float
    last_reload_at: float
    routes: list[RouteTrafficView]


# --- pairings --------------------------------------------------------------------------------------------------


class PartyView(_View):
    """One party of a pairing."""

    identity: str
    address: str
    mode: str


class PairingView(_View):
    """A pairing that runs. ``is_handed_off`` is False until both legs are through their hand-off."""

    id: str
    route: str
    func1: PartyView
    func2: PartyView
    since: float
    age: float
    waited: float
    is_handed_off: bool
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int


class PairingsView(_View):
    """All pairings that run, those of removed routes too."""

    pairings: list[PairingView]


# --- the relay as a whole --------------------------------------------------------------------------------------


# A caller's own text comes back in these; a key that was put into the wrong place must not.
_Told = Annotated[str, AfterValidator(without_pem)]


class ProblemView(_View):
    """One thing that is wrong: where it is, what it is, and how to mend it."""

    message: _Told
    key: _Told | None = None
    file: str | None = None
    line: int | None = None


def problem_view(problem: Problem) -> ProblemView:
    """A problem as it is told."""
    return ProblemView(message=problem.message, key=problem.key, file=str(problem.file), line=problem.line)


class Problems(_View):
    """The body of every answer that is an error.

    ``error`` is a word for programs: ``invalid``, ``conflict``, ``not-found``, ``precondition-failed``,
    ``not-writable``, ``draining``, ``forbidden``, ``too-large``, ``too-many``, ``method-not-allowed``, ``internal``.
    """

    error: str
    message: _Told
    problems: list[ProblemView] = []


class ReloadView(_View):
    """The last time that a configuration was put in force, or was not.

    ``restart_only`` are the keys in which the file that was taken over last differs from what runs, until a restart.
    """

    at: float
    ok: bool
    problems: list[ProblemView]
    restart_only: list[str] = []


class ReloadedView(_View):
    """What a reload did; ``kept`` counts routes, the others are their names."""

    kept: int
    added: list[str]
    removed: list[str]
    replaced: list[str]
    restart_only: list[str]


class CertificateView(_View):
    """A file of ``[tls]`` and when it runs out. ``what`` is certificate, client_ca or crl."""

    what: str
    file: str
    subject: str | None
    not_after: float


class DescriptorView(_View):
    """File descriptors: open ones, the limit, and how many legs their budget carries."""

    open: int
    limit: int
    legs: int
    leg_budget: int


class WorkerView(_View):
    """One of several worker processes: ``pid`` is null while it is down. ``routes`` are the names of its routes."""

    number: int
    pid: int | None
    restarts: int
    routes: list[str]
    descriptors: DescriptorView | None


class RefusalView(_View):
    """Somebody who was turned away, and why."""

    at: float
    code: str
    reason: str
    address: str
    route: str | None
    party: PartyKey | None
    identity: str | None
    certificate: str | None
    count: int = 1
    """Above 1: so many of this kind in one second; ``address`` is that of the last."""


class StatusView(_View):
    """The relay as a whole. ``refusals`` are the last ones, newest first.

    ``workers`` is empty where one process does it all; otherwise ``descriptors`` are those of all workers together, and
    ``pid`` is the process that takes signals.
    """

    name: str
    version: str
    openssl: str
    pid: int
    state: Literal["running", "draining"]
    started_at: float
    now: float
    config: str
    routes: int
    pairings: int
    waiting: int
    last_reload: ReloadView
    certificates: list[CertificateView]
    descriptors: DescriptorView
    refusals: list[RefusalView]
    workers: list[WorkerView] = []


class EventView(_View):
    """One event of ``/v1/events``: ``kind`` is also its SSE event name, ``data`` depends on it."""

    id: int
    kind: str
    at: float
    data: dict[str, Any]
