"""Health and metrics over plain HTTP: ``/healthz``, ``/readyz`` and ``/metrics``.

A scrape must be exact and must not delay any function. Callers that ask at the same time share one scrape
(:mod:`frelay.admin.sharing`), and a scrape that no caller waits for any more is dropped. The live figures (routes,
waiting legs, bytes of running pairings) are copied in one synchronous step, so no pairing can end during it and be
counted twice or not at all. Another thread then turns the copy into the thousands of lines.

The names and labels are a contract that docs/metrics.md explains and ``deploy/`` uses. A label never holds text that a
stranger can choose, an identity or an address: each new value would add a series for ever, and more people read metrics
than logs.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Final

import trio
from prometheus_client import Metric, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from frelay import __version__
from frelay.admin.control import Control, Counts
from frelay.admin.loop_lag import LAG_MEMORY, LoopLag
from frelay.admin.model import CertificateView
from frelay.admin.sharing import Batch, Shared
from frelay.journal import Distribution
from frelay.protocol.messages import PartyName
from frelay.protocol.outcome import Outcome
from frelay.tls.context import openssl_version

__all__ = ["Metrics", "metrics_app"]

_DURATIONS: Final = {
    "handshake": "Time from accept to the end of the outer TLS handshake; only handshakes that succeeded.",
    "wait": "How long the first party of a pairing had waited for the second when they were matched.",
    "pairing": "Time from the match of two parties to the close of both; only pairings that have ended.",
}
_DIRECTIONS: Final[dict[PartyName, str]] = {"func1": "func1_to_func2", "func2": "func2_to_func1"}

_TEXT: Final = "text/plain"
_OPENMETRICS: Final = "application/openmetrics-text"
_TEXT_TYPE: Final = f"{_TEXT}; version=0.0.4; charset=utf-8"
_ENCODERS: Final[Mapping[str, Callable[[Collector], bytes]]] = {
    _TEXT_TYPE: generate_latest,
    openmetrics.CONTENT_TYPE_LATEST: openmetrics.generate_latest,
}


class Metrics:
    """The metrics of one relay. Run :meth:`run` in a task."""

    def __init__(self, control: Control) -> None:
        self._control: Final = control
        self._lag: Final = LoopLag()
        self._scrapes: Final[Shared[str, bytes]] = Shared(self._scrape)

    async def run(self) -> None:
        """Measure the delay of the event loop, and make scrapes on request, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lag.watch)
            nursery.start_soon(self._scrapes.run)

    async def expose(self, accept: str) -> tuple[bytes, str]:
        """All metrics as they are now, and their content type: OpenMetrics if ``Accept`` prefers it, otherwise text.

        Callers that ask at the same time share one scrape; it is dropped if all of them disconnect.
        """
        kind = openmetrics.CONTENT_TYPE_LATEST if _wants_openmetrics(accept) else _TEXT_TYPE
        return await self._scrapes.get(kind), kind

    async def _scrape(self, batch: Batch[str, bytes]) -> None:
        tasks = trio.lowlevel.current_statistics().tasks_living
        scrape = _Scrape(await self._control.counts(), self._lag.worst, tasks, lambda: not batch.wanted)

        def encode() -> None:
            for kind in batch.wanted:
                try:
                    batch.results[kind] = _ENCODERS[kind](scrape)
                except _Abandoned:
                    return

        # A cancelled scrape waits for its thread: two such threads would only compete for the interpreter's lock.
        await trio.to_thread.run_sync(encode)


class _Abandoned(Exception):
    """Control flow: no caller waits for this scrape any more."""


class _Scrape(Collector):
    """The metrics of one scrape. Another thread may use it: it has copies of the figures and only queries the kernel.

    ``is_abandoned`` is called for each series; when it returns True, the scrape ends with :class:`_Abandoned`.
    """

    def __init__(self, counts: Counts, loop_lag: float, tasks: int, is_abandoned: Callable[[], bool]) -> None:
        self._counts: Final = counts
        self._loop_lag: Final = loop_lag
        self._tasks: Final = tasks
        self._is_abandoned: Final = is_abandoned

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield _build_info()
        yield from _route_families(counts, self._is_abandoned)
        for name, distribution in counts.durations.items():
            yield _histogram(f"frelay_{name}_seconds", _DURATIONS[name], distribution)
        yield GaugeMetricFamily(
            "frelay_config_last_reload_successful",
            "1 if the last configuration was put in force, 0 if it was refused and the one before it stays in force.",
            value=float(counts.reload_was_accepted),
        )
        yield GaugeMetricFamily(
            "frelay_config_last_reload_timestamp_seconds",
            "When a configuration was last put in force or refused.",
            value=counts.reloaded_at,
        )
        yield from _certificate_families(counts.certificates)
        yield GaugeMetricFamily(
            "frelay_loop_lag_seconds",
            f"The longest delay of the event loop in waking a sleeping task in the last {LAG_MEMORY:g} s.",
            value=max(self._loop_lag, counts.loop_lag),
        )
        yield GaugeMetricFamily(
            "frelay_tasks",
            "Tasks in the event loop: a few for the relay, one for each waiting connection, three for each pairing.",
            value=self._tasks + counts.tasks,
        )
        if counts.restarts is not None:
            restarts = CounterMetricFamily(
                "frelay_worker_restarts", "How often a worker that had died was started again.", labels=("worker",)
            )
            for worker, count in counts.restarts.items():
                restarts.add_metric((str(worker),), count)
            yield restarts
        yield from _process_families(counts.workers if counts.restarts is not None else None)


def _build_info() -> Metric:
    return InfoMetricFamily(
        "frelay_build",
        "The versions that run; always 1.",
        value={
            "version": __version__,
            "python": platform.python_version(),
            "openssl": openssl_version(),
            "trio": trio.__version__,
        },
    )


def _route_families(counts: Counts, is_abandoned: Callable[[], bool]) -> Iterator[Metric]:
    # Begin the series of the ordinary outcome at 0: if it began at 1, rate() would miss the first pairing.
    ordinary = dict.fromkeys(((route, Outcome.CLOSED.value) for route in counts.pairings), 0)
    yield _family(
        CounterMetricFamily("frelay_pairings", "Pairings that have ended, by outcome."),
        ("route", "outcome"),
        {**ordinary, **counts.outcomes}.items(),
        is_abandoned,
    )
    yield _family(
        GaugeMetricFamily("frelay_pairings_active", "Running pairings."),
        ("route",),
        (((route,), count) for route, count in counts.pairings.items()),
        is_abandoned,
    )
    yield _family(
        GaugeMetricFamily("frelay_legs_waiting", "Connections that wait for their other party."),
        ("route", "party"),
        counts.waiting.items(),
        is_abandoned,
    )
    yield _family(
        GaugeMetricFamily("frelay_keys_waiting", "Keys (JOIN.meet) by which at least one connection waits."),
        ("route",),
        (((route,), count) for route, count in counts.keys.items()),
        is_abandoned,
    )
    yield _family(
        CounterMetricFamily("frelay_bytes", "Bytes delivered to the receiving party, as they are delivered."),
        ("route", "direction"),
        (((route, _DIRECTIONS[party]), count) for (route, party), count in counts.bytes_moved.items()),
        is_abandoned,
    )
    yield _family(
        CounterMetricFamily(
            "frelay_refused", "Refused connections, by code; the route is empty if none was known or it was removed."
        ),
        ("route", "code"),
        counts.refusals.items(),
        is_abandoned,
    )


def _family(
    family: Metric,
    labels: Sequence[str],
    series: Iterable[tuple[tuple[str, ...], int]],
    is_abandoned: Callable[[], bool],
) -> Metric:
    """``family`` with one sample for each of ``series``, which has the values of ``labels`` and the figure."""

    def still_wanted() -> Iterator[tuple[tuple[str, ...], int]]:
        for one in series:
            if is_abandoned():
                raise _Abandoned
            yield one

    name = f"{family.name}_total" if family.type == "counter" else family.name
    # A generator makes each sample when its line is written, and the sample is freed after that. Ten thousand samples
    # at once would make the garbage collector traverse everything, which stops the event loop for longer than all else
    # here.
    family.samples = (  # type: ignore[assignment]
        Sample(name, dict(zip(labels, key, strict=True)), value) for key, value in still_wanted()
    )
    return family


def _certificate_families(certificates: Sequence[CertificateView]) -> Iterator[Metric]:
    crl = [one.not_after for one in certificates if one.what == "crl"]
    # The same file may be certificate and CA. A scraper rejects the whole answer if a series is there twice.
    others: dict[str, float] = {}
    for one in certificates:
        if one.what != "crl":
            others[one.file] = min(one.not_after, others.get(one.file, one.not_after))
    family = GaugeMetricFamily(
        "frelay_certificate_not_after_timestamp_seconds",
        "When the first certificate in a file of [tls] expires.",
        labels=("file",),
    )
    for file, not_after in others.items():
        # A path may hold bytes that are not UTF-8; the answer must be UTF-8.
        family.add_metric((file.encode("utf-8", "backslashreplace").decode("utf-8"),), not_after)
    yield family
    if crl:
        yield GaugeMetricFamily(
            "frelay_crl_next_update_timestamp_seconds",
            "When the revocation list expires; from then on the relay refuses every certificate.",
            value=min(crl),
        )


def _histogram(name: str, text: str, found: Distribution) -> Metric:
    bounds = [*(str(float(bound)) for bound in found.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.total)


# --- processes --------------------------------------------------------------------------------------------------------


def _process_families(workers: Sequence[int] | None) -> Iterator[Metric]:
    """The resources of this process and of ``workers``, under the names that Prometheus clients use.

    Processor time and memory are summed over all processes. Of descriptors the highest number counts: each process has
    a limit of its own, and what matters is how near one of them is to it.
    """
    processes = (os.getpid(), *(workers or ()))
    yield GaugeMetricFamily(
        "frelay_open_fds",
        "Open file descriptors; process_max_fds is the limit.",
        value=max(_open_descriptors(process) for process in processes),
    )
    found: defaultdict[str, list[float]] = defaultdict(list)
    families: dict[str, Metric] = {}
    for process in processes:
        for family in ProcessCollector(pid=partial(int, process), registry=None).collect():
            families.setdefault(family.name, family)
            found[family.name] += [sample.value for sample in family.samples]
    for name, family in families.items():
        total = _OF_ALL.get(name, max)(found[name])
        if name == "process_cpu_seconds" and workers is not None:
            # Add the time of workers that have ended; without it the counter would fall.
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            total += ended.ru_utime + ended.ru_stime
        family.samples = [sample._replace(value=total) for sample in family.samples]
        yield family


_OF_ALL: Final[Mapping[str, Callable[[Iterable[float]], float]]] = {
    "process_cpu_seconds": sum,
    "process_resident_memory_bytes": sum,
    "process_virtual_memory_bytes": sum,
    "process_start_time_seconds": min,
}


def _open_descriptors(process: int) -> int:
    own = process == os.getpid()
    try:
        # In the own process one of them belongs to this listing.
        return len(os.listdir(f"/proc/{process}/fd")) - own
    except OSError:
        return 0  # The process has just ended.


# --- HTTP --------------------------------------------------------------------------------------------------------


def _wants_openmetrics(accept: str) -> bool:
    """Whether ``Accept`` names OpenMetrics and does not prefer text; ``*/*`` gets text, which every tool can read."""
    weights = {_OPENMETRICS: 0.0, _TEXT: 0.0}
    for item in accept.lower().split(","):
        kind = item.partition(";")[0].strip()
        quality = re.search(r";\s*q\s*=\s*([01](?:\.\d*)?)", item)
        if kind in weights:
            weights[kind] = max(weights[kind], float(quality[1]) if quality else 1.0)
    return weights[_OPENMETRICS] > 0 and weights[_OPENMETRICS] >= weights[_TEXT]


def metrics_app(control: Control, metrics: Metrics) -> ASGIApp:
    """The ASGI application of ``[metrics]``. It answers GET and HEAD only."""

    async def healthz(request: Request) -> Response:
        # The answer itself shows that the event loop runs.
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        objection = control.why_not_ready
        return PlainTextResponse("ready\n") if objection is None else PlainTextResponse(f"{objection}\n", 503)

    async def expose(request: Request) -> Response:
        answer = Response(status_code=503)

        async def scrape() -> None:
            content, content_type = await metrics.expose(",".join(request.headers.getlist("accept")))
            nonlocal answer
            answer = Response(content, headers={"content-type": content_type, "vary": "accept"})
            waits.cancel_scope.cancel(reason="the scrape is made")

        async def wait_disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            waits.cancel_scope.cancel(reason="the scraper has gone")

        async with trio.open_nursery() as waits:
            waits.start_soon(wait_disconnected)
            waits.start_soon(scrape)
        return answer

    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", expose)])
