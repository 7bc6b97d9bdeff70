"""``frelay plan``: what a reload with another route file would change, and which pairings it would end.

The plan itself comes from :func:`frelay.config.plan.plan`, which a reload follows too. This module gets the running
configuration (from the relay, or from a second file) and the number of pairings on each route, and prints the plan.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from frelay.cli.admin_client import (
    AdminAddress,
    AdminClient,
    CallFailed,
    Credentials,
    admin_address_in_file,
    find_admin_address,
)
from frelay.cli.check import as_json_object, load_and_prepare, report_problems
from frelay.cli.text import bold, count
from frelay.config.dump import dump_config, dump_route, load_dump
from frelay.config.load import load
from frelay.config.model import Config, Route
from frelay.config.plan import Plan
from frelay.config.plan import plan as planned
from frelay.errors import ConfigError, printable
from frelay.relay.config_warnings import warnings_of

if TYPE_CHECKING:
    from frelay.cli.admin_options import AdminOptions

__all__ = ["Running", "lines", "plan"]

_ELSEWHERE: Final = (
    "No relay was found, so relative paths start from {}. "
    "Name the relay with --admin, or its file with --running: then they start from the directory of its file."
)

# Characters of a value. Nobody reads a line of forty selectors to its end; --json has all of them.
_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class Running:
    """The running configuration. ``counts`` are (pairings, waiting legs) by route; empty if it comes from a file."""

    config: Config
    source: str
    counts: Mapping[str, tuple[int, int]]


def plan(options: AdminOptions, *, running: Path | None, as_json: bool) -> int:
    """Print the plan; raises CallFailed, and ConfigError for the file of ``running``."""
    path = options.config or Path(os.environ.get("FRELAY_CONFIG") or "relay.toml")
    before = _before(options, path, running)
    try:
        new, trust = load_and_prepare(path, base=_base(before, path) if isinstance(before, Running) else None)
    except ConfigError as error:
        code = report_problems(path, error, as_json=as_json)
        is_lost = isinstance(before, CallFailed) and not as_json
        if is_lost and any("does not exist" in problem.message for problem in error.problems):
            print(_ELSEWHERE.format(path.absolute().parent), file=sys.stderr)
        return code
    if isinstance(before, CallFailed):
        raise before
    warnings = warnings_of(new, trust)
    for warning in () if as_json else warnings:
        print(f"warning: {warning}", file=sys.stderr)
    found = planned(before.config, new)
    if as_json:
        print(json.dumps({**_as_json(found, before, new), "warnings": [as_json_object(one) for one in warnings]}))
    else:
        for line in lines(found, before, new):
            print(line)
    return 1 if found.clashes else 0


def _before(options: AdminOptions, path: Path, running: Path | None) -> Running | CallFailed:
    """The running configuration, or the failure to get it. Problems of the new file are reported first."""
    try:
        return _of_file(running) if running is not None else _of_relay(options, path)
    except CallFailed as error:
        return error


def _base(running: Running, path: Path) -> Path | None:
    """The directory that relative paths of the new file start from: that of the running file, which it replaces.

    None stands for the new file's own directory: both are in the same one, or the relay is on another machine.
    """
    base = running.config.path.parent
    return base if base != path.absolute().parent and base.is_dir() else None


def _of_file(path: Path) -> Running:
    return Running(load(path), str(path), {})


def _relay_address(options: AdminOptions, path: Path) -> AdminAddress:
    """The relay to compare with: the one that the user names, that of the new file, or that of the usual file.

    Here -c names the new file. If that is not in the directory of the running file, its relative ``admin.listen`` names
    a socket that does not exist; or it may have no [admin] yet. Then the usual file says where the relay is.
    """
    if options.admin is not None or os.environ.get("FRELAY_ADMIN"):
        return find_admin_address(options.admin, None)
    usual = Path(os.environ.get("FRELAY_CONFIG") or "relay.toml")
    has_other = options.config is not None and usual.exists() and not (path.exists() and usual.samefile(path))
    try:
        address = admin_address_in_file(path)
    except CallFailed:
        if has_other:
            return admin_address_in_file(usual)
        raise
    if has_other and isinstance(address.where, Path) and not address.where.exists():
        return admin_address_in_file(usual)
    return address


def _of_relay(options: AdminOptions, path: Path) -> Running:
    address = _relay_address(options, path)
    credentials = Credentials(options.cert, options.key, options.ca, options.server_name)
    with AdminClient(address, credentials) as client:
        written, routes = client.get("/v1/config"), client.get("/v1/routes")["routes"]
    try:
        config = load_dump(written)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise CallFailed(f"the relay at {address} has a configuration that this frelay cannot read: {text}") from error
    counts = {route["name"]: (route["pairings"], sum(map(len, route["waiting"].values()))) for route in routes}
    return Running(config, f"{config.relay.name} at {address}", counts)


# --- what differs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """One key with its old and new value, as a route file writes them; None if it has no value."""

    key: str
    was: Any
    becomes: Any

    def __str__(self) -> str:
        return printable(f"{self.key}: {_shown(self.was)} -> {_shown(self.becomes)}")

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "from": self.was, "to": self.becomes}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        text = ", ".join(value) or "none"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _route_changes(old: Route, new: Route, keys: Iterable[str]) -> list[_Change]:
    was, becomes = ({**table.pop("limits"), **table} for table in (dump_route(old), dump_route(new)))
    return [_Change(key, was[key], becomes[key]) for key in keys]


def _setting_changes(old: Config, new: Config, keys: Iterable[str]) -> list[_Change]:
    was, becomes = dump_config(old), dump_config(new)
    return [_Change(key, _value_at(was, key), _value_at(becomes, key)) for key in keys]


def _value_at(written: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return written[section][name] if name else written[section]


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _as_json(plan: Plan, running: Running, new: Config) -> dict[str, Any]:
    before = running.config.routes_by_name

    def hit(route: Route) -> dict[str, Any]:
        pairings, waiting = running.counts.get(route.name, (None, None))
        return {"name": route.name, "listen": route.listen.as_toml(), "pairings": pairings, "waiting": waiting}

    return {
        "ok": not plan.clashes,
        "problems": [],
        "changes": not plan.is_empty,
        "running": running.source,
        "keep": [
            {
                **hit(kept.route),
                "changed": [one.as_json() for one in _route_changes(before[kept.route.name], kept.route, kept.changed)],
            }
            for kept in plan.keep
        ],
        "add": [{"name": added.route.name, "listen": added.route.listen.as_toml()} for added in plan.add],
        "remove": [hit(removed.route) for removed in plan.remove],
        "replace": [
            {
                **hit(replaced.new),
                "changed": [one.as_json() for one in _route_changes(replaced.old, replaced.new, replaced.changed)],
            }
            for replaced in plan.replace
        ],
        "bind": sorted(str(key.address) for key in plan.bind),
        "close": sorted(str(key.address) for key in plan.close),
        "clashes": [{"bind": str(bind.address), "close": str(close.address)} for bind, close in plan.clashes],
        "settings": [one.as_json() for one in _setting_changes(running.config, new, plan.settings)],
        "restart_only": [one.as_json() for one in _setting_changes(running.config, new, plan.restart_only)],
    }


# --- as text ----------------------------------------------------------------------------------------------------------


def lines(plan: Plan, running: Running, new: Config) -> Iterator[str]:
    """The plan for a person."""
    for bind, close in plan.clashes:
        text = (
            f"WOULD BE REFUSED: {bind.address} cannot be bound before {close.address} is closed: remove the old route "
            "in one reload, add the new one in a second"
        )
        yield bold(text, sys.stdout)
    if plan.is_empty:
        yield f"no changes against {printable(running.source)}: {count(len(plan.keep), 'route')} as now"
        return
    base = _base(running, new.path)
    place = "" if base is None else f", as if it were in {printable(str(base))}"
    yield f"{printable(str(new.path))} against {printable(running.source)}{place}:"
    drain = f"{new.relay.drain_timeout:g} s"
    for replaced in plan.replace:
        yield f"  replace  {replaced.new.name}{_hit(running, replaced.new.name, drain)}"
        yield from _indented(_route_changes(replaced.old, replaced.new, replaced.changed))
    for removed in plan.remove:
        yield f"  remove   {removed.route.name}, on {removed.route.listen}{_hit(running, removed.route.name, drain)}"
    for added in plan.add:
        yield f"  add      {added.route.name}, on {added.route.listen}"
    before = running.config.routes_by_name
    for kept in plan.keep:
        if kept.changed:
            moved = kept.changed[0] == "listen"
            limits = "with other limits for new legs and pairings"
            what = limits if not moved else "at other addresses" if len(kept.changed) == 1 else f"moved, {limits}"
            yield f"  keep     {kept.route.name}, {what}"
            yield from _indented(_route_changes(before[kept.route.name], kept.route, kept.changed))
    unchanged = sum(not kept.changed for kept in plan.keep)
    if unchanged:
        yield f"  keep     {count(unchanged, 'route')} as now"
    for word, keys in (("bind", plan.bind), ("close", plan.close)):
        for key in sorted(keys):
            yield f"  {word:<8} {key}"
    for change in _setting_changes(running.config, new, plan.settings):
        yield f"  setting  {change}"
    for change in _setting_changes(running.config, new, plan.restart_only):
        yield f"  restart  {change}, and only then"


def _indented(changes: Iterable[_Change]) -> Iterator[str]:
    for change in changes:
        yield f"             {change}"


def _hit(running: Running, name: str, drain: str) -> str:
    """How many pairings and waiting legs end with a route."""
    if name not in running.counts:
        return ""
    pairings, waiting = running.counts[name]
    ends = f" (cut after {drain})" if pairings else ""
    return f": {count(pairings, 'pairing')}{ends}, {waiting} waiting"
