"""``frelay status`` and ``frelay reload``: the state of the relay, and what a reload changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from frelay.cli.admin_client import AdminClient, problem_line
from frelay.cli.text import ago, bold, columns, count, date, duration
from frelay.errors import printable

__all__ = ["reload", "status"]

# Seconds before a certificate expires: enough time to issue a new one, and not a warning that stands there for months.
_WARNING: Final = 14 * 86400.0
_REFUSALS_SHOWN: Final = 5


def status(client: AdminClient, *, as_json: bool) -> int:
    """Print the relay's state; raises CallFailed."""
    found = client.get("/v1/status")
    if as_json:
        print(json.dumps(found))
    else:
        for line in lines(found):
            print(line)
    return 0


def lines(status: Mapping[str, Any]) -> Iterator[str]:
    """The state as text, first what needs attention."""
    now = status["now"]
    yield from (bold(line, sys.stdout) for line in warnings(status))
    yield printable(
        f"{status['name']}: {status['state']}, up {duration(now - status['started_at'])}, frelay {status['version']}, "
        f"{status['openssl']}, pid {status['pid']}"
    )
    last, descriptors = status["last_reload"], status["descriptors"]
    facts = {
        "config": status["config"],
        "last reload": f"{'ok' if last['ok'] else 'REFUSED'}, {date(last['at'])} ({ago(last['at'], now)})",
        "routes": str(status["routes"]),
        "waiting": str(status["waiting"]),
        "pairings": str(status["pairings"]),
        "legs": f"{descriptors['legs']} of {descriptors['leg_budget']}",
        "descriptors": f"{descriptors['open']} of {descriptors['limit']}",
    }
    for key, value in facts.items():
        yield f"{key:<14}{printable(value)}"
    for index, one in enumerate(status["certificates"]):
        lasts = duration(one["not_after"] - now) if one["not_after"] > now else "EXPIRED"
        yield printable(
            f"{'' if index else 'certificates':<14}{one['what']} {one['subject'] or one['file']}: until "
            f"{date(one['not_after'])} ({lasts})"
        )
    yield from _refusals(status["refusals"][:_REFUSALS_SHOWN], now)


def warnings(status: Mapping[str, Any]) -> Iterator[str]:
    """What an operator has to act on, one line each."""
    now, last = status["now"], status["last_reload"]
    if not last["ok"]:
        yield f"LAST RELOAD REFUSED {ago(last['at'], now)}, the configuration before it stays in force:"
        for problem in last["problems"]:
            yield f"  {printable(problem_line(problem))}"
    if last.get("restart_only"):
        yield printable(
            f"RESTART NEEDED: the file changed {', '.join(last['restart_only'])}, which only a restart applies"
        )
    for one in status["certificates"]:
        left = one["not_after"] - now
        if left < _WARNING:
            when = f"EXPIRES IN {duration(left)}" if left > 0 else f"EXPIRED {ago(one['not_after'], now)}"
            yield printable(f"{one['what'].upper()} {when}: {one['file']}")


def _refusals(refusals: list[Mapping[str, Any]], now: float) -> Iterator[str]:
    if not refusals:
        yield f"{'refusals':<14}none"
        return
    yield "last refusals:"
    # The column of keys takes room, so it is there only if one of them had a key.
    keys = any(one.get("meet") for one in refusals)
    rows = [
        (
            f"  {ago(one['at'], now)}",
            one["code"],
            one["route"] or "-",
            one["identity"] or one["certificate"] or "-",
            one["address"],
            *([one.get("meet") or "-"] if keys else []),
            one["reason"],
        )
        for one in refusals
    ]
    yield from columns(("  WHEN", "CODE", "ROUTE", "WHO", "ADDRESS", *(["KEY"] if keys else []), "REASON"), rows)


def reload(client: AdminClient, *, as_json: bool) -> int:
    """Make the relay read its files again, and print what changed; raises CallFailed with the problems."""
    done = client.call("POST", "/v1/reload").body
    if as_json:
        print(json.dumps(done))
        return 0
    for word in ("added", "removed", "replaced"):
        if done[word]:
            print(f"{word}: {', '.join(done[word])}")
    print(f"kept: {count(done['kept'], 'route')}")
    if done["restart_only"]:
        print(f"only after a restart: {', '.join(done['restart_only'])}")
    return 0
