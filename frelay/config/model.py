"""The frozen types of a configuration, with all defaults.

The *sections* (:class:`Limits`, :class:`TlsSection` and so on) have the shape of the file: one class for each table;
unknown keys are refused. :class:`RouteTable` is one ``[[route]]`` as it is written. The rest of frelay works with
:class:`Route` and :class:`Config`: there groups are expanded, each route has its effective limits, and paths are
absolute.

``values`` parses the single values; ``config/relay.toml`` says what each key is for. Durations are seconds (float),
sizes and counts are ints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from frelay.config.address import Address, Addresses, Network, UnixAddress, parse_address, parse_network
from frelay.config.values import (
    Account,
    CongestionControl,
    Count,
    Dial,
    Duration,
    DurationOrZero,
    File,
    InnerTls,
    KeepAlive,
    Listen,
    Listens,
    Name,
    Networks,
    Party,
    PartyValue,
    SelectorList,
    UnixOrAddress,
    UserTimeout,
    ValueContext,
    Workers,
    is_name,
)
from frelay.protocol.identity import Selector

__all__ = [
    "Address",
    "Addresses",
    "AdminSection",
    "Config",
    "Dial",
    "GroupTable",
    "HandOff",
    "Limits",
    "MetricsSection",
    "Network",
    "Outer",
    "Party",
    "RelaySection",
    "Route",
    "RouteLimits",
    "RouteTable",
    "Section",
    "TcpSection",
    "TlsSection",
    "UnixAddress",
    "ValueContext",
    "is_name",
    "parse_address",
    "parse_network",
]


# --- sections --------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A frozen table of the route file. Unknown keys are refused, and types are strict: "10" is not 10."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, hide_input_in_errors=True
    )


class RelaySection(Section):
    """``[relay]``; ``drain_timeout`` in seconds, ``routes_dir`` absolute (by default ``routes.d`` beside the file).

    ``user`` is the account that a relay becomes if root started it. Only then it is checked that the account exists.
    """

    name: Name = "relay-1"
    routes_dir: File | None = None
    drain_timeout: Duration = 30
    policy_ends_pairings: bool = True
    user: Account | None = None
    workers: Workers = 1

    @property
    def worker_count(self) -> int:
        """``workers`` as a number: "auto" stands for the cores that this process may use."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else self.workers


class TlsSection(Section):
    """``[tls]``: absolute paths. The room ``tls/`` reads the files, and checks existence, mode and content."""

    certificate: File
    private_key: File
    client_ca: File
    crl: File | None = None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, "***" if name == "private_key" else value


class RouteLimits(Section):
    """The limits that a route may set for itself; durations in seconds. A :class:`Route` holds its effective ones."""

    wait_timeout: Duration = 60
    half_close_timeout: Duration = 60
    idle_timeout: Duration = 3600
    stall_timeout: Duration = 120
    max_lifetime: Duration = 86400
    certificate_grace: DurationOrZero = 0
    max_waiting_per_party: Count = 16
    max_waiting_per_meet: Count = 64
    max_waiting_by_meet: Count = 1024
    max_pairings: Count = 1024
    max_bytes_per_second: Count | None = None


class Limits(RouteLimits):
    """``[limits]``: the defaults of :class:`RouteLimits` for every route, and the limits of the whole relay."""

    handshake_timeout: Duration = 10
    join_timeout: Duration = 5
    handoff_timeout: Duration = 5
    ping_interval: Duration = 15
    pong_timeout: Duration = 10
    # An idle pairing takes 16 KiB of memory if both legs are raw, and about 150 KiB if both are tunnels.
    max_pairings_in_all: Count = 16384
    max_pre_auth: Count = 256
    max_pre_auth_per_ip: Count = 32
    fd_budget: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.8

    def for_route(self, overrides: Mapping[str, object]) -> RouteLimits:
        """The effective limits of a route that sets ``overrides``."""
        own = {name: getattr(self, name) for name in RouteLimits.model_fields}
        return RouteLimits.model_validate({**own, **overrides})


class TcpSection(Section):
    """``[tcp]``: ``keepalive`` is (idle seconds, interval seconds, count), ``user_timeout`` is in seconds.

    ``congestion_control`` is the name of an algorithm of this kernel (tcp(7)); with None the kernel chooses.
    """

    keepalive: KeepAlive = (30, 10, 3)
    user_timeout: UserTimeout = 120
    nodelay: bool = True
    congestion_control: CongestionControl | None = None


class AdminSection(Section):
    """``[admin]``: ``listen`` is ``unix:PATH`` (absolute) or ``HOST:PORT``; ``allow`` is who may call the latter."""

    listen: UnixOrAddress = "unix:frelay.sock"
    allow: SelectorList = ()

    @property
    def socket_path(self) -> Path | None:
        """The path of the Unix socket, or None if the API listens on TCP."""
        return Path(self.listen.removeprefix("unix:")) if self.listen.startswith("unix:") else None

    @property
    def address(self) -> Address | None:
        """The TCP address, or None if the API listens on a Unix socket."""
        return None if self.listen.startswith("unix:") else parse_address(self.listen)


class MetricsSection(Section):
    """``[metrics]``."""

    listen: Listen = Address("127.0.0.1", 9464)


class GroupTable(Section):
    """One ``[[group]]``."""

    name: Name
    parties: SelectorList


# --- routes ----------------------------------------------------------------------------------------------------

Outer = Literal["mtls", "none"]
HandOff = Literal["close-notify", "hello"]

_HELLO_SETTLE: Final = 0.2  # seconds
_TICKET_TIMEOUT: Final = 10.0  # seconds


class RouteTable(RouteLimits):
    """One ``[[route]]`` as it is written. :meth:`effective` adds the limits that it does not set."""

    name: Name
    listen: Listens
    func1: PartyValue = ()
    func2: PartyValue = ()
    outer: Outer = "mtls"
    allow_from: Networks = ()
    proxy_protocol: Networks = ()
    handoff: HandOff = "close-notify"
    require_inner_tls: InnerTls = True
    hello_settle: Duration = _HELLO_SETTLE
    ticket_timeout: Duration = _TICKET_TIMEOUT

    def effective(self, limits: Limits, source: Path) -> Route:
        """This route with its effective limits, and with the file that holds it."""
        own = {name: getattr(self, name) for name in RouteLimits.model_fields if name in self.model_fields_set}
        return Route(
            name=self.name,
            listen=self.listen,
            func1=self.func1,
            func2=self.func2,
            outer=self.outer,
            allow_from=self.allow_from,
            proxy_protocol=self.proxy_protocol,
            handoff=self.handoff,
            require_inner_tls=self.require_inner_tls,
            hello_settle=self.hello_settle,
            ticket_timeout=self.ticket_timeout,
            limits=limits.for_route(own),
            source=source,
        )


class Route(Section):
    """A route as the relay runs it: groups expanded, limits effective, durations in seconds.

    ``func1`` and ``func2`` are selectors, of which any may match, or one of the two is a :class:`Dial`. If ``outer``
    is "none", both are empty and ``allow_from`` is not; otherwise neither is empty. ``proxy_protocol`` are the networks
    of load balancers that send a PROXY header, the same for all routes of an address. ``source`` is the file that holds
    the route. ``load`` checks these rules, since it can name the line that breaks one; the class checks nothing.
    """

    name: Name
    listen: Listens
    func1: PartyValue
    func2: PartyValue
    outer: Outer = "mtls"
    allow_from: Networks = ()
    proxy_protocol: Networks = ()
    handoff: HandOff = "close-notify"
    require_inner_tls: InnerTls = True
    hello_settle: Duration = _HELLO_SETTLE
    ticket_timeout: Duration = _TICKET_TIMEOUT
    limits: RouteLimits = RouteLimits()
    source: Path


# --- the whole -------------------------------------------------------------------------------------------------


def _frozen_mapping(value: Mapping[str, tuple[Selector, ...]]) -> Mapping[str, tuple[Selector, ...]]:
    return MappingProxyType(dict(value))


class Config(Section):
    """A whole configuration, whose parts agree with each other; all paths are absolute.

    ``admin`` and ``metrics`` are None if the file has no such section. ``files`` are those that were read: the
    route file, then the files of ``routes_dir`` in the order of their names.
    """

    path: Path
    relay: RelaySection = RelaySection()
    tls: TlsSection | None = None
    limits: Limits = Limits()
    tcp: TcpSection = TcpSection()
    admin: AdminSection | None = None
    metrics: MetricsSection | None = None
    groups: Annotated[Mapping[str, tuple[Selector, ...]], PlainValidator(_frozen_mapping)] = Field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def routes_by_name(self) -> Mapping[str, Route]:
        """The routes by their names."""
        return MappingProxyType({route.name: route for route in self.routes})

    @property
    def watched_files(self) -> tuple[Path, ...]:
        """Every path whose change causes a reload; ``routes_dir`` stands for all files in it."""
        paths = [self.path, *self.files]
        if self.relay.routes_dir is not None:
            paths.append(self.relay.routes_dir)
        if self.tls is not None:
            paths += [self.tls.certificate, self.tls.private_key, self.tls.client_ca]
            if self.tls.crl is not None:
                paths.append(self.tls.crl)
        return tuple(dict.fromkeys(paths))
