"""Ask pip-audit about every package in requirements/ci.txt: 1 if one of them has a known vulnerability, otherwise 0.

    .venv/bin/python .ci/audit.py [REPORT]        REPORT: pip-audit's JSON, if it has run already

pip-audit reports success even if its service knows none of the packages, as behind a mirror of the registry that serves
only files. So we count here. Packages that could not be checked are reported loudly, but do not fail the build, because
a build must not depend on a service.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "requirements/ci.txt"
# Seconds for all requests. Slow answers fit in; we do not wait longer for a service that drops packets.
TIMEOUT = 120


def ask() -> list[dict[str, Any]]:
    """Run pip-audit; returns what it reports of each package. Raises OSError, ValueError or SubprocessError."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        # The list is complete and has hashes, so nothing must be installed or resolved.
        command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "-r", str(PINS)]
        command += ["--progress-spinner", "off", "--timeout", "5", "--format", "json", "--output", str(report)]
        subprocess.run(command, timeout=TIMEOUT, check=False, capture_output=True)  # noqa: S603
        return read(report)


def read(report: Path) -> list[dict[str, Any]]:
    """The packages of a report; raises OSError or ValueError."""
    packages: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    return packages


def main(arguments: list[str]) -> int:
    """Print the findings; returns the exit code."""
    try:
        packages = read(Path(arguments[0])) if arguments else ask()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        shout(f"pip-audit gave no report ({type(error).__name__}), so NOTHING WAS AUDITED")
        return 0
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for one in package["vulns"]:
            fixed = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}", file=sys.stderr)
    if skipped:
        count = f"{len(skipped)} of {len(packages)} packages WERE NOT AUDITED"
        shout(f"{count}: the vulnerability service does not know them or cannot be reached")
    print(f"audited {len(packages) - len(skipped)} of {len(packages)} packages, {len(vulnerable)} with a vulnerability")
    return 1 if vulnerable else 0


def shout(text: str) -> None:
    """Print a message that nobody overlooks in a build log."""
    print(f"{'!' * 100}\n{text}\n{'!' * 100}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
