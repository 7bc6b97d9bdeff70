"""The codec of the channel between supervisor and workers: entries, counts, files and problems as JSON, and back."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from frelay.admin.control import Counts
from frelay.config.address import parse_address
from frelay.config.plan import ListenerKey
from frelay.errors import Problem
from frelay.journal import (
    Distribution,
    Entry,
    LegRefused,
    LegWaits,
    PairingEnded,
    PairingStarted,
)
from frelay.protocol.outcome import Outcome, Record
from frelay.relay.prepare import TlsFiles

__all__ = [
    "counts_from_json",
    "counts_to_json",
    "entry_from_json",
    "entry_to_json",
    "is_told",
    "key_from_json",
    "key_to_json",
    "problem_from_json",
    "problem_to_json",
    "tls_files_from_json",
    "tls_files_to_json",
]


# --- the journal -------------------------------------------------------------------------------------------------

# The entries about functions. Reloads and the drain are the supervisor's own, and the counts hold the handshakes.
_TOLD: Final[Mapping[str, type[Entry]]] = {
    kind.kind: kind for kind in (LegWaits, LegRefused, PairingStarted, PairingEnded)
}
_FIELDS: Final = {kind: tuple(one.name for one in fields(kind)) for kind in (*_TOLD.values(), Record)}


def is_told(entry: Entry) -> bool:
    """Whether a worker tells its supervisor of ``entry``."""
    return type(entry) in _FIELDS


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry for which :func:`is_told` is true."""
    # Not asdict(): it copies deeply, and there may be thousands of entries a second.
    table = {name: getattr(entry, name) for name in _FIELDS[type(entry)]}
    if isinstance(entry, PairingEnded):
        record = {name: getattr(entry.record, name) for name in _FIELDS[Record]}
        table["record"] = {**record, "outcome": entry.record.outcome.value}
    return {"kind": entry.kind, **table}


def entry_from_json(table: dict[str, Any]) -> Entry:
    """The entry again."""
    kind = table.pop("kind")
    if kind == PairingEnded.kind:
        record = table["record"]
        table["record"] = Record(**{**record, "outcome": Outcome(record["outcome"])})
    return _TOLD[kind](**table)


# --- counts ------------------------------------------------------------------------------------------------------

_PAIRS: Final = ("waiting", "bytes_moved", "outcomes", "refusals")


def counts_to_json(counts: Counts) -> dict[str, Any]:
    """What each worker counts by itself; the supervisor adds what is the same for all of them."""
    return {
        "pairings": dict(counts.pairings),
        "keys": dict(counts.keys),
        **{name: [[*key, count] for key, count in getattr(counts, name).items()] for name in _PAIRS},
        "durations": {name: [found.bounds, found.counts, found.total] for name, found in counts.durations.items()},
        "loop_lag": counts.loop_lag,
        "tasks": counts.tasks,
    }


def counts_from_json(table: Mapping[str, Any]) -> Counts:
    """The counts again."""
    pairs: dict[str, Any] = {name: {(one, two): count for one, two, count in table[name]} for name in _PAIRS}
    return Counts(
        pairings=Counter(table["pairings"]),
        keys=Counter(table["keys"]),
        **pairs,
        reloaded_at=0.0,
        reload_was_accepted=True,
        certificates=(),
        durations={
            name: Distribution(tuple(bounds), counts, total)
            for name, (bounds, counts, total) in table["durations"].items()
        },
        loop_lag=table["loop_lag"],
        tasks=table["tasks"],
    )


# --- configurations ----------------------------------------------------------------------------------------------


def tls_files_to_json(files: TlsFiles) -> dict[str, Any]:
    """The files of ``[tls]``."""
    return {
        "at": files.at,
        "contents": {str(path): b64encode(data).decode() for path, data in files.contents.items()},
    }


def tls_files_from_json(table: Mapping[str, Any]) -> TlsFiles:
    """The files again."""
    return TlsFiles({Path(path): b64decode(data) for path, data in table["contents"].items()}, table["at"])


def key_to_json(key: ListenerKey) -> list[str | None]:
    """A listening address."""
    return [str(key.address), key.route]


def key_from_json(value: list[Any]) -> ListenerKey:
    """The address again."""
    return ListenerKey(parse_address(value[0]), value[1])


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """A problem."""
    return {name: getattr(problem, name) for name in ("message", "key", "line", "is_conflict")} | {
        "file": str(problem.file)
    }


def problem_from_json(table: Mapping[str, Any]) -> Problem:
    """The problem again."""
    return Problem(**{**table, "file": Path(table["file"])})
