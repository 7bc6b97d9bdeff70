"""One rank of a group that is measured: ``python -m bench.collectives.worker PLAN RANK``.

PLAN is a JSON file (:class:`bench.collectives.runs.Plan`). The rank imports all that it needs, says so by a file, and
waits for the start. It writes its times as JSON beside the plan: seconds a repetition, by case. Ranks may leave a
barrier at different times, so the runner takes the longest of all ranks for each repetition.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.collectives.transports import OPENERS, Transport

_POLL = 0.0005
_BLOCKS = 10


def main(plan_file: str, rank_text: str) -> None:
    """Run one rank."""
    plan = json.loads(Path(plan_file).read_text())
    directory = Path(plan_file).parent
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", rank_text))
    _import_all(plan["subject"])
    (directory / f"ready.{rank}").touch()
    go = directory / "go"
    while not go.exists():
        time.sleep(_POLL)
    began = time.time()
    transport = OPENERS[plan["subject"]](plan["where"], rank, plan["ranks"])
    transport.barrier()
    times: dict[str, list[float]] = {"set-up": [time.time() - began]}
    for case, size, repetitions in plan["cases"]:
        if case == "ping-pong":
            times |= _ping_pong(transport, size, repetitions)
        else:
            times[f"{case} {size}"] = _measure(transport, case, size, repetitions)
    cpu = time.process_time()
    transport.close()
    # The runner reads it as soon as it is there, so it must be there as a whole.
    written = directory / f"written.{rank}"
    written.write_text(json.dumps({"times": times, "cpu": cpu}))
    written.rename(directory / f"result.{rank}")


def _import_all(subject: str) -> None:
    if subject == "frelay":
        import frelay

        _ = frelay.connect, frelay.group
    elif subject == "redis":
        import redis

        _ = redis.Redis
    else:
        import mpi4py

        mpi4py.rc.initialize = False
        import mpi4py.MPI


def _ping_pong(transport: Transport, size: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds a round trip, in blocks; those on the bare wire alternate with those in the group.

    The scheduler may place the three processes well or badly for seconds: so both must be measured in one moment.
    """
    data = np.zeros(size, np.uint8)
    times: dict[str, list[float]] = {}
    for _ in range(_BLOCKS):
        for case, ping in ((f"ping-pong {size}", transport.ping), (f"bare ping-pong {size}", transport.ping_bare)):
            transport.barrier()
            if ping(data, 20) is False:
                continue
            began = time.perf_counter()
            ping(data, repetitions // _BLOCKS)
            times.setdefault(case, []).append((time.perf_counter() - began) / (repetitions // _BLOCKS))
    return times


def _measure(transport: Transport, case: str, size: int, repetitions: int) -> list[float]:
    step = _step(transport, case, size)
    step()
    found = []
    for _ in range(repetitions):
        transport.barrier()
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return found


def _step(transport: Transport, case: str, size: int) -> Callable[[], Any]:
    """One repetition of a case, and a check of what it gives at the first one."""
    rank, ranks = transport.rank, transport.size
    count = max(1, size // 8)
    if case == "barrier":
        return transport.barrier
    if case == "bcast":
        data = np.full(count, float(rank == 0))

        def bcast() -> None:
            transport.bcast(data)
            assert data[0] == data[-1] == 1.0, "the broadcast brought something else"

        return bcast
    if case == "allreduce":
        values = np.ones(count)

        def allreduce() -> None:
            values.fill(1.0)
            transport.allreduce(values)
            assert values[0] == values[-1] == ranks, "the sum is wrong"

        return allreduce
    parts = [np.full(max(1, count // ranks), float(rank)) for _ in range(ranks)]

    def alltoall() -> None:
        received = transport.alltoall(parts)
        assert all(np.frombuffer(part, np.float64)[-1] == source for source, part in enumerate(received))

    return alltoall


if __name__ == "__main__":
    main(*sys.argv[1:])
