"""TESTPLAN 55: CI installs exactly the files that were tested, and audits them for known vulnerabilities."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.backends.openssl.backend import backend
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.site import Site

ROOT: Final = Path(__file__).parents[2]
LISTS: Final = ("ci.txt", "run.txt")
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@dataclass(frozen=True)
class Pin:
    """One package of a list: its version, and the hashes of that version's files."""

    name: str
    version: str
    hashes: tuple[str, ...]


def pins(name: str) -> dict[str, Pin]:
    """A list by the names of its packages; fails on a line that is no pin, hash or comment."""
    text = (ROOT / "requirements" / name).read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
        assert match, f"{name}: not a pinned package: {line[:80]}"
        assert match[1] == canonicalize_name(match[1])
        found[match[1]] = Pin(match[1], match[2], tuple(re.findall("[0-9a-f]{64}", match[3])))
    return found


def declared(*extras: str) -> list[Requirement]:
    """The requirements of pyproject.toml with those of its own extras, and of its build."""
    project = PROJECT["project"]
    texts = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    own = [one for one in found if one.name == project["name"]]
    assert {extra for one in own for extra in one.extras} <= set(extras)
    return [one for one in found if one.name != project["name"]]


def everything() -> list[Requirement]:
    return declared(*PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize(("name", "wanted"), [("ci.txt", everything()), ("run.txt", declared())])
def test_all_that_is_declared_is_pinned_within_its_range(name: str, wanted: list[Requirement]) -> None:
    """After a change of pyproject.toml: `bash requirements/update`."""
    pinned = pins(name)
    assert len(wanted) > 10
    for one in wanted:
        pin = pinned.get(canonicalize_name(one.name))
        assert pin is not None, f"{one} is not in requirements/{name}"
        assert one.specifier.contains(pin.version, prereleases=True), (
            f"requirements/{name} has {pin.version}, not {one}"
        )


def test_what_runs_is_what_was_tested() -> None:
    tested, run = pins("ci.txt"), pins("run.txt")
    assert run.items() <= tested.items()
    assert not {"pytest", "mypy", "pip-audit"} & run.keys()


def test_a_package_with_machine_code_is_pinned_for_every_python_and_machine() -> None:
    """Not only for the machine on which the list was made."""
    pinned = pins("ci.txt")
    for name in ("cryptography", "cffi", "pydantic-core", "watchfiles"):
        assert len(pinned[name].hashes) > 10, name


@pytest.mark.parametrize("name", LISTS)
def test_no_list_says_where_packages_come_from(name: str) -> None:
    """Each machine has its own index, and its address may be private."""
    text = (ROOT / "requirements" / name).read_text()
    assert not re.search(r"https?:|file:|index|trusted-host|find-links|@", text, re.IGNORECASE)


@pytest.mark.skipif("CI" not in os.environ, reason="everybody else may test with what they like")
def test_ci_tests_with_what_is_pinned() -> None:
    """README's command does not name the pins; pip found all requirements installed and changed none."""
    pinned = pins("ci.txt")
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in metadata.distributions()}
    # Python 3.11 puts setuptools into each environment, whether anything needs it or not.
    ours = {"frelay", "setuptools"}
    others = {name: version for name, version in installed.items() if name not in pinned and name not in ours}
    assert not others, "installed, and not pinned"
    assert {name: pin.version for name, pin in pinned.items()}.items() <= installed.items()


async def test_the_relay_says_which_openssl_speaks_for_it(site: Site) -> None:
    """OpenSSL comes with cryptography, not from the machine, so the lists of the machine's packages do not have it."""
    async with site.relay() as relay:
        ready = await relay.log("ready")
        assert ready["openssl"] == relay.relay.openssl == backend.openssl_version_text()
        assert ready["openssl"].startswith("OpenSSL ")


# --- the audit --------------------------------------------------------------------------------------------------------

CLEAN: Final = {"name": "trio", "version": "0.35.0", "vulns": []}
SKIPPED: Final = {
    "name": "attrs",
    "skip_reason": "Dependency not found on PyPI and could not be audited: attrs (26.1.0)",
}
VULNERABLE: Final = {
    "name": "h2",
    "version": "4.1.0",
    "vulns": [{"id": "PYSEC-2099-1", "fix_versions": ["4.3.0"], "aliases": [], "description": "a flaw"}],
}


@pytest.mark.parametrize(
    ("packages", "code", "said", "is_loud"),
    [
        ([CLEAN], 0, "audited 1 of 1 packages, 0 with a vulnerability", False),
        ([CLEAN, VULNERABLE], 1, "h2 4.1.0: PYSEC-2099-1, fixed in 4.3.0", False),
        ([SKIPPED, SKIPPED], 0, "2 of 2 packages WERE NOT AUDITED", True),
        ([SKIPPED, VULNERABLE], 1, "1 of 2 packages WERE NOT AUDITED", True),
        (None, 0, "NOTHING WAS AUDITED", True),
    ],
)
def test_the_audit_fails_for_a_vulnerability_and_never_keeps_silent(
    tmp_path: Path, packages: list[Any] | None, code: int, said: str, is_loud: bool
) -> None:
    """pip-audit 2.10 exits with 0, "No known vulnerabilities found", even if its service knows no package."""
    report = tmp_path / "report.json"
    if packages is not None:
        report.write_text(json.dumps({"dependencies": packages, "fixes": []}))
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/audit.py", report], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert ("!!!" in done.stderr) is is_loud
