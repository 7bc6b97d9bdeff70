"""CPU time and memory as the kernel counted them: of a process and its children, and of the whole machine.

User and system time come from ``/proc/PID/stat``, in ticks of 10 ms. A hundred processes with less than a tick each
would show nothing there, so we read the scheduler's nanosecond clock in ``schedstat`` of each thread where the kernel
has it. For the machine ticks are enough: they show whether something else is busy. Kernel work in an interrupt is
counted for the process that was interrupted, as with any tool.

A forwarder with a process for each connection is the sum of its processes. The parent's count includes children that
have ended and were waited for, so a child that ends between two readings is not lost.

Linux only, as is the relay's splice.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


def process_tree(pid: int) -> list[int]:
    """``pid`` and all its descendants that live now."""
    found = [pid]
    for parent in found:
        for children in _of_threads(parent, "children"):
            found += map(int, children.split())
    return found


def _of_threads(pid: int, name: str) -> list[str]:
    """The content of ``name`` for each thread of ``pid``; threads that end meanwhile are left out."""
    said = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                said.append(Path(f"/proc/{pid}/task/{thread}/{name}").read_text())
    return said


def _process_seconds(pid: int) -> float:
    try:
        # The command name may hold spaces and brackets, so count fields from the last closing bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own, waited_for = (sum(map(int, fields[at : at + 2])) / _TICKS_PER_SECOND for at in (11, 13))
    # The same clock without ticks, of the living threads only: it may miss threads that have ended, never add any.
    return max(own, _thread_seconds(pid)) + waited_for


def _thread_seconds(pid: int) -> float:
    return sum(int(counted.split()[0]) for counted in _of_threads(pid, "schedstat")) / 1e9


def _machine_ticks() -> int:
    with open("/proc/stat") as stat:
        user, nice, system = map(int, stat.readline().split()[1:4])
    return user + nice + system


@dataclass(frozen=True, slots=True)
class CpuReading:
    """User and system seconds so far."""

    subject: float
    machine: float


def read_cpu(pids: list[int]) -> CpuReading:
    """CPU time so far of the processes ``pids`` with their descendants, and of the whole machine."""
    seconds = sum(_process_seconds(one) for pid in pids for one in process_tree(pid))
    return CpuReading(seconds, _machine_ticks() / _TICKS_PER_SECOND)


def read_memory(pid: int) -> int:
    """Resident bytes of ``pid``, and the private ones of its descendants: pages shared by a fork count once."""
    first, *others = process_tree(pid)
    return _rollup(first, "Rss") + sum(_rollup(one, "Private_Clean", "Private_Dirty") for one in others)


def _rollup(pid: int, *names: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in names)
