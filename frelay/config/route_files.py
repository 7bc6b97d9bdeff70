"""Writes the files of ``routes_dir``, one route in each. A crash or a full disk leaves the old file or the new one.

An edit is an object that is not written yet: :func:`~frelay.config.load.load` checks the configuration as it would be
with the edit, the relay binds the new addresses, and only then :meth:`RouteFileEdit.commit` writes it to disk. frelay
never writes the operator's own route file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w

__all__ = ["RouteFileEdit", "route_file", "route_file_content"]

_HEADING: Final = (
    "# Written by the admin API of frelay. You may change this route by the API or in this file; both take effect at "
    "once.\n"
)
# The mode that an editor would give it: nothing in it is secret.
_MODE: Final = 0o644


def route_file(routes_dir: Path, name: str) -> Path:
    """The file of the route ``name``, which must be a valid name: those have no path separator."""
    return routes_dir / f"{name}.toml"


def route_file_content(table: Mapping[str, Any]) -> bytes:
    """The content of a file with the keys of one route; raises ValueError for text that UTF-8 cannot encode."""
    return (_HEADING + tomli_w.dumps(table)).encode()


@dataclass(frozen=True, slots=True)
class RouteFileEdit:
    """A change of one file of ``routes_dir``: its new ``content``, or None to delete it."""

    path: Path
    content: bytes | None

    def commit(self) -> None:
        """Write it; when this returns it is on disk. Raises OSError, and then the old file is unchanged."""
        if self.content is None:
            self.path.unlink(missing_ok=True)
            _sync_directory(self.path.parent)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Hidden: if we crash before the rename, it is not read as a route.
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.stem}.", suffix=".tmp", dir=self.path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(self.content)
                file.flush()
                os.fchmod(file.fileno(), _MODE)
                os.fsync(file.fileno())
            os.rename(name, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync_directory(self.path.parent)


def _sync_directory(directory: Path) -> None:
    """Bring a rename in ``directory`` to disk, which needs an fsync of the directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
