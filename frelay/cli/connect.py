"""``frelay connect``: a pairing as standard input and output, as a local port, or as the way to a local service.

Whatever the local side is, the two directions are carried each for itself, so an end of one (FIN, a closed pipe,
close_notify) arrives as an end of that one, and the other goes on. The rules of the bridge:

* a side that breaks while it is read from (a reset, an end without close_notify) cuts the other side too: nothing may
  look complete that is not;
* a side that breaks while it is written to stops that direction only. What it had said before it went is still to be
  carried, as with a server that answers early and closes.

Exit codes: 0 clean end, 1 failed, 2 usage, 3 refused by the relay, 4 nobody came.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from frelay.client.core import Options, Plan, split_address
from frelay.client.retry import Retry, read_retry
from frelay.client.trio import TrioWire, connect
from frelay.errors import CertificateError, FrelayError, PeerIdentityMismatch, Refused
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["Local", "connect_command", "exit_code"]

_CHUNK: Final = 262144
# A pipe holds 64 KiB unless somebody has changed it.
_PIPE_CHUNK: Final = 65536


@dataclass(frozen=True, slots=True)
class Local:
    """What the wire is joined to; nothing given means standard input and output."""

    listen: str | None = None
    to: str | None = None
    command: str | None = None


def exit_code(error: FrelayError) -> int:
    """What the process ends with after ``error``."""
    if isinstance(error, Refused):
        return 4 if error.code == "wait-timeout" else 3
    return 1


class _Report:
    """What is told on stderr: failures always, and with ``--json`` each step as a line."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def say(self, event: str, **facts: Any) -> None:
        if self._as_json:
            print(json.dumps({"event": event, **facts}), file=sys.stderr, flush=True)

    def fail(self, error: BaseException, **facts: Any) -> None:
        if not self._as_json:
            print(f"frelay: {error}", file=sys.stderr, flush=True)
            return
        if isinstance(error, Refused):
            facts |= {"code": error.code, "retry_after": error.retry_after}
        self.say("failed", error=type(error).__name__, reason=str(error), **facts)

    def on_status(self, message: Message) -> None:
        if isinstance(message, Waiting):
            self.say(
                "waiting",
                route=message.route,
                party=message.party,
                identity=message.identity,
                deadline=message.deadline,
                peer_seen=message.peer_seen,
            )
        elif isinstance(message, Paired):
            self.say("paired", pairing=message.pairing, route=message.route, peer=message.peer, role=message.role)


# --- the local side ---------------------------------------------------------------------------------------------------


class _Stdio(trio.abc.HalfCloseableStream):
    """Standard input and output, whatever they are; blocking calls in threads.

    Not as non-blocking descriptors: that flag is shared with every process that has the same terminal or pipe, and a
    regular file knows no readiness at all.
    """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await trio.to_thread.run_sync(os.read, 0, max_bytes or _PIPE_CHUNK, abandon_on_cancel=True)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        def write() -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]

        try:
            await trio.to_thread.run_sync(write, abandon_on_cancel=True)
        except OSError as error:
            raise trio.BrokenResourceError(f"standard output: {error.strerror}") from error

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if stat.S_ISSOCK(os.fstat(1).st_mode):
            # As inetd gives it: descriptor 0 is the same socket, and closing 1 alone would tell nobody.
            with socket.socket(fileno=os.dup(1)) as sock:
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # its other end is gone
        # Not closed: the next file opened would become standard output.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def _cut(local: trio.abc.AsyncResource) -> None:
    """Make a local connection end by RST: its other end must not take what it got for all of it."""
    if isinstance(local, trio.SocketStream):
        local.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        local.socket.close()


class _Broken(Exception):
    """A side broke; the text says which and how."""


async def _bridge(local: trio.abc.HalfCloseableStream, wire: TrioWire, report: _Report) -> None:
    """Carry both directions to their ends; raises _Broken. Closes both sides."""
    counts = {"sent": 0, "received": 0}
    lost: list[str] = []

    async def carry(
        source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream, names: tuple[str, str], key: str
    ) -> None:
        while True:
            try:
                data = await source.receive_some(_CHUNK)
            except (trio.BrokenResourceError, OSError) as error:
                raise _Broken(f"{names[0]} broke: {error.__cause__ or error}") from error
            try:
                if not data:
                    await sink.send_eof()
                    return
                await sink.send_all(data)
            except trio.BrokenResourceError as error:
                if data:
                    lost.append(f"{names[1]} takes nothing more: {error.__cause__ or error}")
                return
            counts[key] += len(data)

    inside, outside = "the local side", "the other function"
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, local, wire, (inside, outside), "sent")
            nursery.start_soon(carry, wire, local, (outside, inside), "received")
        if lost:
            raise _Broken(lost[0])
    except* _Broken as group:
        _cut(local)
        await trio.aclose_forcefully(wire)
        broken = _first(group)
        report.say("ended", clean=False, reason=str(broken), **counts)
        raise broken from None
    finally:
        try:
            await wire.aclose()
        finally:
            await local.aclose()
    report.say("ended", clean=True, **counts)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


# --- the ways to use it -----------------------------------------------------------------------------------------------


class _Command:
    """One run of ``frelay connect``."""

    def __init__(self, address: str, options: Options, report: _Report) -> None:
        self._address = address
        self._options = options
        self._report = report

    async def _join(self, on_status: Callable[[Message], None] | None = None, *, retries: bool = True) -> TrioWire:
        options = self._options.copy()
        options["on_status"] = on_status or self._report.on_status
        if not retries:
            options["retry"] = None
        wire = await connect(self._address, **options)
        cipher = wire.ssl_object.cipher()
        self._report.say(
            "connected",
            peer=wire.paired.peer,
            pairing=wire.paired.pairing,
            cipher=cipher[0] if cipher else None,
            alpn=wire.ssl_object.selected_alpn_protocol(),
        )
        return wire

    async def with_stdio(self) -> int:
        """One pairing, with standard input and output."""
        return await self._once(lambda wire: _bridge(_Stdio(), wire, self._report))

    async def with_command(self, command: str) -> int:
        """One pairing, with the input and output of a command."""

        async def run(wire: TrioWire) -> None:
            process = await trio.lowlevel.open_process(
                ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            if process.stdio is None:
                raise AssertionError("a process without pipes")
            pipes = _Pipes(process.stdio)
            try:
                await _bridge(pipes, wire, self._report)
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
                    with trio.CancelScope(shield=True):
                        await process.wait()
            if code != 0:
                raise _Broken(f"the command ended with exit code {code}")

        return await self._once(run)

    async def _once(self, use: Callable[[TrioWire], Awaitable[None]]) -> int:
        try:
            wire = await self._join()
            await use(wire)
        except FrelayError as error:
            self._report.fail(error)
            return exit_code(error)
        except _Broken as error:
            self._report.fail(error)
            return 1
        return 0

    async def listen(self, place: str) -> int:
        """Each connection to a local port becomes a pairing; until a signal comes."""
        host, port = _local_address(place)

        async def serve(local: trio.SocketStream) -> None:
            try:
                await _bridge(local, await self._join(), self._report)
            except (FrelayError, _Broken) as error:
                # One caller's failure is not the end of the port.
                self._report.fail(error)
                _cut(local)

        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            self._report.fail(error)
            return 1
        for listener in listeners:
            name = listener.socket.getsockname()
            text = f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
            self._report.say("listening", address=text)
        await trio.serve_listeners(serve, listeners)
        raise AssertionError("serving ended by itself")

    async def serve(self, place: str) -> int:
        """Each pairing dials a local service; one leg is always waiting. Until a signal, or a refusal for good."""
        host, port = split_address(place)
        retry = read_retry(self._options.get("retry")) or Retry()
        failures = 0
        async with trio.open_nursery() as nursery:
            while True:
                error: FrelayError | None = await nursery.start(self._serve_one, host, port)
                if error is None:
                    failures = 0
                    continue
                if isinstance(error, Refused) and error.code == "wait-timeout":
                    failures = 0
                    continue  # nobody came yet, which is no failure of a service
                # The wrong caller is not the service's fault, and must not be able to end it.
                pause = retry.pause_after(error, 0, failures)
                if isinstance(error, PeerIdentityMismatch):
                    pause = retry.first
                if pause is None or (retry.tries is not None and failures >= retry.tries):
                    return exit_code(error)  # once the pairings that are under way have ended
                self._report.say("retrying", seconds=round(pause, 2))
                await trio.sleep(pause)
                failures += 1

    async def _serve_one(self, host: str, port: int, task_status: trio.TaskStatus[FrelayError | None]) -> None:
        """One leg from JOIN to its end; started once it is paired (None), or has failed before that."""
        is_paired = False

        def on_status(message: Message) -> None:
            nonlocal is_paired
            self._report.on_status(message)
            if isinstance(message, Paired) and not is_paired:
                # Now, not after the inner handshake: a caller that is slow there must not keep the next one out.
                is_paired = True
                task_status.started(None)

        try:
            wire = await self._join(on_status, retries=False)
        except FrelayError as error:
            if is_paired or not (isinstance(error, Refused) and error.code == "wait-timeout"):
                self._report.fail(error)
            if not is_paired:
                task_status.started(error)
            return
        try:
            local = await trio.open_tcp_stream(host, port)
        except OSError as error:
            await trio.aclose_forcefully(wire)
            self._report.fail(_Broken(f"no connection to the local service {host}:{port}: {error}"))
            return
        try:
            await _bridge(local, wire, self._report)
        except _Broken as error:
            self._report.fail(error)


class _Pipes(trio.abc.HalfCloseableStream):
    """The input and output of a process, with an end of each that has no error where the process has gone."""

    def __init__(self, stdio: trio.StapledStream[Any, Any]) -> None:
        self._stdio = stdio

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data: bytes = await self._stdio.receive_stream.receive_some(max_bytes)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stdio.send_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stdio.send_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stdio.send_stream.aclose()

    async def aclose(self) -> None:
        await self._stdio.aclose()


def _local_address(place: str) -> tuple[str, int]:
    """HOST:PORT of a listener, where port 0 is any."""
    if place.endswith(":0"):
        return split_address(f"{place[:-1]}1")[0], 0
    return split_address(place)


async def _until_signal(run: Callable[[], Awaitable[int]], *, is_service: bool) -> int:
    """``run``, or what the first SIGINT or SIGTERM makes of it: told to the relay, and 0 for a service."""
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


def connect_command(address: str, options: Options, local: Local, *, as_json: bool) -> int:
    """Run ``frelay connect`` to its end; gives the exit code. Raises ValueError where an argument cannot be read."""
    report = _Report(as_json)
    try:
        # Before anything is opened, so that a wrong file is found now and not by the first caller.
        Plan.make(address, **options)
    except CertificateError as error:
        report.fail(error)
        return 1
    command = _Command(address, options, report)
    run: Callable[[], Awaitable[int]]
    if local.listen is not None:
        _local_address(local.listen)
        run = partial(command.listen, local.listen)
    elif local.to is not None:
        split_address(local.to)
        run = partial(command.serve, local.to)
    elif local.command is not None:
        run = partial(command.with_command, local.command)
    else:
        run = command.with_stdio
    return trio.run(partial(_until_signal, run, is_service=bool(local.listen or local.to)))
