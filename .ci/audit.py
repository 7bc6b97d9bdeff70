"""Ask pip-audit about every package in requirements/ci.txt: 1 if one of them has a known vulnerability, otherwise 0.

    .venv/bin/python .ci/audit.py [REPORT]        REPORT: pip-audit's JSON, where it has been asked already

pip-audit itself calls it a success when its service knows no package at all, as behind a mirror of the registry that
serves files and nothing else. So it is counted here: packages that nobody could be asked about are told of, loudly, and
are no reason to fail, because a build must not depend on a service being up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "requirements/ci.txt"
# Seconds for all of it. A dozen requests a second is slow; a service that drops packets is not worth the wait.
PATIENCE = 120


def ask() -> list[dict[str, Any]]:
    """What pip-audit has found out, a package each; raises OSError, ValueError or SubprocessError if it has not."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        # Nothing is installed or resolved for it: the list is complete, and its hashes say so.
        command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "-r", str(PINS)]
        command += ["--progress-spinner", "off", "--timeout", "5", "--format", "json", "--output", str(report)]
        subprocess.run(command, timeout=PATIENCE, check=False, capture_output=True)  # noqa: S603
        return read(report)


def read(report: Path) -> list[dict[str, Any]]:
    """The packages of a report; raises OSError or ValueError."""
    packages: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    return packages


def main(arguments: list[str]) -> int:
    """Print what was found; gives the exit code."""
    try:
        packages = read(Path(arguments[0])) if arguments else ask()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        shout(f"pip-audit gave no report ({type(error).__name__}), so NOTHING WAS AUDITED")
        return 0
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for one in package["vulns"]:
            mended = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}", file=sys.stderr)
    if skipped:
        count = f"{len(skipped)} of {len(packages)} packages WERE NOT AUDITED"
        shout(f"{count}: the vulnerability service does not know them, or is not to be reached from here")
    print(f"audited {len(packages) - len(skipped)} of {len(packages)} packages, {len(vulnerable)} with a vulnerability")
    return 1 if vulnerable else 0


def shout(text: str) -> None:
    """Say it so that nobody who skims a build log misses it."""
    print(f"{'!' * 100}\n{text}\n{'!' * 100}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
