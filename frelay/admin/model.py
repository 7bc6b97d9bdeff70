"""The JSON shapes of the admin API, on which its callers rely.

Times are in seconds since the epoch, durations in seconds, sizes in bytes. Later versions only add keys. A value that a
route file can hold is written as in the file: ``["dns:func1.acme"]``, ``{"dial": "10.0.0.7:5432"}``,
``"127.0.0.1:9001"``.

:class:`RouteBody` is the only shape that callers send. It checks the types of the keys. The loader of the route file
checks the values, so that the API and the file have the same rules.
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

# As which party a leg joined, and the key that it joined with.
_LegParty = Annotated[
    Literal["func1", "func2", "either"] | None,
    Field(description="null: not known yet. either: the certificate fits both parties, and the leg has a key."),
]
_Meet = Annotated[
    str | None,
    Field(description="The key (JOIN.meet), as the function chose it: visible ASCII. null: it joined without a key."),
]
_PerMeet = Field(description="How many legs of one party may wait with the same key (JOIN.meet).")
_ByMeet = Field(description="How many legs of the route may wait with a key (JOIN.meet), in all.")


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- what comes in ---------------------------------------------------------------------------------------------


class DialBody(_Body):
    """A party that is a service, which the relay dials at this address."""

    dial: str
    connect_timeout: float | None = None


# A larger int is no TOML integer. The loader refuses a value that is too large for its key.
_Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Selectors = str | list[str]


class RouteBody(_Body):
    """A route, with the keys of a ``[[route]]``. ``name`` may be left out, because the path has it."""

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
    max_waiting_per_meet: Annotated[_Whole | None, _PerMeet] = None
    max_waiting_by_meet: Annotated[_Whole | None, _ByMeet] = None
    max_pairings: _Whole | None = None
    max_bytes_per_second: _Whole | None = None

    def table(self, name: str) -> dict[str, Any]:
        """The given keys, as they are written into the route's file."""
        return {"name": name, **self.model_dump(exclude_none=True, exclude={"name"})}


# --- routes ----------------------------------------------------------------------------------------------------


class LegView(_View):
    """A leg that waits in the lobby."""

    identity: str
    address: str
    mode: str
    since: float
    meet: _Meet = None


class WaitingView(_View):
    """The waiting legs by party; the leg that waits longest is first."""

    func1: list[LegView]
    func2: list[LegView]
    either: Annotated[
        list[LegView],
        Field(description="Legs with a key whose certificate fits both parties. Pairing decides which party they are."),
    ] = []


class PartyLimits(_View):
    """The limits in force for a route; ``max_bytes_per_second`` is null if there is no limit."""

    wait_timeout: float
    half_close_timeout: float
    idle_timeout: float
    stall_timeout: float
    max_lifetime: float
    certificate_grace: float
    max_waiting_per_party: int
    max_waiting_per_meet: Annotated[int, _PerMeet]
    max_waiting_by_meet: Annotated[int, _ByMeet]
    max_pairings: int
    max_bytes_per_second: int | None


class RouteView(_View):
    """A route in force, with its settings and its traffic.

    ``listen`` is a text for one address and a list for several; ``bound`` lists the addresses where the route listens
    in fact. ``file`` is the file that defines the route, and ``is_editable`` says whether the API may change it.
    ``etag`` changes exactly when the settings of the route change. ``outcomes`` counts ended pairings by outcome, and
    ``refusals`` counts refused connections by code. Bytes include those of running pairings.
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
    """The traffic of one route: the keys of RouteView that change without a reload."""

    name: str
    waiting: WaitingView
    pairings: int
    outcomes: dict[str, int]
    refusals: dict[str, int]
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int


class TrafficView(_View):
    """The traffic of all routes at the time ``now``. Poll it every second or two: two answers give a rate.

    When ``last_reload_at`` changes, the other keys of ``/v1/routes`` may have changed.
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
    """A running pairing. ``is_handed_off`` is False until both legs have finished their hand-off."""

    id: str
    route: str
    meet: _Meet = None
    func1: PartyView
    func2: PartyView
    since: float
    age: float
    waited: float
    is_handed_off: bool
    bytes_func1_to_func2: int
    bytes_func2_to_func1: int


class PairingsView(_View):
    """All running pairings, including those of removed routes."""

    pairings: list[PairingView]


# --- the relay as a whole --------------------------------------------------------------------------------------


# These return text that the caller has sent. A private key that was pasted into a wrong field must not come back.
_Told = Annotated[str, AfterValidator(without_pem)]


class ProblemView(_View):
    """One problem: where it is, what is wrong, and how to correct it."""

    message: _Told
    key: _Told | None = None
    file: str | None = None
    line: int | None = None


def problem_view(problem: Problem) -> ProblemView:
    """The JSON shape of a problem."""
    return ProblemView(message=problem.message, key=problem.key, file=str(problem.file), line=problem.line)


class Problems(_View):
    """The body of every error answer. ``message`` is a sentence for a person.

    ``error`` is a word for programs: ``invalid``, ``conflict``, ``not-found``, ``precondition-failed``,
    ``not-writable``, ``draining``, ``forbidden``, ``too-large``, ``too-many``, ``method-not-allowed``, ``internal``.
    """

    error: str
    message: _Told
    problems: list[ProblemView] = []


class ReloadView(_View):
    """The last reload: when it was, and whether the configuration was put in force.

    ``restart_only`` lists the keys whose new values need a restart.
    """

    at: float
    ok: bool
    problems: list[ProblemView]
    restart_only: list[str] = []


class ReloadedView(_View):
    """The result of a reload. ``kept`` counts unchanged routes; the other keys list names of routes.

    ``restart_only`` lists the keys whose new values need a restart.
    """

    kept: int
    added: list[str]
    removed: list[str]
    replaced: list[str]
    restart_only: list[str]


class CertificateView(_View):
    """A file of ``[tls]`` and when it expires. ``what`` is certificate, client_ca or crl."""

    what: str
    file: str
    subject: str | None
    not_after: float


class DescriptorView(_View):
    """File descriptors: how many are open, the limit, how many legs there are, and how many their budget allows."""

    open: int
    limit: int
    legs: int
    leg_budget: int


class WorkerView(_View):
    """One of several worker processes. ``pid`` is null while it is down. ``routes`` lists the names of its routes."""

    number: int
    pid: int | None
    restarts: int
    routes: list[str]
    descriptors: DescriptorView | None


class RefusalView(_View):
    """A refused connection, and why it was refused."""

    at: float
    code: str
    reason: str
    address: str
    route: str | None
    party: _LegParty
    identity: str | None
    meet: _Meet = None
    certificate: str | None
    count: int = 1
    """Above 1: so many refusals of this kind in one second; ``address`` is the last one."""


class StatusView(_View):
    """The relay as a whole. ``refusals`` lists the last refusals, newest first.

    ``workers`` is empty if the relay is a single process. With workers, ``descriptors`` has their sums, and ``pid`` is
    the process that takes signals.
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
    """One event of ``/v1/events``. ``kind`` is also its SSE event name, and ``data`` depends on it."""

    id: int
    kind: str
    at: float
    data: dict[str, Any]
