"""The section of a page that a script writes, between two markers with the script's name."""

from __future__ import annotations

from pathlib import Path

from bench.measuring.load import BenchError

__all__ = ["with_section", "write_section"]


def with_section(text: str, script: str, section: str) -> str:
    """``text`` with the section between the script's markers replaced; raises BenchError without these two markers."""
    begin, end = f"<!-- {script}: begin -->", f"<!-- {script}: end -->"
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end or begin in rest or end in after:
        raise BenchError(f"the page must hold {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{section}\n{end}{after}"


def write_section(page: Path, script: str, section: str) -> None:
    """Replace the script's section in the file ``page``; raises BenchError as above, and OSError."""
    try:
        text = with_section(page.read_text("utf-8"), script, section)
    except BenchError as error:
        raise BenchError(f"{page}: {error}") from None
    page.write_text(text, "utf-8")
