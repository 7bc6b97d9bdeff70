"""``frelay init``: write a working set of certificates and a route file, and say what to do next."""

from __future__ import annotations

from pathlib import Path

from frelay.pki.init import initialise, summary

__all__ = ["write_all"]


def write_all(directory: Path, *, force: bool) -> None:
    """Write the set into ``directory`` and print what was written; raises CertificateError."""
    print(summary(initialise(directory, force=force)))
