"""``frelay demo``: a relay and two functions on loopback, as real processes; it leaves nothing behind.

It makes a throwaway CA, and starts a relay (``frelay run``) and two functions, each in a process of its own. Every line
that it prints is an event that one of them reported at that moment; nothing is scripted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from frelay.errors import FrelayError
from frelay.pki.init import initialise

__all__ = ["run_demo"]

# Enough to measure a rate, and a small machine still moves it in a second or two.
_BULK: Final = 64 * 1024 * 1024
# The demo takes about two seconds; a machine that is forty times slower still finishes.
_TIMEOUT: Final = 90.0


class _DemoFailed(FrelayError):
    """A process of the demo failed."""


class _Story:
    """Prints each step, and records which have happened."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.listening = trio.Event()
        self.ended = trio.Event()
        self.address = ""
        self.outcome: Mapping[str, Any] = {}
        self.exchanged: dict[str, Mapping[str, Any]] = {}
        self.complaints: list[str] = []

    def tell(self, who: str, text: str) -> None:
        print(f"  {time.perf_counter() - self._began:5.2f} s  {who:<6}  {text}", flush=True)

    def hear_relay(self, entry: Mapping[str, Any]) -> None:
        match entry.get("event"):
            case "listening":
                self.address = entry["address"]
                self.tell("relay", f"listening on {self.address} for dns:func1.demo and dns:func2.demo")
                self.listening.set()
            case "waiting":
                self.tell("relay", f"{entry['identity']} is verified and waits in the lobby")
            case "handed off":
                self.tell("relay", "both legs handed off: close_notify has crossed, raw bytes from here on")
            case "pairing ended":
                self.outcome = entry
                total = entry["bytes_func1_to_func2"] + entry["bytes_func2_to_func1"]
                self.tell(
                    "relay",
                    f"pairing ended: {entry['outcome']}; {total / 1e6:.1f} MB passed through, unreadable here",
                )
                self.ended.set()
            case _ if entry.get("level") in ("warning", "error"):
                self.complaints.append(json.dumps(entry))

    def hear_function(self, name: str, entry: Mapping[str, Any]) -> None:
        match entry["step"]:
            case "dialling":
                self.tell(name, f"dials {entry['address']}, with its certificate")
            case "waiting":
                other = "is here already" if entry["peer_seen"] == 0 else "is not here yet"
                self.tell(name, f"joined as {entry['identity']}; the other party {other}")
            case "paired":
                self.tell(name, f"paired with {entry['peer']}, plays the TLS {entry['role']}")
            case "connected":
                self.tell(name, f"end-to-end mTLS with {entry['peer']} ({entry['version']}, {entry['cipher']})")
            case "greeted":
                self.tell(name, f"received: {entry['text']!r}")
            case "exchanged":
                self.exchanged[name] = entry
                rate = entry["bytes"] * 8 / entry["seconds"] / 1e9
                self.tell(name, f"received {entry['bytes'] // 2**20} MiB at {rate:.1f} Gbit/s of inner TLS")


async def _lines(stream: trio.abc.ReceiveStream, hear: Callable[[Mapping[str, Any]], None], keep: list[str]) -> None:
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + bytes(chunk)).split(b"\n")
        for line in lines:
            keep.append(line.decode("utf-8", "replace"))
            if line.startswith(b"{"):
                hear(json.loads(line))


def _environment() -> dict[str, str]:
    # The processes must import this same package, whatever directory the demo was started in.
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{package_root}{os.pathsep}{path}" if path else package_root}


async def _function(story: _Story, name: str, directory: Path) -> None:
    certs = directory / "certs"
    settings = {
        "name": name,
        "address": story.address,
        "cert": str(certs / f"{name}.pem"),
        "key": str(certs / f"{name}.key"),
        "ca": str(certs / "ca.pem"),
        "peer": "dns:func2.demo" if name == "func1" else "dns:func1.demo",
        "size": _BULK,
    }
    said: list[str] = []
    complaints: list[str] = []
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-m", "frelay.cli.demo_function", json.dumps(settings)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
                env=_environment(),
            )
        )
        assert process.stdout is not None  # noqa: S101  for the type checker
        assert process.stderr is not None  # noqa: S101
        nursery.start_soon(_lines, process.stderr, lambda _: None, complaints)
        await _lines(process.stdout, partial(story.hear_function, name), said)
        if await process.wait() != 0:
            raise _DemoFailed(f"{name} failed: {complaints[-1] if complaints else 'it printed nothing'}")


async def _play(directory: Path) -> None:
    story = _Story()
    text = (directory / "relay.toml").read_text()
    # Any free port: a demo must not fail because 9001 is taken.
    (directory / "relay.toml").write_text(re.sub(r'listen = "127\.0\.0\.1:\d+"', 'listen = "127.0.0.1:0"', text))
    said: list[str] = []
    async with trio.open_nursery() as nursery:
        relay: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-m", "frelay", "run", "-c", str(directory / "relay.toml"), "--log-format", "json"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                env=_environment(),
            )
        )
        assert relay.stderr is not None  # noqa: S101  for the type checker

        async def hear_relay() -> None:
            await _lines(relay.stderr, story.hear_relay, said)  # type: ignore[arg-type]
            if not story.listening.is_set():
                raise _DemoFailed(f"the relay did not start: {said[-1] if said else 'it printed nothing'}")

        nursery.start_soon(hear_relay)
        await story.listening.wait()
        cpu_before = _cpu_seconds(relay.pid)
        async with trio.open_nursery() as functions:
            for name in ("func1", "func2"):
                functions.start_soon(_function, story, name, directory)
        await story.ended.wait()
        _judge(story)
        cpu_after = _cpu_seconds(relay.pid)
        relay.send_signal(signal.SIGTERM)
        code = await relay.wait()
        if code != 0:
            raise _DemoFailed(f"the relay ended with exit code {code}: {said[-1]}")
        story.tell("relay", f"stopped; all of this cost it {cpu_after - cpu_before:.2f} s of CPU")


def _judge(story: _Story) -> None:
    one, two = story.exchanged["func1"], story.exchanged["func2"]
    if one["sent"] != two["received"] or two["sent"] != one["received"]:
        raise _DemoFailed("the bytes that arrived are not those that were sent")
    if story.outcome["outcome"] != "closed":
        raise _DemoFailed(f"the pairing ended with {story.outcome}")
    story.tell("both", "SHA-256 of what arrived equals what was sent, in both directions")


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _end_by_signal(*, task_status: trio.TaskStatus[None]) -> None:
    # By default SIGTERM kills Python at once: the relay and the directory would outlive the demo.
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            raise _DemoFailed("ended by SIGTERM")


def run_demo() -> int:
    """Run the demo; prints the steps, returns the exit code."""
    print("A relay and two functions on this machine, with certificates made for the occasion.\n", flush=True)
    try:
        temporary = tempfile.TemporaryDirectory(prefix="frelay-demo-")
    except OSError as error:
        print(
            f"frelay demo: it keeps its certificates in a temporary directory, and may write to none: {error.strerror}",
            file=sys.stderr,
        )
        return 1
    with temporary as name:
        directory = Path(name)
        initialise(directory)

        async def bounded() -> bool:
            with trio.move_on_after(_TIMEOUT) as deadline:
                async with trio.open_nursery() as nursery:
                    await nursery.start(_end_by_signal)
                    await _play(directory)
                    nursery.cancel_scope.cancel(reason="the demo is over")
            return not deadline.cancelled_caught

        failure: BaseException | None = None
        unread: BaseException | None = None
        was_interrupted = False
        try:
            if not trio.run(bounded):
                failure = _DemoFailed(f"not done after {_TIMEOUT:g} s")
        except* KeyboardInterrupt:
            was_interrupted = True
        except* BrokenPipeError as group:
            unread = _first(group)
        except* _DemoFailed as group:
            failure = _first(group)
    if was_interrupted:
        # Ctrl-C reached the other processes too, so their errors are no news.
        raise KeyboardInterrupt
    if unread is not None:
        # `frelay demo | head`: outside of its group, so that typer ends silently on it.
        raise unread
    if failure is not None:
        print(f"frelay demo: {failure}", file=sys.stderr)
        return 1
    print("\nnext: frelay init my-relay && frelay run -c my-relay/relay.toml")
    return 0


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
