"""``frelay why``: print what :mod:`frelay.joining.explain` finds; ``--json`` prints its ``as_json``.

If the route file itself has problems, they are printed as ``frelay check`` prints them; the JSON then has ``admitted``
null, and ``problems``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import typer

from frelay.cli.ca_show import Row, certificate_rows, fit_rows, print_rows
from frelay.cli.check import as_json_object, load_and_prepare
from frelay.errors import ConfigError
from frelay.joining.explain import Verdict, examine
from frelay.pki.files import read_certificates

__all__ = ["explain"]


def explain(config_path: Path, certificate: Path, route: str | None, *, as_json: bool) -> int:
    """Print why the relay admits or refuses a certificate; returns the exit code: 0 admitted, 1 refused.

    Raises CertificateError if the file holds no certificate, typer.BadParameter if there is no such route.
    """
    try:
        config, trust = load_and_prepare(config_path)
    except ConfigError as error:
        if as_json:
            print(json.dumps({"admitted": None, "problems": [as_json_object(problem) for problem in error.problems]}))
        else:
            for problem in error.problems:
                print(problem, file=sys.stderr)
        return 1
    if route is not None and route not in config.routes_by_name:
        raise typer.BadParameter(f"there is no route {route!r} in {config_path}", param_hint="--route")
    verdict = examine(config, trust, read_certificates(certificate), route)
    now = datetime.now(UTC)
    if as_json:
        print(json.dumps(verdict.as_json(now)))
    else:
        rows = (certificate_rows(verdict.facts, now), list(_check_rows(verdict)), list(_summary_rows(verdict, route)))
        for index, block in enumerate(filter(None, rows)):
            if index:
                print()
            print_rows(block)
    return 0 if verdict.refusal is None else 1


def _check_rows(verdict: Verdict) -> Iterator[Row]:
    for check in verdict.checks:
        yield check.name, f"{check.result:<11}  {check.text}".rstrip()
        if check.remedy is not None:
            yield check.name, f"{'remedy':<11}  {check.remedy}"


def _summary_rows(verdict: Verdict, route: str | None) -> Iterator[Row]:
    refusal = verdict.refusal
    if not verdict.checks:
        which = (
            "no route of the file looks at certificates" if route is None else f"route {route} looks at no certificate"
        )
        yield "verdict", f"not refused: {which}, only at addresses (allow_from)"
        return
    if refusal is None:
        yield "verdict", "admitted" if route is None else f"admitted to route {route}"
    else:
        yield "verdict", f"refused, {refusal.code}: {refusal.reason}"
        if refusal.alert is not None:
            yield "it sees", f"the TLS alert {refusal.alert}, maybe only after its handshake seemed to be done"
        else:
            yield "it sees", f"REFUSED {refusal.code}: {refusal.told}"
    yield from fit_rows(verdict)
    if route is None:
        yield "routes", f"{len(verdict.fits)} of {verdict.routes_checked} have a party that these names fit"
        if verdict.plain_routes:
            yield "routes", f"{len(verdict.plain_routes)} more look at no certificate, only at addresses (allow_from)"
    for warning in verdict.warnings:
        yield "warning", warning
    for hint in verdict.hints:
        yield "hint", hint
