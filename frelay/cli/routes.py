"""``frelay route add``, ``delete``, ``list`` and ``show``: routes of a running relay, through its admin API."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from frelay.cli.admin_client import AdminClient, route_path
from frelay.cli.text import bold, columns, duration, pad, size
from frelay.errors import printable

__all__ = ["add", "delete", "etag", "listing", "party", "party_text", "show"]

_DIAL: Final = "dial:"


def party(selectors: Sequence[str], dial: str | None, connect_timeout: float | None = None) -> Any:
    """A party as the API takes it: selectors, or the address that the relay dials; None if neither was given.

    ``dial:HOST:PORT`` among the selectors means the same as ``dial``. Raises ValueError if a party is both.
    """
    addresses = [text.removeprefix(_DIAL) for text in selectors if text.startswith(_DIAL)]
    addresses += [] if dial is None else [dial]
    if not addresses:
        return list(selectors) or None
    if len(addresses) > 1 or len(selectors) > (1 if dial is None else 0):
        raise ValueError("a party is either selectors or one address to dial")
    return {"dial": addresses[0]} | ({} if connect_timeout is None else {"connect_timeout": connect_timeout})


def party_text(party: Any) -> str:
    """A party as text: its selectors, or the address that the relay dials; ``-`` if it has neither (outer = "none")."""
    if isinstance(party, Mapping):
        return f"{_DIAL}{party.get('dial')}"
    return ", ".join(str(selector) for selector in party) or "-"


def etag(text: str) -> str:
    """An etag as HTTP writes it, in quotes, which a shell has often removed."""
    return text if text == "*" or text.startswith('"') else f'"{text}"'


def add(
    client: AdminClient, name: str, body: Mapping[str, Any], *, must_be_new: bool, if_match: str | None, as_json: bool
) -> int:
    """Add a route or replace it; raises CallFailed."""
    headers = {"if-none-match": "*"} if must_be_new else {}
    if if_match is not None:
        headers["if-match"] = etag(if_match)
    answer = client.call("PUT", route_path(name), body, headers)
    if as_json:
        print(json.dumps(answer.body))
    else:
        done = "added" if answer.status == 201 else "updated"
        print(f"{name}: {done}, listens on {', '.join(answer.body['bound'])}, written to {answer.body['file']}")
    return 0


def delete(client: AdminClient, name: str, *, if_match: str | None) -> int:
    """Delete a route; raises CallFailed."""
    client.call("DELETE", route_path(name), headers={} if if_match is None else {"if-match": etag(if_match)})
    print(f"{name}: deleted")
    return 0


def listing(client: AdminClient, *, as_json: bool) -> int:
    """Print all routes, one a line; raises CallFailed."""
    found = client.get("/v1/routes")
    if as_json:
        print(json.dumps(found))
        return 0
    header = ("NAME", "LISTEN", "FUNC1", "FUNC2", "WAITING 1/2", "PAIRINGS", "BYTES", "FILE")
    rows = [_row(route) for route in found["routes"]]
    head, *lines = columns(header, rows, right=("WAITING 1/2", "PAIRINGS", "BYTES"))
    print(bold(head, sys.stdout))
    for line in lines:
        print(line)
    return 0


def waiting_counts(waiting: Mapping[str, Any]) -> tuple[int, int, int]:
    """How many legs wait as func1, as func2 and as either. A relay that is older has no ``either``."""
    return len(waiting["func1"]), len(waiting["func2"]), len(waiting.get("either", ()))


def waiting_text(counts: tuple[int, int, int]) -> str:
    """``2/0``, or ``2/0+3`` with three that may be either."""
    func1, func2, either = counts
    return f"{func1}/{func2}" + (f"+{either}" if either else "")


def _row(route: Mapping[str, Any]) -> tuple[str, ...]:
    waiting = route["waiting"]
    return (
        route["name"],
        ", ".join(route["bound"]),
        party_text(route["func1"]),
        party_text(route["func2"]),
        waiting_text(waiting_counts(waiting)),
        str(route["pairings"]),
        size(route["bytes_func1_to_func2"] + route["bytes_func2_to_func1"]),
        route["file"],
    )


def show(client: AdminClient, name: str, *, as_json: bool) -> int:
    """Print one route and the legs that wait on it; raises CallFailed."""
    route = client.get(route_path(name))
    if as_json:
        print(json.dumps(route))
        return 0
    facts = list(_facts(route, time.time()))
    indent = max(len(key) for key, _ in facts) + 2
    for key, value in facts:
        print(f"{pad(key, indent)}{printable(value)}".rstrip())
    return 0


def _facts(route: Mapping[str, Any], now: float) -> list[tuple[str, str]]:
    bound = ", ".join(route["bound"])
    listen = route["listen"] if isinstance(route["listen"], str) else ", ".join(route["listen"])
    facts = [
        ("name", route["name"]),
        ("listen", listen if listen == bound else f"{listen}, bound to {bound}"),
        ("func1", party_text(route["func1"])),
        ("func2", party_text(route["func2"])),
        ("outer", route["outer"]),
    ]
    facts += [("allow_from", ", ".join(route["allow_from"]))] if route["allow_from"] else []
    balancers = route.get("proxy_protocol")
    facts += [("proxy_protocol", ", ".join(balancers))] if balancers else []
    facts += [
        ("handoff", route["handoff"]),
        ("require_inner_tls", json.dumps(route["require_inner_tls"]).strip('"')),
    ]
    facts += [
        (key, f"{value:g} s" if key.endswith("_timeout") else str(value)) for key, value in route["limits"].items()
    ]
    for party, legs in route["waiting"].items():
        if party in ("func1", "func2") or legs:
            facts.append((f"waiting {party}", str(len(legs))))
        facts += [("", _leg(leg, now)) for leg in legs]
    facts += [
        ("pairings", str(route["pairings"])),
        ("bytes func1 > func2", size(route["bytes_func1_to_func2"])),
        ("bytes func2 > func1", size(route["bytes_func2_to_func1"])),
        ("ended", _counted(route["outcomes"])),
        ("refused", _counted(route["refusals"])),
        ("file", route["file"] + ("" if route["is_editable"] else ", which the API never writes")),
        ("etag", route["etag"]),
    ]
    return facts


def _leg(leg: Mapping[str, Any], now: float) -> str:
    key = f", by key {leg['meet']}" if leg.get("meet") else ""
    return f"{leg['identity']} from {leg['address']} ({leg['mode']}), for {duration(now - leg['since'])}{key}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {word}" for word, number in counts.items()) or "-"
