"""One run of a group: start its server and its ranks, wait for their times, and end everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

from bench.measuring.cpu import read_cpu
from bench.measuring.interrupt import deferred
from bench.measuring.load import BenchError
from bench.measuring.subjects import START, checkout_root
from frelay.pki.authority import Authority, Usage

__all__ = ["SUBJECTS", "Case", "Plan", "run_group"]

SUBJECTS: Final = ("openmpi", "frelay", "redis")
# A run of 16 ranks on 2 cores takes some tens of seconds.
_LONGEST: Final = 600.0
_TAIL: Final = 5

_ROUTE_FILE: Final = """\
[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "certs/ca.pem"

[[route]]
name = "bench"
listen = "127.0.0.1:{port}"
func1 = "dns:*.bench"
func2 = "dns:*.bench"
"""

Case = tuple[str, int, int]
"""Its name, the bytes that each rank sends in all, and how often it is repeated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ranks of one run do."""

    subject: str
    ranks: int
    cases: Sequence[Case]
    where: str = ""


def run_group(plan: Plan, python: Path) -> dict[str, float]:
    """The times of a run in ms by ``"CASE SIZE"``; ``"set-up 0"`` and ``"cpu 0"`` are there as well.

    ``"bare ping-pong 64"`` is that of the wire of ``frelay.connect`` beside a group of two.
    A case takes as long as its slowest rank; of its repetitions the median counts. ``python`` has the programs that are
    compared. Raises BenchError.
    """
    with tempfile.TemporaryDirectory(prefix="frelay-groups-") as name, ExitStack() as stack:
        directory = Path(name)
        server, where = _serve(plan, directory, stack)
        (directory / "plan").write_text(json.dumps({**asdict(plan), "where": where}))
        ranks = _start_ranks(plan, directory, python, stack)
        _await(directory, "ready", plan.ranks, ranks)
        before = 0.0 if server is None else read_cpu([server.pid]).subject
        (directory / "go").touch()
        _await(directory, "result", plan.ranks, ranks)
        after = 0.0 if server is None else read_cpu([server.pid]).subject
        found = [json.loads((directory / f"result.{rank}").read_text()) for rank in range(plan.ranks)]
    times = [one["times"] for one in found]
    result = {
        case: 1000 * median(max(repetition) for repetition in zip(*(one[case] for one in times), strict=True))
        for case in times[0]
    }
    result["set-up 0"] = result.pop("set-up")
    result["cpu 0"] = 1000 * (after - before + sum(one["cpu"] for one in found))
    return result


def _start(command: Sequence[str | Path], log: Path, stack: ExitStack, **more: str) -> subprocess.Popen[bytes]:
    with deferred():
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(checkout_root()), "OMP_NUM_THREADS": "1", **more},
                start_new_session=True,
            )
        stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in ("TERM", "KILL"):
        subprocess.run(["kill", f"-{number}", "--", f"-{process.pid}"], capture_output=True)
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _serve(plan: Plan, directory: Path, stack: ExitStack) -> tuple[subprocess.Popen[bytes] | None, str]:
    """Start what the ranks meet at, if anything; returns its process and where it is."""
    if plan.subject == "openmpi":
        return None, ""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    log = directory / "server.log"
    if plan.subject == "redis":
        command: list[str | Path] = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"]
        command += ["--bind", "127.0.0.1", "--dir", directory]
        where = str(port)
    else:
        _certificates(directory / "certs", plan.ranks)
        (directory / "relay.toml").write_text(_ROUTE_FILE.format(port=port))
        command = [sys.executable, "-m", "frelay", "run", "-c", directory / "relay.toml", "--no-watch"]
        where = f"localhost:{port} {directory / 'certs'}"
    server = _start(command, log, stack)
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return server, where
        if server.poll() is not None:
            break
        time.sleep(0.02)
    raise BenchError(f"the server of {plan.subject} did not start: {_last_lines(log)}")


def _certificates(directory: Path, ranks: int) -> None:
    directory.mkdir()
    authority = Authority.create("bench")
    authority.write(directory / "ca.pem", directory / "ca.key")
    names = {"relay": ["localhost"], **{f"rank{rank}": [f"rank{rank}.bench"] for rank in range(ranks)}}
    for name, dns in names.items():
        usage: Usage = "relay" if name == "relay" else "party"
        authority.issue(common_name=name, dns=dns, usage=usage).write(
            directory / f"{name}.pem", directory / f"{name}.key"
        )


def _start_ranks(plan: Plan, directory: Path, python: Path, stack: ExitStack) -> Mapping[subprocess.Popen[bytes], Path]:
    worker: list[str | Path] = [python, "-m", "bench.collectives.worker", directory / "plan"]
    if plan.subject == "openmpi":
        mpirun: list[str | Path] = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(plan.ranks)]
        # TCP, as between machines: shared memory would be another contest.
        mpirun += ["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo", "--mca", "mpi_yield_when_idle", "1"]
        log = directory / "ranks.log"
        return {_start([*mpirun, *worker, "0"], log, stack): log}
    logs = [directory / f"rank{rank}.log" for rank in range(plan.ranks)]
    return {_start([*worker, str(rank)], log, stack): log for rank, log in enumerate(logs)}


def _await(directory: Path, what: str, count: int, ranks: Mapping[subprocess.Popen[bytes], Path]) -> None:
    deadline = time.monotonic() + _LONGEST
    while sum(1 for _ in directory.glob(f"{what}.*")) < count:
        for process, log in ranks.items():
            if process.poll() not in (None, 0):
                raise BenchError(f"a rank has failed: {_last_lines(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"not all ranks were done within {_LONGEST:g} s")
        time.sleep(0.005)


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " / ".join(lines[-_TAIL:]) or "it wrote nothing"
