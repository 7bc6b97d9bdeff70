"""Writing the files of ``routes_dir``: one route a file, and after a crash or on a full disk the old or the new one.

An edit is an object before it is a fact: :func:`~frelay.config.load.load` can judge the configuration as it would be
with it, the relay can bind what it asks for, and only then :meth:`RouteFileEdit.commit` makes it last. The operator's
own route file is never written by frelay.
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

_HEADING: Final = "# Written by the admin API of frelay. Change it there, or here; both count at once.\n"
# As an editor would make it: nothing in it is secret.
_MODE: Final = 0o644


def route_file(routes_dir: Path, name: str) -> Path:
    """Where the route ``name`` stands; ``name`` must be a valid one, which no path separator is."""
    return routes_dir / f"{name}.toml"


def route_file_content(table: Mapping[str, Any]) -> bytes:
    """The file that holds the keys of one route; raises ValueError for text that UTF-8 cannot write."""
    return (_HEADING + tomli_w.dumps(table)).encode()


@dataclass(frozen=True, slots=True)
class RouteFileEdit:
    """One file of ``routes_dir`` as it is to be: ``content``, or None for not there at all."""

    path: Path
    content: bytes | None

    def commit(self) -> None:
        """Make it last, on disk when this returns; raises OSError with the old file as it was."""
        if self.content is None:
            self.path.unlink(missing_ok=True)
            _sync_directory(self.path.parent)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, so that a crash in between leaves nothing behind that would be read as a route.
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
    """A rename is on disk only once its directory is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
