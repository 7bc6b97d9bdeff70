"""An unexpected error ends one caller or one leg of ``frelay connect`` with one line of output, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio

from frelay.cli.connect.command import LocalOptions, connect_command
from frelay.cli.connect.listen import Port
from frelay.cli.connect.report import Report
from frelay.cli.connect.service import Service
from frelay.client.options import Options
from frelay.errors import Refused
from frelay.protocol.messages import Message, Paired, Waiting
from support.site import Site
from support.waiting import TIMEOUT

WAITING = Waiting("demo", "func2", "dns:func2.demo", 60.0, None)
PAIRED = Paired("1", "demo", "dns:func1.demo", "server", "handoff")


class OddJoiner:
    """Reports the given messages, and then raises an error that no join should raise."""

    def __init__(self, *messages: Message, error: Exception | None = None) -> None:
        self.wait = None
        self.plans = self
        self.joins = 0
        self.joined = trio.Event()
        self._messages = messages
        self._error = error or KeyError("odd")

    def current(self) -> Any:
        return None

    def read_again(self) -> None:
        pass

    async def join_once(self, wait: float | None, on_status: Callable[[Message], None]) -> Any:
        self.joins += 1
        for message in self._messages:
            on_status(message)
        await trio.lowlevel.checkpoint()
        if self.joins == 20:  # more than fit in at once
            self.joined.set()
        raise self._error

    join_as_service = join_once


def failures(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [entry["reason"] for entry in said if entry["event"] == "failed"]


async def test_a_caller(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    joiner: Any = OddJoiner(WAITING)
    port = Port(f"unix:{tmp_path}/port", joiner, None, Report(as_json=True, is_quiet=False))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.serve)
        with trio.fail_after(TIMEOUT):
            while not (tmp_path / "port").exists():  # noqa: ASYNC110
                await trio.sleep(0.001)
            for _ in range(3):
                stream = await trio.open_unix_socket(f"{tmp_path}/port")
                assert await stream.receive_some(1) == b""
                await stream.aclose()
            nursery.cancel_scope.cancel()
    assert failures(capsys) == ["unexpected error, a bug in frelay: KeyError: 'odd'"] * 3


@pytest.mark.load
@pytest.mark.parametrize("messages", [(), (WAITING,), (WAITING, PAIRED), (PAIRED,)])
async def test_a_leg(
    capsys: pytest.CaptureFixture[str], messages: tuple[Message, ...], autojump_clock: trio.testing.MockClock
) -> None:
    joiner: Any = OddJoiner(*messages)
    service = Service("127.0.0.1:9", joiner, None, Report(as_json=True, is_quiet=False), concurrency=8, always=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve)
        began = trio.current_time()
        await joiner.joined.wait()
        # The joins must not follow each other as fast as the processor allows.
        assert trio.current_time() > began
        nursery.cancel_scope.cancel()
    assert set(failures(capsys)) == {"unexpected error, a bug in frelay: KeyError: 'odd'"}


async def test_callers_who_fail_again_and_again_do_not_keep_it_busy(autojump_clock: trio.testing.MockClock) -> None:
    """And do not end it: after each failure the leg keeps its slot for a moment."""
    joiner: Any = OddJoiner(WAITING, PAIRED, error=Refused("protocol-error", "odd"))
    service = Service("127.0.0.1:9", joiner, None, Report(as_json=False, is_quiet=True), concurrency=8, always=False)
    with trio.move_on_after(100):
        await service.serve()
    assert 100 < joiner.joins < 400


async def test_a_refusal_of_one_leg_of_several_is_no_failure(
    capsys: pytest.CaptureFixture[str], autojump_clock: trio.testing.MockClock
) -> None:
    """The relay has room for two legs: the others are given up silently, and those two stay."""

    class Full(OddJoiner):
        waiting = 0

        async def join_as_service(self, plan: object, on_status: Callable[[Message], None]) -> Any:
            await trio.sleep(0.01)
            if self.waiting == 2:
                raise Refused("queue-full", "2 legs of this party are waiting already", 5.0)
            on_status(WAITING)
            self.waiting += 1
            try:
                if paired:
                    await trio.sleep(0.01)
                    paired.pop()
                    on_status(PAIRED)
                    raise Refused("protocol-error", "odd")
                await trio.sleep_forever()
            finally:
                self.waiting -= 1

    paired = [1] * 5
    joiner: Any = Full()
    service = Service("127.0.0.1:9", joiner, None, Report(as_json=True, is_quiet=False), concurrency=8, always=False)
    with trio.move_on_after(4):
        await service.serve()
    assert not paired
    assert not [reason for reason in failures(capsys) if "queue-full" in reason]


def test_the_command_itself(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback, and exit code 1."""

    def odd(*_: object, **__: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr("frelay.cli.connect.command.trio.run", odd)
    cert, key = site.paths["func1"]
    options = Options(cert=cert, key=key, ca=site.ca_path, peer="dns:func2.demo")
    assert connect_command("127.0.0.1:1", options, LocalOptions(listen="127.0.0.1:0")) == 1
    assert capsys.readouterr().err == "frelay: unexpected error, a bug in frelay: KeyError: 'odd'\n"
