"""Build what a release consists of, twice, and judge it: 0 if it may be published, otherwise 1.

    .venv/bin/python .ci/release.py [--tag vX.Y.Z] [DIRECTORY]     DIRECTORY: for the files, by default dist

Nothing is published here. The files are:

* the sdist and the wheel of frelay, and the wheel of frelay-client;
* a layer for AWS Lambda, which is frelay-client below ``python/``;
* a list of all packages that a relay needs (SBOM, CycloneDX), and SHA256SUMS.

The same commit gives the same bytes on each machine: it is built from two clones here, with umask 022 and 077.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
LARGEST_LAYER: Final = 200_000
# As pip-licenses finds them in the metadata of a package; each is compared with a part of its words.
LICENCES: Final = "MIT;BSD;Apache;ISC;Python Software Foundation;PSF;MPL-2.0;Mozilla Public License 2.0"
# In requirements/run.txt for those who build frelay from a clone: hatchling, and what it needs.
BUILDERS: Final = ("hatchling", "editables", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers")
# Of the tests of the sdist: those that need neither a network nor a repository, in some seconds.
TESTS_OF_SDIST: Final = ("test_protocol_frames.py", "test_protocol_messages.py", "test_config_load.py", "test_lobby.py")
# The same for all files of a zip, so that the time of the build is in none of them: the earliest that zip knows.
EPOCH: Final = (1980, 1, 1, 0, 0, 0)


class NotGood(Exception):
    """A file of the release is not as it must be."""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command; returns its output. Raises NotGood with what it said."""
    done = subprocess.run(  # noqa: S603
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise NotGood(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a module of this environment."""
    return run(sys.executable, "-m", *arguments, cwd=cwd, **environment)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Files are made with this umask within the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def build(source: Path, into: Path) -> None:
    """All files but the SBOM, from one tree."""
    # Without isolation: the pinned hatchling of this environment builds, and not the newest one.
    python("build", "--no-isolation", "--outdir", into, source)
    python("build", "--no-isolation", "--wheel", "--outdir", into, source / "deploy/client")
    (client,) = into.glob("frelay_client-*.whl")
    write_layer(client, into / f"frelay-layer-{client.name.split('-')[1]}.zip")


def write_layer(wheel: Path, layer: Path) -> None:
    """The packages of a wheel below ``python/``, where AWS Lambda looks for them."""
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(layer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as taken:
        for name in sorted(given.namelist()):
            entry = zipfile.ZipInfo(f"python/{name}", EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            taken.writestr(entry, given.read(name))


def build_twice(into: Path) -> None:
    """Build from two clones of HEAD, and compare."""
    with tempfile.TemporaryDirectory() as name:
        sums = []
        for mask in (0o022, 0o077):
            directory = Path(name) / f"{mask:03o}"
            with umask(mask):
                # CI may run as root in a tree of another user, which git else refuses.
                run("git", "-c", "safe.directory=*", "clone", "-q", "--no-hardlinks", ROOT, directory / "source")
                build(directory / "source", directory / "dist")
            sums.append({path.name: digest(path) for path in sorted((directory / "dist").iterdir())})
        if sums[0] != sums[1]:
            differing = [file for file in sums[0] if sums[0][file] != sums[1].get(file)]
            raise NotGood(f"two builds of one commit differ in {', '.join(differing) or 'their files'}")
        shutil.copytree(Path(name) / "022" / "dist", into, dirs_exist_ok=True)


def digest(path: Path) -> str:
    """SHA-256 as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judge_version(into: Path, tag: str | None) -> None:
    """The wheels, the changes and the tag, if there is one, say the same version."""
    versions = {path.name.split("-")[1] for path in into.glob("*.whl")}
    if len(versions) != 1:
        raise NotGood(f"the wheels have different versions: {', '.join(sorted(versions))}")
    (version,) = versions
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if version not in headings:
        raise NotGood(f"CHANGELOG.md has no section ## {version}; it has {', '.join(headings)}")
    if tag is not None and tag != f"v{version}":
        raise NotGood(f"the tag is {tag}, and frelay/__init__.py has the version {version}")
    if tag is not None and f"## {version} (unreleased)" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise NotGood(f"CHANGELOG.md says that {version} is unreleased: write the date of the release there")


def judge_files(into: Path) -> None:
    """The metadata, what lies in the wheels, and the size of the layer."""
    wheels, archives = sorted(into.glob("*.whl")), sorted(into.glob("*.tar.gz"))
    python("twine", "check", "--strict", *wheels, *archives)
    run(Path(sys.executable).with_name("check-wheel-contents"), *wheels)
    (layer,) = into.glob("frelay-layer-*.zip")
    if layer.stat().st_size > LARGEST_LAYER:
        raise NotGood(f"{layer.name} has {layer.stat().st_size:,} bytes, of {LARGEST_LAYER:,} at most")


def judge_sdist(into: Path) -> None:
    """The sdist alone makes the same wheel, and its tests run."""
    (sdist,) = into.glob("frelay-*.tar.gz")
    (wheel,) = into.glob("frelay-*.whl")
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(sdist) as archive:
            archive.extractall(name, filter="data")
        (source,) = Path(name).iterdir()
        python("build", "--no-isolation", "--wheel", "--outdir", Path(name) / "dist", source)
        if digest(Path(name) / "dist" / wheel.name) != digest(wheel):
            raise NotGood(f"{sdist.name} alone makes another {wheel.name}")
        tests = [f"tests/unit/{test}" for test in TESTS_OF_SDIST]
        # PYTHONPATH: the frelay of the sdist, and not that of this environment.
        python("pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=source, PYTHONPATH=str(source))


def judge_dependencies(into: Path) -> None:
    """Install the wheel with the pinned dependencies, wheels only; write the SBOM, and look at the licences."""
    (wheel,) = into.glob("frelay-*.whl")
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        inside = Path(name) / "bin/python"
        pip = (inside, "-m", "pip", "install", "-q", "--only-binary", ":all:")
        run(*pip, "--require-hashes", "-r", ROOT / "requirements/run.txt")
        version = wheel.name.split("-")[1]
        # By name, as from an index: else the list of packages would tell where the wheel lay.
        run(*pip, "--no-deps", "--no-index", "--find-links", into, f"frelay=={version}")
        # What only builds is no part of a relay; that it still has all that it needs, pip checks.
        run(inside, "-m", "pip", "uninstall", "-q", "-y", *BUILDERS)
        run(inside, "-m", "pip", "check")
        run(inside, "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools")
        python(
            *("cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON"),
            *("-o", into / f"frelay-{version}.cdx.json", inside),
        )
        found = ("--from=mixed", "--partial-match", f"--python={inside}", f"--allow-only={LICENCES}")
        run(Path(sys.executable).with_name("pip-licenses"), *found, "--ignore-packages", "frelay")


def judge_workflows() -> None:
    """The workflow files are well-formed, and give nobody more than is needed."""
    programs, workflows = Path(sys.executable).parent, sorted((ROOT / ".github/workflows").glob("*.yml"))
    if not workflows:
        raise NotGood("there are no workflows in .github/workflows")
    run(programs / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    run(programs / "zizmor", "--offline", "--no-progress", "--persona", "regular", *workflows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", metavar="vX.Y.Z", help="the tag that is released, which must be the version")
    options = parser.parse_args(arguments)
    into: Path = options.directory
    into.mkdir(parents=True, exist_ok=True)
    if any(into.iterdir()):
        print(f"release.py: {into} is not empty; remove what is in it, or name another directory", file=sys.stderr)
        return 1
    try:
        build_twice(into)
        judge_version(into, options.tag)
        judge_files(into)
        judge_sdist(into)
        judge_dependencies(into)
        judge_workflows()
    except NotGood as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 1
    lines = [f"{digest(path)}  {path.name}" for path in sorted(into.iterdir())]
    (into / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
