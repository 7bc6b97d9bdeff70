"""The messages between this rank and one other, on the inner TLS of their wire, without I/O.

Theory of operation. Bytes of the network go in by :meth:`Link.feed` and come out by :meth:`Link.take`. A message is an
:class:`Outgoing` or an :class:`Incoming`, and ``is_done`` says when its buffer is free or full.

* A message that is expected is decrypted into its buffer. One that comes before its time is kept, up to KEPT bytes a
  link. Then the link is *held*: its owner reads no further, and the kernel's window holds the sender back. So the
  memory is bounded, and still all ranks may send 8 MiB first and receive then.
* The messages of a link come in the order in which they were sent. A tag that differs from the expected one is a fault
  and never a wrong result.
* A fault ends the link. :class:`Fault` says how bad it is: the word ABORT of another rank names who failed first, so
  it counts more than a cut, which is perhaps the effect of that failure only.
"""

from __future__ import annotations

import ssl
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from frelay.client.group.frames import FORMAT, PIECE, TAG, Abort, Kind, header, make_tag, sequence_of, tag_text
from frelay.client.tls_engine import Engine
from frelay.errors import RemoteProtocolError, Truncated

__all__ = ["Fault", "Incoming", "Link", "Ongoing", "Outgoing", "Weight"]

KEPT: Final = 16 * 1024 * 1024
"""Bytes of messages that came before their time, a link. In a full mesh of 16 that is 240 MiB at worst."""

# The header of a piece and its first bytes go into one TLS record: two records would cost a small message twice.
_RECORD: Final = 16384
_IN_FIRST_RECORD: Final = _RECORD - FORMAT.size
# The most that is encrypted ahead of the kernel.
_AHEAD: Final = PIECE
_NOTHING: Final = memoryview(b"")

_ABORT: Final = make_tag(Kind.ABORT)
_REFUSED: Final = make_tag(Kind.REFUSED)
_PING: Final = make_tag(Kind.PING)
_PONG: Final = make_tag(Kind.PONG)
# No ABORT of ours is longer.
_LONGEST_ABORT: Final = 8192


class Weight(IntEnum):
    """How much a fault tells; of several, the heaviest says what happened."""

    CUT = 1
    OUT_OF_STEP = 2
    ABORT = 3
    REFUSED = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a link is of no more use."""

    weight: Weight
    rank: int | None
    """The rank to blame."""
    text: str


class Outgoing:
    """A message to send; ``view`` must not change until it ``is_done``."""

    __slots__ = ("at", "is_done", "tag", "view")

    def __init__(self, tag: bytes, view: memoryview) -> None:
        self.tag: Final = tag
        self.view: Final = view
        self.at = 0
        self.is_done = False


class Incoming:
    """A message to receive. Without a ``view`` it gets a buffer of its own, which :attr:`buffer` is at the end."""

    __slots__ = ("at", "buffer", "has_own_buffer", "is_done", "is_early", "is_exact", "length", "tag", "view")

    def __init__(
        self, tag: bytes, view: memoryview | None = None, *, is_exact: bool = True, is_early: bool = False
    ) -> None:
        self.tag: Final = tag
        self.view = view
        self.has_own_buffer: Final = view is None
        self.is_exact: Final = is_exact
        """Whether the message must fill ``view``; else it may be shorter."""
        self.is_early: Final = is_early
        """Whether it came before its time, so that nobody expects it yet."""
        self.buffer = bytearray()
        self.length = -1
        self.at = 0
        self.is_done = False

    def begin(self, length: int) -> None:
        """Take note of the length of the message; raises RemoteProtocolError if it does not fit."""
        if self.view is None:
            try:
                self.buffer = bytearray(length)
            except (MemoryError, OverflowError):
                raise RemoteProtocolError(f"there is no memory for its message of {length} bytes") from None
            self.view = memoryview(self.buffer)
        elif length > len(self.view) or (self.is_exact and length < len(self.view)):
            room = f"this rank's buffer has {len(self.view)}"
            raise RemoteProtocolError(f"its {tag_text(self.tag)} has {length} bytes, and {room}")
        self.length = length
        self.is_done = length == 0


class Ongoing:
    """The call that all ranks make together now, as far as this rank is; its links share one."""

    __slots__ = ("tag",)

    def __init__(self) -> None:
        self.tag = make_tag(Kind.HELLO)

    def contradicts(self, tag: bytes) -> bool:
        """Whether a message with ``tag`` shows that another rank is in another call in place of this one or earlier.

        A message of a later call is none: its sender is ahead.
        """
        theirs = sequence_of(tag)
        return theirs != 0 and tag != self.tag and (sequence_of(self.tag) - theirs) & 0xFFFFFFFF < 1 << 31


class Link:
    """All messages between this rank and ``rank``."""

    def __init__(self, rank: int, size: int, engine: Engine, ongoing: Ongoing) -> None:
        self.rank: Final = rank
        self._ongoing: Final = ongoing
        self._size: Final = size
        self._engine: Final = engine
        # out
        self._outbox: Final[deque[Outgoing]] = deque()
        self._encrypted: Final[list[Outgoing]] = []
        self._unsent = _NOTHING
        self.is_ending = False
        # in
        self._head = b""
        self._piece_left = 0
        self._current: Incoming | None = None
        self._expected: Incoming | None = None
        self._early: Final[deque[Incoming]] = deque()
        self._early_bytes = 0
        self._keeps_all = False
        self.is_held = False
        """Whether :meth:`feed` must wait: a message is next that nobody expects yet and that is too long to keep."""
        self.has_ended = False
        """Whether the other side has ended its direction in good order."""
        self.has_answered = True
        """Whether a word or a byte has come since the last :meth:`ping`."""
        self.fault: Fault | None = None
        self.moved = 0
        """Bytes and messages in both directions so far, without PING and PONG: it grows if there is progress."""

    # --- out -----------------------------------------------------------------------------------------------------

    def send(self, message: Outgoing) -> None:
        """Queue a message."""
        self._outbox.append(message)

    def ping(self) -> None:
        """Ask whether the other rank is in a call, too: only then it answers."""
        self.has_answered = False
        self._say(_PING)

    def abort(self, abort: Abort, *, to_this_process_alone: bool = False) -> None:
        """Say that the group has failed, as the last word. Of the message under way only this piece is sent."""
        at_front = self._outbox[0] if self._outbox and self._outbox[0].at % PIECE else None
        self._outbox.clear()
        if at_front is not None:
            rest = Outgoing(at_front.tag, at_front.view[: min(len(at_front.view), -(-at_front.at // PIECE) * PIECE)])
            rest.at = at_front.at
            self._outbox.append(rest)
        tag = _REFUSED if to_this_process_alone else _ABORT
        self._outbox.append(Outgoing(tag, memoryview(abort.encode())))

    def end(self) -> None:
        """End our direction with close_notify, after all that is queued."""
        self.is_ending = True

    def _say(self, tag: bytes) -> None:
        # Between two pieces, before the rest of the message under way.
        place = 1 if self._outbox and self._outbox[0].at % PIECE else 0
        self._outbox.insert(place, Outgoing(tag, _NOTHING))

    @property
    def has_output(self) -> bool:
        """Whether :meth:`take` has something to send."""
        return bool(self._unsent or self._outbox or self.is_ending)

    def take(self) -> memoryview:
        """Bytes for the network, maybe none; :meth:`sent` says how many of them the kernel took."""
        if not self._unsent:
            try:
                self._encrypt()
            except ssl.SSLError as error:
                self.cut(str(error))
        return self._unsent

    def sent(self, size: int) -> None:
        """The kernel took ``size`` bytes of those that :meth:`take` returned."""
        self._unsent = self._unsent[size:]
        if not self._unsent:
            for message in self._encrypted:
                message.is_done = True
            self._encrypted.clear()

    def _encrypt(self) -> None:
        engine, budget = self._engine, _AHEAD
        while self._outbox and budget > 0:
            message = self._outbox[0]
            view, at = message.view, message.at
            left = len(view) - at
            if at % PIECE == 0:
                end = at + min(left, _IN_FIRST_RECORD)
                # Join copies at most one record; a message of an empty view is a header alone.
                engine.write(b"".join((header(message.tag, left), view[at:end])))
            else:
                end = at + min(left, PIECE - at % PIECE, budget)
                engine.write(view[at:end])
            budget -= end - at
            self.moved += end - at
            message.at = end
            if end == len(view):
                self._outbox.popleft()
                self._encrypted.append(message)
                if message.tag not in (_PING, _PONG):
                    self.moved += 1
        if self.is_ending and not self._outbox:
            self.is_ending = False
            engine.send_eof()
        self._unsent = memoryview(engine.take())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued, kept or expected, and the link has no fault and no end."""
        return not (
            self._unsent
            or self._outbox
            or self._current
            or self._expected
            or self._early
            or self._head
            or self.is_held
            or self.is_ending
            or self.has_ended
            or self.fault
        )

    def send_rest(self, message: Outgoing) -> None:
        """Send what the kernel did not take of a message that went past this idle link; its view is encrypted."""
        self._unsent = message.view
        self._encrypted.append(message)

    # --- in ------------------------------------------------------------------------------------------------------

    def receive(self, message: Incoming) -> None:
        """Expect a message; the one before it must be done."""
        if self._expected is not None:
            raise AssertionError("one message of a link is received at a time")
        try:
            if self._early:
                found = self._early.popleft()
                self._early_bytes -= found.length
                self._adopt(message, found)
            elif self._current is not None:
                self._early_bytes -= self._current.length
                self._adopt(message, self._current)
                self._current = message
            else:
                self._expected = message
                if self.is_held:
                    self.is_held = False
                    self._begin_piece()
        except RemoteProtocolError as error:
            self._fail(str(error))
            return
        self.process()

    def _adopt(self, message: Incoming, found: Incoming) -> None:
        """Give what has come before its time to the message that expects it."""
        self._compare(message.tag, found.tag)
        if message.view is None:
            # No copy: the message takes over the buffer.
            message.view, message.buffer, message.length = found.view, found.buffer, found.length
        else:
            message.begin(found.length)
            message.view[: found.at] = found.buffer[: found.at]
        message.at = found.at
        message.is_done = found.is_done

    def _compare(self, expected: bytes, found: bytes) -> None:
        if expected == found:
            return
        ours, theirs = tag_text(expected), tag_text(found)
        if ours == theirs:
            raise RemoteProtocolError(f"it gave other arguments to {ours}: root, operation, element type or size")
        raise RemoteProtocolError(f"it is in {theirs}, and this rank in {ours}")

    @property
    def has_kept(self) -> bool:
        """Whether something came before its time."""
        return bool(self._early or self._current or self.is_held)

    def check_all_kept(self) -> None:
        """A call has begun: see whether what came before its time contradicts it."""
        kept = [message.tag for message in self._early]
        if self._current is not None and self._current.is_early:
            kept.append(self._current.tag)
        if self.is_held:
            kept.append(self._head[: TAG.size])
        for tag in kept:
            try:
                self._check_kept(tag)
            except RemoteProtocolError as error:
                self._fail(str(error))

    def _check_kept(self, tag: bytes) -> None:
        if self._ongoing.contradicts(tag):
            self._compare(self._ongoing.tag, tag)

    def keep_all(self) -> None:
        """Read on even if the link is held, because the other side is gone and the rest is in the kernel already."""
        self._keeps_all = True
        if self.is_held:
            self.is_held = False
            try:
                self._begin_piece()
            except RemoteProtocolError as error:
                self._fail(str(error))

    def drop_all(self) -> None:
        """Forget what is expected and kept: from here on only the end of the other side matters."""
        self._expected = None
        self._early.clear()
        self._keeps_all = True
        self.is_held = False

    def feed(self, data: memoryview | bytes) -> None:
        """Take bytes from the network; ``b""`` is its FIN."""
        self.has_answered = True
        try:
            self._engine.feed(data)
        except ssl.SSLError as error:
            self.cut(str(error))
            return
        self.process()

    def cut(self, text: str) -> None:
        """The connection broke."""
        self._set_fault(Fault(Weight.CUT, self.rank, text))

    def process(self) -> None:
        """Decrypt and deliver what is there."""
        engine = self._engine
        try:
            while engine.has_input and not self.is_held and not self.has_ended and self.fault is None:
                if self._piece_left:
                    current = self._current
                    if current is None or current.view is None:
                        raise AssertionError("a piece belongs to a message")
                    at = current.at
                    count = engine.read_into(current.view[at : at + self._piece_left])
                    if count is None:
                        return
                    if count == 0:
                        raise Truncated("it ended in the middle of a message")
                    self._take_in(current, count)
                else:
                    data = engine.read(FORMAT.size - len(self._head))
                    if data is None:
                        return
                    if not data:
                        self._end()
                        return
                    self._head += data
                    if len(self._head) == FORMAT.size:
                        self._begin_piece()
        except (Truncated, ssl.SSLError) as error:
            self.cut(str(error))
        except RemoteProtocolError as error:
            self._fail(str(error))

    def _end(self) -> None:
        if self._head or self._current is not None:
            raise Truncated("it ended in the middle of a message")
        self.has_ended = True

    def _begin_piece(self) -> None:
        """A header is complete in ``_head``; if the link must be held, it stays there."""
        tag, left = self._head[: TAG.size], int.from_bytes(self._head[TAG.size :], "big")
        if tag in (_PING, _PONG):
            self._head = b""
            if tag == _PING:
                self._say(_PONG)
            return
        current = self._current
        if tag in (_ABORT, _REFUSED):
            # What it interrupts does not count any more.
            if left > _LONGEST_ABORT:
                raise RemoteProtocolError("it sent an ABORT that is too long")
            current = self._current = Incoming(tag)
            current.begin(left)
        elif current is not None:
            if tag != current.tag or left != current.length - current.at:
                raise RemoteProtocolError("it mixed up two messages")
        elif self._expected is not None:
            current, self._expected = self._expected, None
            self._compare(current.tag, tag)
            current.begin(left)
        elif self._early_bytes + left > KEPT and not self._keeps_all:
            self._check_kept(tag)
            self.is_held = True
            return
        else:
            self._check_kept(tag)
            current = Incoming(tag, is_early=True)
            current.begin(left)
            self._early_bytes += left
        self._head = b""
        self._current = current
        self._piece_left = min(left, PIECE)
        if not left:
            self._finish(current)

    def _take_in(self, current: Incoming, count: int) -> None:
        current.at += count
        self._piece_left -= count
        self.moved += count
        if current.at == current.length:
            current.is_done = True
            self._finish(current)

    def _finish(self, message: Incoming) -> None:
        self._current = None
        self.moved += 1
        if message.tag in (_ABORT, _REFUSED):
            abort = Abort.decode(message.buffer, self._size)
            weight = Weight.REFUSED if message.tag == _REFUSED else Weight.ABORT
            self._set_fault(Fault(weight, abort.rank, abort.text))
        elif message.is_early:
            self._early.append(message)

    def _fail(self, text: str) -> None:
        self._set_fault(Fault(Weight.OUT_OF_STEP, self.rank, f"rank {self.rank} is out of step: {text}"))

    def _set_fault(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault
