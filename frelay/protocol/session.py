"""Whose turn it is: the two state machines of frelay/1, one for each end of a leg.

The relay's end (:class:`RelaySession`)::

    JOINING --JOIN in--> JOINED --WAITING out--> WAITING --PAIRED out--> PAIRED
       \\________________\\________ REFUSED out _____/----> OVER

The party's end (:class:`PartySession`) is its mirror. Neither does I/O: bytes that were read go in through
``receive``, which gives the messages found in them; a message to send goes through ``send``, which gives the bytes.
Both raise :class:`~frelay.errors.RemoteProtocolError` for what the other side may not say now, and
:class:`~frelay.errors.LocalProtocolError` for what this side may not.

One race is part of the protocol: a PING may cross with PAIRED, so that its PONG reaches the relay after PAIRED was
sent. That one PONG, and nothing else, is still taken in the state PAIRED; so is a LEAVE that crossed. And whoever has
said its last word, REFUSED or LEAVE, may still be sent what the other side wrote before it could read that: it is
decoded and dropped.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.frames import FrameDecoder
from frelay.protocol.messages import (
    Draining,
    Join,
    Leave,
    Message,
    Paired,
    Ping,
    Pong,
    Refused,
    Waiting,
    decode,
    encode,
)

__all__ = ["PartySession", "RelaySession", "State"]

# A waiting leg has no reason to send advisory frames at all today; this many are patience with a later version,
# and a bound on the work that one leg can cause.
_MAX_ADVISORY: Final = 64


class State(Enum):
    """How far a leg has come."""

    JOINING = "joining"
    JOINED = "joined"
    WAITING = "waiting"
    PAIRED = "paired"
    OVER = "over"


class _Session:
    """What both ends share: the decoder, the state, and the bound on advisory frames."""

    __slots__ = ("_decoder", "_said_last_word", "state")

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._said_last_word = False
        self.state = State.JOINING

    def receive(self, data: bytes) -> list[Message]:
        """Take in what was read; give the messages that are complete. Raises RemoteProtocolError."""
        self._decoder.feed(data)
        messages = []
        while (frame := self._decoder.next_frame()) is not None:
            message = decode(frame)
            if not self._said_last_word:
                self._judge(message)
                messages.append(message)
        if self._decoder.advisory_skipped > _MAX_ADVISORY:
            raise RemoteProtocolError(f"more than {_MAX_ADVISORY} advisory frames")
        return messages

    @property
    def is_inside_frame(self) -> bool:
        """Whether a frame has come in part."""
        return len(self._decoder) > 0

    @property
    def missing(self) -> int:
        """How many bytes may be read next without reading beyond the end of a frame; at least 1."""
        return self._decoder.missing

    def end_of_stream(self) -> None:
        """The other side ended its TLS stream; raises RemoteProtocolError if that cut a frame in two."""
        if len(self._decoder):
            raise RemoteProtocolError("the stream ended inside a frame")

    def _judge(self, message: Message) -> None:
        raise NotImplementedError

    def _refuse_message(self, message: Message) -> RemoteProtocolError:
        return RemoteProtocolError(f"{message.TYPE.name} while {self.state.value}")


class RelaySession(_Session):
    """The relay's end of one framed leg."""

    __slots__ = ("_ping_number", "_pong_due")

    def __init__(self) -> None:
        super().__init__()
        self._ping_number = 0
        self._pong_due = False

    @property
    def pong_due(self) -> bool:
        """Whether a PING was sent and its PONG has not come."""
        return self._pong_due

    def _judge(self, message: Message) -> None:
        if isinstance(message, Join) and self.state is State.JOINING:
            self.state = State.JOINED
        elif isinstance(message, Pong) and self._pong_due and message.n == self._ping_number:
            self._pong_due = False
        elif isinstance(message, Leave) and self.state in (State.JOINED, State.WAITING, State.PAIRED):
            self.state = State.OVER
        else:
            raise self._refuse_message(message)

    def ping(self) -> bytes:
        """The bytes of the next PING; at most one is under way at a time."""
        if self._pong_due:
            raise LocalProtocolError("a PING is already under way")
        self._ping_number += 1
        data = self.send(Ping(self._ping_number))
        self._pong_due = True
        return data

    def send(self, message: Message) -> bytes:
        """The bytes of ``message``, moving the state on; raises LocalProtocolError if it is not its turn."""
        state, data = self.state, encode(message)
        if isinstance(message, Waiting) and state is State.JOINED:
            self.state = State.WAITING
        elif isinstance(message, Paired) and state in (State.JOINED, State.WAITING):
            self.state = State.PAIRED
        elif isinstance(message, Refused) and state in (State.JOINING, State.JOINED, State.WAITING):
            self.state, self._said_last_word = State.OVER, True
        elif not (isinstance(message, Ping | Draining) and state is State.WAITING):
            raise LocalProtocolError(f"{message.TYPE.name} while {state.value}")
        return data


class PartySession(_Session):
    """A function's end of its leg."""

    __slots__ = ()

    def _judge(self, message: Message) -> None:
        if isinstance(message, Waiting) and self.state is State.JOINED:
            self.state = State.WAITING
        elif isinstance(message, Paired) and self.state in (State.JOINED, State.WAITING):
            self.state = State.PAIRED
        elif isinstance(message, Refused) and self.state in (State.JOINING, State.JOINED, State.WAITING):
            # JOINING too: a relay that refuses by certificate may say so before it has read a JOIN.
            self.state = State.OVER
        elif not (isinstance(message, Ping | Draining) and self.state in (State.JOINED, State.WAITING)):
            raise self._refuse_message(message)

    def send(self, message: Message) -> bytes:
        """The bytes of ``message``, moving the state on; raises LocalProtocolError if it is not its turn."""
        data = encode(message)
        if isinstance(message, Join) and self.state is State.JOINING:
            self.state = State.JOINED
        elif isinstance(message, Leave) and self.state in (State.JOINED, State.WAITING):
            self.state, self._said_last_word = State.OVER, True
        elif not (isinstance(message, Pong) and self.state in (State.JOINED, State.WAITING)):
            raise LocalProtocolError(f"{message.TYPE.name} while {self.state.value}")
        return data
