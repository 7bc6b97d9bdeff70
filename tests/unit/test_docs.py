"""The documentation says what is so: the page of commands is what the commands say, and every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = sorted(path for path in (*TOP.glob("*.md"), *TOP.glob("docs/*.md"), *TOP.glob("examples/**/*.md")))


def anchors(page: Path) -> set[str]:
    """The fragments that lead to a heading of ``page``."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_commands_is_made_from_them() -> None:
    """Add an option, and this says to run ``python docs/make_cli.py``."""
    done = subprocess.run(
        [sys.executable, TOP / "docs" / "make_cli.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        if "://" in path:
            continue
        place = page if not path else (page.parent / path).resolve()
        assert place.exists(), target
        if fragment and place.suffix == ".md":
            assert fragment in anchors(place), target
