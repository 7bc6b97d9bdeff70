"""The open descriptors of a process, and those that were opened since an earlier look."""

from __future__ import annotations

import os
from collections.abc import Mapping

from frelay.pairing.pipes import PipePool
from support.faults import descriptors_of_networks

__all__ = ["open_descriptors", "opened_since"]


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """The descriptors of a process and what they are, without those of the network between parties and relay."""
    found = {}
    others = descriptors_of_networks() if pid == "self" else set()
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        if int(name) in others:
            continue
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # the descriptor of listdir itself
    return found


def opened_since(before: Mapping[int, str], pid: int | str = "self", pipes: PipePool | None = None) -> dict[int, str]:
    """The descriptors of a process that were not there at ``before``, which :func:`open_descriptors` gave.

    We do not compare counts: a count changes, too, when the garbage collector closes what an earlier test has left. The
    free pipes of ``pipes`` are left out: the pool keeps a limited number of them for the next transfer.
    """
    pooled = {end for pipe in (pipes._free if pipes else ()) for end in (pipe.read_end, pipe.write_end)}
    now = open_descriptors(pid)
    return {number: what for number, what in now.items() if number not in pooled and before.get(number) != what}
