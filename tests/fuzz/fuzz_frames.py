"""Any bytes give frames and messages, or RemoteProtocolError; in one chunk the same as byte by byte, in little memory.

Input: one byte for the end of a leg and its state; one byte for where the stream is cut in two; the stream.

The decoder is compared with :class:`Model`, which shares no code with it: it has a JSON reader of its own, and decodes
all bytes at once. It is plain Python, so its branches guide the fuzzer; ``json`` would be a black box for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from campaign import run
from frelay.errors import RemoteProtocolError
from frelay.protocol.frames import HEADER_SIZE, MAX_PAYLOAD, Frame, FrameDecoder
from frelay.protocol.messages import Join, Message, Paired, Ping, Waiting, encode
from frelay.protocol.session import PartySession, RelaySession

__all__ = [
    "KNOWN",
    "LEAVE",
    "check_decoder",
    "check_session",
    "one_input",
    "party_session",
    "relay_session",
    "run_decoder",
    "same",
    "splits",
]

Session = RelaySession | PartySession

# --- the model -----------------------------------------------------------------------------------------------------

KNOWN: Final = {0x01, 0x02, 0x03, 0x11, 0x12, 0x13, 0x14, 0x15}
LEAVE: Final = 0x03


class Fault(Exception):
    """The model's word for a protocol error."""


class Json:
    """A JSON reader after RFC 8259, character by character, that refuses duplicate names."""

    _NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<rest>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
    _ESCAPES: Final = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    @classmethod
    def read(cls, text: str) -> Any:
        reader = cls(text)
        value = reader.value()
        if reader.peek():
            raise Fault("more than one value")
        return value

    def peek(self) -> str:
        while self.text[self.at : self.at + 1] in (" ", "\t", "\n", "\r"):
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        self.peek()
        if not self.text.startswith(expected, self.at):
            raise Fault(f"{expected!r} expected")
        self.at += len(expected)

    def value(self) -> Any:
        first = self.peek()
        if first == "{":
            return self.object()
        if first == "[":
            return list(self.items("[", "]", self.value))
        if first == '"':
            return self.string()
        for word, meaning in (("true", True), ("false", False), ("null", None)):
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        found = self._NUMBER.match(self.text, self.at)
        if not found:
            raise Fault("no value")
        self.at = found.end()
        return float(found[0]) if found["rest"] else int(found[0])

    def items(self, opening: str, closing: str, one: Callable[[], Any]) -> Iterator[Any]:
        self.take(opening)
        if self.peek() != closing:
            yield one()
            while self.peek() == ",":
                self.take(",")
                yield one()
        self.take(closing)

    def object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in self.items("{", "}", self.member):
            if name in found:
                raise Fault("doubled")
            found[name] = value
        return found

    def member(self) -> tuple[str, Any]:
        self.peek()
        name = self.string()
        self.take(":")
        return name, self.value()

    def string(self) -> str:
        if self.text[self.at : self.at + 1] != '"':
            raise Fault("a string expected")
        self.at += 1
        units: list[str] = []
        while True:
            char = self.text[self.at : self.at + 1]
            self.at += 1
            if not char or char < " ":
                raise Fault("an open string")
            if char == '"':
                # Two escaped surrogates side by side are one character; a lone one stays a surrogate.
                return re.sub(
                    "[\ud800-\udbff][\udc00-\udfff]",
                    lambda pair: pair[0].encode("utf-16-be", "surrogatepass").decode("utf-16-be"),
                    "".join(units),
                )
            if char == "\\":
                kind = self.text[self.at : self.at + 1]
                self.at += 1
                if kind == "u":
                    digits = self.text[self.at : self.at + 4]
                    if not re.fullmatch("[0-9a-fA-F]{4}", digits):
                        raise Fault("four hex digits expected")
                    self.at += 4
                    char = chr(int(digits, 16))
                elif kind in self._ESCAPES:
                    char = self._ESCAPES[kind]
                else:
                    raise Fault("an unknown escape")
            units.append(char)


class Model:
    """What a stream of bytes means: its frames, and whether an error follows them."""

    def __init__(self, data: bytes) -> None:
        self.frames: list[tuple[int, Any]] = []
        self.advisory = 0
        self.is_faulty = False
        self.left = len(data)
        try:
            self._read(data)
        except Fault:
            self.is_faulty = True

    def _read(self, data: bytes) -> None:
        while len(data) >= 4:
            code, zero, length = data[0], data[1], data[2] * 256 + data[3]
            if zero or length > 4096 or (code < 0x80 and code not in KNOWN):
                raise Fault
            if len(data) < 4 + length:
                return
            body, data = data[4 : 4 + length], data[4 + length :]
            self.left = len(data)
            if code >= 0x80:
                self.advisory += 1
                continue
            if code == LEAVE and not body:
                self.frames.append((code, {}))
                continue
            try:
                value = Json.read(body.decode("utf-8"))
            except UnicodeDecodeError:
                raise Fault from None
            if type(value) is not dict:
                raise Fault
            self.frames.append((code, value))


# --- what is checked ------------------------------------------------------------------------------------------------


def splits(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """All at once, and byte by byte."""
    return [data], [data[at : at + 1] for at in range(len(data))]


def same(one: Any, other: Any) -> bool:
    """Compare so that 1, 1.0 and True differ, as on the wire."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def run_decoder(chunks: Sequence[bytes]) -> tuple[list[Frame], bool, int, int]:
    """Feed the decoder as the sessions do: frames, whether it raised, advisory frames, bytes held."""
    decoder = FrameDecoder()
    found: list[Frame] = []
    for chunk in chunks:
        decoder.feed(chunk)
        try:
            while (frame := decoder.next_frame()) is not None:
                found.append(frame)
        except RemoteProtocolError:
            return found, True, decoder.advisory_skipped, len(decoder)
        # Between two reads it holds at most one incomplete frame.
        assert len(decoder) < HEADER_SIZE + MAX_PAYLOAD
    return found, False, decoder.advisory_skipped, len(decoder)


def check_decoder(stream: bytes, *cuttings: Sequence[bytes]) -> None:
    """The decoder does what the model does, in whatever pieces the bytes come."""
    model = Model(stream)
    for chunks in (*splits(stream), *cuttings):
        found, raised, advisory, held = run_decoder(chunks)
        assert [int(frame.type) for frame in found] == [code for code, _ in model.frames]
        for frame, (_, payload) in zip(found, model.frames, strict=True):
            assert same(dict(frame.payload), payload)
        assert (raised, advisory) == (model.is_faulty, model.advisory)
        if not raised:
            assert held == model.left


def relay_session(steps: int) -> RelaySession:
    """A relay's end after ``steps`` steps."""
    session = RelaySession()
    if steps > 0:
        session.receive(encode(Join("0f8fad5b-d9cb-469f-a165-70867728950e")))
    if steps > 1:
        session.send(Waiting("r", "func1", "dns:p", 60.0, None))
    if steps > 2:
        session.ping()
    if steps > 3:
        session.send(Paired("1", "r", "dns:p", "client", "handoff"))
    return session


def party_session(steps: int) -> PartySession:
    """A party's end after ``steps`` steps."""
    session = PartySession()
    if steps > 0:
        session.send(Join("0f8fad5b-d9cb-469f-a165-70867728950e"))
    if steps > 1:
        session.receive(encode(Waiting("r", "func1", "dns:p", 60.0, None)))
    if steps > 2:
        session.receive(encode(Ping(1)))
    if steps > 3:
        session.receive(encode(Paired("1", "r", "dns:p", "client", "handoff")))
    return session


def run_session(session: Session, chunks: Sequence[bytes]) -> tuple[list[Message], bool]:
    """Feed a session; returns its messages before the first error, and whether there was one."""
    found: list[Message] = []
    try:
        for chunk in chunks:
            found += session.receive(chunk)
        session.end_of_stream()
    except RemoteProtocolError:
        return found, True
    return found, False


def check_session(make: Callable[[int], Session], steps: int, stream: bytes, *cuttings: Sequence[bytes]) -> None:
    """In every state the verdict is the same, in whatever pieces the bytes come."""
    at_once, bytewise = splits(stream)
    found, raised = run_session(make(steps), at_once)
    for chunks in (bytewise, *cuttings):
        pieces, raised_in_pieces = run_session(make(steps), chunks)
        assert raised_in_pieces == raised
        # A chunk with an error gives no message. So large chunks may give fewer messages, but never other ones.
        assert pieces == found if not raised else pieces[: len(found)] == found


def one_input(data: bytes) -> None:
    """Check one input; raises AssertionError, or the exception that should never be raised."""
    if len(data) < 2:
        return
    which, cut, stream = data[0], data[1], data[2:]
    in_two = [stream[:cut], stream[cut:]]
    check_decoder(stream, in_two)
    check_session(party_session if which & 1 else relay_session, (which >> 1) % 5, stream, in_two)


if __name__ == "__main__":
    run(one_input, instrument=("frelay.protocol", "__main__"))
