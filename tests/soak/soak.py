"""Does a relay stay as it is? ``python tests/soak/soak.py --seconds 1800``

A real ``frelay run`` gets good and hostile traffic of every kind at once (tests/soak/churn). Each second we read its
open descriptors, memory, tasks, and the lag of its event loop. After a warm-up none of them may rise; flat.py judges
that. When all traffic has stopped, the relay must hold exactly the sockets and tasks that it held before. The curves
show a leak that grows slowly; the count at the end shows what was never given back.

    python tests/soak/soak.py --seconds 60                             # what CI does
    nice python tests/soak/soak.py --seconds 1800 --json soak.json --plot docs/soak.svg

The table goes to stdout, progress to stderr if that is a terminal. Exit codes: 0 flat and no trouble, 1 not, 2 usage,
130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

# As a script, this file would find only its own directory. It needs bench/ and the frelay of this checkout, and tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.measuring.flags import output_file
from bench.measuring.script import progress
from bench.measuring.subjects import checkout_root
from soak.churn import Actor, Ground, actors, ask
from soak.flat import judge, warm_up
from soak.result import GAUGES, Result, Sample, as_json, as_picture, as_table

_START: Final = 60.0
_REST: Final = 40.0


class _Relay:
    """The relay's process, and its log."""

    def __init__(self, process: trio.Process, ground: Ground) -> None:
        self.process: Final = process
        self._ground: Final = ground
        self.outcomes: Final[Counter[str]] = Counter()
        self.bugs: Final[list[str]] = []
        self.is_ready: Final = trio.Event()
        self.metrics = ""
        self._tail = ""

    async def read_log(self) -> None:
        """Read the log to its end; a log that nobody reads would stall."""
        assert self.process.stderr is not None
        rest = b""
        async for chunk in self.process.stderr:
            *lines, rest = (rest + bytes(chunk)).split(b"\n")
            for line in lines:
                self._take(line)
        self.is_ready.set()

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {"event": line.decode("utf-8", "replace")}
            self._tail = entry["event"]
        event = entry["event"]
        if event == "pairing ended":
            self.outcomes[entry["outcome"]] += 1
        elif event == "listening":
            self._ground.ports[entry["route"]] = int(entry["address"].rpartition(":")[2])
        elif event == "serving":
            self.metrics = entry["metrics"]
        elif event == "ready":
            self.is_ready.set()
        elif "a bug in frelay" in event:
            self.bugs.append(line.decode("utf-8", "replace"))

    async def wait_ready(self) -> None:
        """Until it serves; raises RuntimeError."""
        with trio.move_on_after(_START):
            await self.is_ready.wait()
        if not self.metrics:
            raise RuntimeError(f"the relay did not start: {self._tail}")

    # --- samples -------------------------------------------------------------------------------------------------

    async def sample(self, at: float) -> Sample:
        """Read one sample."""
        directory = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        ticks = (directory / "stat").read_text().rpartition(")")[2].split()
        metrics = await self._read_metrics()
        return Sample(
            at=at,
            descriptors=len(os.listdir(directory / "fd")),
            memory=int(status["VmRSS"].split()[0]) / 1024,
            threads=int(status["Threads"]),
            tasks=round(metrics["frelay_tasks"]),
            cpu=(int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
        )

    async def _read_metrics(self) -> dict[str, float]:
        host, _, port = self.metrics.rpartition(":")
        stream = await trio.open_tcp_stream(host, int(port))
        async with stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b""
            while data := await stream.receive_some():
                answer += data
        lines = answer.decode().splitlines()
        return {
            name: float(value)
            for name, _, value in (line.partition(" ") for line in lines)
            if name in ("frelay_tasks",)
        }

    async def settled(self) -> dict[str, int]:
        """What it holds when that does not change any more: our last connection may still be closing."""
        found, before = await self.at_rest(), None
        while found != before:
            await trio.sleep(0.3)
            found, before = await self.at_rest(), found
        return found

    async def at_rest(self) -> dict[str, int]:
        """What it holds and must hold again at the end."""
        kinds = list(self._open_files())
        _, status = await ask(self._ground, "GET", "/v1/status")
        return {
            "sockets": sum(kind.startswith("socket:") for kind in kinds),
            "files": sum(not kind.startswith(("socket:", "pipe:")) for kind in kinds),
            "tasks": (await self.sample(0)).tasks,
            "legs": status["descriptors"]["legs"],
            "pairings": status["pairings"],
            "waiting legs": status["waiting"],
        }

    def _open_files(self) -> Iterator[str]:
        """What each open descriptor is, as proc(5) has it."""
        directory = f"/proc/{self.process.pid}/fd"
        for name in os.listdir(directory):
            try:
                yield os.readlink(f"{directory}/{name}")
            except FileNotFoundError:
                pass  # closed since it was listed


# --- the run ----------------------------------------------------------------------------------------------------------


async def _echo(stream: trio.SSLStream[trio.SocketStream]) -> None:
    try:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.aclose()
    except trio.BrokenResourceError:
        pass  # a scene that closes without TLS's close_notify


async def _kill(process: trio.Process) -> None:
    # SIGTERM would start a drain, which might not end.
    process.kill()


async def _probe(ground: Ground, found: list[tuple[float, float]]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), str(ground.ports["probe"])]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
        )
        assert process.stdout is not None
        rest = b""
        async for chunk in process.stdout:
            *lines, rest = (rest + bytes(chunk)).split(b"\n")
            found += [(way["median"], way["longest"]) for way in map(json.loads, lines)]


async def _traffic(
    ground: Ground, relay: _Relay, cast: Sequence[Actor], seconds: float, troubles: Counter[str]
) -> list[Sample]:
    """Run all scenes for ``seconds``, with a sample each second."""
    samples: list[Sample] = []
    lags: list[tuple[float, float]] = []
    over = trio.Event()
    async with trio.open_nursery() as beside:
        beside.start_soon(_probe, ground, lags)
        async with trio.open_nursery() as scenes:
            for actor in cast:
                scenes.start_soon(actor.run, over, troubles)
            began = trio.current_time()
            while (at := trio.current_time() - began) < seconds and relay.process.returncode is None:
                sample = await relay.sample(at)
                if lags:
                    sample.lag, sample.longest_lag = lags[-1][0], max(longest for _, longest in lags)
                    lags.clear()
                samples.append(sample)
                progress(f"{at:.0f} of {seconds:.0f} s: {sample.descriptors} descriptors, {sample.memory:.1f} MiB")
                await trio.sleep_until(began + len(samples))
            over.set()
            progress("the last scenes come to their end")
        beside.cancel_scope.cancel(reason="time is up")
    return samples


async def run(options: argparse.Namespace, directory: Path) -> Result:
    """Start everything, run the traffic, judge, and end it."""
    certs = directory / "certs"
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ground = Ground(directory, f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
    ground.write()
    service = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    service.load_cert_chain(certs / "func2.pem", certs / "func2.key")
    service.load_verify_locations(certs / "ca.pem")
    service.verify_mode = ssl.CERT_REQUIRED
    command = [sys.executable, "-m", "frelay", "run", "-c", str(ground.route_file), "--log-format", "json"]
    troubles: Counter[str] = Counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _echo, [trio.SSLListener(listener, service) for listener in listeners])
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                command,
                cwd=checkout_root(),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                # In a process group of its own: Ctrl-C must reach only us, and we end the relay.
                process_group=0,
                deliver_cancel=_kill,
            )
        )
        relay = _Relay(process, ground)
        ground.pid = process.pid
        nursery.start_soon(relay.read_log)
        await relay.wait_ready()
        before = await relay.settled()  # by asking, so that what the first connection creates once is no leak
        cast = actors(ground, options.seed)
        samples = await _traffic(ground, relay, cast, options.seconds, troubles)
        progress("coming to rest")
        after = await relay.at_rest()
        with trio.move_on_after(_REST):
            while after != before:
                await trio.sleep(0.2)
                after = await relay.at_rest()
        others = [f"in the log: {bug}" for bug in relay.bugs[:3]]
        process.terminate()
        with trio.move_on_after(_REST):
            code = await process.wait()
            if code != 0:
                others.append(f"the relay ended with {code}")
        nursery.cancel_scope.cancel()
    scenes: Counter[str] = Counter()
    for actor in cast:
        scenes[actor.name] += actor.times
    early = warm_up(options.seconds)
    findings = [
        judge(gauge, [(s.at, value) for s in samples if (value := getattr(s, name)) is not None], after=early)
        for name, gauge in GAUGES.items()
    ]
    return Result(
        options.seconds, early, samples, findings, before, after, dict(scenes), relay.outcomes, troubles, others
    )


# --- the command ------------------------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    value = float(text)
    if not 20 <= value <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 20 to a week")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak.py",
        description="Churn a relay with everything at once, and see whether it stays as it is.",
        epilog="Exit codes: 0 flat and no trouble, 1 not, 2 usage, 130 or 143 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seconds", type=_seconds, default=60.0, metavar="S", help="how long, from 20 (default: 60)")
    add("--seed", type=int, default=1, metavar="N", help="for what the scenes choose (default: 1)")
    add("--json", type=output_file, metavar="FILE", help="write everything, each sample included")
    add("--plot", type=output_file, metavar="FILE", help="write the curves as SVG")
    return parser


async def _until_signalled(options: argparse.Namespace, directory: Path) -> Result | int:
    """The result, or the number of the signal that came first."""
    found: list[Result | int] = []
    async with trio.open_nursery() as nursery:

        async def obey(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for number in signals:
                    found.append(number)
                    nursery.cancel_scope.cancel(reason="a signal")

        await nursery.start(obey)
        found.append(await run(options, directory))
        nursery.cancel_scope.cancel(reason="done")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="frelay-soak-") as scratch:
        result = trio.run(_until_signalled, options, Path(scratch) / "relay")
    progress("")
    if isinstance(result, int):
        print("soak.py: interrupted; everything that was started has been ended", file=sys.stderr)
        return 128 + result
    print(as_table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(result), indent=1) + "\n")
    if options.plot is not None:
        options.plot.write_text(as_picture(result))
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
