"""``frelay --show-completion SHELL`` prints the script of the named shell, in whatever shell it runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.commands import frelay_command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    said = frelay_command("--show-completion", shell)
    assert (said.code, said.stderr) == (0, "")
    assert f"_FRELAY_COMPLETE=complete_{shell}" in said.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=said.stdout, text=True, check=False).returncode == 0


def test_a_shell_that_nobody_knows() -> None:
    said = frelay_command("--show-completion", "csh")
    assert (said.code, said.stdout) == (2, "")


def test_it_is_installed_at_home_and_nowhere_else(tmp_path: Path) -> None:
    said = frelay_command("--install-completion", "bash", env={"HOME": str(tmp_path)})
    assert said.code == 0
    (script,) = [path for path in tmp_path.rglob("*") if path.is_file() and "_FRELAY_COMPLETE" in path.read_text()]
    assert str(script) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("frelay ro", {"route"}),
        ("frelay route ", {"add", "delete", "list", "show"}),
        ("frelay route add --func2", {"--func2", "--func2-dial"}),
    ],
)
def test_commands_and_options_are_completed(words: str, expected: set[str]) -> None:
    asked = {"_FRELAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert set(frelay_command(env=asked).stdout.split()) == expected
