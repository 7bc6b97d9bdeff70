"""What is in the container image, and what is not: nothing that builds, and nothing that gives rights."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import frelay
from support.containers import USER, Containers, image

_SIZE: Final = 180_000_000
"""Bytes, with the base: 122 MB of Debian and Python, and 55 MB of frelay and its libraries."""


@pytest.fixture
def tree() -> Iterator[Path]:
    """The root directory of the image, as the test's machine sees it."""
    done = subprocess.run(["podman", "image", "mount", image()], check=True, capture_output=True, text=True)
    yield Path(done.stdout.strip())
    subprocess.run(["podman", "image", "unmount", image()], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
async def facts(containers: Containers) -> dict[str, Any]:
    return await containers.inspect(containers.image)


def files(tree: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All paths of the image, from its root on, each with what ``lstat`` says of it."""
    for directory, names, others in os.walk(tree):
        for name in (*names, *others):
            path = Path(directory, name)
            yield f"/{path.relative_to(tree)}", path.lstat()


async def test_it_is_small(facts: dict[str, Any]) -> None:
    assert facts["Size"] <= _SIZE


async def test_its_settings_are_what_its_users_rely_on(facts: dict[str, Any]) -> None:
    settings = facts["Config"]
    assert settings["User"] == f"{USER}:{USER}"
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["Entrypoint"] == ["/opt/frelay/bin/frelay"]
    assert settings["Cmd"] == ["run", "-c", "/etc/frelay/relay.toml", "--log-format", "json"]
    assert facts["HealthCheck"]["Test"] == ["CMD", "frelay", "status"] if "HealthCheck" in facts else True
    # A volume that nobody named would be made for each container, and stay.
    assert not settings.get("Volumes")


async def test_its_labels_say_what_it_is(facts: dict[str, Any]) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in facts["Labels"].items()}
    assert labels["title"] == "frelay"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == frelay.__version__
    assert re.fullmatch("[0-9a-f]{40}|", labels["revision"])


def test_no_program_gives_more_rights(tree: Path) -> None:
    """Setuid and setgid, and capabilities of a file, which getxattr shows."""
    found = [path for path, facts in files(tree) if stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o6000]
    found += [
        path
        for path, facts in files(tree)
        if stat.S_ISREG(facts.st_mode) and "security.capability" in os.listxattr(tree / path[1:])
    ]
    assert found == []


def test_everybody_may_write_to_tmp_and_to_nothing_else(tree: Path) -> None:
    kinds = {stat.S_IFREG, stat.S_IFDIR}  # the mode of a link says nothing, and a container has devices of its own
    found = [path for path, facts in files(tree) if stat.S_IFMT(facts.st_mode) in kinds and facts.st_mode & 0o002]
    assert found == ["/tmp"]
    assert stat.S_IMODE((tree / "tmp").stat().st_mode) == 0o1777


def test_its_user_owns_the_directory_of_the_socket_and_nothing_else(tree: Path) -> None:
    """A relay that somebody has taken over can change none of its programs."""
    found = {path: stat.S_IMODE(facts.st_mode) for path, facts in files(tree) if USER in (facts.st_uid, facts.st_gid)}
    assert found == {"/run/frelay": 0o700}
    assert f"frelay:x:{USER}:{USER}:" in (tree / "etc/passwd").read_text()
    assert list((tree / "etc/frelay").iterdir()) == []


def test_nothing_is_left_of_the_build(tree: Path) -> None:
    """Neither pip nor the tools that build frelay, neither the sources nor the wheels."""
    paths = [path for path, _ in files(tree)]
    tools = r"(ensurepip|pip|setuptools|wheel|hatchling|trove_classifiers)"
    assert [path for path in paths if re.search(rf"/{tools}(-[^/]*)?$|/pip[0-9.]*$|\.whl$", path)] == []
    assert [path for path in ("/src", "/wheels") if path in paths] == []
    assert [path.name for path in (tree / "opt").iterdir()] == ["frelay"]


def test_python_finds_its_modules_compiled(tree: Path) -> None:
    """Each container would compile them anew, since it cannot write them down: a start would take twice as long."""
    packages = next((tree / "opt/frelay/lib").glob("python3*/site-packages"))
    missing, wrong = [], []
    for source in (packages / "frelay").rglob("*.py"):
        compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"))
        if not compiled:
            missing.append(source)
        # Bytes 4 to 8: that it is found by a hash (1), which is not compared with the source (2 is not set). PEP 552.
        wrong += [path for path in compiled if path.read_bytes()[4:8] != b"\x01\0\0\0"]
    assert missing == wrong == []
