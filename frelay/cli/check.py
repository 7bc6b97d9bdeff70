"""``frelay check``: load the route file as ``frelay run`` does, but bind no address."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from frelay.config.load import load
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.relay.config_warnings import warnings_of
from frelay.relay.prepare import prepare, with_all_problems
from frelay.tls.trust import OuterTls

__all__ = ["as_json_object", "check_file", "load_and_prepare", "report_problems"]


def check_file(path: Path, *, as_json: bool) -> int:
    """Check the route file at ``path`` and every file that it names; prints the result, returns the exit code."""
    try:
        config, trust = load_and_prepare(path)
    except ConfigError as error:
        return report_problems(path, error, as_json=as_json)
    found = warnings_of(config, trust)
    if trust is not None and not trust.is_open:
        return report_problems(path, ConfigError(found), as_json=as_json)
    if as_json:
        warnings = [as_json_object(warning) for warning in found]
        print(json.dumps({"ok": True, "problems": [], "warnings": warnings, **_facts(config, trust)}))
        return 0
    for warning in found:
        print(f"warning: {warning}", file=sys.stderr)
    more = f"; {len(found)} warning{'s' if len(found) > 1 else ''}" if found else ""
    print(f"{path}: ok, {_summary(config, trust)}{more}")
    return 0


def load_and_prepare(path: Path, *, base: Path | None = None) -> tuple[Config, OuterTls | None]:
    """Load the route file at ``path`` and its certificates; raises ConfigError with the problems of both."""
    try:
        config = load(path, base=base)
    except ConfigError as error:
        raise with_all_problems(path, error, base=base) from error
    return config, prepare(config)


def report_problems(path: Path, error: ConfigError, *, as_json: bool) -> int:
    """Print all problems of the route file at ``path``; returns the exit code."""
    if as_json:
        print(json.dumps({"ok": False, "problems": [as_json_object(problem) for problem in error.problems]}))
        return 1
    for problem in error.problems:
        print(problem, file=sys.stderr)
    count = len(error.problems)
    print(f"{path}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
    return 1


def as_json_object(problem: Problem) -> dict[str, Any]:
    """One problem in the shape that all commands print with ``--json``."""
    return {"file": str(problem.file), "line": problem.line, "key": problem.key, "message": problem.message}


def _facts(config: Config, trust: OuterTls | None) -> dict[str, Any]:
    return {
        "routes": [route.name for route in config.routes],
        "addresses": sorted({str(address) for route in config.routes for address in route.listen}),
        "certificate_not_after": None if trust is None else _date(trust.not_after),
        "crl_next_update": None if trust is None or trust.crl_next_update is None else _date(trust.crl_next_update),
    }


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _summary(config: Config, trust: OuterTls | None) -> str:
    facts = _facts(config, trust)
    routes, addresses = len(facts["routes"]), len(facts["addresses"])
    parts = [
        f"{routes} route{'' if routes == 1 else 's'} on {addresses} address{'' if addresses == 1 else 'es'}",
    ]
    if trust is not None:
        parts.append(f"certificate {trust.subject} until {facts['certificate_not_after']}")
        parts.append(f"CRL until {facts['crl_next_update']}" if facts["crl_next_update"] else "no CRL")
    return ", ".join(parts)
