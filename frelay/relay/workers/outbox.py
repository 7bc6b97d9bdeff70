"""The outbox of a worker: what it has to tell its supervisor. It is bounded, and nobody waits for it."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import trio

from frelay.journal import Entry
from frelay.net.channel import Channel, ChannelEnded
from frelay.relay.workers.codec import entry_to_json, is_told

__all__ = ["Outbox"]

# About a second of everything at a busy worker. It bounds the memory that a supervisor costs that does not read.
_LONGEST_QUEUE: Final = 4096


class Outbox:
    """What is to be sent through ``channel``: entries of the journal, the last counts, and answers."""

    def __init__(self, channel: Channel) -> None:
        self._channel: Final = channel
        self._entries: Final[deque[dict[str, Any]]] = deque(maxlen=_LONGEST_QUEUE)
        self._dropped = 0
        self._counts: dict[str, Any] | None = None
        self._answers: Final[deque[dict[str, Any]]] = deque()
        self._news = trio.Event()
        self._is_empty = trio.Event()

    def note(self, entry: Entry) -> None:
        """Send ``entry`` if the supervisor is told of its kind; it is called for every entry of the journal."""
        if is_told(entry):
            self._dropped += len(self._entries) == _LONGEST_QUEUE
            self._entries.append(entry_to_json(entry))
            self._wake()

    def report(self, counts: dict[str, Any]) -> None:
        """Send ``counts`` in place of any that are not sent yet."""
        self._counts = counts
        self._wake()

    def answer(self, answer: dict[str, Any]) -> None:
        """Send an answer, after all entries that were noted before."""
        self._answers.append(answer)
        self._wake()

    def _wake(self) -> None:
        self._news.set()

    async def flushed(self) -> None:
        """Wait until all is sent."""
        self._is_empty = trio.Event()
        self._wake()
        await self._is_empty.wait()

    async def run(self) -> None:
        """Send until cancelled, or until the channel ends. The task that reads from it notices that end, too."""
        try:
            while True:
                self._news = trio.Event()
                while message := self._next():
                    await self._channel.send(message)
                self._is_empty.set()
                await self._news.wait()
        except ChannelEnded:
            pass

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = {}
        if self._entries:
            message["entries"], message["dropped"] = list(self._entries), self._dropped
            self._entries.clear()
            self._dropped = 0
        if self._counts is not None:
            message["counts"], self._counts = self._counts, None
        if self._answers:
            message |= self._answers.popleft()
        return message
