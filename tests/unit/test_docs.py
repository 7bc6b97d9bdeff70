"""The documentation is right: the page of commands is made from the commands, and every link works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from frelay.cli.app import app

TOP = Path(__file__).parents[2]
PAGES = sorted(path for path in (*TOP.glob("*.md"), *TOP.glob("docs/*.md"), *TOP.glob("examples/**/*.md")))


def anchors(page: Path) -> set[str]:
    """The fragments of the headings of ``page``."""
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


# --- commands in the text ---------------------------------------------------------------------------------------------

PLACES = [*PAGES, *TOP.glob("deploy/*.service"), *TOP.glob("deploy/*.conf"), TOP / "config/relay.toml"]


def calls(text: str) -> Iterator[list[str]]:
    """The words after each ``frelay`` that is written as a command: in a block, in backquotes, or after a prompt."""
    text = text.replace("\\\n", " ")
    pieces = re.findall(r"`([^`\n]+)`", text) + [line.lstrip("#$> ").strip() for line in text.splitlines()]
    for piece in pieces:
        for command in re.split(r"&&|\|\||[|;]|\s#\s", piece):
            found = re.match(r"(?:ExecStart=|exec )?(?:[\w./]*/)?frelay ([a-z].*)", command.strip())
            if found is None:
                continue
            try:
                yield shlex.split(found[1])
            except ValueError:
                continue  # prose with an apostrophe


@cache
def all_commands() -> Any:
    return typer.main.get_command(app)


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a call: no such command, or no such option."""
    command = all_commands()
    rest = list(words)
    while getattr(command, "commands", None) and rest:
        known = command.commands
        if "|" in rest[0] or rest[0] not in known:
            return f"no command {rest[0]!r}" if any(word.startswith("-") for word in rest) else None
        command = known[rest.pop(0)]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    wrong = [option for option in given if option not in options | {"--help"}]
    return f"{command.name} has no {', '.join(wrong)}" if wrong else None


@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place.relative_to(TOP)))
def test_every_command_in_the_text_can_be_given(place: Path) -> None:
    """Its name and all of its options: this finds those that were renamed or never existed."""
    wrong = {" ".join(words): problem for words in calls(place.read_text()) if (problem := problem_of(words))}
    assert wrong == {}


def test_commands_are_found_wherever_they_stand() -> None:
    block = "```sh\n$ .venv/bin/frelay chek -c a.toml  # why\nfrelay run -c a && frelay top --x\n```\n"
    text = f"say `frelay ca revoke X --cq d`\n{block}"
    found = [problem_of(words) for words in calls(text)]
    assert found == ["revoke has no --cq", "no command 'chek'", None, "top has no --x"]
    assert sum(len(list(calls(page.read_text()))) for page in PLACES) > 50
