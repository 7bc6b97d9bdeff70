"""An event is encoded once for all readers, and a reader that has fallen behind gets many events in one write.

A function that joins again and again makes several events each time. Encoding and writing each of them once for every
reader would be unbounded work.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import trio
from starlette.types import Message

from frelay.admin.events import EventResponse, EventStream
from frelay.journal import Entry, LegRefused, LegWaits, PairingEnded, PairingStarted
from frelay.protocol.outcome import Outcome, Record

EVENTS = 500


def waits(number: int) -> LegWaits:
    return LegWaits(route="demo", party="func1", identity=f"dns:f{number}.demo", address="127.0.0.1:1", mode="handoff")


# Visible ASCII without letters and digits: all that JSON, HTML or the lines of an event stream could trip over.
KEY = "".join(one for one in map(chr, range(ord("!"), ord("~") + 1)) if not one.isalnum())


@pytest.mark.parametrize("meet", [KEY, "data:x", None])
@pytest.mark.parametrize(
    "entry",
    [
        LegWaits(route="demo", party="either", identity="dns:a", address="127.0.0.1:1", mode="handoff"),
        LegRefused(code="wait-timeout", reason="nobody came", address="127.0.0.1:1", party="either"),
        PairingStarted(pairing="id", route="demo", func1="dns:a", func2="dns:b", waited=0.5),
        PairingEnded(record=Record("id", "demo", "dns:a", "dns:b", Outcome.CLOSED, "both", None, 1, 2, 3.5)),
    ],
    ids=lambda entry: entry.kind,
)
async def test_a_key_arrives_as_it_was(entry: Entry, meet: str | None) -> None:
    """Also one that looks like a line of the stream; null without one."""
    if isinstance(entry, PairingEnded):
        entry = replace(entry, record=replace(entry.record, meet=meet))
    else:
        entry = replace(entry, meet=meet)  # type: ignore[call-arg]
    events = EventStream()
    with events.reader(None) as reader:
        events.note(entry)
        (event,) = reader.queue
    _, kind, data, *rest = event.text.decode().split("\n")
    assert (kind, rest) == (f"event: {entry.kind}", ["", ""])
    told = json.loads(data.removeprefix("data: "))["data"]
    assert told["meet"] == meet
    assert told.get("party", "either") == "either"


async def test_all_readers_share_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    put_into_words = 0
    dumps = json.dumps

    def counting(*arguments: Any, **options: Any) -> str:
        nonlocal put_into_words
        put_into_words += 1
        return str(dumps(*arguments, **options))

    monkeypatch.setattr(json, "dumps", counting)
    events = EventStream()
    with events.reader(None, "a") as one, events.reader(None, "b") as two:
        for number in range(10):
            events.note(waits(number))
        assert put_into_words == 0, "nobody has asked yet"
        for reader in (one, two):
            assert [event.text.partition(b"\n")[0] for event in reader.queue] == [b"id: %d" % n for n in range(1, 11)]
    assert put_into_words == 10


async def test_a_reader_that_has_fallen_behind_gets_many_in_one_write() -> None:
    """It gets each event once, whole and in order."""
    events = EventStream()
    written: list[bytes] = []
    is_done = trio.Event()

    async def receive() -> Message:
        await is_done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] != "http.response.body":
            return
        written.append(message["body"])
        if len(written) == 1:
            # After the first comment of the stream, many events happen before the next write.
            for number in range(EVENTS):
                events.note(waits(number))
        if b"".join(written).count(b"event: waiting") == EVENTS:
            is_done.set()
        await trio.lowlevel.checkpoint()

    with trio.fail_after(20):
        await EventResponse(events, None)({"type": "http", "headers": []}, receive, send)
    text = b"".join(written).decode()
    ids = [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]
    assert ids == list(range(1, EVENTS + 1))
    assert len(written) < EVENTS / 10
