"""The two state machines of frelay/1, one for each end of a leg: they say which message may come next.

The relay's end (:class:`RelaySession`)::

    JOINING --JOIN in--> JOINED --WAITING out--> WAITING --PAIRED out--> PAIRED
       \\________________\\________ REFUSED out _____/----> OVER

The party's end (:class:`PartySession`) is its mirror. Neither does I/O: ``receive`` takes the bytes that were read and
returns the messages in them; ``send`` takes a message and returns its bytes. Both raise
:class:`~frelay.errors.RemoteProtocolError` if the other side may not send a message now, and
:class:`~frelay.errors.LocalProtocolError` if this side may not.

Some messages may cross on the wire. A PONG may reach the relay after it has sent PAIRED, if its PING crossed with that;
so may a LEAVE. In the state PAIRED these two are still accepted, and nothing else. After its last message, REFUSED or
LEAVE, an end may still receive what the other side sent before it read that: such messages are decoded and dropped.
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

# Today a waiting leg has no reason to send advisory frames. A later version may send some; the limit bounds the work
# that one leg can cause.
_MAX_ADVISORY: Final = 64


class State(Enum):
    """The state of a leg in the protocol."""

    JOINING = "joining"
    JOINED = "joined"
    WAITING = "waiting"
    PAIRED = "paired"
    OVER = "over"


class _Session:
    """What both ends share: the decoder, the state, and the bound on advisory frames."""

    __slots__ = ("_decoder", "_sent_last_message", "state")

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._sent_last_message = False
        self.state = State.JOINING

    def receive(self, data: bytes) -> list[Message]:
        """Take the bytes that were read; return the messages that are complete. Raises RemoteProtocolError."""
        self._decoder.feed(data)
        messages = []
        while (frame := self._decoder.next_frame()) is not None:
            message = decode(frame)
            if not self._sent_last_message:
                self._check_turn(message)
                messages.append(message)
        if self._decoder.advisory_skipped > _MAX_ADVISORY:
            raise RemoteProtocolError(f"more than {_MAX_ADVISORY} advisory frames")
        return messages

    @property
    def is_inside_frame(self) -> bool:
        """Whether a frame was received in part."""
        return len(self._decoder) > 0

    @property
    def missing(self) -> int:
        """How many bytes may be read next without reading beyond the end of a frame; at least 1."""
        return self._decoder.missing

    def end_of_stream(self) -> None:
        """The other side ended its TLS stream; raises RemoteProtocolError if that cut a frame in two."""
        if len(self._decoder):
            raise RemoteProtocolError("the stream ended inside a frame")

    def _check_turn(self, message: Message) -> None:
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
        """Whether a PING was sent and its PONG was not received yet."""
        return self._pong_due

    def _check_turn(self, message: Message) -> None:
        if isinstance(message, Join) and self.state is State.JOINING:
            self.state = State.JOINED
        elif isinstance(message, Pong) and self._pong_due and message.n == self._ping_number:
            self._pong_due = False
        elif isinstance(message, Leave) and self.state in (State.JOINED, State.WAITING, State.PAIRED):
            self.state = State.OVER
        else:
            raise self._refuse_message(message)

    def ping(self) -> bytes:
        """The bytes of the next PING; only one may wait for its PONG at a time."""
        if self._pong_due:
            raise LocalProtocolError("a PING is already under way")
        self._ping_number += 1
        data = self.send(Ping(self._ping_number))
        self._pong_due = True
        return data

    def send(self, message: Message) -> bytes:
        """The bytes of ``message``, and advance the state; raises LocalProtocolError if it may not be sent now."""
        state, data = self.state, encode(message)
        if isinstance(message, Waiting) and state is State.JOINED:
            self.state = State.WAITING
        elif isinstance(message, Paired) and state in (State.JOINED, State.WAITING):
            self.state = State.PAIRED
        elif isinstance(message, Refused) and state in (State.JOINING, State.JOINED, State.WAITING):
            self.state, self._sent_last_message = State.OVER, True
        elif not (isinstance(message, Ping | Draining) and state is State.WAITING):
            raise LocalProtocolError(f"{message.TYPE.name} while {state.value}")
        return data


class PartySession(_Session):
    """A function's end of its leg."""

    __slots__ = ()

    def _check_turn(self, message: Message) -> None:
        if isinstance(message, Waiting) and self.state is State.JOINED:
            self.state = State.WAITING
        elif isinstance(message, Paired) and self.state in (State.JOINED, State.WAITING):
            self.state = State.PAIRED
        elif isinstance(message, Refused) and self.state in (State.JOINING, State.JOINED, State.WAITING):
            # In JOINING too: a relay that refuses the certificate may say so before it reads a JOIN.
            self.state = State.OVER
        elif not (isinstance(message, Ping | Draining) and self.state in (State.JOINED, State.WAITING)):
            raise self._refuse_message(message)

    def send(self, message: Message) -> bytes:
        """The bytes of ``message``, and advance the state; raises LocalProtocolError if it may not be sent now."""
        data = encode(message)
        if isinstance(message, Join) and self.state is State.JOINING:
            self.state = State.JOINED
        elif isinstance(message, Leave) and self.state in (State.JOINED, State.WAITING):
            self.state, self._sent_last_message = State.OVER, True
        elif not (isinstance(message, Pong) and self.state in (State.JOINED, State.WAITING)):
            raise LocalProtocolError(f"{message.TYPE.name} while {self.state.value}")
        return data
