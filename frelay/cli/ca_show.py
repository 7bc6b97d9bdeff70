"""``frelay ca show``: what certificates, CRLs and keys hold; as text for people, as JSON for programs.

The JSON is one object: ``files``, in the order given, each with ``file`` and ``holds``, a list of the shapes that
:mod:`frelay.tls.facts` describes. With ``-c`` each certificate that is no authority also has ``fits``, with the keys
``admitted``, ``routes``, ``refusal`` and ``hints`` of ``frelay why --json``. Keys may be added, none is ever removed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from frelay.config.load import load
from frelay.config.model import Config
from frelay.errors import CertificateError, ConfigError, printable
from frelay.joining.explain import Verdict, examine
from frelay.pki.files import read_file
from frelay.relay.prepare import prepare
from frelay.tls.facts import CertificateFacts, CrlFacts, Facts, KeyFacts, iso, read_facts
from frelay.tls.trust import OuterTls

__all__ = ["Row", "certificate_rows", "fit_rows", "print_rows", "show_files"]

Row = tuple[str, str]
Held = tuple[Facts, Verdict | None]

# One width for all blocks, so that their columns stand below each other.
_LABELS: Final = len("certificate")
# Lines that fit on one page of a terminal. The JSON has all of them.
_SHOWN: Final = 20


def show_files(paths: Sequence[Path], config_path: Path | None, *, as_json: bool) -> int:
    """Print what ``paths`` hold; returns the exit code: 1 if any of them, or the route file, cannot be read."""
    served: tuple[Config, OuterTls | None] | None = None
    code = 0
    if config_path is not None:
        try:
            config = load(config_path)
            served = config, prepare(config)
        except ConfigError as error:
            for problem in error.problems:
                print(problem, file=sys.stderr)
            code = 1
    now = datetime.now(UTC)
    files: list[tuple[Path, list[Held]]] = []
    for path in paths:
        try:
            files.append((path, _held(path, served)))
        except CertificateError as error:
            print(f"frelay: {printable(str(error))}", file=sys.stderr)
            code = 1
    if as_json:
        print(json.dumps({"files": [_as_json(path, held, now) for path, held in files]}))
        return code
    for index, (path, held) in enumerate(files):
        if index:
            print()
        print(printable(str(path)))
        for number, (facts, verdict) in enumerate(held):
            if number:
                print()
            print_rows(_rows(facts, verdict, now))
    return code


def _held(path: Path, served: tuple[Config, OuterTls | None] | None) -> list[Held]:
    content = read_file(path)
    try:
        blocks = read_facts(content)
    except CertificateError as error:
        raise CertificateError(f"{path}: {error}") from None
    certificates = [certificate for _, certificate in blocks if certificate is not None]
    held: list[Held] = []
    for facts, certificate in blocks:
        verdict = None
        if (
            served is not None
            and certificate is not None
            and isinstance(facts, CertificateFacts)
            and not facts.authority
        ):
            # A function would send the certificates that follow it in the file, too.
            chain = certificates[certificates.index(certificate) :]
            verdict = examine(*served, chain)
        held.append((facts, verdict))
    return held


def _as_json(path: Path, held: Sequence[Held], now: datetime) -> dict[str, Any]:
    holds = []
    for facts, verdict in held:
        shape = facts.as_json(now)
        if verdict is not None:
            whole = verdict.as_json(now)
            shape["fits"] = {key: whole[key] for key in ("admitted", "routes", "refusal", "hints")}
        holds.append(shape)
    return {"file": str(path), "holds": holds}


def print_rows(rows: Sequence[Row]) -> None:
    """Print labels and values in two columns; a label that comes again is not repeated."""
    width = max([_LABELS, *(len(label) for label, _ in rows)])
    before = ""
    for label, value in rows:
        print(f"  {'' if label == before else label:<{width}}  {value}".rstrip())
        before = label


def _expiry(moment: datetime, now: datetime) -> str:
    if now > moment:
        return "EXPIRED"
    days = (moment - now) // timedelta(days=1)
    return "expires today" if days == 0 else f"expires in {days} day{'' if days == 1 else 's'}"


def _rows(facts: Facts, verdict: Verdict | None, now: datetime) -> list[Row]:
    match facts:
        case CertificateFacts():
            return [*certificate_rows(facts, now), *([] if verdict is None else _verdict_rows(verdict))]
        case CrlFacts():
            return list(_crl_rows(facts, now))
        case KeyFacts():
            return [(facts.kind, facts.key or "encrypted with a password")]
        case _:
            return [("other", facts.label)]


def certificate_rows(facts: CertificateFacts, now: datetime) -> list[Row]:
    """The rows of a certificate."""
    begins = "" if now >= facts.not_before else "NOT YET VALID, "
    usages = "any" if facts.usages is None else ", ".join(facts.usages) or "none"
    key_usages = "any key usage" if facts.key_usages is None else ", ".join(facts.key_usages) or "no key usage"
    return [
        ("certificate", facts.subject or "(no subject)"),
        *(("names", name) for name in facts.names),
        *(("ignored", sentence) for sentence in facts.ignored),
        ("issuer", facts.issuer),
        ("serial", facts.serial),
        ("valid", f"{iso(facts.not_before)} to {iso(facts.not_after)}, {begins}{_expiry(facts.not_after, now)}"),
        ("usages", f"{usages}; {key_usages}"),
        ("key", facts.key),
        ("authority", "yes" if facts.authority else "no"),
    ]


def _crl_rows(facts: CrlFacts, now: datetime) -> Iterator[Row]:
    yield "CRL", f"of {facts.issuer}"
    yield "number", "none" if facts.number is None else str(facts.number)
    if facts.next_update is None:
        yield "valid", f"{iso(facts.this_update)} without an end, which the relay takes as EXPIRED"
    else:
        yield "valid", f"{iso(facts.this_update)} to {iso(facts.next_update)}, {_expiry(facts.next_update, now)}"
    for one in facts.revoked[:_SHOWN]:
        yield "revoked", f"{one.serial} on {iso(one.date)}{'' if one.reason is None else f' ({one.reason})'}"
    if len(facts.revoked) > _SHOWN:
        yield "revoked", f"and {len(facts.revoked) - _SHOWN} more"
    if not facts.revoked:
        yield "revoked", "nobody"


def fit_rows(verdict: Verdict) -> Iterator[Row]:
    """The rows of the routes that a certificate fits, or would fit if no other check failed."""
    label = "fits" if verdict.refusal is None else "would fit"
    for fit in verdict.fits[:_SHOWN]:
        for party in fit.parties:
            yield label, f"route {fit.route} as {party.party}, by {party.name}"
        if fit.note is not None:
            yield label, f"  ({fit.note})"
    if len(verdict.fits) > _SHOWN:
        yield label, f"and {len(verdict.fits) - _SHOWN} more routes"


def _verdict_rows(verdict: Verdict) -> Iterator[Row]:
    if not verdict.checks:
        yield "fits", "every route of the file: none looks at certificates"
    yield from fit_rows(verdict)
    objection = verdict.objection
    if objection is not None:
        yield "refused", f"{objection.name}: {objection.text}"
        if objection.remedy is not None:
            yield "remedy", objection.remedy
    for hint in verdict.hints:
        yield "hint", hint
