"""How long strangers keep functions waiting, and whether a burst from one address is served.

    .venv/bin/python bench/strangers.py
    .venv/bin/python bench/strangers.py --kinds silent,whole --joins 100

Three parts, each with a relay of its own on loopback. Limits are the defaults unless a line of the output says so:

* 16 addresses with 32 connections each, one kind after the other: how long a function takes from its SYN to WAITING.
* 80 silent connections and 40 that send garbage, from the functions' own address: how long a pair takes from the first
  SYN until both are PAIRED.
* 200 functions at once from one address, without retries: how many are paired, and when the last one is.

The kinds are those of tests/support/hostile.py. Exit code 1 if a figure misses its limit: 2 s, 1 s, and all 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

__all__ = ["main"]

_HOSTILE: Final = Path(__file__).resolve().parent.parent / "tests" / "support" / "hostile.py"
_KINDS: Final = (
    "silent", "one_byte", "half", "slow", "whole", "in_pieces", "half_a_ticket", "garbage", "unknown", "restless",
)  # fmt: skip
_WAITING: Final = 0x11
_PING: Final = 0x12
_PAIRED: Final = 0x13
_FUNCTIONS: Final = 200


class _Failed(Exception):
    """Another frame came than the expected one."""


@contextmanager
def _relay(sections: str = "", route: str = "") -> Iterator[tuple[Path, int]]:
    """A relay in a process of its own; gives its directory and port."""
    frelay = [sys.executable, "-m", "frelay"]
    with tempfile.TemporaryDirectory(prefix="frelay-bench-") as name:
        directory = Path(name)
        subprocess.run([*frelay, "init", name], check=True, stdout=subprocess.DEVNULL)
        file = directory / "strangers.toml"
        file.write_text(
            '[tls]\ncertificate = "certs/relay.pem"\nprivate_key = "certs/relay.key"\nclient_ca = "certs/ca.pem"\n'
            f'{sections}\n[[route]]\nname = "demo"\nlisten = "127.0.0.1:0"\nfunc1 = "dns:func1.demo"\n'
            f'func2 = "dns:func2.demo"\n{route}\n'
        )
        command = [*frelay, "run", "-c", str(file), "--log-format", "json"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                port = next(int(e["address"].rpartition(":")[2]) for e in _events(process) if e["event"] == "listening")
                # Nobody may wait because we do not read the log.
                with (directory / "log").open("w") as sink:
                    reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=sink)
                yield directory, port
            finally:
                process.terminate()
                process.wait()
                reader.wait()


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stderr is not None
    for line in process.stderr:
        yield json.loads(line)
    raise SystemExit("the relay did not start")


@contextmanager
def _strangers(port: int, sources: str, **kinds: int) -> Iterator[None]:
    command = [sys.executable, str(_HOSTILE), str(port), "--sources", sources]
    with subprocess.Popen(
        [*command, *(f"{kind}={count}" for kind, count in kinds.items())], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.5)  # the kernel has accepted them; let the relay accept them too
            yield
        finally:
            process.kill()


class _Function:
    """One function, from its SYN on."""

    def __init__(self, directory: Path, port: int, name: str) -> None:
        self._certs, self._port, self._name = directory / "certs", port, name
        self._writer: asyncio.StreamWriter | None = None

    async def join(self) -> None:
        """Connect and ask to join."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self._certs / "ca.pem")
        context.load_cert_chain(self._certs / f"{self._name}.pem", self._certs / f"{self._name}.key")
        context.set_alpn_protocols(["frelay/1"])
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=context, server_hostname="localhost"
        )
        body = json.dumps({"attempt": str(uuid.uuid4())}).encode()
        self._writer.write(struct.pack(">BBH", 0x01, 0, len(body)) + body)

    async def expect(self, wanted: int) -> None:
        """Read to a frame of this type; WAITING may come before PAIRED."""
        while True:
            kind, _, length = struct.unpack(">BBH", await self._reader.readexactly(4))
            body = await self._reader.readexactly(length)
            if kind == wanted:
                return
            if kind not in (_WAITING, _PING):
                raise _Failed(body.decode())

    def close(self) -> None:
        """Close abruptly."""
        if self._writer is not None:
            self._writer.transport.abort()


async def _until_waiting(directory: Path, port: int) -> float:
    began = time.perf_counter()
    function = _Function(directory, port, "func1")
    try:
        await function.join()
        await function.expect(_WAITING)
        return time.perf_counter() - began
    finally:
        function.close()


async def _until_paired(directory: Path, port: int) -> float:
    began = time.perf_counter()
    functions = [_Function(directory, port, name) for name in ("func1", "func2")]

    async def go(function: _Function) -> None:
        await function.join()
        await function.expect(_PAIRED)

    try:
        await asyncio.gather(*map(go, functions))
        return time.perf_counter() - began
    finally:
        for function in functions:
            function.close()


def _measure(what: str, once: Any, joins: int, bar: float) -> bool:
    found = []
    for _ in range(joins):
        try:
            found.append(asyncio.run(asyncio.wait_for(once(), 60)))
        except (OSError, _Failed, asyncio.IncompleteReadError, TimeoutError) as error:
            print(f"{what}: {type(error).__name__}: {error}")
            return False
        time.sleep(0.02)
    found.sort()
    is_good = bool(found[-1] <= bar)
    print(f"{what}: median {found[len(found) // 2]:.3f} s, slowest {found[-1]:.3f} s {'' if is_good else '  BEYOND'}")
    return is_good


async def _burst(directory: Path, port: int) -> tuple[int, float]:
    began, paired = time.perf_counter(), 0
    functions = [_Function(directory, port, f"func{1 + number % 2}") for number in range(_FUNCTIONS)]

    async def go(function: _Function) -> None:
        nonlocal paired
        try:
            await function.join()
            await function.expect(_PAIRED)
        except (OSError, _Failed, asyncio.IncompleteReadError) as error:
            print(f"  {type(error).__name__}: {error}")
        else:
            paired += 1

    await asyncio.gather(*map(go, functions))
    seconds = time.perf_counter() - began
    for function in functions:
        function.close()
    return paired, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--joins", type=int, default=30, help="joins a figure (30)")
    parser.add_argument("--kinds", default=",".join(_KINDS), help="which kinds of strangers")
    asked = parser.parse_args(arguments)
    good = True
    with _relay() as (directory, port):
        good &= _measure("nobody else: WAITING", lambda: _until_waiting(directory, port), asked.joins, 2.0)
        good &= _measure("nobody else: both PAIRED", lambda: _until_paired(directory, port), asked.joins, 1.0)
    for kind in asked.kinds.split(","):
        with _relay() as (directory, port), _strangers(port, "127.0.1.1-127.0.1.16", **{kind: 512}):
            what = f"16 addresses x 32, {kind}: WAITING"
            good &= _measure(what, lambda: _until_waiting(directory, port), asked.joins, 2.0)
    for limits in ("", "[limits]\nmax_pre_auth = 100\nmax_pre_auth_per_ip = 100\n"):
        with (
            _relay(limits) as (directory, port),
            _strangers(port, "127.0.0.1-127.0.0.1", silent=80, garbage=40),
        ):
            what = f"80 silent and 40 garbage from the same address{', limits of 100' if limits else ''}: both PAIRED"
            good &= _measure(what, lambda: _until_paired(directory, port), asked.joins, 1.0)
    with _relay(route=f"max_waiting_per_party = {_FUNCTIONS}") as (directory, port):
        paired, seconds = asyncio.run(_burst(directory, port))
        good &= paired == _FUNCTIONS
        print(f"{_FUNCTIONS} functions at once from one address: {paired} paired, the last after {seconds:.2f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
