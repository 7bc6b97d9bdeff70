"""Writes docs/cli.md from the commands themselves: ``python docs/make_cli.py``.

A test runs it with ``--check``, so the page says exactly what the commands say.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer.main

from frelay.cli.app import app

PAGE: Final = Path(__file__).with_name("cli.md")

HEADING: Final = """\
# The commands

`python docs/make_cli.py` makes this page from the commands themselves. Each command says the same with `--help`.

Data goes to stdout, messages to stderr. Exit codes: 0 done, 1 failed or an invalid configuration, 2 wrong usage;
`frelay connect` has two more, below. With `NO_COLOR` the output has no colours. An option with a variable in its line
can be set by that variable instead. `frelay --show-completion bash` (or zsh, fish) prints the completion script of that
shell, and `--install-completion` installs it.
"""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below ``command`` with its full name, each group before its commands."""
    for name, child in getattr(command, "commands", {}).items():
        if child.hidden:
            continue
        yield f"{path} {name}", child
        yield from commands(child, f"{path} {name}")


def cell(text: str) -> str:
    """``text`` as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def row(parameter: Any) -> str:
    """The line of one option or argument."""
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
        if not parameter.is_flag:
            name += f" `{parameter.metavar or parameter.name.upper()}`"
    notes = [parameter.help or ""]
    if parameter.required:
        notes.append("Required.")
    elif parameter.default not in (None, False, True, (), []) and not callable(parameter.default):
        notes.append(f"Default: `{parameter.default}`.")
    if parameter.multiple:
        notes.append("May be given several times.")
    variable = parameter.envvar
    return f"| {name} | {cell(' '.join(note for note in notes if note))} | {f'`{variable}`' if variable else ''} |"


def section(path: str, command: Any) -> Iterator[str]:
    """The part of the page about one command."""
    yield f"\n## {path}\n"
    yield inspect.cleandoc(command.help or command.short_help or "")
    parameters = [one for one in command.params if one.name != "help" and not one.hidden]
    if parameters:
        yield "\n| option | what it does | variable |\n|---|---|---|"
        yield from (row(one) for one in parameters)


def page() -> str:
    """The whole of docs/cli.md."""
    root = typer.main.get_command(app)
    lines = [HEADING.rstrip()]
    for path, command in commands(root, "frelay"):
        lines += section(path, command)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} differs from the commands: run python docs/make_cli.py")
    PAGE.write_text(page())
