"""What frelay claims of its groups, as ratios within one run, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.collectives.record import GroupRecord, size_in_words

__all__ = ["judge"]

_LARGE = 8 << 20
# Milliseconds from the moment when all ranks have imported frelay to the end of their first barrier.
_SET_UP = 3000.0


def judge(record: GroupRecord) -> Iterator[str]:
    """A sentence for each claim that the run has figures for, and one for each case that is slower than Redis."""
    yield ""
    found = [
        ("ping-pong of 64 B: at most 1.2 x a bare wire", record.ratio(2, "ping-pong 64", "frelay", "wire"), 1.2),
        ("ping-pong of 64 B: at most 0.4 x Redis", record.ratio(2, "ping-pong 64", "frelay", "redis"), 0.4),
    ]
    for case in ("bcast", "allreduce"):
        for ranks in (4, 8, 16):
            what = f"{case} of {size_in_words(_LARGE)}, {ranks} ranks: at most 0.6 x Redis"
            found.append((what, record.ratio(ranks, f"{case} {_LARGE}", "frelay", "redis"), 0.6))
    spread = record.spread(16, "set-up 0", "frelay")
    set_up = None if spread is None else spread.median
    for text, ratio, limit in found:
        if ratio is not None:
            yield f"{'holds ' if ratio <= limit else 'MISSED'}  {text}: {ratio:.2f}"
    if set_up is not None:
        verdict = "holds " if set_up <= _SET_UP else "MISSED"
        yield f"{verdict}  set-up and first barrier of 16 ranks: at most 3 s: {set_up / 1000:.2f} s"
    for key in record.figures:
        number, _, case = key.partition(" ")
        slower = record.ratio(int(number), case, "frelay", "redis")
        if slower is not None and slower > 1 and case != "cpu 0":
            yield f"slower than Redis: {case}, {number} ranks: {slower:.2f} x"
