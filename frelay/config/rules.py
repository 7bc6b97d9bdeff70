"""The rules between keys and between tables of a configuration, which no single value can break.

They are judged on what is *written*, not on validated objects: whether ``allow_from`` stands there at all is known
even where another key of that route has a typing error. So one mistake never hides another, and the reader gets the
whole list at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from frelay.config.address import parse_listen
from frelay.config.document import Document, Place
from frelay.config.model import (
    Address,
    AdminSection,
    Limits,
    MetricsSection,
    Network,
    RouteTable,
    TcpSection,
    is_name,
    parse_network,
)

__all__ = [
    "WrittenRoute",
    "check_addresses",
    "check_keys_together",
    "check_names",
    "check_servers",
    "check_stalls",
    "check_tls",
]


@dataclass(frozen=True)
class WrittenRoute:
    """A route as it stands in a file, before anybody knows whether its values are any good."""

    document: Document
    place: Place
    table: dict[str, Any]

    @property
    def name(self) -> str | None:
        """Its name, if that is a valid one."""
        name = self.table.get("name")
        return name if is_name(name) else None

    @cached_property
    def listen(self) -> dict[Address, Place]:
        """Its valid addresses, and where each stands."""
        written = self.table.get("listen")
        places: list[tuple[object, Place]] = [(written, (*self.place, "listen"))]
        if isinstance(written, list):
            places = [(one, (*self.place, "listen", index)) for index, one in enumerate(written)]
        found: dict[Address, Place] = {}
        for text, place in places:
            if isinstance(text, str):
                with suppress(ValueError):
                    found.setdefault(parse_listen(text), place)
        return found

    @cached_property
    def proxy_protocol(self) -> frozenset[Network] | None:
        """Its networks of balancers, if those are valid ones."""
        try:
            return frozenset(parse_network(one) for one in self.table.get("proxy_protocol", ()))
        except (TypeError, ValueError, AttributeError):
            return None

    @property
    def outer(self) -> object:
        """What ``outer`` says, or its default."""
        return self.table.get("outer", "mtls")

    def report(self, key: str, message: str, *, is_conflict: bool = False) -> None:
        """Add a problem with one of its keys."""
        self.document.report((*self.place, key), message, is_conflict=is_conflict)

    def report_address(self, address: Address, message: str) -> None:
        """Add a problem of one of its addresses with another."""
        self.document.report(self.listen[address], message, is_conflict=True)

    def where(self, key: str) -> str:
        """File and line of one of its keys."""
        return self.document.where((*self.place, key))

    def where_address(self, address: Address) -> str:
        """File and line of one of its addresses."""
        return self.document.where(self.listen[address])

    def __str__(self) -> str:
        return f'route "{self.name}"' if self.name else "a route without a valid name"


# --- one route -------------------------------------------------------------------------------------------------


def check_keys_together(route: WrittenRoute) -> None:
    """What ``outer`` and ``handoff`` ask of the other keys of a route."""
    table = route.table
    if route.outer == "none":
        for key in ("func1", "func2"):
            if key in table:
                route.report(key, 'cannot stand with outer = "none": without TLS nobody shows who they are')
        for key in ("handoff", "hello_settle", "ticket_timeout"):
            if key in table:
                route.report(key, 'cannot stand with outer = "none": there is no TLS to hand off')
        if table.get("allow_from", []) == []:
            route.report(
                "allow_from",
                'is required with outer = "none", as it is all that decides who gets in: name networks, as in '
                '["10.0.0.0/8"]',
            )
    elif route.outer == "mtls":
        for key in ("func1", "func2"):
            if key not in table:
                route.report(key, 'is required: say who it is, as in ["dns:NAME"], or { dial = "HOST:PORT" }')
        if "allow_from" in table:
            route.report("allow_from", 'is for outer = "none" only: here the certificates decide who gets in')
        if isinstance(table.get("func1"), dict) and isinstance(table.get("func2"), dict):
            route.report("func2", "only one of func1 and func2 can be dialled: the other one's call starts it")
        if "hello_settle" in table and table.get("handoff") != "hello":
            route.report("hello_settle", 'is for handoff = "hello" only')


# --- between routes --------------------------------------------------------------------------------------------


def check_names(routes: Iterable[WrittenRoute]) -> None:
    """A name means one route, in whichever file it stands."""
    first: dict[str, WrittenRoute] = {}
    for route in routes:
        if route.name is None:
            continue
        taken = first.setdefault(route.name, route)
        if taken is not route:
            text = f'there is a route "{route.name}" already, at {taken.where("name")}'
            route.report("name", text, is_conflict=True)


def check_addresses(routes: Iterable[WrittenRoute]) -> None:
    """Routes may share an address exactly, and only where the relay can tell whom a caller means."""
    by_address: dict[Address, list[WrittenRoute]] = defaultdict(list)
    for route in routes:
        for address in route.listen:
            if address.port != 0:
                by_address[address].append(route)
    by_port: dict[int, list[Address]] = defaultdict(list)
    for address, sharing in by_address.items():
        by_port[address.port].append(address)
        if len(sharing) > 1:
            _check_sharing(address, sharing)
    for addresses in by_port.values():
        # Only wide ones are compared with all others: every pair of thousands on one port would take minutes.
        wide: list[Address] = []
        for index, address in enumerate(addresses):
            others = addresses[:index] if address.is_wide else wide
            taken = next((other for other in others if address.overlaps(other)), None)
            if taken is not None:
                one, other = by_address[address][0], by_address[taken][0]
                if one is other:
                    text = f"{address} overlaps {taken}, which stands here too: both cannot be bound; leave one out"
                else:
                    text = (
                        f"{address} overlaps {taken} of {other}, at {other.where_address(taken)}: both cannot be "
                        "bound. Use exactly the same address to share it, or another port"
                    )
                one.report_address(address, text)
            if address.is_wide:
                wide.append(address)


def _check_sharing(address: Address, sharing: Sequence[WrittenRoute]) -> None:
    by_server_name: dict[str, WrittenRoute] = {}
    for route in sharing:
        other = next(other for other in sharing if other is not route)
        beside = f"{address} is shared with {other}, at {other.where_address(address)}"
        if route.outer == "none":
            route.report_address(address, f'{beside}, but with outer = "none" nothing tells their callers apart')
        elif route.table.get("handoff") == "hello":
            # Those clients send no JOIN.route, and the oldest of them no server name either.
            route.report_address(address, f'{beside}, but with handoff = "hello" nothing tells their callers apart')
        first = sharing[0]
        networks = (first.proxy_protocol, route.proxy_protocol)
        if None not in networks and networks[0] != networks[1]:
            route.report(
                "proxy_protocol",
                f"differs from that of {first}, at {first.where_address(address)}, and both share {address}: a PROXY "
                "header comes before anything that tells their callers apart, so write the same networks in both",
                is_conflict=True,
            )
        if route.name is not None:
            like = by_server_name.setdefault(route.name.lower(), route)
            if like.name != route.name:
                route.report(
                    "name",
                    f'differs from "{like.name}", at {like.where("name")}, in case only, and both share {address}: '
                    "a TLS server name, which chooses between them, has no case",
                    is_conflict=True,
                )


# --- routes and the rest ---------------------------------------------------------------------------------------


def check_servers(
    main: Document,
    admin: AdminSection | None,
    metrics: MetricsSection | None,
    routes: Iterable[WrittenRoute],
) -> None:
    """The relay's own HTTP servers: who may call them, and that nothing else stands on their addresses."""
    taken: list[tuple[str, Address, str]] = []
    if admin is not None and admin.address is not None:
        taken.append(("admin", admin.address, "the admin API"))
        if not admin.allow:
            main.report(
                ("admin", "allow"),
                'is required where the API listens on HOST:PORT: name who may call it, as in ["dns:operator.acme"], '
                'or listen on "unix:PATH"',
            )
        if "tls" not in main.table:
            main.report(("admin", "listen"), 'on HOST:PORT needs [tls]; or listen on "unix:PATH"')
    elif admin is not None and admin.allow:
        main.report(("admin", "allow"), "is for HOST:PORT only: a Unix socket is guarded by its file mode, 0600")
    if metrics is not None:
        taken.append(("metrics", metrics.listen, "the metrics"))
    for (_, there, what), (section, here, _) in combinations(taken, 2):
        if here.overlaps(there):
            main.report((section, "listen"), f"{here} is in the way of {what} on {there}: choose another port")
    for route in routes:
        for section, address, what in taken:
            for own in route.listen:
                if own.overlaps(address):
                    place = main.where((section, "listen"))
                    route.report_address(own, f"{own} is in the way of {what} on {address}, at {place}")


def check_tls(main: Document, routes: Iterable[WrittenRoute]) -> None:
    """Routes with outer mTLS need a certificate to show, and a CA to judge by."""
    needing = next((route for route in routes if route.outer == "mtls"), None)
    if needing is not None and "tls" not in main.table:
        main.report(
            ("tls",),
            f'is required by {needing} (outer = "mtls"): add certificate, private_key and client_ca; '
            '"frelay init DIR" writes a working set',
        )


def check_stalls(
    main: Document,
    limits: Limits,
    tcp: TcpSection,
    routes: Iterable[tuple[WrittenRoute, RouteTable]],
) -> None:
    """The kernel must not give up on a reader that is slow, but within what its route permits."""
    why = "so that the kernel would cut readers that are slow but alive"
    if limits.stall_timeout > tcp.user_timeout:
        section = main.table.get("tcp")
        is_written = isinstance(section, dict) and "user_timeout" in section
        main.report(
            ("tcp", "user_timeout"),
            f"of {tcp.user_timeout:g} s is shorter than limits.stall_timeout of {limits.stall_timeout:g} s, {why}: "
            "raise the first or lower the second",
            line_of=None if is_written else ("limits", "stall_timeout"),
        )
    for route, table in routes:
        if "stall_timeout" in table.model_fields_set and table.stall_timeout > tcp.user_timeout:
            route.report(
                "stall_timeout",
                f"of {table.stall_timeout:g} s is longer than tcp.user_timeout of {tcp.user_timeout:g} s, {why}: "
                "lower the first or raise the second",
            )
