"""The event stream of the admin API: the journal's entries, numbered and sent to each reader as server-sent events.

:class:`EventStream` listens to the journal and keeps one queue per reader. :class:`EventResponse` is the endless HTTP
answer that sends such a queue.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frelay.admin.http import caller_of
from frelay.admin.model import EventView, problem_view
from frelay.admin.problems import problem_response
from frelay.journal import Entry, HandshakeDone, PairingEnded, ReloadRefused

__all__ = ["EventResponse", "EventStream"]

# Seconds. Proxies and NATs forget connections on which nothing is sent; a comment this often keeps them.
_HEARTBEAT: Final = 15.0
# Seconds. How often the caller's certificate is checked again while there is no event: it may have expired meanwhile.
_CHECK_INTERVAL: Final = 1.0
# Readers at a time; one address gets half of them. Each holds one of the server's connections for as long as it likes.
_MAX_READERS: Final = 64
# A reader that reconnects gets what it missed of the last so many events.
_EVENTS_KEPT: Final = 256
# A reader that is so many events behind is disconnected.
_MAX_LAG: Final = 1024
# How many events one write may hold for a reader that has fallen behind: a write costs more than an event.
_EVENTS_PER_WRITE: Final = 64


@dataclass(eq=False)
class _Event:
    """An event, and the bytes of it that all readers are sent."""

    view: EventView

    @cached_property
    def text(self) -> bytes:
        # Encoded once for all readers: each new leg makes several events, and there may be dozens of readers.
        data = json.dumps(self.view.model_dump(mode="json"))
        return f"id: {self.view.id}\nevent: {self.view.kind}\ndata: {data}\n\n".encode()


@dataclass(eq=False)
class _Reader:
    """One open event stream."""

    holder: str
    queue: deque[_Event] = field(default_factory=deque)
    has_news: trio.Event = field(default_factory=trio.Event)
    is_too_slow: bool = False

    def add(self, event: _Event) -> None:
        if len(self.queue) >= _MAX_LAG:
            self.is_too_slow = True
        else:
            self.queue.append(event)
        self.has_news.set()


class EventStream:
    """The journal as numbered events for a bounded number of readers. A slow reader is disconnected and delays nobody.

    There are at most ``most`` readers, and at most half of them come from one address.
    """

    def __init__(self, most: int = _MAX_READERS) -> None:
        self._most: Final = max(2, min(most, _MAX_READERS))
        self._last = 0
        self._kept: Final[deque[_Event]] = deque(maxlen=_EVENTS_KEPT)
        self._readers: Final[set[_Reader]] = set()

    def note(self, entry: Entry) -> None:
        """The journal's listener."""
        if isinstance(entry, HandshakeDone):
            return  # It is for the metrics only: it does not say whose handshake it was.
        self._last += 1
        event = _Event(EventView(id=self._last, kind=entry.kind, at=entry.at, data=_event_data(entry)))
        self._kept.append(event)
        for reader in self._readers:
            reader.add(event)

    def objection_to_another(self, holder: str) -> str | None:
        """Why ``holder`` cannot have one more reader now, or None."""
        if len(self._readers) >= self._most:
            return f"{self._most} event streams are open already, which is the most this relay allows"
        if sum(reader.holder == holder for reader in self._readers) >= self._most // 2:
            return f"{self._most // 2} event streams of this address are open already, which is the most it may have"
        return None

    @contextmanager
    def reader(self, after: int | None, holder: str = "") -> Iterator[_Reader]:
        """A reader of all events from now on; with ``after``, also of the kept events with a higher number."""
        reader = _Reader(holder)
        if after is not None:
            if after > self._last:
                after = 0  # The number is from before the relay restarted: all events of this relay are newer.
            for event in self._kept:
                if event.view.id > after:
                    reader.add(event)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)


class EventResponse(Response):
    """An endless answer: server-sent events until the client disconnects, may read no more or is too slow.

    It is a class and not a generator in a StreamingResponse, because nothing would close that generator in time.
    """

    media_type = "text/event-stream"

    def __init__(self, events: EventStream, after: int | None) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events: Final = events
        self._after: Final = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        caller = caller_of(scope)
        holder = "" if caller is None else caller.holder
        objection = self._events.objection_to_another(holder)
        if objection is not None:
            await problem_response(429, "too-many", objection)(scope, receive, send)
            return

        async def wait_disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel(reason="the reader of this event stream has gone")

        def may_read() -> bool:
            return caller is None or caller.objection() is None

        with self._events.reader(self._after, holder) as reader:
            # The reader is registered before the headers are sent, so a client that has them misses no later event.
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_disconnected)
                await self._send_events(reader, send, may_read)
                nursery.cancel_scope.cancel(reason="this event stream has ended")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, reader: _Reader, send: Send, may_read: Callable[[], bool]) -> None:
        """Send the events of ``reader`` until it is too slow or may read no more."""

        async def put(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})

        # Without this first comment a client would know only at the first event that the stream is open.
        await put(b": frelay events\n\n")
        heartbeat_at = trio.current_time() + _HEARTBEAT
        while may_read():
            if reader.queue:
                several = [reader.queue.popleft() for _ in range(min(len(reader.queue), _EVENTS_PER_WRITE))]
                await put(b"".join(event.text for event in several))
                continue
            if reader.is_too_slow:
                return
            if trio.current_time() >= heartbeat_at:
                heartbeat_at = trio.current_time() + _HEARTBEAT
                await put(b": still here\n\n")
            reader.has_news = trio.Event()
            with trio.move_on_after(_CHECK_INTERVAL):
                await reader.has_news.wait()


def _event_data(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, PairingEnded):
        record = asdict(entry.record)
        return {**record, "outcome": entry.record.outcome.value}
    if isinstance(entry, ReloadRefused):
        return {"problems": [problem_view(problem).model_dump() for problem in entry.problems]}
    data = asdict(entry)
    del data["at"]
    return data
