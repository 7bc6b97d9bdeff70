"""How fast are pairs set up, and with how much CPU? Two processes of ours set pairs up and close them again.

Each handles one pair at a time, from the first dial to the close, so there are at most two at once. In Python the
client's side of a handshake costs about as much as the relay's. So with few cores the clients limit the rate, and only
the CPU time says something about the relay.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from multiprocessing.connection import Connection, wait
from typing import Final

from bench.measuring.cpu import CpuReading, read_cpu
from bench.measuring.interrupt import deferred
from bench.measuring.load import BenchError
from bench.measuring.subjects import Subject
from frelay.errors import FrelayError

__all__ = ["measure_admission"]

_WORKERS: Final = 2
_WARMUP: Final = 0.3
_PATIENCE: Final = 30.0
# The load goes on for so long after the window, so that the clocks are read under load.
_AFTERWARDS: Final = 0.1


def measure_admission(subject: Subject, seconds: float) -> dict[str, float]:
    """Pairs a second, and the subject's CPU for each connection that it accepted; raises BenchError."""
    context = multiprocessing.get_context("fork")
    began = time.monotonic() + _WARMUP
    ended = began + seconds
    answers: list[Connection] = []
    workers = []
    readings: list[CpuReading] = []
    try:
        for _ in range(_WORKERS):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_admit, args=(subject, began, ended, theirs), daemon=True)
            with deferred():
                worker.start()
                workers.append(worker)
            theirs.close()
            answers.append(ours)
        for edge in (began, ended):
            if wait(answers, max(0.0, edge - time.monotonic())):
                break  # a message before the end is an error
            readings.append(read_cpu(subject.pids))
        counted = [_answer(one) for one in answers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        for one in answers:
            one.close()
    pairs = sum(count for count, _ in counted)
    if len(readings) < 2 or not pairs:
        raise BenchError(f"{subject.name}: no pair was set up in {seconds:g} s")
    used = readings[1].subject - readings[0].subject
    figures = {
        "pairs_per_second": pairs / seconds,
        "generator_cores": sum(cpu for _, cpu in counted) / seconds,
    }
    if subject.pids:
        figures["cpu_us_per_leg"] = used * 1e6 / pairs / subject.legs
        figures["subject_cores"] = used / seconds
    return figures


def _answer(connection: Connection) -> tuple[int, float]:
    try:
        if not connection.poll(_PATIENCE):
            raise BenchError("pairs were not set up in time")
        answer = connection.recv()
    except EOFError:
        raise BenchError("a process that sets up pairs ended without a message") from None
    if isinstance(answer, str):
        raise BenchError(answer)
    count, cpu = answer
    return int(count), float(cpu)


def _admit(subject: Subject, began: float, ended: float, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    count = 0
    cpu_before: float | None = None
    cpu = 0.0
    try:
        while (now := time.monotonic()) < ended + _AFTERWARDS:
            if now >= began and cpu_before is None:
                cpu_before = time.process_time()
            subject.admit()
            if began <= time.monotonic() < ended:
                count += 1
                cpu = time.process_time() - (cpu_before or 0.0)
        answer.send((count, cpu))
    except (BenchError, OSError, FrelayError) as error:
        answer.send(f"{subject.name}: {error}")
