"""The command ``frelay connect``: it checks its options and runs one of the four local ends.

The local ends are standard input and output and a command (both here), ``--listen`` (listen.py) and ``--to``
(service.py). local.py has the kinds of local streams; bridge.py copies the bytes.

Exit codes: 0 clean end, 1 failed, 2 usage, 3 refused by the relay, 4 nobody came.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from frelay.cli.connect.address import check_dial_address, check_listen_address
from frelay.cli.connect.bridge import Broken, bridge
from frelay.cli.connect.join import Joiner, exit_code
from frelay.cli.connect.listen import Port
from frelay.cli.connect.local import Pipes, Stdio, fill_standard_descriptors, standard_output_is_closed
from frelay.cli.connect.report import Report
from frelay.cli.connect.service import Service
from frelay.client.options import JoinPlan, Options
from frelay.client.peer import read_selectors
from frelay.client.retry import read_retry
from frelay.client.trio import TrioWire
from frelay.errors import CertificateError, FrelayError

__all__ = ["LocalOptions", "connect_command"]

# Seconds that the command of --exec has to end after SIGTERM.
_COMMAND_GRACE: Final = 5.0


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """The local end of the wire; none given means standard input and output. ``concurrency`` belongs to ``to``."""

    listen: str | None = None
    to: str | None = None
    command: str | None = None
    concurrency: int = 64


async def _with_stdio(joiner: Joiner, report: Report) -> int:
    """One pairing, with standard input and output."""
    return await _run_once(joiner, report, lambda wire: bridge(Stdio(), wire, report))


async def _with_command(command: str, joiner: Joiner, report: Report) -> int:
    """One pairing, with the input and output of a command."""

    async def run(wire: TrioWire) -> None:
        try:
            process = await trio.lowlevel.open_process(
                ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except BaseException:
            await trio.aclose_forcefully(wire)
            raise
        if process.stdio is None:
            raise AssertionError("a process without pipes")
        pipes = Pipes(process.stdio)
        try:
            await bridge(pipes, wire, report)
            code = await process.wait()
        finally:
            await _end_process(process)
            await trio.aclose_forcefully(pipes)
        if code != 0:
            raise Broken(f"the command ended with exit code {code}")

    return await _run_once(joiner, report, run)


async def _end_process(process: trio.Process) -> None:
    """Stop a command that still runs. Do it before its input closes, which it could take for a complete input."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(_COMMAND_GRACE):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _run_once(joiner: Joiner, report: Report, use: Callable[[TrioWire], Awaitable[None]]) -> int:
    try:
        await use(await joiner.join())
    except FrelayError as error:
        report.fail(error)
        return exit_code(error)
    return 0


async def _until_signal(run: Callable[[], Awaitable[int]], *, is_service: bool) -> int:
    """The exit code of ``run``. The first SIGINT or SIGTERM cancels it, which tells the relay; then 0 for a service."""
    code = 1
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal code
                async for number in signals:
                    code = 0 if is_service else 128 + number
                    nursery.cancel_scope.cancel(reason=f"signal {number}")
                    return

            nursery.start_soon(watch)
            code = await run()
            nursery.cancel_scope.cancel(reason="done")
    return code


def connect_command(
    address: str,
    options: Options,
    local: LocalOptions,
    *,
    as_json: bool = False,
    is_quiet: bool = False,
    always: bool = False,
) -> int:
    """Run ``frelay connect`` to its end and return the exit code. Raises ValueError if an argument cannot be read.

    With ``always``, ``--to`` goes on after every failure, also if a file is missing now.
    """
    is_service = bool(local.listen or local.to)
    report = Report(as_json=as_json, is_quiet=is_quiet)
    if standard_output_is_closed() and not is_service and local.command is None:
        report.fail(
            Broken("standard output is closed: what arrives could not be written; give it a file, or /dev/null")
        )
        return 1
    fill_standard_descriptors()
    if local.listen is not None:
        check_listen_address(local.listen)
    if local.to is not None:
        check_dial_address(local.to)
    try:
        # Check the arguments and files before anything is opened, so that not the first caller finds a wrong file.
        JoinPlan.make(address, **options)
    except CertificateError as error:
        if not (local.to and always):
            report.fail(error)
            return 1
        read_selectors(options["peer"])  # make() checks this argument only after the files
    except FrelayError as error:
        report.fail(error)
        return exit_code(error)
    joiner = Joiner(address, options, report)
    retry = read_retry(options.get("retry"))
    run: Callable[[], Awaitable[int]]
    if local.listen is not None:
        run = Port(local.listen, joiner, retry, report).serve
    elif local.to is not None:
        run = Service(local.to, joiner, retry, report, concurrency=local.concurrency, always=always).serve
    elif local.command is not None:
        run = partial(_with_command, local.command, joiner, report)
    else:
        run = partial(_with_stdio, joiner, report)
    try:
        return trio.run(partial(_until_signal, run, is_service=is_service))
    except Exception as error:
        report.bug(error)
        return 1
