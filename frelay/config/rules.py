"""The rules between keys and between tables of a configuration.

They are checked on the parsed file, not on validated objects: even if one key of a route has a typing error, it is
known whether the route has ``allow_from``. So one mistake never hides another, and the reader gets the whole list at
once.
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
from frelay.config.document import Document, KeyPath
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
    "UncheckedRoute",
    "check_addresses",
    "check_keys_together",
    "check_names",
    "check_servers",
    "check_stalls",
    "check_tls",
]


@dataclass(frozen=True)
class UncheckedRoute:
    """A route as it is written in a file; its values may be wrong."""

    document: Document
    key_path: KeyPath
    table: dict[str, Any]

    @property
    def name(self) -> str | None:
        """Its name, or None if that is not valid."""
        name = self.table.get("name")
        return name if is_name(name) else None

    @cached_property
    def listen(self) -> dict[Address, KeyPath]:
        """Its valid addresses, and the key path of each."""
        written = self.table.get("listen")
        key_paths: list[tuple[object, KeyPath]] = [(written, (*self.key_path, "listen"))]
        if isinstance(written, list):
            key_paths = [(one, (*self.key_path, "listen", index)) for index, one in enumerate(written)]
        found: dict[Address, KeyPath] = {}
        for text, key_path in key_paths:
            if isinstance(text, str):
                with suppress(ValueError):
                    found.setdefault(parse_listen(text), key_path)
        return found

    @cached_property
    def proxy_protocol(self) -> frozenset[Network] | None:
        """Its networks of load balancers, or None if one is not valid."""
        try:
            return frozenset(parse_network(one) for one in self.table.get("proxy_protocol", ()))
        except (TypeError, ValueError, AttributeError):
            return None

    @property
    def outer(self) -> object:
        """The value of ``outer``, or its default."""
        return self.table.get("outer", "mtls")

    def report(self, key: str, message: str, *, is_conflict: bool = False) -> None:
        """Report a problem of one of its keys."""
        self.document.report((*self.key_path, key), message, is_conflict=is_conflict)

    def report_address(self, address: Address, message: str) -> None:
        """Report a conflict of one of its addresses with another address."""
        self.document.report(self.listen[address], message, is_conflict=True)

    def where(self, key: str) -> str:
        """File and line of one of its keys."""
        return self.document.where((*self.key_path, key))

    def where_address(self, address: Address) -> str:
        """File and line of one of its addresses."""
        return self.document.where(self.listen[address])

    def __str__(self) -> str:
        return f'route "{self.name}"' if self.name else "a route without a valid name"


# --- one route -------------------------------------------------------------------------------------------------


def check_keys_together(route: UncheckedRoute) -> None:
    """Check the keys of a route that ``outer`` and ``handoff`` require or exclude."""
    table = route.table
    if route.outer == "none":
        for key in ("func1", "func2"):
            if key in table:
                route.report(key, 'cannot be used with outer = "none": without TLS nobody shows a certificate')
        for key in ("handoff", "hello_settle", "ticket_timeout"):
            if key in table:
                route.report(key, 'cannot be used with outer = "none": there is no TLS to hand off')
        if table.get("allow_from", []) == []:
            route.report(
                "allow_from",
                'is required with outer = "none", since it is all that decides who gets in: name networks, as in '
                '["10.0.0.0/8"]',
            )
    elif route.outer == "mtls":
        for key in ("func1", "func2"):
            if key not in table:
                route.report(key, 'is required: say who it is, as in ["dns:NAME"], or { dial = "HOST:PORT" }')
        if "allow_from" in table:
            route.report("allow_from", 'is for outer = "none" only: here the certificates decide who gets in')
        if isinstance(table.get("func1"), dict) and isinstance(table.get("func2"), dict):
            route.report(
                "func2", "only one of func1 and func2 can be dialled: the relay dials it when the other one joins"
            )
        if "hello_settle" in table and table.get("handoff") != "hello":
            route.report("hello_settle", 'is for handoff = "hello" only')


# --- between routes --------------------------------------------------------------------------------------------


def check_names(routes: Iterable[UncheckedRoute]) -> None:
    """Check that no two routes have one name, in all files."""
    first: dict[str, UncheckedRoute] = {}
    for route in routes:
        if route.name is None:
            continue
        taken = first.setdefault(route.name, route)
        if taken is not route:
            text = f'there is a route "{route.name}" already, at {taken.where("name")}'
            route.report("name", text, is_conflict=True)


def check_addresses(routes: Iterable[UncheckedRoute]) -> None:
    """Check that routes share an address only if it is the same, and if the relay can tell their callers apart."""
    by_address: dict[Address, list[UncheckedRoute]] = defaultdict(list)
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
        # Only wide addresses are compared with all others: to compare every pair of thousands would take minutes.
        wide: list[Address] = []
        for index, address in enumerate(addresses):
            others = addresses[:index] if address.is_wide else wide
            taken = next((other for other in others if address.overlaps(other)), None)
            if taken is not None:
                one, other = by_address[address][0], by_address[taken][0]
                if one is other:
                    text = f"{address} overlaps {taken}, which this route has too: both cannot be bound; leave one out"
                else:
                    text = (
                        f"{address} overlaps {taken} of {other}, at {other.where_address(taken)}: both cannot be "
                        "bound. Use exactly the same address to share it, or another port"
                    )
                one.report_address(address, text)
            if address.is_wide:
                wide.append(address)


def _check_sharing(address: Address, sharing: Sequence[UncheckedRoute]) -> None:
    by_server_name: dict[str, UncheckedRoute] = {}
    for route in sharing:
        other = next(other for other in sharing if other is not route)
        beside = f"{address} is shared with {other}, at {other.where_address(address)}"
        if route.outer == "none":
            route.report_address(
                address, f'{beside}, but with outer = "none" the relay cannot tell their callers apart'
            )
        elif route.table.get("handoff") == "hello":
            # The clients for "hello" send no JOIN.route, and the oldest of them no server name either.
            route.report_address(
                address, f'{beside}, but with handoff = "hello" the relay cannot tell their callers apart'
            )
        first = sharing[0]
        networks = (first.proxy_protocol, route.proxy_protocol)
        if None not in networks and networks[0] != networks[1]:
            route.report(
                "proxy_protocol",
                f"differs from that of {first}, at {first.where_address(address)}, and both share {address}: a PROXY "
                "header comes before the relay knows which route is meant, so write the same networks in both",
                is_conflict=True,
            )
        if route.name is not None:
            like = by_server_name.setdefault(route.name.lower(), route)
            if like.name != route.name:
                route.report(
                    "name",
                    f'differs from "{like.name}", at {like.where("name")}, in case only, and both share {address}: '
                    "the TLS server name chooses between them, and it has no case; rename one of them",
                    is_conflict=True,
                )


# --- routes and the rest ---------------------------------------------------------------------------------------


def check_servers(
    main: Document,
    admin: AdminSection | None,
    metrics: MetricsSection | None,
    routes: Iterable[UncheckedRoute],
) -> None:
    """Check who may call the relay's own HTTP servers, and that nothing else uses their addresses."""
    taken: list[tuple[str, Address, str]] = []
    if admin is not None and admin.address is not None:
        taken.append(("admin", admin.address, "the admin API"))
        if not admin.allow:
            main.report(
                ("admin", "allow"),
                'is required if the API listens on HOST:PORT: name who may call it, as in ["dns:operator.acme"], '
                'or listen on "unix:PATH"',
            )
        if "tls" not in main.table:
            main.report(("admin", "listen"), 'on HOST:PORT needs [tls]; or listen on "unix:PATH"')
    elif admin is not None and admin.allow:
        main.report(
            ("admin", "allow"), "is for HOST:PORT only: the file mode of a Unix socket, 0600, admits its owner alone"
        )
    if metrics is not None:
        taken.append(("metrics", metrics.listen, "the metrics"))
    for (_, there, what), (section, here, _) in combinations(taken, 2):
        if here.overlaps(there):
            main.report((section, "listen"), f"{here} overlaps {what} on {there}: choose another port")
    for route in routes:
        for section, address, what in taken:
            for own in route.listen:
                if own.overlaps(address):
                    place = main.where((section, "listen"))
                    route.report_address(own, f"{own} overlaps {what} on {address}, at {place}: choose another port")


def check_tls(main: Document, routes: Iterable[UncheckedRoute]) -> None:
    """Check that there is a [tls] if a route needs one."""
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
    routes: Iterable[tuple[UncheckedRoute, RouteTable]],
) -> None:
    """Check that the kernel allows a slow reader as much time as its route does."""
    why = "so the kernel would cut readers that are slow but alive"
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
