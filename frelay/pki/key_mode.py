"""Checks who may read the file of a private key: only its owner; or, if root owns it, also a group of the relay.

A key that others can read is refused, as ssh and PostgreSQL refuse it. One wider mode is safe: root owns the file, its
group may read but not write it, and the relay is in that group. Kubernetes mounts a Secret with ``fsGroup`` in this
way, read-only, so that nobody could change the mode.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

__all__ = ["objection_to_mode", "own_groups"]

# Even for a file of root: no execution, no writing by the group, nothing for others.
_TOO_WIDE = stat.S_IXUSR | stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO


def own_groups() -> frozenset[int]:
    """The ids of this process's groups: the effective one, and the supplementary ones."""
    return frozenset({os.getegid(), *os.getgroups()})


def objection_to_mode(facts: os.stat_result, path: os.PathLike[str], groups: Iterable[int] | None = None) -> str | None:
    """Why too many may read the key with these ``facts``, with the remedy; None if its mode is good.

    ``groups`` are the ids of the groups that its reader is in, or will be; by default those of this process.
    """
    mode = stat.S_IMODE(facts.st_mode)
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return None
    seen = f"has mode {mode:04o}, others can read it; chmod 600 {os.fspath(path)}"
    if facts.st_uid != 0 or mode & _TOO_WIDE:
        return f"{seen}, or leave it to root with mode 0640 and a group that the relay is in"
    if facts.st_gid in (own_groups() if groups is None else groups):
        return None
    return f"{seen}, or let the relay be in group {facts.st_gid}"
