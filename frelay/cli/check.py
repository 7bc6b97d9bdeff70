"""``frelay check``: the same loading as at start, without binding anything."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from frelay.config.load import load
from frelay.config.model import Config
from frelay.errors import ConfigError, Problem
from frelay.relay import prepare
from frelay.tls.context import OuterTls

__all__ = ["as_json_object", "check_file", "report_problems"]


def check_file(path: Path, *, as_json: bool) -> int:
    """Check the route file at ``path`` and all that it refers to; prints the result, gives the exit code."""
    try:
        config = load(path)
        trust = prepare(config)
    except ConfigError as error:
        return report_problems(path, error, as_json=as_json)
    if as_json:
        print(json.dumps({"ok": True, "problems": [], **_facts(config, trust)}))
    else:
        print(f"{path}: ok, {_summary(config, trust)}")
    return 0


def report_problems(path: Path, error: ConfigError, *, as_json: bool) -> int:
    """Print all that is wrong with the route file at ``path``; gives the exit code."""
    if as_json:
        print(json.dumps({"ok": False, "problems": [as_json_object(problem) for problem in error.problems]}))
        return 1
    for problem in error.problems:
        print(problem, file=sys.stderr)
    count = len(error.problems)
    print(f"{path}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
    return 1


def as_json_object(problem: Problem) -> dict[str, Any]:
    """One problem as the JSON of every command has it."""
    return {"file": str(problem.file), "line": problem.line, "key": problem.key, "message": problem.message}


def _facts(config: Config, trust: OuterTls | None) -> dict[str, Any]:
    return {
        "routes": [route.name for route in config.routes],
        "addresses": sorted({str(route.listen) for route in config.routes}),
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
