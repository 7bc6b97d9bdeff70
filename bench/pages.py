"""The part of a page that a script writes, between two markers which name the script."""

from __future__ import annotations

from bench.load import BenchError

__all__ = ["with_section"]


def with_section(text: str, script: str, section: str) -> str:
    """``text`` with what is between the script's markers replaced; raises BenchError without just these."""
    begin, end = f"<!-- {script}: begin -->", f"<!-- {script}: end -->"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end or begin in rest or end in after:
        raise BenchError(f"the page must hold {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{section}\n{end}{after}"
